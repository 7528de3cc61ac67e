"""What a workflow may set of the compiler: a list, held against the sources of the torch that is installed."""
from __future__ import annotations

import ast
import json
import time
from pathlib import Path

import pytest
import torch
from int8_compile.compile.allowed_options import ALLOWED, VARIABLE
from int8_compile.compile.modes import MODES as MODE_REGISTRY
from int8_compile.compile.modes import ModeConfigError, apply_modes
from int8_compile.compile.modes.apply import parse_modes
from int8_compile.compile.modes.record import parse_state
from int8_compile.compile.options import TORCH_COMPILE_MODES, CompileOptions, check_path, parse_options
from int8_compile.int8.options import Int8Options

SOURCES = Path(torch.__file__).parent / "_inductor"
# Make command lines, run compilers and other programs, import modules by name, open logs and caches.
DANGEROUS = ["cpp_builder.py", "codegen/cutlass", "codegen/cuda", "codegen/rocm", "codegen/xpu", "debug.py", "autoheuristic",
             "remote_cache.py", "runtime/cache_dir_utils.py", "compile_worker", "metrics.py", "fx_passes/numeric_utils.py",
             "rocm_multiarch_utils.py", "compile_fx_ext.py",
             "compile_fx_subproc.py", "autotune_process.py", "async_compile.py", "wrapper_benchmark.py",
             "codecache.py", "cpu_vec_isa.py", "runtime/compile_tasks.py", "pattern_matcher.py"]
REFUSED = "^Compilation failed due to invalid options: "


def known() -> dict:
    from torch._inductor import config
    return config.get_config_copy()


def accepted(options: dict) -> bool:
    try:
        parse_options(json.dumps(options), "inductor")
    except ValueError as error:
        assert str(error).startswith("Compilation failed due to invalid options: ")
        return False
    return True


def read_names(path: Path) -> set[str]:
    """The options of inductor that a source file reads: config.x, config.cpp.x, inductor_config.triton.x."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            parts = []
            while isinstance(node, ast.Attribute):
                parts.append(node.attr)
                node = node.value
            if isinstance(node, ast.Name):
                parts.append(node.id)
            parts.reverse()
            if any(part.endswith("config") for part in parts):
                at = next(i for i, part in enumerate(parts) if part.endswith("config"))
                names |= {".".join(parts[at + 1:at + 2]), ".".join(parts[at + 1:at + 3])}
    return names


def test_no_option_on_the_list_reaches_a_command_line_a_path_a_module_or_a_log():
    files = [file for name in DANGEROUS for file in (sorted((SOURCES / name).rglob("*.py")) or [SOURCES / name])]
    read = {}
    for file in filter(Path.exists, files):
        for name in read_names(file):
            read.setdefault(name, set()).add(file.name)
    assert "cpp.enable_floating_point_contract_flag" in read and "cutlass.cutlass_dir" in read
    # Each looked at: a condition, never a part of a text.
    conditions = {"epilogue_fusion", "cpp.simdlen"}
    if torch.__version__ >= "2.14":  # which cache a graph's is, and whether Triton's libdevice is CUDA's own
        conditions |= {"cpp.threads", "cpp.dynamic_threads", "triton.cudagraphs", "emulate_precision_casts"}
    assert {name: read[name] for name in ALLOWED if name in read and name not in conditions} == {}


def test_the_list_is_of_flags_bounded_numbers_and_words():
    for name, allowed in ALLOWED.items():
        if isinstance(allowed, range):
            assert allowed[0] >= -1 and allowed[-1] <= 1 << 20
        elif isinstance(allowed, (tuple, frozenset)):
            assert all(one is None or type(one) is int or (one.isalpha() and one.isascii()) for one in allowed), name
        else:
            assert allowed is bool, name


def test_what_this_torch_has_by_default_may_be_written_down_and_the_list_is_of_it():
    defaults = {name: value for name, value in known().items() if name in ALLOWED}
    assert len(defaults) > 90
    assert all(accepted({name: value}) for name, value in defaults.items())
    if torch.__version__.startswith("2.11."):
        assert set(ALLOWED) == set(defaults)


def test_what_users_of_compile_set_is_on_the_list():
    for mode in TORCH_COMPILE_MODES:
        CompileOptions(mode=mode, options=json.dumps(CompileOptions(mode=mode).torch_options()))
    assert accepted({"epilogue_fusion": True, "max_autotune": True, "coordinate_descent_tuning": True, "shape_padding": True,
                     "triton.cudagraphs": False, "triton.cudagraph_trees": True, "force_fuse_int_mm_with_mul": True, "cpp.simdlen": 256,
                     "max_autotune_gemm_backends": "ATEN, triton", "conv_1x1_as_mm": True, "emulate_precision_casts": True})


def test_no_option_that_holds_text_a_list_a_path_or_nothing_takes_any():
    """Whatever it is called in the torch at hand."""
    hostile = ("off -wrapper /bin/sh,-c,'touch ran'", "/tmp/x", "os.system", ["x"], {"x": 1}, "$(touch ran)", "-O3")
    for name, default in known().items():
        if isinstance(default, (bool, int, float)) and name in ALLOWED:
            continue
        assert not any(accepted({name: value}) for value in hostile), name
    for name in ALLOWED:
        more = (1.5, 1 << 40, -2, "", [], "CUTLASS", "ATEN,CUTLASS", "ATEN;id")
        assert not any(accepted({name: value}) for value in (*hostile, *more)), name


@pytest.mark.parametrize("name", ["cpp.enable_floating_point_contract_flag", "aot_inductor.compile_wrapper_opt_level", "cpp.cxx",
                                  "cuda.cuda_cxx", "cuda.cutlass_dir", "trace.debug_dir", "autoheuristic_log_path",
                                  "external_matmul", "compile_threads",
                                  "post_grad_custom_pre_pass", "worker_start_method", "fx_graph_remote_cache", "freezing", "max_autotuned"])
def test_what_is_refused_is_named_with_the_list_and_what_is_near(name):
    default = known().get(name)
    with pytest.raises(ValueError, match=REFUSED) as raised:
        parse_options(json.dumps({name: default}), "inductor")
    assert f"'{name}'" in str(raised.value) and "epilogue_fusion" in str(raised.value)
    if name == "max_autotuned":
        assert "inductor has no option 'max_autotuned'. Did you mean max_autotune" in str(raised.value)


def test_the_same_holds_for_the_optional_backends_and_others_take_none():
    for backend in ("velocator", "xelerate", "eager", "cudagraphs", "aot_eager"):
        with pytest.raises(ValueError, match=REFUSED):
            parse_options('{"cpp.cxx": "sh"}', backend)
    assert parse_options('{"epilogue_fusion": true}', "velocator") == '{"epilogue_fusion": true}'


def test_whoever_administers_the_server_may_allow_more_and_a_type_is_still_a_type(monkeypatch):
    monkeypatch.setenv(VARIABLE, "compile_threads, trace.debug_dir,no_such_option")
    assert accepted({"max_autotune_gemm_backends": "ATEN"}) and not accepted({"max_autotune_gemm_backends": "CUTLASS"})
    assert accepted({"compile_threads": 4}) and accepted({"trace.debug_dir": "x"})
    assert not accepted({"compile_threads": "4"}) and not accepted({"no_such_option": 1}) and not accepted({"cpp.cxx": ["g++"]})
    monkeypatch.setenv(VARIABLE, "max_autotune_gemm_backends")
    assert accepted({"max_autotune_gemm_backends": "CUTLASS"}) and not accepted({"compile_threads": 4})


@pytest.mark.parametrize("change", [
    {"options": '{"cpp.cxx": "sh"}'}, {"options": '{"compile_threads": 2}'}, {"backend": "os.system"}, {"backend": "nonsense"},
    {"mode": "lite"}, {"mode": ["default"]}, {"dynamic": "yes"}, {"dynamic": 1}, {"fullgraph": "x"}, {"background": 1},
    {"cache_size_limit": 10**9}, {"cache_size_limit": True}])
def test_options_that_were_not_checked_do_not_exist(change):
    """Wherever they come from: the dataclass checks itself."""
    with pytest.raises(ValueError):
        CompileOptions(**change)


def test_the_mode_compile_takes_no_other_options_than_the_node():
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(2)])
    for config in ({"options": '{"cpp.cxx": "sh"}'}, {"backend": "nonsense"}, {"options": "[]"}, {"mode": "lite"}):
        with pytest.raises(ModeConfigError):
            apply_modes(model, [("compile", config)])


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000, '{"a": ' * 2000, "{" * 10_001, '{"cpp.simdlen": 1e400}',
                                  '{"cpp.simdlen": NaN}'], ids=lambda text: text[:30])
def test_text_that_is_no_options_is_refused_at_once(text):
    started = time.thread_time()
    with pytest.raises(ValueError, match=REFUSED):
        parse_options(text, "inductor")
    assert time.thread_time() - started < 0.5


def _apply_modes(text):
    from int8_compile.nodes.modes import _parse
    return _parse(text)


@pytest.mark.comfy
@pytest.mark.parametrize("parse, value", [
    (_apply_modes, '["int8"' + ', "int8"' * 1_000_000 + "]"), (lambda modes: parse_modes(modes, MODE_REGISTRY), ["int8"] * 1_000_000),
    (lambda modes: parse_modes(modes, MODE_REGISTRY), ["a" * 1_000_000]), (lambda text: parse_state(text, MODE_REGISTRY), "[" * 5_000_000),
    (lambda text: parse_state(text, MODE_REGISTRY), '{"version": 1, "modes": [' + ",".join(["{}"] * 1000) + "]}"),
    (Int8Options.parse_keep_layers, "a*\n" * 1_000_000), (Int8Options.parse_keep_layers, "*a" * 500_000), (check_path, "a." * 500_000),
    (lambda text: parse_options(text, "inductor"), json.dumps({"a" * 1_000_000: 1})),
    (lambda text: CompileOptions(backend=text), "a" * 1_000_000)],
    ids=["modes as text", "modes", "a mode", "a record", "modes in a record", "globs", "a glob", "a path", "options", "a backend"])
def test_what_is_too_long_is_refused_within_a_tenth_of_a_second_and_a_short_message(comfy, parse, value):
    """This took up to two minutes."""
    assert _apply_modes("[]") == [] and CompileOptions(backend="aot_eager")  # what is imported at the first is no answer
    started = time.thread_time()
    with pytest.raises((ValueError, LookupError)) as raised:
        Int8Options(keep_layers=found) if isinstance(found := parse(value), tuple) else found
    assert time.thread_time() - started < 0.1 and len(str(raised.value)) < 1000
