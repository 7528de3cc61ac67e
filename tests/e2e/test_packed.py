"""What the registry gets: comfy-cli's validator and packer, and a server that has the packed zip and nothing of the repository."""
from __future__ import annotations

import os
import shutil
import subprocess
import urllib.request
import zipfile
from pathlib import Path

import pytest
from toys import difference

from benchmarks.workflows import flux_prompt

from .conftest import latent

REPO = Path(__file__).resolve().parents[2]
FOLDER = "int8-compile"  # as ComfyUI-Manager installs it: the project's name
MAX_BYTES = 2_000_000


def comfy_cli() -> str | None:
    known = REPO / ".nox" / "comfy-cli" / "bin" / "comfy"  # made by `nox -s tests`
    return os.environ.get("COMFY_CLI") or shutil.which("comfy") or (str(known) if known.exists() else None)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The working tree as a git checkout of its own: comfy-cli packs what git tracks, into the folder where it is."""
    folder = tmp_path_factory.mktemp("checkout") / "repository"
    shutil.copytree(REPO, folder, ignore=shutil.ignore_patterns(".git", ".nox", "__pycache__", ".*_cache", "demo_output"))
    if shutil.which("git"):  # without it comfy-cli packs all files
        for command in (["init", "--quiet"], ["add", "--all"]):
            subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def comfy_node(checkout, tmp_path_factory):
    """comfy_node(command) runs `comfy node command` there, with a home of its own: it asks nobody to log in."""
    if comfy_cli() is None:
        pytest.skip("comfy-cli is not installed: `nox -s tests` does it, or set COMFY_CLI to its command")
    environment = {**os.environ, "HOME": str(tmp_path_factory.mktemp("home")), "DO_NOT_TRACK": "1", "COLUMNS": "200"}

    def comfy_node(command: str) -> str:
        run = subprocess.run([comfy_cli(), "--skip-prompt", "node", command], cwd=checkout, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout + run.stderr
    return comfy_node


@pytest.fixture(scope="module")
def packed(comfy_node, checkout) -> Path:
    comfy_node("pack")
    return checkout / "node.zip"


def test_comfy_node_validate_has_no_complaints(comfy_node):
    output = comfy_node("validate")
    assert "All validation checks passed" in output and "warning" not in output.lower()


def test_the_zip_has_what_runs_and_is_small(packed):
    names = set(zipfile.ZipFile(packed).namelist())
    assert packed.stat().st_size < MAX_BYTES
    for folder in ("nodes", "compile", "int8", "web", "example_workflows"):
        tracked = {str(path.relative_to(REPO)) for path in (REPO / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        assert tracked <= names
    assert {"__init__.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", ".ci/", ".nox/", "noxfile"))]


@pytest.mark.e2e
def test_the_unpacked_zip_works_in_an_empty_comfyui(packed, serve):
    server = serve(pack=None, pack_folder="none")
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(server.base_dir / "custom_nodes" / FOLDER)
    with server:
        nodes = server.object_info()
        ours = [node_id for node_id, info in nodes.items() if info["category"] == "INT8 Compile"]
        assert {"CompileModel", "INT8LazyTorchCompile", "INT8QuantizeModel"} <= set(ours)
        assert {nodes[node_id]["python_module"] for node_id in ours} == {f"custom_nodes.{FOLDER}"}
        for node_id in ours:
            with urllib.request.urlopen(f"{server.url}/extensions/{FOLDER}/docs/{node_id}.md") as page:
                assert page.read().decode().startswith("# ")
        with urllib.request.urlopen(f"{server.url}/api/workflow_templates") as templates:
            assert FOLDER in templates.read().decode()
        eager = latent(server, server.run(flux_prompt()))
        quantize = "INT8QuantizeModel", {**server.defaults("INT8QuantizeModel"), "method": "convrot"}
        # Without a code generator, which is not what could be missing from the zip.
        compiled = "CompileModel", {**server.defaults("CompileModel"), "backend": "aot_eager"}
        assert 1e-6 < difference(latent(server, server.run(flux_prompt(model_nodes=[quantize, compiled]))), eager) < 0.05
        log = server.log_text()
        assert "Compile Model: compiled" in log and "compile failed" not in log and "Traceback" not in log
