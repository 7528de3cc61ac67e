from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from int8_compile.compile.options import CompileOptions, list_backends, parse_options, require_backend
from int8_compile.compile.third_party_backends import compile_optional


def test_every_backend_torch_lists_is_offered_and_the_optional_ones():
    assert set(torch.compiler.list_backends()) <= set(list_backends())
    assert {"velocator", "xelerate"} <= set(list_backends())
    assert list_backends()[0] == "inductor"


@pytest.mark.parametrize("backend", ["velocator", "xelerate"])
def test_an_absent_optional_backend_says_so_word_for_word(backend):
    with pytest.raises(RuntimeError, match=f"^{backend} is not installed"):
        require_backend(backend)


def test_an_unknown_backend_names_those_that_exist():
    with pytest.raises(ValueError, match=r"^Unknown backend 'inducto'\. Choose one of: inductor"):
        require_backend("inducto")


def test_xelerate_is_used_when_importable(tmp_path, monkeypatch):
    """The package that the velocator distribution installs, reduced to the function that Comfy-WaveSpeed calls."""
    package = tmp_path / "xelerate" / "compilers"
    package.mkdir(parents=True)
    (tmp_path / "xelerate" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "xelerate_compiler.py").write_text(
        "def xelerate_compile(fn, **kwargs):\n    return lambda *args: (fn(*args), kwargs)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for backend in ("velocator", "xelerate"):
        require_backend(backend)
        result, kwargs = compile_optional(abs, backend, "max-autotune", {"a": 1}, fullgraph=True, dynamic=None)(-3)
        assert result == 3
        assert kwargs == {"backend": "xelerate", "mode": "max-autotune", "options": {"a": 1}, "fullgraph": True, "dynamic": None}
    for name in [name for name in sys.modules if name.partition(".")[0] == "xelerate"]:
        del sys.modules[name]


@pytest.mark.parametrize("text, message", [
    ("{", "not JSON"),
    ([1], "not JSON"),
    ({"a": 1}, "not JSON"),
    ("[1]", "a JSON list, not an object"),
    ("3", "a JSON int, not an object"),
    ('{"epilog_fusion": true}', "inductor has no option 'epilog_fusion'. Did you mean epilogue_fusion"),
    ('{"max_autotune": "yes"}', "'max_autotune' takes a bool, not \"yes\""),
])
def test_invalid_options_are_named_before_anything_runs(text, message):
    with pytest.raises(ValueError) as error:
        parse_options(text, "inductor")
    assert str(error.value).startswith("Compilation failed due to invalid options") and message in str(error.value)


def test_options_for_a_backend_that_takes_none_are_refused():
    with pytest.raises(ValueError, match=r"^Compilation failed due to invalid options: backend 'eager' takes no options"):
        parse_options('{"max_autotune": true}', "eager")


def test_empty_options_are_none_and_valid_ones_are_kept():
    assert parse_options("  \n", "inductor") == "{}"
    assert json.loads(parse_options('{"triton.cudagraphs": false, "epilogue-fusion": true}', "inductor")) == \
        {"triton.cudagraphs": False, "epilogue-fusion": True}


def test_mode_and_options_combine_in_a_fresh_dict_each_time():
    options = CompileOptions(mode="max-autotune-no-cudagraphs", options='{"epilogue_fusion": false}')
    first = options.torch_options()
    assert first["max_autotune"] is True and first["epilogue_fusion"] is False
    first.clear()  # torch.compile pops from the dict it is given
    assert options.torch_options()["max_autotune"] is True


def test_importing_the_pack_and_its_options_loads_no_compile_machinery():
    script = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("int8_compile", "__init__.py", submodule_search_locations=["."])
module = sys.modules["int8_compile"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import int8_compile.compile.options, int8_compile.compile.engine, int8_compile.int8.options
print([name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor", "triton"))])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=__file__.rsplit("/tests/", 1)[0])
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
