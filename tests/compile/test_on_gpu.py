"""What only a GPU can show, compiled: CUDA graphs over INT8 layers, other streams, other devices. Part of it runs anywhere."""
from __future__ import annotations

import pytest
import torch
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.options import CompileOptions
from int8_compile.int8 import hadamard
from int8_compile.int8.kernels import ops, reference
from int8_compile.int8.linear import Int8Linear, RotatedLinear
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Mlp, Stack

CUDA = torch.cuda.is_available()
gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
WIDTH = 256


class Block(Mlp):
    def __init__(self):
        super().__init__(WIDTH)
        self.up, self.down = (Int8Linear.from_float(torch.randn(n, k) / k ** 0.5, torch.randn(n), rotated=True)
                              for k, n in ((WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)))


@pytest.fixture
def fresh_choices(tmp_path, monkeypatch):
    """Nothing is chosen or cached yet, as in a process that has just loaded an INT8 file."""
    from int8_compile.int8.kernels import autotune, triton_quant

    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "_CHOSEN", {})
    for cached in (autotune.choices, triton_quant.factors, hadamard._hadamard):
        cached.cache_clear()
    yield
    autotune.choices.cache_clear()


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_what_is_cached_is_made_outside_of_the_call_that_needs_it():
    """Not in its inference mode, and not in the memory pool of a CUDA graph that it warms up, which belongs to its thread."""
    hadamard._hadamard.cache_clear()
    with torch.inference_mode(), Watch() as watch:
        h = hadamard.hadamard(256, torch.device("cpu"))
    assert not watch.seen and not h.is_inference()
    with pytest.raises(ValueError, match="power of 4, not 32"):
        hadamard.hadamard(32, torch.device("cpu"))


def test_a_trace_takes_the_rotation_in_and_leaves_nothing_in_its_cache():
    layer = RotatedLinear(torch.nn.Parameter(torch.randn(32, 64)), None, group=64).requires_grad_(False)
    x = torch.randn(2, 64)
    hadamard._hadamard.cache_clear()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
    exported = torch.export.export(layer, (x,), strict=False).module()(x)
    assert type(hadamard.hadamard(64, torch.device("cpu"))) is torch.Tensor
    want = layer(x)
    torch.testing.assert_close(compiled, want)
    torch.testing.assert_close(exported, want)


@gpu
@pytest.mark.parametrize("options", [dict(mode="reduce-overhead"), dict(backend="cudagraphs"), dict()], ids=str)
def test_int8_blocks_compile_on_a_gpu(fresh_choices, options):
    net = Stack(Block).cuda().eval()
    compiled = CompiledModule(CompileOptions(mark_sizes=True, **options), torch.device("cuda", 0))
    with torch.inference_mode():
        for step, rows in enumerate((64, 64, 64, 64, 96, 96, 96, 64)):
            x = torch.randn(2, rows, WIDTH, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
            want = net(x)
            got = compiled.run(net, lambda x=x: net(x), filter_guards=True, passthrough=lambda error: False)
            assert not compiled.report.failure, compiled.report.failure
            # A fused kernel rounds x another way, and here and there a value then falls to the next step of INT8, whose noise is 1e-2.
            assert (got - want).norm() < 3e-3 * want.norm()
    assert not compiled.report.fallbacks


@gpu
def test_int8_layers_run_in_a_graph_that_somebody_else_captures(fresh_choices):
    layer = Block().cuda().eval()
    x = torch.randn(64, WIDTH, device="cuda")
    with torch.inference_mode():
        want = layer(x)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(y, want)


@gpu
def test_the_current_stream_is_used(fresh_choices):
    """Inputs that another stream is still making."""
    w, scale = reference.quant_rows(torch.randn(1024, 1024, device="cuda"))
    big = torch.randn(8192, 8192, device="cuda")
    x = torch.randn(512, 1024, device="cuda")
    ops.int8_linear(x, w, scale[:, None])  # compiled and chosen
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(5):
            big @ big
        late = x * 2
        y = ops.int8_linear(late, w, scale[:, None])
    stream.synchronize()
    torch.testing.assert_close(y, ops.int8_linear(x * 2, w, scale[:, None]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_is_used_while_the_first_is_current(fresh_choices):
    w, scale = reference.quant_rows(torch.randn(256, 256))
    x = torch.randn(64, 256)
    want = ops.int8_linear(x.to("cuda:0"), w.to("cuda:0"), scale[:, None].to("cuda:0")).cpu()
    torch.testing.assert_close(ops.int8_linear(x.to("cuda:1"), w.to("cuda:1"), scale[:, None].to("cuda:1")).cpu(), want)
