"""Every implementation of the two operations against float64, on fresh random inputs, odd shapes and outliers."""
from __future__ import annotations

import importlib.util

import pytest
import torch
from int8_compile.int8.hadamard import hadamard, rotate
from int8_compile.int8.kernels import cpu, native, ops, reference, registry, with_triton

from .conftest import CUDA, DEVICE, On


def implementations():
    """On each device type of theirs that is here; Triton's on the CPU, in its interpreter, where there is no GPU."""
    for kernel in registry.KERNELS:
        if kernel is reference.KERNEL or (kernel.package and not importlib.util.find_spec(kernel.package)):
            continue
        if hasattr(module := kernel.load(), "quant_rows"):
            yield from (On(module, torch.device(device)) for device in [d for d in kernel.devices if d == "cpu" or CUDA] or ["cpu"])


IMPLEMENTATIONS = list(implementations())

# (M, K, N, ConvRot group)
SHAPES = [(1, 64, 64, 64), (5, 256, 33, 256), (70, 320, 100, 64), (3, 48, 16, 16), (129, 1000, 72, 0), (33, 768, 130, 256),
          (2, 5120, 24, 256)]


@pytest.fixture(params=["gaussian", "outliers", "zero row"])
def make(request):
    seed = torch.seed()
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)

    def make(m, k):
        x = torch.randn(m, k, generator=generator)
        if request.param == "outliers":
            x[:, torch.randint(k, (4,), generator=generator)] *= 100
        if request.param == "zero row":
            x[m // 2] = 0
        return x
    return make


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reference_quantizes_to_within_half_a_step(make, shape, dtype):
    m, k, _, group = shape
    x = make(m, k).to(dtype)
    q, s = reference.quant_rows(x, group)
    exact = rotate(x.double(), group)
    assert q.dtype == torch.int8 and s.dtype == torch.float32
    assert q.abs().max() <= 127
    # Half a step, and the rounding of a rotation in fp32.
    assert ((q.double() * s.double()[:, None] - exact).abs() <= 0.501 * s.double()[:, None] + 1e-30).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantizers_agree_with_reference(make, implementation, shape):
    m, k, _, group = shape
    x = make(m, k)
    q, s = implementation.quant_rows(x, group)
    want_q, want_s = reference.quant_rows(x, group)
    torch.testing.assert_close(s, want_s, rtol=1e-5, atol=0)
    # A value on a rounding boundary may fall to either side, where sums are taken in another order.
    assert (q.int() - want_q.int()).abs().max() <= 1
    assert (q != want_q).sum() <= max(2, 1e-3 * q.numel())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("act", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_activation_and_smoothing_come_before_the_rotation(make, implementation, shape, act, dtype):
    m, k, _, group = shape
    x = make(m, 2 * k if act == "swiglu" else k).to(dtype)
    scale = torch.rand(k) + 0.5
    q, s = implementation.quant_rows(x, group, act, scale)
    x = x.double()
    x = torch.nn.functional.gelu(x, approximate="tanh") if act == "gelu_tanh" else torch.nn.functional.silu(x[:, :k]) * x[:, k:]
    exact = rotate(x * scale.double(), group)
    assert q.shape == (m, k) and q.dtype == torch.int8 and s.dtype == torch.float32
    steps = 0.65 if implementation.device.type == "cuda" and dtype is torch.float16 and group else 0.51  # tf32 in the rotation
    assert ((q.double() * s.double()[:, None] - exact).abs() <= steps * s.double()[:, None] + 1e-30).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scalar_scale", [True, False], ids=["scalar scale", "row scale"])
def test_gemms_accumulate_exactly(implementation, shape, bias, scalar_scale):
    m, k, n, _ = shape
    q = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    s = torch.rand(m) + 0.1
    ws = torch.rand(()) if scalar_scale else torch.rand(n, 1)
    b = torch.randn(n) if bias else None
    y = implementation.int8_gemm(q, s, w, ws, b, torch.float32)
    want = (q.double() @ w.double().t()) * s.double()[:, None] * ws.double().reshape(1, -1) + (0 if b is None else b.double())
    assert y.shape == (m, n) and y.dtype == torch.float32
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-3)


def test_saturated_operands_do_not_overflow():
    q = torch.full((20, 20000), -127, dtype=torch.int8)
    for implementation in IMPLEMENTATIONS:
        y = implementation.int8_gemm(q, torch.ones(20), q, torch.ones(20, 1), None, torch.float32)
        assert (y == 127 * 127 * 20000).all(), str(implementation)


@pytest.mark.skipif(native.library() is None or not native.library().int8c_has_gemm(),
                    reason="needs a processor with AVX2 and a C++ compiler")
@pytest.mark.parametrize("m, k, n", [(1, 7, 3), (2, 16, 64), (3, 100, 33), (5, 15, 1), (6, 31, 129), (7, 528, 65), (513, 1000, 77)])
def test_native_code_multiplies_exactly(m, k, n):
    """Also where torch's product is the faster one, and serves. Sizes around tiles of 6 x 2, blocks of 64 columns, and steps of 16."""
    q, w = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    acc = torch.full((m, n), 7, dtype=torch.int32)
    native.library().int8c_gemm(q.data_ptr(), w.data_ptr(), m, n, k, acc.data_ptr())
    assert torch.equal(acc.double(), q.double() @ w.double().t())


@pytest.mark.parametrize("m, k, n", [(1, 7, 3), (2, 1024, 64), (65, 1025, 33), (33, 5000, 17)])
@pytest.mark.parametrize("extreme", [False, True])
def test_fp32_multiplies_exactly_where_torch_multiplies_slowly(monkeypatch, m, k, n, extreme):
    q, w = (torch.full((rows, k), -128, dtype=torch.int8) if extreme else torch.randint(-128, 128, (rows, k), dtype=torch.int8)
            for rows in (m, n))
    acc = torch.full((m, n), 7, dtype=torch.int32)
    try:
        torch.set_default_dtype(torch.float64)  # a pack may
        with torch.autocast("cpu", torch.bfloat16):
            cpu._fp32_mm(q, w, acc)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(acc.double(), q.double() @ w.double().t())
    monkeypatch.setattr(cpu, "multiplier", lambda: cpu.FP32)
    s, ws, bias = torch.rand(m), torch.rand(n, 1), torch.randn(n)
    monkeypatch.setattr(torch, "_int_mm", None)
    y = cpu.int8_gemm(q, s, w, ws, bias, torch.float32)
    want = acc.double() * s.double()[:, None] * ws.double().t() + bias
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-3)


def test_the_cpu_multiplies_by_what_is_not_slow(monkeypatch):
    multiply = cpu._int_mm
    monkeypatch.setattr(cpu, "_int_mm", lambda *operands: [multiply(*operands) for _ in range(400)])
    assert cpu.int_mm_is_slow.__wrapped__()
    monkeypatch.setattr(native, "library", lambda: None)
    for slow, by in ((True, cpu.FP32), (False, cpu.INT_MM)):
        monkeypatch.setattr(cpu, "int_mm_is_slow", lambda slow=slow: slow)
        assert cpu.multiplier() == by


@pytest.mark.parametrize("m", [1, 700, 3000])
def test_blocks_of_the_cpu_kernel_leave_no_seam(m):
    """Large enough for several row blocks."""
    x, w = torch.randn(m, 2048), torch.randn(1024, 2048)
    q, s = cpu.quant_rows(x, 256)
    want_q, want_s = reference.quant_rows(x, 256)
    # Matrix products of another height may be summed in another order.
    assert (q != want_q).sum() <= max(2, 1e-4 * q.numel()) and torch.allclose(s, want_s)
    qw, ws = reference.quant_rows(w, 256)
    y = cpu.int8_gemm(want_q, want_s, qw, ws[:, None], None, torch.float32)
    assert torch.equal(y, reference.int8_gemm(want_q, want_s, qw, ws[:, None], None, torch.float32))


def test_without_a_compiler_torch_quantizes_and_one_warning_says_so(monkeypatch, caplog):
    x = torch.randn(700, 512).bfloat16()
    want_q, want_s = cpu.quant_rows(x, 256, "gelu_tanh")
    monkeypatch.setenv("CXX", "/bin/false")
    native._load.cache_clear()
    try:
        for _ in range(2):
            q, s = cpu.quant_rows(x, 256, "gelu_tanh")
            assert (q.int() - want_q.int()).abs().max() <= 1 and torch.allclose(s, want_s)
            y = cpu.int8_gemm(want_q, want_s, want_q, want_s[:, None], None, torch.bfloat16)
        assert torch.allclose(y.float(), reference.int8_gemm(want_q, want_s, want_q, want_s[:, None], None, torch.float32), rtol=0.01)
    finally:
        native._load.cache_clear()
    assert caplog.text.count("could not build the CPU kernels") == 1


@pytest.mark.parametrize("body", ["printf '\\377 broken' >&2; exit 1", "kill -9 $$", "[ $1 = --version ] && printf '\\377'; exit 0"],
                         ids=["no UTF-8", "killed", "version"])
def test_a_compiler_of_any_kind_is_no_error_and_its_command_is_not_told(tmp_path, monkeypatch, caplog, body):
    compiler = tmp_path / "odd-cxx"
    compiler.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit 0\n{body}\n" if "version" not in body else f"#!/bin/sh\n{body}\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    native._load.cache_clear()
    try:
        assert native.library() is None
    finally:
        native._load.cache_clear()
    assert "could not build the CPU kernels" in caplog.text and "-std=c++17" not in caplog.text


def test_not_a_number_stays_one():
    x = torch.randn(4, 64)
    x[1, 7], x[2, 9] = float("nan"), float("inf")
    q, s = cpu.quant_rows(x)
    assert s[1].isnan() and s[2].isinf() and s[[0, 3]].isfinite().all()
    y = cpu.int8_gemm(q, s, torch.ones(8, 64, dtype=torch.int8), torch.ones(8, 1), None, torch.bfloat16)
    assert not y[1:3].isfinite().any() and y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("size", [16, 64, 256])
def test_rotation_is_orthonormal_symmetric_and_regular(size):
    h = hadamard(size, torch.device("cpu"), torch.float64)
    assert torch.allclose(h @ h, torch.eye(size, dtype=torch.float64))
    assert torch.equal(h, h.t())
    assert torch.allclose(h.sum(0), torch.ones(size, dtype=torch.float64))


def test_linear_is_as_accurate_as_int8_allows():
    """SQNR of a Gaussian layer: 38.4 dB measured for the method, 10 dB less for outlier channels without rotation."""
    x, w = torch.randn(512, 3072), torch.randn(256, 3072) / 55

    def sqnr(x, group):
        qw, ws = reference.quant_rows(w, group)
        y, exact = ops.int8_linear(x, qw, ws[:, None], group=group), x.double() @ w.double().t()
        return 10 * torch.log10(exact.square().mean() / (y - exact).square().mean())

    assert sqnr(x, 0) > 37.9 and sqnr(x, 256) > 37.9
    spiky = x.clone()
    spiky[:, ::100] *= 30
    assert sqnr(spiky, 256) > sqnr(spiky, 0) + 8


def test_linear_takes_any_leading_shape_and_half_precision(tmp_path, monkeypatch):
    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(tmp_path))
    w, b = torch.randn(40, 64, device=DEVICE), torch.randn(40, device=DEVICE)
    qw, ws = reference.quant_rows(w)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((64,), (3, 64), (2, 5, 64), (2, 0, 64)):
            x = torch.randn(shape, device=DEVICE).to(dtype)
            y = ops.int8_linear(x, qw, ws[:, None], b)
            assert y.shape == (*shape[:-1], 40) and y.dtype == dtype
            torch.testing.assert_close(y.float(), x.float() @ w.t() + b, rtol=0.05, atol=0.5)


def test_ops_pass_torchs_own_checks():
    x, w = torch.randn(6, 64), torch.randint(-127, 128, (8, 64), dtype=torch.int8)
    torch.library.opcheck(ops.quant_rows.default, (x, 64, "gelu_tanh", torch.rand(64), "auto"),
                          test_utils=("test_schema", "test_faketensor"))
    q, s = ops.quant_rows(x, 0, "none", None, "auto")
    torch.library.opcheck(ops.int8_gemm.default, (q, s, w, torch.rand(8, 1), torch.randn(8), "bfloat16", "auto"),
                          test_utils=("test_schema", "test_faketensor"))


def test_linear_compiles_to_one_graph_for_every_size():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    w = torch.randint(-127, 128, (24, 64), dtype=torch.int8)
    scale = torch.rand(24, 1)
    compiled = torch.compile(lambda x: ops.int8_linear(x, w, scale, group=64), backend=counter, fullgraph=True, dynamic=True)
    for m in (2, 5, 300):
        x = torch.randn(m, 64)
        assert torch.equal(compiled(x), ops.int8_linear(x, w, scale, group=64))
    assert counter.frame_count == 1


def test_where_triton_cannot_launch_the_reason_and_the_remedy_are_said(monkeypatch, caplog):
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    from int8_compile.int8.kernels import triton_kernels

    assert with_triton.triton_failure(DEVICE) == "" and not caplog.text

    def broken(x):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")
    monkeypatch.setattr(triton_kernels, "quant_rows", broken)
    reason = with_triton.triton_failure(DEVICE)
    assert "Failed to find C compiler" in reason and "apt install gcc" in reason and "more" not in reason
    assert "torch._int_mm multiplies" in caplog.text


def test_comfy_kitchens_gemm_is_a_candidate_where_it_agrees():
    from int8_compile.int8.kernels import autotune, comfy_kitchen_gemm

    q, w = (torch.randint(-127, 128, (rows, 512), dtype=torch.int8, device=DEVICE) for rows in (70, 96))
    reason = comfy_kitchen_gemm.why_not(q.device)
    if not CUDA:
        assert reason == "comfy_kitchen's cuda backend is off"
        return
    assert ("comfy_kitchen" in autotune.candidates(q, w)) == (reason == "")
    if reason == "":
        for dtype in (torch.bfloat16, torch.float16):
            arguments = q, torch.rand(70, device=DEVICE) / 512, w, torch.rand(96, 1, device=DEVICE) / 512, None, dtype
            want = reference.int8_gemm(*arguments)
            torch.testing.assert_close(comfy_kitchen_gemm.int8_gemm(*arguments), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
