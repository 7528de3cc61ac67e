"""Packs what a machine without a network lacks: packages for its Python, and ComfyUI without what is not code. One .tar.xz.

    python benchmarks/gpu/pack.py --out FOLDER [--comfyui PATH] [--python 3.12]     here
    python3 -c "import tarfile; tarfile.open('FOLDER/gpu.tar.xz').extractall('/tmp/gpu', filter='data')"     there
    export PYTHONPATH=/tmp/gpu/site COMFYUI_PATH=/tmp/gpu/ComfyUI COMFYUI_PYTHON=$(which python3)
    python benchmarks/gpu/pack.py --out FOLDER --rehearse     here: unpacks it and starts ComfyUI with those packages and IMAGE's alone
"""
from __future__ import annotations

import argparse
import importlib.metadata
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import ComfyServer, find_comfyui, find_python  # noqa: E402

LIMIT = 60 << 20  # bytes of the pack and of the files of this repository together
# Besides torch, which the machine has: what ComfyUI's server needs and images for GPU work usually lack. comfy-kitchen is a contender.
PACKAGES = ("comfy-kitchen", "comfy-aimdo", "torchsde", "trampoline", "av", "sqlalchemy", "alembic", "mako", "pydantic", "pydantic-core",
            "annotated-types", "typing-inspection", "python-dotenv", "pydantic-settings", "simpleeval", "blake3")
# What is counted on there.
IMAGE = ("torch", "torchvision", "torchaudio", "triton", "numpy", "safetensors", "aiohttp", "yarl", "pyyaml", "pillow", "scipy", "tqdm",
         "psutil", "einops", "transformers", "tokenizers", "sentencepiece", "filelock", "requests", "pytest")
NOT_CODE = {".git", ".venv", ".ci", "tests", "tests-unit", "user", "output", "input", "models", "temp", "custom_nodes", "blueprints",
            "__pycache__", "script_examples", ".github"}
UNUSED = {"hip", "av.libs.debug", "__pycache__"}
FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 64 << 20}]
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_34_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64")


def install(python: str, comfyui_python: str, folder: Path) -> None:
    """PACKAGES for that version of Python on Linux, in the versions that run here with ComfyUI, into folder."""
    asked = subprocess.run([comfyui_python, "-c", "import importlib.metadata as m, sys; print(*(n + '==' + m.version(n) for n in "
                            "sys.argv[1:]))", *PACKAGES], capture_output=True, text=True, check=True)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([comfyui_python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps",
                    "--no-compile", "--only-binary=:all:",
                    "--implementation", "cp", "--python-version", python, *platforms, "--target", str(folder), *asked.stdout.split()],
                   check=True)
    if shutil.which("strip"):
        subprocess.run(["strip", "--strip-unneeded", *map(str, folder.rglob("*.so*"))], check=False, stderr=subprocess.DEVNULL)


def pack(comfyui: Path, site: Path, target: Path) -> None:
    def code(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = Path(info.name).parts[1:]
        unwanted = NOT_CODE if info.name.startswith("ComfyUI") else UNUSED
        # A folder of models is code inside comfy, data at the top.
        return None if "__pycache__" in parts or (parts and parts[0] in unwanted) or (unwanted is UNUSED and UNUSED & set(parts)) else info
    with lzma.open(target, "wb", filters=FILTERS) as file, tarfile.open(fileobj=file, mode="w") as archive:
        archive.add(comfyui, "ComfyUI", filter=code)
        archive.add(site, "site", filter=code)


def tracked_bytes() -> int:
    """Of the files of this repository, which travel too."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    return sum((ROOT / name).stat().st_size for name in filter(None, listed.split("\0")) if (ROOT / name).exists())


def rehearse(archive: Path, python: str) -> None:
    """Starts the packed ComfyUI with the pack in it, in an empty folder, with nothing installed but site and IMAGE with what those need."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with tarfile.open(archive) as opened:
            opened.extractall(base, filter="data")
        image = base / "image"
        image.mkdir()
        listed = subprocess.run([python, __file__, "--list-image"], capture_output=True, text=True, check=True).stdout.splitlines()
        for path in map(Path, listed):
            (image / path.name).symlink_to(path)
        alone = base / "python"  # without the site-packages of its own
        alone.write_text(f'#!/bin/sh\nexec "{python}" -S "$@"\n')
        alone.chmod(0o755)
        page = base / "page"
        page.mkdir()
        (page / "index.html").write_text("<html></html>")
        os.environ["COMFYUI_PYTHON"] = str(alone)
        env = {"PYTHONPATH": os.pathsep.join((str(base / "site"), str(image)))}
        with ComfyServer(base / "ComfyUI", base / "run", env=env, extra_args=["--front-end-root", str(page)]) as server:
            nodes = server.get("/object_info")
            print(f"The server started: {len(nodes)} nodes, INT8LazyTorchCompile {'INT8LazyTorchCompile' in nodes}.")


def image_paths() -> Iterator[Path]:
    """What the distributions of IMAGE, and those that they need, have at the top of site-packages."""
    seen, waiting = set(), list(IMAGE)
    while waiting:
        name = waiting.pop()
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.name in seen:
            continue
        seen.add(found.name)
        for requirement in found.requires or ():
            if "extra ==" not in requirement:
                waiting.append(requirement.split(";")[0].split("[")[0].strip(" ()").split("=")[0].split(">")[0].split("<")[0].split("!")[0]
                               .split("~")[0].strip())
        top = Path(found.locate_file(""))
        yield from {top / Path(str(file)).parts[0] for file in found.files or () if Path(str(file)).parts[0] != ".."}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--list-image", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list_image:
        print(*sorted(set(image_paths())), sep="\n")
        return 0
    comfyui = options.comfyui or find_comfyui()
    python = find_python(comfyui)
    version = f"{sys.version_info.major}.{sys.version_info.minor}" if options.rehearse else options.python
    if options.out is None:
        parser.error("--out FOLDER says where the pack goes")
    options.out.mkdir(parents=True, exist_ok=True)
    archive = options.out / ("rehearsal.tar.xz" if options.rehearse else "gpu.tar.xz")
    with tempfile.TemporaryDirectory() as folder:
        install(version, python, Path(folder))
        pack(comfyui, Path(folder), archive)
    size, tree = archive.stat().st_size, tracked_bytes()
    print(f"{archive}: {size / 2**20:.1f} MiB, with the repository {(size + tree) / 2**20:.1f} MiB of {LIMIT >> 20}")
    if options.rehearse:
        rehearse(archive, python)
    return 0 if size + tree <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
