"""Artifacts of a model's blocks: built by another process, swapped in, found again, and never wrong."""
from __future__ import annotations

import functools
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
import cache_nets
from cache_nets import Hidden, make
from int8_compile.compile.artifacts import artifact
from int8_compile.compile.artifacts.builder import Builder
from int8_compile.compile.artifacts.runtime import Cache
from int8_compile.compile.artifacts.store import CacheStore
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.options import CompileOptions
from toys import difference, wait_for_builder, wait_until

pytestmark = pytest.mark.rotating(4)

OPTIONS = CompileOptions(mark_sizes=True, dynamic=False)
BACKGROUND = CompileOptions(mark_sizes=True, dynamic=False, background=True)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    return tmp_path_factory.mktemp("key") / "cache.key"


@pytest.fixture(scope="module")
def built(tmp_path_factory, key_file):
    """A cache that has the artifact of Net's block."""
    cache = open_cache(tmp_path_factory.mktemp("cache"), key_file)
    with torch.inference_mode():
        run(CompiledModule(BACKGROUND, cache=cache), make(), *inputs())
    wait_for_builder(cache)
    return cache


def open_cache(folder: Path, key_file: Path) -> Cache:
    store = CacheStore(folder, key_file)
    return Cache(store, Builder(store))


def restarted(cache: Cache, key_file: Path) -> Cache:
    return open_cache(cache.store.layout.parent, key_file)


def inputs(batch=2, tokens=10, width=32):
    return torch.randn(batch, tokens, width), torch.rand(batch, width)


def run(compiled: CompiledModule, net, *arguments, patched=False, **options):
    return compiled.run(net, lambda: net(*arguments, **options), filter_guards=not patched, passthrough=lambda e: False)


@pytest.mark.rotating
def test_background_runs_eager_until_it_is_built_and_compiled_from_the_next_step(tmp_path, key_file):
    cache, net = open_cache(tmp_path, key_file), make()
    compiled = CompiledModule(BACKGROUND, cache=cache)
    x = inputs()
    start = time.perf_counter()
    for _ in range(3):
        assert torch.equal(run(compiled, net, *x), net(*x))  # eager's bits
    assert time.perf_counter() - start < 2 and compiled.report.compiled_from_step == 0
    assert [building.partition(" ")[0] for building in compiled.report.building] == ["Block"]
    wait_for_builder(cache)
    assert not compiled.report.building and compiled.report.short() == ["compiled, from the next step on"]
    assert difference(run(compiled, net, *x), net(*x)) < 1e-5
    assert compiled.report.status().startswith("ready: ")
    assert compiled.report.compiled_from_step == 4 and compiled.report.graphs == 0 and len(compiled.report.artifacts) == 1
    assert not compiled.report.fallbacks


def test_one_artifact_serves_every_size_batch_and_model_of_the_structure(built, key_file):
    cache = restarted(built, key_file)
    for net in (make(), make(depth=5)):
        compiled = CompiledModule(OPTIONS, cache=cache)
        for batch, tokens in ((2, 10), (1, 10), (3, 7), (1, 200)):
            x = inputs(batch, tokens)
            assert difference(run(compiled, net, *x), net(*x)) < 1e-5
        assert compiled.report.graphs == 0 and len(compiled.report.artifacts) == 1 and compiled.report.compiled_from_step == 1


@pytest.mark.parametrize("name, make_inputs", [
    ("transposed", lambda: (torch.randn(2, 32, 10).transpose(1, 2), torch.rand(2, 32))),
    ("sliced", lambda: (torch.randn(4, 40, 32)[:2, 3:17], torch.rand(2, 64)[:, ::2])),
    ("scale for all", lambda: (torch.randn(3, 10, 32), torch.rand(1, 32))),
    ("float64", lambda: (torch.randn(2, 10, 32, dtype=torch.float64), torch.rand(2, 32, dtype=torch.float64))),
])
def test_inputs_of_other_kinds_equal_eager(built, key_file, name, make_inputs):
    net, x = make().to(torch.float64 if name == "float64" else torch.float32), make_inputs()
    compiled = CompiledModule(CompileOptions(mark_sizes=True, dynamic=False, background=True), cache=restarted(built, key_file))
    assert difference(run(compiled, net, *x), net(*x)) < 1e-5


def test_a_block_that_writes_into_its_input_does_so_in_an_artifact(built, key_file):
    net, compiled = make(), CompiledModule(OPTIONS, cache=restarted(built, key_file))
    for strided in (False, True):
        x, scale = inputs()
        x = x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x
        twin = x.clone()
        returned = compiled.run(net, lambda x=x, scale=scale: net.blocks[0](x, scale, transformer_options={}), filter_guards=True,
                                passthrough=lambda e: False)
        net.blocks[0](twin, scale, transformer_options={})
        assert difference(x, twin) < 1e-5 and difference(returned, twin) < 1e-5
        returned.zero_()
        assert strided or not x.any()  # it is the input, as in eager


@pytest.mark.parametrize("change", ["flag", "patch function", "appended patch", "hook", "forward", "patched"])
def test_what_the_trace_did_not_see_is_not_served(built, key_file, change):
    """Runs eager here (background), so that a wrong artifact would show at once."""
    net, compiled, x = make(), CompiledModule(BACKGROUND, cache=restarted(built, key_file)), inputs()
    run(compiled, net, *x)
    assert compiled.report.artifacts
    options = {"double": True} if change == "flag" else {}
    if change == "patch function":
        net.blocks[1].patches = [lambda h: h * 3]
    elif change == "appended patch":
        net.blocks[1].patches.append(lambda h: h * 3)
    elif change == "hook":
        net.blocks[1].first.register_forward_hook(lambda module, args, out: out * 2)
    elif change == "forward":
        net.blocks[1].second.forward = lambda h: h[..., :32]
    want = net(*x, **options)
    assert torch.equal(run(compiled, net, *x, patched=change == "patched", **options), want)


def test_gradients_are_not_lost_in_an_artifact(built, key_file):
    with torch.inference_mode(False):
        net, x = make().requires_grad_(True), inputs()
        compiled = CompiledModule(BACKGROUND, cache=restarted(built, key_file))
        with torch.no_grad():
            run(compiled, net, *x)
        assert compiled.report.artifacts
        y = run(compiled, net, *x)
        assert y.requires_grad and torch.equal(y, net(*x))


class _Halves(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {})) * (0.5 if "linear" in str(func) or "addmm" in str(func) else 1)


def test_nothing_between_operators_and_what_they_do_is_passed_by(built, key_file):
    """A dispatch mode, forward-mode derivatives, functorch: an artifact knows none of them, and is none the worse for it."""
    net, compiled, x = make(), CompiledModule(OPTIONS, cache=restarted(built, key_file)), inputs()
    assert torch.equal(run(compiled, net, *x), net(*x))
    with _Halves():
        assert torch.equal(run(compiled, net, *x), net(*x))
    both = functools.partial(run, compiled, net), net
    with torch.inference_mode(False), torch.no_grad():
        values = inputs()
        with forward_ad.dual_level():
            dual = [forward_ad.make_dual(value, torch.ones_like(value)) for value in values]
            got, expected = (forward_ad.unpack_dual(call(*dual)).tangent for call in both)
            assert torch.allclose(got, expected, rtol=1e-4)
        stacked = [torch.stack([value, value]) for value in values]
        got, expected = (torch.func.vmap(call)(*stacked) for call in both)
        assert torch.allclose(got, expected, atol=1e-5)
    assert torch.equal(run(compiled, net, *x), net(*x)) and compiled.report.last_calls["artifact"] > 0


def test_code_that_is_patched_in_this_process_is_not_what_the_artifact_was_made_of(built, key_file, monkeypatch):
    net, compiled, x = make(), CompiledModule(BACKGROUND, cache=restarted(built, key_file)), inputs()
    assert difference(run(compiled, net, *x), net(*x)) < 1e-5 and compiled.report.artifacts
    monkeypatch.setattr(cache_nets, "strength", lambda: 3.0)
    assert torch.equal(run(compiled, net, *x), net(*x))
    monkeypatch.undo()
    assert difference(run(compiled, net, *x), net(*x)) < 1e-5


def test_parameters_that_are_replaced_or_changed_are_seen(built, key_file):
    net, compiled, x = make(), CompiledModule(OPTIONS, cache=restarted(built, key_file)), inputs()
    run(compiled, net, *x)
    net.blocks[0].first.weight.data.mul_(2)
    net.blocks[1].second.weight = torch.nn.Parameter(torch.randn(32, 64), requires_grad=False)
    assert difference(run(compiled, net, *x), net(*x)) < 1e-5 and compiled.report.graphs == 0


def test_what_no_other_process_can_be_told_stays_eager_with_one_warning(tmp_path, key_file, caplog):
    net, compiled, x = make(Hidden), CompiledModule(BACKGROUND, cache=open_cache(tmp_path, key_file)), inputs()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(run(compiled, net, *x), net(*x))
    assert len(compiled.report.fallbacks) == len(caplog.records) == 1
    assert "cannot be described to another process" in caplog.text and "Set background to false" in caplog.text


@pytest.mark.rotating
def test_a_builder_that_is_killed_twice_leaves_eager_and_one_reason_and_the_next_start_builds(tmp_path, key_file, caplog):
    cache, net, x = open_cache(tmp_path, key_file), make(), inputs()
    compiled = CompiledModule(BACKGROUND, cache=cache)
    run(compiled, net, *x)
    killed: list[int] = []
    while len(killed) < 2:
        wait_until(lambda: cache.builder._process is not None and cache.builder._process.pid not in killed, 30)
        time.sleep(1)
        killed.append(cache.builder._process.pid)
        os.killpg(killed[-1], signal.SIGKILL)
    wait_for_builder(cache)
    for _ in range(2):
        assert torch.equal(run(compiled, net, *x), net(*x))
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 2 and all("the builder process was killed" in text for text in said) and "tried once more" in said[0]
    assert len(compiled.report.fallbacks) == 1
    cache = restarted(cache, key_file)
    compiled = CompiledModule(BACKGROUND, cache=cache)
    run(compiled, net, *x)
    wait_for_builder(cache)
    assert difference(run(compiled, net, *x), net(*x)) < 1e-5 and compiled.report.artifacts


def test_the_builder_ends_with_this_process(tmp_path, key_file):
    cache, net = open_cache(tmp_path, key_file), make()
    run(CompiledModule(BACKGROUND, cache=cache), net, *inputs())
    while cache.builder._process is None:
        time.sleep(0.05)
    process = cache.builder._process
    process.stdin.close()  # what the kernel does when this process ends, however it ends
    assert process.wait(timeout=30) is not None


@pytest.mark.parametrize("options, reason", [
    (CompileOptions(backend="aot_eager", background=True), "backend aot_eager makes no artifacts"),
    (CompileOptions(mode="max-autotune-no-cudagraphs", background=True), "mode max-autotune-no-cudagraphs is not kept"),
])
def test_what_makes_no_artifacts_says_so(built, options, reason):
    compiled = CompiledModule(options, cache=built)
    assert reason in compiled.report.fallbacks[0] and compiled._cache is None


@pytest.mark.rotating
def test_background_without_a_cache_says_that_the_first_image_waits():
    assert "cannot be used" in CompiledModule(BACKGROUND).report.fallbacks[0] and not CompiledModule(OPTIONS).report.fallbacks


def test_int8_layers_and_their_rotation(tmp_path, key_file):
    """The plain twin of a quantized layer, whose ops run inside the artifact."""
    from int8_compile.int8.plain_layer import ArtifactLinear
    from int8_compile.int8.quantize import quantize_weight

    net = make(width=64)
    for block in net.blocks:
        qweight, scale, group = quantize_weight(block.first.weight, True)
        layer = ArtifactLinear(group, "auto", ("qweight", "weight_scale", "bias"), {})
        layer.qweight, layer.weight_scale, layer.bias = qweight, scale, block.first.bias.detach().clone()
        block.first = layer
    cache, x = open_cache(tmp_path, key_file), inputs(width=64)
    compiled = CompiledModule(BACKGROUND, cache=cache)
    run(compiled, net, *x)
    wait_for_builder(cache)
    assert difference(run(compiled, net, *x), net(*x)) < 0.01 and compiled.report.artifacts


LOADER = """
import sys, types
from pathlib import Path
root, store, key = sys.argv[1:]
package = sys.modules["int8_compile"] = types.ModuleType("int8_compile")
package.__path__ = [root]
import torch
from int8_compile.compile.artifacts.artifact import Artifact
from int8_compile.compile.artifacts.store import CacheStore
store = CacheStore(Path(store), Path(key))
for folder in store.own():
    print(Artifact(store.entry(folder), torch.device("cpu")).kind)
print(sorted(path.name for path in Path("/tmp").iterdir()))
"""


@pytest.mark.parametrize("options", ["size=64k", "size=1m,noexec"])
def test_artifacts_are_loaded_where_tmp_is_full_or_no_code_may_run_from_it(built, key_file, options):
    """torch's own loader unpacks to /tmp, whatever TMPDIR says."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        shutil.copytree(built.store.layout.parent, Path(folder, "cache"), ignore=shutil.ignore_patterns(".*"))  # of a builder that runs yet
        shutil.copy(key_file, Path(folder, "key"))
        mounted = f"mount -t tmpfs -o mode=1777,{options} tmpfs /tmp && exec \"$@\""
        command = ["unshare", "-m", "sh", "-c", mounted, "sh", sys.executable, "-c", LOADER, str(Path(cache_nets.__file__).parents[2]),
                   str(Path(folder, "cache")), str(Path(folder, "key"))]
        if subprocess.run([*command[:6], "true"], capture_output=True).returncode:
            pytest.skip("needs the right to mount a small file system")
        done = subprocess.run(command, capture_output=True, text=True)
        *kinds, left = done.stdout.split() or [done.stderr]
        assert set(kinds) == {"aoti"} and left == "[]", done.stdout + done.stderr
        assert not [path for path in Path(folder, "cache", "v1").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("Could not find schema for pack::operation")])
def test_what_cannot_be_loaded_now_is_not_set_aside(built, key_file, monkeypatch, error):
    def fail(entry, device):
        raise error
    net, x = make(), inputs()
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "LOADERS", {"aoti": fail})
        compiled = CompiledModule(BACKGROUND, cache=restarted(built, key_file))
        for _ in range(2):
            assert torch.equal(run(compiled, net, *x), net(*x))
        assert compiled.report.fallbacks and all(str(error) in fallback for fallback in compiled.report.fallbacks)
    compiled = CompiledModule(BACKGROUND, cache=restarted(built, key_file))
    assert difference(run(compiled, net, *x), net(*x)) < 1e-5 and compiled.report.artifacts


@pytest.mark.rotating
def test_a_damaged_artifact_is_built_again_in_this_process(built, key_file, tmp_path, caplog):
    folder = tmp_path / "cache"
    shutil.copytree(built.store.layout.parent, folder, ignore=shutil.ignore_patterns(".*"))
    for package in folder.rglob("artifact.pt2"):  # another test may have had a second one built
        package.write_bytes(package.read_bytes()[:-100])
    cache, net, x = open_cache(folder, key_file), make(), inputs()
    compiled = CompiledModule(BACKGROUND, cache=cache)
    assert torch.equal(run(compiled, net, *x), net(*x))
    assert compiled.report.building and not compiled.report.fallbacks and "set aside" in caplog.text
    wait_for_builder(cache)
    assert difference(run(compiled, net, *x), net(*x)) < 1e-5 and compiled.report.artifacts
