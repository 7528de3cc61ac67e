"""cache_compile and readable_cache: TorchAir's semantics, and what a cached method must equal."""
from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import cache_modules
from cache_modules import make
from int8_compile.compile.artifacts import key as cache_key
from int8_compile.compile.artifacts.cache_compile import cache_compile, readable_cache

pytestmark = pytest.mark.rotating(4)

REPO = Path(__file__).resolve().parents[2]
# torch 2.8 cannot compile a graph with its own sizes by itself (standalone_compile, "from_graph"): the next tier takes its place.
AOT = ("aot",) if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11) else ("aot", "fx")


@pytest.fixture(scope="module", autouse=True)
def signing_key(tmp_path_factory):
    os.environ["INT8_COMPILE_CACHE_KEY_FILE"] = str(tmp_path_factory.mktemp("key") / "cache.key")
    yield
    del os.environ["INT8_COMPILE_CACHE_KEY_FILE"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One cache for the tests of this file: what one has built the next finds."""
    return tmp_path_factory.mktemp("cache")


def artifacts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("v1/*/*/*/*/*/artifact.*") if not path.parent.name.startswith("."))


INPUTS = {
    "batch 1": lambda: torch.randn(1, 10, 32),
    "batch 2": lambda: torch.randn(2, 10, 32),
    "batch 5, other tokens": lambda: torch.randn(5, 77, 32),
    "one token": lambda: torch.randn(1, 1, 32),
    "transposed": lambda: torch.randn(2, 32, 20).transpose(1, 2),
    "sliced": lambda: torch.randn(4, 40, 32)[:, 3:17],
    "every other channel": lambda: torch.randn(2, 9, 64)[..., ::2],
    "expanded": lambda: torch.randn(1, 9, 32).expand(3, 9, 32),
}


@pytest.mark.rotating
@pytest.mark.parametrize("aoti_cache", [True, False])
@pytest.mark.parametrize("name", INPUTS)
def test_a_cached_method_equals_the_method(folder, name, aoti_cache):
    module, x = make(), INPUTS[name]()
    cached = cache_compile(module.forward, cache_dir=folder, aoti_cache=aoti_cache)
    assert torch.allclose(cached(x), module(x), atol=1e-6)
    assert cached.tier in (("aoti",) if aoti_cache else AOT)


def test_a_second_process_neither_traces_nor_compiles(folder):
    cache_compile(make().forward, cache_dir=folder, aoti_cache=True)(torch.randn(1, 10, 32))
    script = textwrap.dedent(f"""
        import sys, time
        sys.path[:0] = [{str(REPO)!r}, {str(Path(__file__).parent)!r}]
        from benchmarks.wrapper_overhead import load_pack
        load_pack()
        import torch
        from int8_compile.compile.artifacts.cache_compile import cache_compile
        from cache_modules import make
        module = make()
        cached = cache_compile(module.forward, cache_dir={str(folder)!r}, aoti_cache=True)
        x = torch.randn(3, 12, 32)
        start = time.perf_counter()
        y = cached(x)
        seconds = time.perf_counter() - start
        assert torch.allclose(y, module(x), atol=1e-6)
        print(cached.tier, "torch._inductor.compile_fx" in sys.modules, seconds)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    tier, inductor, seconds = done.stdout.split()[-3:]
    assert (tier, inductor) == ("aoti", "False") and float(seconds) < 1, done.stdout + done.stderr


def test_parameters_are_inputs(folder):
    """Written in place, replaced, and those of another module of the class."""
    module, x = make(), torch.randn(2, 10, 32)
    cached = cache_compile(module.forward, cache_dir=folder, aoti_cache=True)
    cached(x)
    before = len(artifacts(folder))
    module.out.weight.data.mul_(3)
    assert torch.allclose(cached(x), module(x), atol=1e-6)
    module.qkv.weight = torch.nn.Parameter(torch.randn(96, 32), requires_grad=False)
    assert torch.allclose(cached(x), module(x), atol=1e-6)
    other = make(seed=1)
    assert torch.allclose(cache_compile(other.forward, cache_dir=folder, aoti_cache=True)(x), other(x), atol=1e-6)
    assert len(artifacts(folder)) == before


def test_methods_of_one_module_and_what_they_write_into_their_inputs(folder):
    module = make()
    decode = cache_compile(module.decode, cache_dir=folder, aoti_cache=True)
    for strided in (False, True):
        x = torch.randn(2, 5, 32)
        cache = torch.randn(2, 32, 5).transpose(1, 2) if strided else torch.randn(2, 5, 32)
        twin = cache.clone()
        (y, returned), (want, _) = decode(x, cache), module.decode(x, twin)
        assert torch.allclose(y, want, atol=1e-6) and torch.equal(cache, twin) and returned is cache


def test_wrapping_twice_and_keeping_it_on_the_module(folder):
    module, x = make(), torch.randn(2, 10, 32)
    want = module(x)
    module.cached = cache_compile(module.forward, cache_dir=folder, aoti_cache=True)
    again = cache_compile(module.cached, cache_dir=folder, aoti_cache=True)
    assert torch.allclose(module.cached(x), want, atol=1e-6) and torch.allclose(again(x), want, atol=1e-6)


def test_it_is_lazy(folder, tmp_path):
    cache_compile(make().forward, cache_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def function(x):
    return x


class NoModule:
    def method(self, x):
        return x


@pytest.mark.parametrize("func, message", [
    (function, "Only method can be cached now, got "), (torch.nn.Linear.forward, "Only method can be cached now, got "),
    (NoModule().method, "Only torch.nn.Module method can be cached now, got "),
])
def test_only_methods_of_modules(func, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        cache_compile(func)


@pytest.mark.parametrize("arguments, error, message", [
    ({"backend": {"config": {"epilogue_fusion": True}}}, ValueError, "config in current backend is different from the config during cache"),
    ({"backend": "eager"}, ValueError, "Only the inductor backend"), ({"fullgraph": False}, ValueError, "one graph"),
    ({"ge_cache": True}, TypeError, "takes no ge_cache"),
])
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        cache_compile(make().forward, config={"epilogue_fusion": False}, **arguments)


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root to make another user's folder")
def test_another_users_folder(tmp_path):
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(ValueError, match=r"^Cache dir .* must be owned by the current user"):
        cache_compile(make().forward, cache_dir=tmp_path)


def test_backward_is_refused(folder):
    cached = cache_compile(make().forward, cache_dir=folder)
    with pytest.raises(RuntimeError, match="Backward cache compilation is not supported yet"):
        cached(torch.randn(1, 10, 32, requires_grad=True))


def test_an_error_of_the_method_is_the_methods_own(folder):
    module, x = make(), torch.randn(1, 10, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError) as own:
        module(x)
    with pytest.raises(RuntimeError) as cached:
        cache_compile(module.forward, cache_dir=folder, aoti_cache=True)(x)
    assert str(cached.value) == str(own.value)


class Unkeepable(torch.nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.kind = kind

    def forward(self, x):
        if self.kind == "random":
            return self.linear(x) + torch.rand_like(x)
        return self.linear(x) if x.sum() > -1e9 else x


@pytest.mark.parametrize("kind", ["random", "data-dependent"])
def test_what_cannot_be_kept_runs_all_the_same(folder, kind, caplog):
    module, x = Unkeepable(kind).eval(), torch.randn(2, 4)
    cached = cache_compile(module.forward, cache_dir=folder)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            y = cached(x)
    assert cached.tier in ("fx", "eager") and y.shape == x.shape
    if kind != "random":
        assert torch.allclose(y, module(x), atol=1e-6)
    assert sum("is not kept on disk" in record.message for record in caplog.records) == 1


def test_what_is_not_kept_is_not_served_stale_either(folder, monkeypatch):
    class Noisy(torch.nn.Linear):
        def forward(self, x):
            return self.finish(super().forward(x) + 0 * torch.rand_like(x))

        def finish(self, x):
            return x * 2

    module = Noisy(8, 8).requires_grad_(False)
    cached, x = cache_compile(module.forward, cache_dir=folder), torch.randn(2, 8)
    assert torch.allclose(cached(x), module(x), atol=1e-6)
    monkeypatch.setattr(Noisy, "finish", lambda self, x: x * 3)
    assert torch.allclose(cached(x), module(x), atol=1e-6)
    monkeypatch.undo()
    assert torch.allclose(cached(x), module(x), atol=1e-6)
    module.register_forward_hook(lambda module, args, out: out * 5)
    assert cached.tier == "fx"


def test_a_folder_that_cannot_be_written(caplog):
    module, x = make(), torch.randn(1, 10, 32)
    cached = cache_compile(module.forward, cache_dir="/proc/no_folder")
    with caplog.at_level(logging.WARNING):
        assert torch.allclose(cached(x), module(x), atol=1e-6)
    assert cached.tier == "fx" and len([r for r in caplog.records if r.name.endswith("artifacts.cache_compile")]) == 1


RANKS = [({}, ""), ({"tp_rank": 0}, "tp_rank0"), ({"tp_rank": 1, "pp_rank": 0}, "tp_rank1_pp_rank0"), ({"global_rank": 3}, "")]


@pytest.mark.parametrize("ranks, name", RANKS)
def test_rank_suffixes_without_torch_distributed(ranks, name):
    assert cache_key.distribution(**ranks) == name


@pytest.mark.parametrize("ranks, name", [({}, "world2global_rank1"), ({"global_rank": 0}, "world2global_rank0"),
                                         ({"tp_rank": 1}, "world2global_rank1_tp_rank1")])
def test_rank_suffixes_of_two_processes(ranks, name, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert cache_key.distribution(**ranks) == name


def test_readable_cache(folder, tmp_path, capsys):
    cache_compile(make().forward, cache_dir=folder, aoti_cache=True)(torch.randn(1, 10, 32))
    artifact = next(p for p in artifacts(folder) if p.parent.parent.name == "forward" and p.suffix == ".pt2")
    text = readable_cache(artifact, file=tmp_path / "out.py")
    assert text == readable_cache(artifact.parent, print_output=False) == (tmp_path / "out.py").read_text()
    assert text in capsys.readouterr().out and (tmp_path / "out.py").stat().st_mode & 0o777 == 0o600
    for part in ("# Attention.forward for cpu", "cache_modules.Attention._finish", "scaled_dot_product_attention", "qkv.weight"):
        assert part in text
    compile("\n".join(line for line in text.splitlines() if line.startswith("#")), "readable", "exec")


def test_readable_cache_refuses_links_and_foreign_files(folder, tmp_path):
    cache_compile(make().forward, cache_dir=folder, aoti_cache=True)(torch.randn(1, 10, 32))
    artifact = artifacts(folder)[0]
    (tmp_path / "link.pt2").symlink_to(artifact)
    (tmp_path / "output.py").symlink_to(tmp_path / "elsewhere.py")
    (tmp_path / "open.py").write_text("")
    (tmp_path / "open.py").chmod(0o644)
    for path, output in ((tmp_path / "absent", None), (tmp_path / "link.pt2", None), (artifact, tmp_path / "output.py"),
                         (artifact, tmp_path / "open.py"), (tmp_path / "open.py", None)):
        with pytest.raises(ValueError, match=r"must|is no artifact"):
            readable_cache(path, print_output=False, file=output)
    assert not (tmp_path / "elsewhere.py").exists()


def group(**changes) -> str:
    arguments = {"name": "Block", "dynamic": True, "tier": "aoti", "structure": [["", "Block", False]], "config": {},
                 "device": torch.device("cpu"), "host": {"attention": "pytorch"}}
    return cache_key.group(**{**arguments, **changes})


@pytest.mark.parametrize("changes", [
    {"name": "Other"}, {"dynamic": False}, {"tier": "aot"}, {"structure": [["", "Block", True]]}, {"config": {"epilogue_fusion": False}},
    {"host": {"attention": "split"}},
])
def test_each_part_of_the_key_alone_makes_another_place(changes):
    assert group() == group() != group(**changes)


@pytest.mark.parametrize("part", ["torch", "git", "cuda", "triton", "python", "pack", "processor", "capability", "system"])
def test_each_version_and_the_machine_are_in_the_key(monkeypatch, part):
    known = cache_key.machine("cpu", None)
    assert part in known
    before = group()
    monkeypatch.setattr(cache_key, "machine", lambda *_: {**known, part: "other"})
    assert group() != before


@pytest.mark.parametrize("change, back", [
    (lambda: torch.set_float32_matmul_precision("medium"), lambda: torch.set_float32_matmul_precision("highest")),
    (lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)),
    (lambda: torch.set_num_threads(torch.get_num_threads() + 1), lambda: torch.set_num_threads(torch.get_num_threads() - 1)),
    (lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)),
])
def test_torchs_settings_are_in_the_key(change, back):
    before = group()
    change()
    try:
        assert group() != before
    finally:
        back()
    assert group() == before


@pytest.mark.rotating
@pytest.mark.parametrize("change", ["width", "dtype", "attribute", "training", "function", "global", "method"])
def test_a_changed_module_or_code_is_never_served_stale(folder, change, monkeypatch):
    """Everything that a trace saw; the artifact of before is there all the time."""
    x = torch.randn(2, 10, 32)
    cache_compile(make().forward, cache_dir=folder, aoti_cache=True)(x)
    before = len(artifacts(folder))
    module = make(gain=2.0 if change == "attribute" else 1.0, width=64 if change == "width" else 32,
                  dtype=torch.bfloat16 if change == "dtype" else torch.float32)
    x = torch.randn(2, 10, 64) if change == "width" else x.to(module.out.weight.dtype)
    if change == "training":
        module.train()
    if change == "function":
        monkeypatch.setattr(cache_modules, "scaled", lambda x: x * 5)
    if change == "global":
        monkeypatch.setattr(cache_modules, "FACTOR", 7.0)
    if change == "method":
        monkeypatch.setattr(cache_modules.Attention, "_finish", lambda self, x: x)
    cached = cache_compile(module.forward, cache_dir=folder, aoti_cache=True)
    assert torch.allclose(cached(x), module(x), atol=1e-6 if change != "dtype" else 0.1)
    monkeypatch.undo()
    fresh = make()
    assert torch.allclose(cache_compile(fresh.forward, cache_dir=folder, aoti_cache=True)(torch.ones(2, 10, 32)),
                          fresh(torch.ones(2, 10, 32)), atol=1e-6)
    assert len(artifacts(folder)) >= before


@pytest.mark.rotating
@pytest.mark.parametrize("damage", ["artifact", "manifest"])
def test_a_damaged_artifact_is_set_aside_and_built_again(tmp_path, damage, caplog):
    module, x = make(), torch.randn(2, 10, 32)
    cache_compile(module.forward, cache_dir=tmp_path, aoti_cache=True)(x)
    (artifact,) = artifacts(tmp_path)
    if damage == "artifact":
        content = artifact.read_bytes()
        artifact.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    else:
        manifest = artifact.parent / "manifest.json"
        manifest.write_text(manifest.read_text()[:-40])
    caplog.clear()
    for _ in range(2):
        cached = cache_compile(module.forward, cache_dir=tmp_path, aoti_cache=True)
        start = time.perf_counter()
        assert torch.allclose(cached(x), module(x), atol=1e-6) and cached.tier == "aoti"
    assert time.perf_counter() - start < 1  # the second found what the first has built
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "set aside" in warnings[0].message
