"""Tiny multimodal checkpoints with random weights and processors, and prompts with images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import Answer, Job, answer_of, probe, sampling
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

_WORDS, _HIDDEN, _IMAGE = 512, 128, 512  # _IMAGE: the token that stands for an image
_PATCH = 14
_TEXT: dict[str, Any] = {
    "hidden_size": _HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}


def write_llava(folder: Path, weights: bool = True) -> str:
    """Llama behind CLIP; the token of images is none of its vocabulary."""
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2, "image_size": 2 * _PATCH, "patch_size": _PATCH}
    config = LlavaConfig(
        text_config=_TEXT
        | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        | {"vocab_size": _WORDS, "head_dim": 32},
        vision_config=vision | {"model_type": "clip_vision_model", "projection_dim": 64},
        image_token_index=_IMAGE,
        image_seq_length=4,
    )
    _write(LlavaForConditionalGeneration, config, folder, weights)
    size = {"height": 2 * _PATCH, "width": 2 * _PATCH}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    _processor(folder, images, "<image>", "LlavaProcessor", patch_size=_PATCH)
    return str(folder)


def write_qwen2_5_vl(folder: Path, weights: bool = True) -> str:
    """Its positions are of three dimensions, and the token of images is of its vocabulary."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2}
    vision |= {"out_hidden_size": _HIDDEN, "fullatt_block_indexes": [1], "window_size": 56}
    config = Qwen2_5_VLConfig(
        text_config=_TEXT | {"vocab_size": _WORDS + 8, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=_IMAGE,
        video_token_id=_IMAGE + 1,
        vision_start_token_id=_IMAGE + 2,
        vision_end_token_id=_IMAGE + 3,
    )
    _write(Qwen2_5_VLForConditionalGeneration, config, folder, weights)
    unit = (2 * _PATCH) ** 2
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": unit, "longest_edge": 6 * unit})
    _processor(folder, images, "<|image_pad|>", "Qwen2_5_VLProcessor")
    return str(folder)


WRITERS = {"llava": write_llava, "qwen2_5_vl": write_qwen2_5_vl}
# on top of those of a small engine; the processor asks for a tokenizer
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": False,
    "limit_mm_per_prompt": {"image": 2, "video": 0},
}
ENVIRONMENT = {"FGTP_TEST_IMAGES": "1"}


def _write(model_class: Any, config: Any, folder: Path, weights: bool) -> None:
    if not weights:
        config.architectures = [model_class.__name__]
        config.save_pretrained(folder)
        return
    with torch.random.fork_rng(devices=[]):
        model = model_class(config)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=source)
            if parameter.dim() > 1:
                parameter.copy_(1.6 / _HIDDEN**0.5 * noise)
            else:
                middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(middle + 0.15 * noise)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    older = {k.replace("tower.", "tower.vision_model."): v for k, v in tensors.items()}  # for vLLM
    save_file(older, path, metadata={"format": "pt"})


def _processor(folder: Path, images: Any, image: str, kind: str, **more: Any) -> None:
    """What is saved of a processor; its part for videos, which needs torchvision, is not."""
    names = [*map(str, range(_WORDS)), image, "<|video_pad|>"]
    words = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words),
        eos_token="1",
        extra_special_tokens={"image_token": image, "video_token": "<|video_pad|>"},
    )
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    if more:
        more |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        more |= {"processor_class": kind, "image_token": image}
        (folder / "processor_config.json").write_text(json.dumps(more))


def images_of(number: int) -> int:
    """How many images prompt `number` has."""
    return number % 3


def with_images(prompts: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """The prompts, with the token of images in some: one after another, and among the text."""
    found = {}
    for i, ids in prompts.items():
        count = images_of(i)
        found[i] = [*ids[:2], *[_IMAGE] * (count > 0), *ids[2:], *[_IMAGE] * (count > 1)]
    return found


def _image(seed: int) -> Image.Image:
    source = np.random.default_rng(seed)
    pixels = source.integers(0, 256, (28 + 28 * (seed % 2), 28, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _embeddings(seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(4, _HIDDEN, generator=source)


def generate_from_images(llm: Any, job: Job) -> Answer:
    """Like `generate`; prompt i has `images_of(i)` images of its own, for its tokens of images."""
    return _generate(llm, job, lambda seeds: [_image(seed) for seed in seeds])


def _generate(llm: Any, job: Job, images: Callable[[list[int]], Any]) -> Answer:
    numbers = sorted(job.prompts)
    given = []
    for i in numbers:
        one: dict[str, Any] = {"prompt_token_ids": list(job.prompts[i])}
        if images_of(i):
            seeds = [10 * i + j for j in range(images_of(i))]
            one["multi_modal_data"] = {"image": images(seeds)}
        given.append(one)
    outputs = llm.generate(given, [sampling(i) for i in numbers], use_tqdm=False)
    return answer_of(dict(zip(numbers, outputs, strict=True)), llm.apply_model(probe))


def embeddings_as_images(llm: Any, job: Job) -> Answer:
    """The same with random embeddings in the place of each image's."""
    return _generate(llm, job, lambda seeds: torch.stack([_embeddings(seed) for seed in seeds]))
