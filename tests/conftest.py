"""Finds ComfyUI, offers the pack as the package int8_compile, and says at the end what ran against what."""
from __future__ import annotations

import datetime
import gc
import importlib.util
import logging
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels on CPU tensors; must be set before they are imported

# pytest 9.2 listens to loggers that do not propagate: torch then writes out every graph and guard, which takes as long as the tests.
logging.getLogger("torch.__trace").propagate = True

os.environ.setdefault("INT8_COMPILE_CACHE", "0")  # tests of the compile cache turn it on, with folders of their own

import shares  # noqa: E402

from benchmarks.comfy_server import find_comfyui  # noqa: E402

COMFYUI = find_comfyui()
NO_COMFYUI = "ComfyUI was not found: set COMFYUI_PATH to its folder"
_ran: dict[str, int] = {"e2e": 0, "comfy": 0}


def _load_pack() -> None:
    spec = importlib.util.spec_from_file_location("int8_compile", REPO / "__init__.py", submodule_search_locations=[str(REPO)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["int8_compile"] = module
    spec.loader.exec_module(module)


_load_pack()


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="every combination of parameters, and all that rotates")


def pytest_collection_modifyitems(config, items):
    if not (config.option.all or config.option.keyword):
        named = {Path(argument.partition("::")[0]).resolve() for argument in config.args if ".py" in argument}
        run = shares.of_day(items, datetime.date.today()) | {item for item in items if item.path in named}
        config.hook.pytest_deselected(items=[item for item in items if item not in run])
        items[:] = [item for item in items if item in run]
    for item in items:
        for marker in ("comfy", "e2e"):
            if item.get_closest_marker(marker) and COMFYUI is None:
                item.add_marker(pytest.mark.skip(reason=NO_COMFYUI))


def pytest_runtest_logreport(report):
    if report.when == "call" and report.outcome in ("passed", "failed"):
        for marker in _ran:
            _ran[marker] += marker in report.keywords


def pytest_terminal_summary(terminalreporter):
    if COMFYUI is None:
        terminalreporter.write_line(f"end-to-end: NONE ran. {NO_COMFYUI}.", red=True, bold=True)
    else:
        version = comfyui_version(COMFYUI)
        terminalreporter.write_line(f"end-to-end: {_ran['e2e']} tests ran against a ComfyUI {version} server, "
                                    f"{_ran['comfy']} more inside its Python code")


def comfyui_version(comfyui: Path) -> str:
    return runpy.run_path(str(comfyui / "comfyui_version.py"))["__version__"]


@pytest.fixture(scope="module", autouse=True)
def left_objects():
    """Each full collection of later modules, and ComfyUI asks for many, would look through what this one leaves: seconds at the end."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """A ComfyUI base directory with small random checkpoints of ComfyUI's own classes; kept between runs."""
    from benchmarks.tiny_models import cache_dir, make_models

    return make_models(COMFYUI, cache_dir())


@pytest.fixture(scope="session")
def comfy(models_dir):
    """ComfyUI imported into this process, on CPU, with the attention that GPUs use."""
    sys.path.insert(0, str(COMFYUI))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True
    import comfy.sample
    import comfy.sd
    import comfy.utils
    return comfy
