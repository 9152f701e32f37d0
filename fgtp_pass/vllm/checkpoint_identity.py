"""What tells one checkpoint from another: ranks that load different ones would mix their shards."""

import hashlib
from pathlib import Path
from typing import Any

from fgtp_pass.plan.plan import format_bytes

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SAMPLES, _SAMPLE = 16, 4096  # of each file, evenly spread; bytes of each


def checkpoint_identity(model_config: Any, load_config: Any) -> str:
    """Of a folder, the sizes of its files of weights and samples of what is in them; of a model of
    the hub, its commit; "" where vLLM loads from elsewhere, or no weights at all.

    A file that is not larger than its samples is read whole. In a larger one a change of a few
    weights may go unseen; a checkpoint that was trained on does not.
    """
    if load_config.load_format == "dummy":
        return ""
    folder = Path(model_config.model)
    if not folder.is_dir():
        return str(getattr(model_config.hf_config, "_commit_hash", None) or "")
    digest, total = hashlib.blake2b(digest_size=8), 0
    files = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS)
    for file in files:
        size = file.stat().st_size
        total += size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as data:
            for i in range(_SAMPLES):
                data.seek(max(size - _SAMPLE, 0) * i // (_SAMPLES - 1))
                digest.update(data.read(_SAMPLE))
    return f"{len(files)} files, {format_bytes(total)}, samples {digest.hexdigest()}"
