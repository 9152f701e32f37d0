"""`python -m fgtp_pass.vllm.check`: whether the pass works in the vLLM that is installed.

Checks every private name that is used, then serves a tiny random Llama on one rank without the pass
and on two with it, and compares the tokens. For a vLLM that fgtp_pass does not know by its number.
"""

import importlib
import os
import sys
import tempfile
from typing import Any

from fgtp_pass.errors import FgtpError
from fgtp_pass.vllm import PASS, host

_COMPONENTS = ("embedding", "lmhead", "oproj", "mlp")
_SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
}
_PROMPTS = ([5, 9, 301, 44], [7, 8, 450, 2, 13, 77, 21])
_NEW_TOKENS = 8


def main() -> int:
    """Print what was found; 0 if tokens are those of the engine without the pass."""
    try:
        version = host.vllm_version()
        different = host.differences()
    except FgtpError as error:
        print(error)
        return 1
    for one in different:
        print(f"differs: {one}")
    if different:
        return 1
    known = "known" if host.is_known(version) else "not known by its number"
    print(f"ok: vLLM {version} ({known}) has every private name that is used")
    devices = _devices()
    if devices == 1:
        print("not tried: tokens, for which two devices are needed; there is one")
        return 0
    # the engines are processes of their own, which inherit this
    os.environ[host.ALLOW_UNKNOWN] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with tempfile.TemporaryDirectory() as folder:
        _write_model(folder)
        plain = _tokens(folder)
        sharded = _tokens(
            folder,
            data_parallel_size=2,
            compilation_config={"passes": [PASS]},
            additional_config={
                "finegrained_tp_config": {f"{c}_tensor_parallel_size": 2 for c in _COMPONENTS}
            },
        )
    if sharded != plain:
        print(f"wrong: two ranks with the pass gave {sharded}, one without gave {plain}")
        return 1
    print(f"ok: two ranks planned, sharded and served {_NEW_TOKENS} tokens for each of two prompts")
    return 0


def _devices() -> int:
    """How many accelerators there are; 0 where vLLM runs on CPUs."""
    accelerator = importlib.import_module("torch").accelerator
    return int(accelerator.device_count()) if accelerator.is_available() else 0


def _write_model(folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM.from_config
    model = make(LlamaConfig(**_SHAPE))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.08)  # far apart logits: rounding must not choose a token
    model.save_pretrained(folder)


def _tokens(folder: str, **options: Any) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.3,
        **options,
    )
    sampling = SamplingParams(temperature=0, max_tokens=_NEW_TOKENS, detokenize=False)
    prompts: Any = [{"prompt_token_ids": list(ids)} for ids in _PROMPTS]
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, sampling, use_tqdm=False)]


if __name__ == "__main__":
    sys.exit(main())
