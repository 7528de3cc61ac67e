"""Which of the internals that the pack uses are missing in releases of torch, Triton and comfy_kitchen: their wheels are read, not run.

    python tests/internals/releases.py "torch==2.8.*" "comfy-kitchen==0.2.40"

torch's wheels are those for macOS, whose Python sources and stubs are the same as Linux's and which are a tenth of its size.
"""
from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from internals import INTERNALS, Internal
from uses import Release

PLATFORMS = {"torch": ("macosx_11_0_arm64", "macosx_14_0_arm64"), "triton": ("manylinux_2_27_x86_64", "manylinux_2_28_x86_64"),
             "comfy-kitchen": ("manylinux_2_24_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")}
PYTHON = "3.12"
READ = (".py", ".pyi", ".so", ".dylib")
LIMIT = 900  # seconds for a download


def download(requirement: str, folder: Path) -> str:
    """The wheel into folder: -> why not, empty for success."""
    platforms = [part for platform in PLATFORMS[requirement.partition("==")[0]] for part in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--python-version", PYTHON, *platforms, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (errors or ["pip failed"])[0] if done.returncode else ""


def missing(release: Release, package: str) -> list[Internal]:
    mine = [internal for internal in INTERNALS if (internal.file or internal.name).replace("/", ".").partition(".")[0] == package]
    return [internal for internal in mine
            if not (release.mentions(internal.file, internal.name[1:]) if internal.file else release.has(internal.name))]


def main() -> int:
    wrong = 0
    for requirement in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            if reason := download(requirement, Path(folder)):
                print(f"{requirement}: not to be had here ({reason})", flush=True)
                continue
            wheel = next(Path(folder).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder, [name for name in archive.namelist() if name.endswith(READ)])
            absent = missing(Release(Path(folder)), requirement.partition("==")[0].replace("-", "_"))
            print(f"{wheel.name}: " + ("all names are there" if not absent else f"{len(absent)} missing"), flush=True)
            for internal in absent:
                verdict = "MISSING" if internal.needed else "falls back"
                print(f"  {internal.name}, {internal.use}: {verdict}: {internal.without}", flush=True)
            wrong += any(internal.needed for internal in absent)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
