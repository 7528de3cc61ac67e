"""Nothing private of another package is used that the list does not explain, and all of the list is there in what is installed."""
from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest

from benchmarks.comfy_server import find_comfyui

from .internals import INTERNALS, OWN
from .uses import Release, uses

LISTED = {internal.name: internal for internal in INTERNALS}


def test_every_private_name_that_the_pack_uses_is_listed():
    used = uses()
    missing = [f"{name} ({', '.join(places)})" for name, places in used.items() if name not in LISTED and name not in OWN]
    assert not missing, "add these to tests/internals/internals.py, with what each is for:\n" + "\n".join(missing)
    assert not [name for name in (*LISTED, *OWN) if name not in used], "the pack no longer uses these: take them out of the list"
    assert all(internal.use and internal.without for internal in INTERNALS) and len(LISTED) == len(INTERNALS)


def folder_of(internal) -> Path | None:
    """What holds the package of an internal, None where it is not installed."""
    package = (internal.file or internal.name).replace("/", ".").partition(".")[0]
    if package == "comfy":
        return find_comfyui()
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent.parent if spec else None


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda internal: internal.name)
def test_what_is_installed_has(internal):
    folder = folder_of(internal)
    if folder is None:
        pytest.skip("ComfyUI was not found" if internal.file.startswith("comfy/") else "comfy_kitchen is not installed")
    release = Release(folder)
    assert release.mentions(internal.file, internal.name[1:]) if internal.file else release.has(internal.name), internal.without
    if internal.name.startswith("torch."):
        found, rest = importlib.import_module("torch"), internal.name.split(".")[1:]
        for index, part in enumerate(rest):
            if not hasattr(found, part):
                importlib.import_module(".".join(["torch", *rest[:index + 1]]))
            found = getattr(found, part)


@pytest.mark.parametrize("name", ["torch._C._cuda_getDriverVersion", "torch._C._aoti.NoSuchLoader", "torch._inductor.config.no_such",
                                  "torch.cuda._no_such", "torch._no_such_module.name", "torch._no_such_function"])
def test_what_no_release_has_is_not_found(name):
    """The first is the one that stopped every INT8 layer on CUDA."""
    spec = importlib.util.find_spec("torch")
    assert not Release(Path(spec.origin).parent.parent).has(name)


def test_a_private_name_is_found_however_it_is_spelled(tmp_path):
    for part in ("compile", "int8", "nodes"):
        (tmp_path / part).mkdir()
    (tmp_path / "compile" / "x.py").write_text(
        "import os, torch\nfrom torch._inductor import config as c\nimport torch._dynamo\n"
        "class A:\n    def __init__(self):\n        self._mine = 1\n"
        "def f(x, name='y'):\n    torch._dynamo.reset()\n    c.patch(a=1)\n    os._exit(x._mine)\n"
        "    return x._shape, getattr(x, '_odd'), x.a._replace()\n")
    assert uses(tmp_path) == {"torch._inductor.config.patch": ["compile/x.py:9"], "torch._dynamo.reset": ["compile/x.py:8"],
                              "._shape": ["compile/x.py:11"], "._odd": ["compile/x.py:11"]}
