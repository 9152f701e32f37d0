"""Requests that need what a sharded lm_head cannot give: refused one by one, before they run."""

from typing import Any

from vllm.exceptions import VLLMValidationError

from fgtp_pass.vllm.settings import read_settings


def process_inputs(
    stock: Any, self: Any, request_id: str, prompt: Any, params: Any, *rest: Any, **kwargs: Any
) -> Any:
    """What `InputProcessor.process_inputs` does, for requests that every rank can go along with.

    Raises vLLM's error for invalid requests (HTTP 400) where logits of the prompt are asked for:
    only the rank of the request would compute these, and the others hold parts of the lm_head.
    """
    config = self.vllm_config
    settings = read_settings(config.compilation_config, config.additional_config)
    if settings is not None and settings.sizes.by_component["lmhead"] != 1:
        for name in ("prompt_logprobs", "prompt_logprob_token_ids"):
            if getattr(params, name, None) is not None:
                raise VLLMValidationError(
                    f"{name} is not supported where lm_head is sharded over data-parallel ranks "
                    "(lmhead_tensor_parallel_size). logprobs of generated tokens are.",
                    parameter=name,
                )
    return stock(self, request_id, prompt, params, *rest, **kwargs)
