"""What a release does to people, tried before it is published: nox -s release. Nothing is uploaded, nothing of this machine is changed.

    python benchmarks/release.py --comfy-cli COMMAND [--comfyui PATH] [--previous COMMIT] [--json FILE] [--keep FOLDER]

1. comfy-cli validates and packs a clean clone of HEAD: what the zip holds, how large it is, whether the CHANGELOG tells of it.
2. comfy-cli installs that zip, as from a registry (one on this machine stands for it), into an empty ComfyUI; a server samples.
3. The version before is installed likewise in another one, and used: its workflows, compiled code, an INT8 file, a bundle. The new one is
   installed over it: the same workflows give the same pictures.
4. The pack's folder is deleted: ComfyUI samples as before, and what is left on disk is what README names.

Prints a line for each check; exits with 1 where one failed.
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import ComfyServer, PromptRejected, find_comfyui, find_python, load_latent, relative_difference  # noqa: E402
from benchmarks.tiny_models import cache_dir, make_models  # noqa: E402
from benchmarks.workflows import flux_prompt, with_small_models  # noqa: E402

# What people have who took the pack by git before it had releases: 0.1.0, at the end of 2026-11-21.
FIRST_VERSION = "c1adef7383427587fd0690ad4b8f389684561069"
NAME = "int8-compile"  # in pyproject.toml, and so the folder
REGISTRY_PORT = 8080  # comfy-cli's, where ENVIRONMENT is dev
MAX_BYTES = 2_000_000
NOT_PACKED = ("tests/", "benchmarks/", ".ci/", ".github/", ".nox/", "noxfile")
# Of a ComfyUI: what is not code.
APART = ".git", ".venv", "venv", "models", "input", "output", "temp", "user", "custom_nodes", "__pycache__"
BUILD_SECONDS = 300
SAME = 0.02  # mean difference of two pictures, of 1: INT8 + compile moves it by less, another model by ten times that
QUANTIZE, COMPILE = ("INT8QuantizeModel", {"method": "convrot"}), ("INT8LazyTorchCompile", {})
FIRST, LAST = "quantize_and_save", "export_compile_cache"  # what one writes others read; a bundle is of what the others had compiled
OF_COMFYUI = ("ComfyUI/output/*", "ComfyUI/temp/*", "ComfyUI/input/*", "ComfyUI/user/*", "ComfyUI/server.log", "ComfyUI/shared_models.yaml",
              "ComfyUI/alembic_db/*", "*__pycache__*", "home/.cache/huggingface/*", "home/.cache/matplotlib/*", "home/.config/matplotlib/*",
              "home/.config/comfy-cli/*", "home/.rustup/*", "home/.cache/pip/*", "home/.triton/*", "ComfyUI/.venv/*", "tmp/torchinductor_*")
OUR_USER_DATA = "ComfyUI/user/__int8_compile"


class Failed(Exception):
    """A check of the release."""


class Release:
    def __init__(self, work: Path, comfyui: Path, comfy_cli: str):
        self.work, self.source, self.comfy_cli = work, comfyui, comfy_cli
        self.models = make_models(comfyui, cache_dir())
        self.checks: list[dict] = []
        self.home = work / "home"
        self.home.mkdir()
        (work / "tmp").mkdir()
        self.environment = {**os.environ, "HOME": str(self.home), "TMPDIR": str(work / "tmp"), "DO_NOT_TRACK": "1", "COLUMNS": "200",
                            "ENVIRONMENT": "dev", "no_proxy": "localhost,127.0.0.1"}
        for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "VIRTUAL_ENV", "CONDA_PREFIX", "INT8_COMPILE_CACHE_DIR", "COMFYUI_PATH"):
            self.environment.pop(name, None)

    def check(self, what: str, holds: bool, figure: object = "") -> None:
        self.checks.append({"check": what, "holds": holds, "figure": figure})
        sys.stdout.write(f"{'ok    ' if holds else 'FAILED'}  {what}{f': {figure}' if figure != '' else ''}\n")
        sys.stdout.flush()

    def comfy(self, *arguments: str, cwd: Path | None = None) -> str:
        """Runs comfy-cli. Raises Failed with its output where it fails."""
        run = subprocess.run([self.comfy_cli, "--skip-prompt", *arguments], cwd=cwd or self.work, env=self.environment, capture_output=True,
                             text=True)
        if run.returncode:
            raise Failed(f"comfy {' '.join(arguments)}: {(run.stdout + run.stderr).strip()[-2000:]}")
        return run.stdout + run.stderr

    def pack(self, commit: str) -> tuple[Path, str, str]:
        """(the zip of a commit, its version, what comfy-cli's validator said)."""
        folder = self.work / f"clone-{commit[:12]}"
        git("clone", "--quiet", "--no-checkout", str(ROOT), str(folder))
        git("-C", str(folder), "checkout", "--quiet", "--detach", commit)
        said = self.comfy("node", "validate", cwd=folder)
        self.comfy("node", "pack", cwd=folder)
        version = of_project(folder, "version")
        return folder / "node.zip", version, said

    def empty_comfyui(self, name: str) -> Path:
        """A copy of ComfyUI's code with nothing else, and an environment of its own that sees what ComfyUI's Python has."""
        folder = self.work / name / "ComfyUI"

        def apart(at: str, names: list[str]) -> set[str]:
            return {name for name in names if name in APART and (at == str(self.source) or name == "__pycache__")}

        shutil.copytree(self.source, folder, ignore=apart)
        python = find_python(self.source)
        subprocess.run([python, "-m", "venv", "--without-pip", str(folder / ".venv")], check=True)
        paths = "import json, sysconfig; print(json.dumps([sysconfig.get_path(name) for name in ('purelib', 'platlib')]))"
        found = json.loads(subprocess.run([python, "-c", paths], capture_output=True, text=True, check=True).stdout)
        inside = json.loads(subprocess.run([str(python_of(folder)), "-c", paths], capture_output=True, text=True, check=True).stdout)
        Path(inside[0], "of_comfyui.pth").write_text("\n".join(dict.fromkeys(found)) + "\n")
        (folder / "custom_nodes").mkdir()
        return folder

    def install(self, comfyui: Path, package: Path, version: str) -> None:
        """By comfy-cli, from a registry that offers that zip."""
        with registry(package, version):
            self.comfy("--workspace", str(comfyui), "node", "registry-install", NAME, "--force-download")
        installed = of_project(comfyui / "custom_nodes" / NAME, "version")
        self.check(f"comfy-cli installs {version}", installed == version)

    def serve(self, comfyui: Path) -> ComfyServer:
        return ComfyServer(comfyui, comfyui, pack=None, pack_folder="none", models=self.models, python=str(python_of(comfyui)),
                           env=self.environment)

    def sample(self, server: ComfyServer, nodes=(), seed: int = 1):
        prompt = flux_prompt(model_nodes=[(name, {**server.defaults(name), **inputs}) for name, inputs in nodes], seed=seed)
        result = server.run(prompt)
        if result.status != "success":
            raise Failed(f"{result.failure}\n{server.log_text()[-2000:]}")
        return load_latent(next(path for path in result.files(server) if path.suffix == ".latent"))

    def workflows(self, server: ComfyServer, folder: Path) -> dict[str, object]:
        """The workflows of a version, run with small models: {name: first picture as floats [H, W, C], None for a workflow that makes
        none, or what went wrong}."""
        pictures: dict[str, object] = {}
        for path in sorted(folder.glob("*.json"), key=lambda path: (path.stem == LAST, path.stem != FIRST, path.stem)):
            if path.stem == LAST:
                with contextlib.suppress(RuntimeError):  # a version may have found that it cannot keep some block
                    server.wait_for_builder(BUILD_SECONDS)
            try:
                result = server.run(with_small_models(json.loads(path.read_text())))
            except PromptRejected as error:
                pictures[path.stem] = f"rejected: {error}"
                continue
            files = [file for file in result.files(server) if file.suffix == ".png"]
            pictures[path.stem] = result.failure if result.status != "success" else picture(files[0]) if files else None
        return pictures

    def clean_log(self, server: ComfyServer, what: str) -> None:
        text = server.log_text()
        bad = [line for line in text.splitlines() if re.search(r"Traceback|compile failed|IMPORT FAILED|ERROR", line)]
        self.check(f"{what}: no error in the log", not bad, bad[0][:160] if bad else "")

    def left(self, comfyui: Path) -> list[str]:
        """Files that are neither ComfyUI's, nor of the clones that were packed, below the working folder."""
        names = []
        for path in self.work.rglob("*"):
            name = str(path.relative_to(self.work)).replace(f"{comfyui.parent.name}/", "", 1)
            if path.is_dir() or name.startswith(("clone-", "fresh/")) or (self.source / name.replace("ComfyUI/", "", 1)).exists():
                continue
            if name.startswith(OUR_USER_DATA) or not any(fnmatch(name, pattern) for pattern in OF_COMFYUI):
                names.append(name)
        return sorted(names)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def of_project(folder: Path, field: str) -> str:
    """name or version in a pyproject.toml (tomllib is not in Python 3.10)."""
    return re.search(rf'^{field} = "(.*)"$', (folder / "pyproject.toml").read_text(), re.MULTILINE).group(1)


def python_of(comfyui: Path) -> Path:
    return comfyui / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def picture(path: Path):
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255


@contextlib.contextmanager
def registry(package: Path, version: str) -> Iterator[None]:
    """The two answers that comfy-cli asks of a registry, given on this machine. Raises Failed where its port is taken."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.endswith(".zip"):
                body = package.read_bytes()
            else:
                url = f"http://localhost:{REGISTRY_PORT}/node.zip"
                body = json.dumps({"id": NAME, "version": version, "downloadUrl": url}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    try:
        server = http.server.ThreadingHTTPServer(("localhost", REGISTRY_PORT), Answers)
    except OSError as error:
        raise Failed(f"port {REGISTRY_PORT}, where comfy-cli looks for a registry of this machine, is taken ({error}): free it") from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def named_in_readme() -> list[str]:
    """What README says that stays on disk: the paths of its section on uninstalling."""
    section = re.search(r"^## Uninstall\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", section.group(1)) if section else []


def is_named(name: str, named: list[str]) -> bool:
    """Whether a file below the working folder lies in one of the named folders. ~ is home, everything else is below ComfyUI."""
    folders = [f"home/{path[2:]}" if path.startswith("~/") else f"ComfyUI/{path}" for path in named]
    return any(name == folder or name.startswith(f"{folder.rstrip('/')}/") for folder in folders)


def run(release: Release, previous: str) -> None:
    head = git("-C", str(ROOT), "rev-parse", "HEAD")
    changed = git("-C", str(ROOT), "status", "--porcelain")
    release.check("everything is committed", not changed, changed.splitlines()[0] if changed else head[:12])
    package, version, said = release.pack(head)
    release.check("comfy node validate", "All validation checks passed" in said and "warning" not in said.lower())
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
    release.check("size of the zip", package.stat().st_size < MAX_BYTES, f"{package.stat().st_size / 1e3:.0f} kB, {len(names)} files")
    tracked = git("-C", str(ROOT), "ls-files").splitlines()
    wanted = {name for name in tracked if not name.startswith(NOT_PACKED) and not name.startswith(".")}
    odd = sorted((wanted - set(names)) | {name for name in names if name not in tracked})
    release.check("the zip holds what runs and nothing else", not odd, ", ".join(odd[:3]))
    first = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1)
    dated = re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", first)
    release.check("CHANGELOG begins with that version and a date", bool(dated), first)

    comfyui = release.empty_comfyui("fresh")
    with release.serve(comfyui) as server:
        eager = release.sample(server)
    release.install(comfyui, package, version)
    with release.serve(comfyui) as server:
        difference = relative_difference(release.sample(server, [QUANTIZE, COMPILE]), eager)
        release.check("an empty ComfyUI samples in INT8, compiled", 1e-6 < difference < 0.05, f"{difference:.1e} from eager")
        release.clean_log(server, "in an empty ComfyUI")

    old_package, old_version, _ = release.pack(previous)
    comfyui = release.empty_comfyui("upgraded")
    workflows = release.work / f"clone-{previous[:12]}" / "example_workflows" / "api"
    release.install(comfyui, old_package, old_version)
    with release.serve(comfyui) as server:
        before = release.workflows(server, workflows)
    release.install(comfyui, package, version)
    with release.serve(comfyui) as server:
        after = release.workflows(server, workflows)
        release.clean_log(server, f"over {old_version}")
        compiled = release.sample(server, [COMPILE])
    for name, old in before.items():
        new = after[name]
        if old is None or isinstance(old, str) or isinstance(new, str):
            release.check(f"{name} of {old_version} runs", not isinstance(new, str), new if isinstance(new, str) else old or "")
        else:
            difference = float(abs(old - new).mean())
            release.check(f"{name} of {old_version}: the picture of before", difference < SAME, f"{difference:.4f}")

    shutil.rmtree(comfyui / "custom_nodes" / NAME)
    with release.serve(comfyui) as server:
        difference = relative_difference(release.sample(server), compiled)
        release.check("uninstalled, the image is eager's", difference < 1e-3, f"{difference:.1e}")
        release.clean_log(server, "uninstalled")
    named = named_in_readme()
    unnamed = [name for name in release.left(comfyui) if not is_named(name, named)]
    figure = f"{len(unnamed)} files, {unnamed[0]}" if unnamed else ""
    release.check("what an uninstall leaves is named in README", bool(named) and not unnamed, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfy-cli", default=os.environ.get("COMFY_CLI") or shutil.which("comfy"), help="its command")
    parser.add_argument("--comfyui", type=Path, default=find_comfyui(), help="whose code the empty ones are copies of")
    parser.add_argument("--previous", help="a commit or tag; otherwise the last tag v*, or 0.1.0")
    parser.add_argument("--json", type=Path, help="where the checks go")
    parser.add_argument("--keep", type=Path, help="a folder to work in, which stays")
    arguments = parser.parse_args()
    if not arguments.comfy_cli or not arguments.comfyui:
        parser.error("needs comfy-cli (nox -s release installs it) and a ComfyUI (COMFYUI_PATH)")
    tags = git("-C", str(ROOT), "tag", "--list", "v*", "--sort=-v:refname").splitlines()
    previous = git("-C", str(ROOT), "rev-parse", arguments.previous or (tags[0] if tags else FIRST_VERSION))
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        release = Release(work.resolve(), arguments.comfyui.resolve(), arguments.comfy_cli)
        try:
            run(release, previous)
        except Failed as error:
            release.check("the rest", False, str(error))
    failed = sum(not check["holds"] for check in release.checks)
    sys.stdout.write(f"{len(release.checks)} checks, {failed} failed\n")
    if arguments.json:
        about = {"date": datetime.date.today().isoformat(), "commit": git("-C", str(ROOT), "rev-parse", "HEAD"), "previous": previous}
        arguments.json.write_text(json.dumps({**about, "checks": release.checks}, indent=1) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
