"""Tiny checkpoints with random weights, of sizes that vLLM's CPU kernels take."""

import json
import random
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zoo
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
_GQA: dict[str, Any] = _COMMON | {"num_key_value_heads": 2, "head_dim": 32}


@dataclass(frozen=True)
class Checkpoint:
    """A model of the zoo, what its configuration changes, and what vLLM needs to run it on a CPU.

    saved: on top of the configuration as transformers writes it.
    """

    name: str
    overrides: dict[str, Any]
    saved: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def components(self) -> tuple[str, ...]:
        """Those that the model has, but for opt-in ones."""
        return self._have(zoo.COMPONENTS)

    @property
    def opt_in(self) -> tuple[str, ...]:
        """The opt-in components that the model has."""
        return self._have(zoo.OPT_IN)

    def weights(self, component: str) -> tuple[str, ...]:
        """The names of those of the component, in the checkpoint."""
        return zoo.components(zoo.build(self.name, device="meta", **self.overrides))[component]

    def _have(self, components: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(c for c in components if zoo.ARCHITECTURES[self.name].expected[c])

    def write(self, folder: Path, weights: bool = True) -> str:
        """The checkpoint as transformers saves it, or only its configuration."""
        if weights:
            zoo.build(self.name, **self.overrides).save_pretrained(folder)
        else:
            config = zoo.config(self.name, **self.overrides)
            config.architectures = [zoo.ARCHITECTURES[self.name].model_class.__name__]
            config.save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | self.saved))
        return str(folder)


_MHA: dict[str, Any] = _COMMON | {"num_key_value_heads": 4}
# the first has a dense FFN, and there is a step from experts to experts
_THREE_LAYERS: dict[str, Any] = {"num_hidden_layers": 3}
_MLA: dict[str, Any] = (
    _MHA
    | _THREE_LAYERS
    | {"moe_intermediate_size": 64, "kv_lora_rank": 512, "qk_nope_head_dim": 32}
    | {"qk_rope_head_dim": 64, "v_head_dim": 32, "q_lora_rank": 48}
)
_EXPERTS: dict[str, Any] = {"enable_expert_parallel": True, "enforce_eager": True}
# vLLM's CPU kernel for rotary embeddings is wrong for MLA, whose k is a slice of a wider tensor:
# tokens then depend on the other requests of a batch
# vLLM's kernels for AMX, which it prefers where there is AMX, take no fp32
_LATENT: dict[str, Any] = _EXPERTS | {
    "compilation_config": {"custom_ops": ["none"]},
    "attention_backend": "CPU_MLA",
}

CHECKPOINTS: dict[str, Checkpoint] = {
    "llama": Checkpoint("llama", _GQA),
    "llama_0.1b": Checkpoint(
        "llama",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
        | {"num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 4}
        | {"vocab_size": 32000, "max_position_embeddings": 256},
    ),
    "qwen3": Checkpoint("qwen3", _GQA | {"tie_word_embeddings": True}),
    "qwen2": Checkpoint("qwen2", _COMMON | {"num_key_value_heads": 2}),
    "gemma3": Checkpoint("gemma3", _GQA | {"query_pre_attn_scalar": 32}),
    # its FFN stands in its layer, not in a module of its own
    "opt": Checkpoint("opt", _COMMON | {"word_embed_proj_dim": 128, "ffn_dim": 256}),
    "mixtral": Checkpoint("mixtral", _GQA, options=_EXPERTS),
    "qwen3_moe": Checkpoint(
        "qwen3_moe",
        _GQA | _THREE_LAYERS | {"num_experts": 4, "moe_intermediate_size": 64},
        options=_EXPERTS,
    ),
    "qwen2_moe": Checkpoint(
        "qwen2_moe",
        _MHA | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 128},
        options=_EXPERTS,
    ),
    "deepseek_v3": Checkpoint(
        "deepseek_v3", _MLA, saved={"topk_method": "noaux_tc"}, options=_LATENT
    ),
    # its q has no latent, and reads what the latent of k and v reads
    "deepseek_v2": Checkpoint("deepseek_v2", _MLA | {"q_lora_rank": None}, options=_LATENT),
    "glm4_moe": Checkpoint(
        "glm4_moe", _GQA | _THREE_LAYERS | {"moe_intermediate_size": 64}, options=_EXPERTS
    ),
}


# vLLM's code of these needs data where planning has none.
UNPLANNED: dict[str, Checkpoint] = {
    "bloom": Checkpoint("bloom", {"hidden_size": 128}),
    "nemotron": Checkpoint("nemotron", _GQA),
}

# More, of which only the configuration is used.
PLANNED: dict[str, Checkpoint] = CHECKPOINTS | {
    name: Checkpoint(name, overrides)
    for name, overrides in {
        "mistral": _GQA,
        "gemma2": _GQA | {"query_pre_attn_scalar": 32},
        "gpt2": {"hidden_size": 128},
        "phi": _MHA,
        "phi3": _MHA,
        "falcon": {"hidden_size": 128},
        "gpt_neox": _COMMON,
        "gptj": {"hidden_size": 128},
        "cohere": _MHA,
        "granite": _MHA,
        "olmo2": _MHA,
        "glm4": _GQA,
        "starcoder2": _MHA,
        "stablelm": _MHA,
        "llama4": _GQA,
    }.items()
}


class Checkpoints:
    """Writes each checkpoint once, when it is first asked for."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(self, name: str) -> str:
        folder = self._folder / name
        return str(folder) if folder.exists() else CHECKPOINTS[name].write(folder)


def write_tokenizer(folder: Path) -> None:
    """One token per number from 0 to 511, so that a regular expression can ask for some."""
    words = models.WordLevel({str(i): i for i in range(512)}, unk_token="0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="1").save_pretrained(
        folder
    )


def write_text_tokenizer(folder: Path) -> None:
    """512 tokens, as many as the models have: of ASCII, pairs of letters, and an end. A chat is
    written out line by line.
    """
    characters = ["\n", *map(chr, range(32, 127))]
    letters = string.ascii_lowercase
    pairs = [(a, b) for a in letters for b in letters][: 511 - len(characters)]
    tokens = [*characters, *(a + b for a, b in pairs), "<end>"]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, pairs)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "assistant: "
    )
    fast.save_pretrained(folder)


def prompts(count: int = 7, longest: int = 40) -> dict[int, list[int]]:
    """By number, token ids of different lengths."""
    source = random.Random(0)
    return {
        i: [source.randrange(1, 500) for _ in range(source.randrange(3, longest))]
        for i in range(count)
    }


def parts(count: int, world: int) -> list[list[int]]:
    """Prompts by rank, more for the first than for others, so that others fall idle."""
    owners = [min(i % (world + 1), world) % world for i in range(count)]
    return [[i for i in range(count) if owners[i] == rank] for rank in range(world)]
