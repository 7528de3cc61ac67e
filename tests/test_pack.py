"""The pack as ComfyUI and its registry see it."""
from __future__ import annotations

import ast
import asyncio
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

REPO = Path(__file__).resolve().parent.parent


def test_the_root_has_the_v3_entry_point_only():
    pack = sys.modules["int8_compile"]
    assert asyncio.iscoroutinefunction(pack.comfy_entrypoint)
    assert (REPO / pack.WEB_DIRECTORY).is_dir()
    # ComfyUI ignores the entry point of a pack that also has these.
    assert not hasattr(pack, "NODE_CLASS_MAPPINGS")


def test_node_ids_are_literals_that_comfyui_managers_scanner_reads():
    found = set()
    for path in (REPO / "nodes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "Schema":
                found |= {k.value.value for k in node.keywords if k.arg == "node_id" and isinstance(k.value, ast.Constant)}
    assert found == {"CompileModel", "INT8LazyTorchCompile", "INT8QuantizeModel", "LoadINT8Model", "SaveINT8Model", "ApplyModes",
                     "ShowModes", "SaveCompileCache", "LoadCompileCache", "ClearCompileCache", "INT8CompileCheck",
                     "OptimizeModel"}


@pytest.mark.comfy
def test_comfyuis_own_parser_accepts_the_project_file(comfy):
    from comfy_config import config_parser

    config = config_parser.extract_node_configuration(str(REPO))
    assert config.project.name == "int8-compile" and config.tool_comfy.display_name == "INT8 Compile"
    assert config.tool_comfy.publisher_id and not config.tool_comfy.web
    assert config.project.supported_os == ["OS Independent"]
    assert not any("torch" in dependency for dependency in config.project.dependencies)
    # The Manager reads this file, the registry the other.
    assert (REPO / "requirements.txt").read_text().split() == config.project.dependencies


def test_icon_and_banner_are_in_the_repository_in_the_registrys_sizes():
    text = (REPO / "pyproject.toml").read_text()
    main = re.escape("https://raw.githubusercontent.com/int8-compile/int8-compile/main/")
    addresses = dict(re.findall(f'^(Icon|Banner) = "{main}(.+)"$', text, re.MULTILINE))
    icon, banner = (Image.open(REPO / addresses[name]).size for name in ("Icon", "Banner"))
    assert icon[0] == icon[1] <= 400  # docs.comfy.org/registry/specifications
    assert banner[0] / banner[1] == 21 / 9


def test_an_edit_in_any_package_makes_other_cache_keys(tmp_path):
    (tmp_path / "pack.py").write_text((REPO / "pack.py").read_text())
    for package in ("compile", "new"):
        (tmp_path / package / "deeper").mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "deeper" / "code.py").write_text("x = 1")

    def digest():
        return runpy.run_path(str(tmp_path / "pack.py"))["sources_digest"]()
    before = digest()
    assert digest() == before
    seen = {before}
    for change in (lambda: (tmp_path / "new" / "deeper" / "code.py").write_text("x = 2"),
                   lambda: (tmp_path / "new" / "deeper" / "code.py").rename(tmp_path / "new" / "code.py"),
                   lambda: (tmp_path / "compile" / "native.cpp").write_text("int x;")):
        change()
        seen.add(digest())
    assert len(seen) == 4


# The lowest first. A module imports from its own layer and those below; check and modes know nothing of each other.
LAYERS = ("int8", "compile/torch_internals", "compile/artifacts", "compile", "compile/check", "compile/modes",
          "compile/comfyui", "nodes")
COMFYUIS_OWN = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server", "node_helpers", "latent_preview", "execution"}


def layer(path: str) -> int:
    """Of a file or folder of this repository; -1 for pack.py and what is not in a package."""
    found = [index for index, folder in enumerate(LAYERS) if f"{path}/".startswith(f"{folder}/")]
    return max(found, key=lambda index: len(LAYERS[index]), default=-1)


def test_only_nodes_and_compile_comfyui_import_comfyui_and_nothing_imports_what_is_above_it():
    for path in sorted(path for folder in ("int8", "compile", "nodes") for path in (REPO / folder).rglob("*.py")):
        relative = path.relative_to(REPO)
        own = layer(relative.parent.as_posix())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*relative.parent.parts[:len(relative.parent.parts) - node.level + 1], *(node.module or "").split(".")]
                for alias in node.names:
                    target = "/".join([part for part in base if part] + [alias.name])
                    assert layer(target) <= own, f"{relative} imports {target}"
                    assert {LAYERS[own], LAYERS[layer(target)]} != {"compile/check", "compile/modes"}, f"{relative} imports {target}"
            elif LAYERS[own] not in ("nodes", "compile/comfyui"):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                    [node.module] if isinstance(node, ast.ImportFrom) else [])
                assert not COMFYUIS_OWN.intersection(name.partition(".")[0] for name in names), f"{relative} imports {names}"


def test_a_file_of_the_product_has_at_most_320_lines():
    lengths = {path.relative_to(REPO).as_posix(): len(path.read_text().splitlines()) for folder in ("compile", "int8")
               for path in (REPO / folder).rglob("*.py")}
    assert lengths and {path: length for path, length in lengths.items() if length > 320} == {}


@pytest.mark.parametrize("path", sorted((REPO / "example_workflows").glob("*.json")), ids=lambda p: p.stem)
def test_every_example_workflow_has_a_picture_and_is_for_the_template_browser(path):
    workflow = json.loads(path.read_text())
    assert {"nodes", "links", "version"} <= set(workflow)
    assert path.with_suffix(".jpg").stat().st_size < 100_000
    assert (path.parent / "api" / f"{path.stem.lower().replace(' ', '_')}.json").exists(), "see tests/web/test_examples.py"


PAGES = ["README.md", "SECURITY.md", "benchmarks/README.md",
         *sorted(f"{folder}/{path.name}" for folder in ("docs", "web/docs") for path in (REPO / folder).glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """ComfyUI's help panel finds pictures beside a page, and takes any other relative link for one of its own pages."""
    text = (REPO / page).read_text()
    main = "https://github.com/int8-compile/int8-compile/blob/main/"
    for picture, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text):
        if target.startswith(main):
            path = REPO / target.removeprefix(main).partition("#")[0]
        elif "://" in target or target.startswith("#"):
            continue
        else:
            assert picture or not page.startswith("web/docs"), f"{page}: {target} must be an address"
            path = (REPO / page).parent / target.partition("#")[0]
        assert path.exists(), f"{page}: there is no {target}"
        if "#" in target:
            headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in path.read_text().splitlines()
                        if line.startswith("#")}
            assert target.partition("#")[2] in headings, f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_name_files_that_there_are(page):
    for path in re.findall(r"custom_nodes[/\\]int8-compile[/\\]([\w./\\]*\.\w+)", (REPO / page).read_text()):
        assert (REPO / path.replace("\\", "/")).exists(), f"{page}: there is no {path}"


def test_the_readme_is_read_in_one_sitting():
    assert len((REPO / "README.md").read_text().splitlines()) <= 200
