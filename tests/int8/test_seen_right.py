"""Kernels that compute wrong results are found at their first call, and are not used; right ones are never taken for wrong."""
from __future__ import annotations

import functools
import logging
import random

import pytest
import torch
from int8_compile.int8.kernels import autotune, cpu, ops, reference, seen_right, torch_mm
from int8_compile.int8.kernels.tuning import Choices

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch):
    for name in ("_RIGHT", "_WRONG", "_not_before"):
        monkeypatch.setattr(seen_right, name, {})


def operands(m=70, k=1536, n=48, dtype=torch.bfloat16, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, generator=g) for rows in (m, n))
    s, ws = torch.rand(m, generator=g) + 0.01, torch.rand(n, 1, generator=g) / 127
    return q, s, w, ws, torch.randn(n, generator=g).to(dtype) if bias else None, dtype


def right_gemm(q, s, w, ws, bias, dtype):
    return reference.int8_gemm(q, s, w, ws, bias, dtype)


def drops_the_last_tile_of_k(q, s, w, ws, bias, dtype):
    return right_gemm(q[:, :-32].contiguous(), s, w[:, :-32].contiguous(), ws, bias, dtype)


def ignores_the_bias(q, s, w, ws, bias, dtype):
    return right_gemm(q, s, w, ws, None, dtype)


def one_scale_for_all_columns(q, s, w, ws, bias, dtype):
    return right_gemm(q, s, w, ws[:1].expand_as(ws), bias, dtype)


def last_row_is_zero(q, s, w, ws, bias, dtype):
    y = right_gemm(q, s, w, ws, bias, dtype)
    y[-1] = 0
    return y


def last_columns_are_shifted(q, s, w, ws, bias, dtype):
    y = right_gemm(q, s, w, ws, bias, dtype)
    y[:, -8:] = y[:, -8:].roll(1, 1)
    return y


def a_tile_is_not_a_number(q, s, w, ws, bias, dtype):
    y = right_gemm(q, s, w, ws, bias, dtype)
    y[:16, :16] = torch.nan
    return y


def saturates_its_sums(q, s, w, ws, bias, dtype):
    acc = (q.double() @ w.double().t()).clamp(-(1 << 15), 1 << 15)
    return reference.epilogue(acc, s, ws, bias, dtype)


def wrong_beyond_64_rows(q, s, w, ws, bias, dtype):
    y = right_gemm(q, s, w, ws, bias, dtype)
    y[64:] *= 1.5
    return y


GEMM_FAULTS = (drops_the_last_tile_of_k, ignores_the_bias, one_scale_for_all_columns, last_row_is_zero, last_columns_are_shifted,
               a_tile_is_not_a_number, saturates_its_sums, wrong_beyond_64_rows)


@pytest.mark.parametrize("fault", GEMM_FAULTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_gemm_is_not_used(fault, dtype, monkeypatch, caplog):
    kept = []
    monkeypatch.setattr(cpu, "int8_gemm", fault)
    monkeypatch.setattr(seen_right, "record", lambda *failure: kept.append(failure) or "/kept.json")
    arguments = operands(dtype=dtype)
    expected = right_gemm(*arguments)
    name = str(dtype).removeprefix("torch.")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            y = ops.int8_gemm(*arguments[:5], name, "auto")
            torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
        other = operands(m=300, n=40, dtype=dtype, seed=1)  # another shape does not try it again
        torch.testing.assert_close(ops.int8_gemm(*other[:5], name, "auto"), right_gemm(*other), rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert len(kept) == 1 and kept[0][0] == "cpu"
    assert len(caplog.records) == 1 and "cpu computes wrong results on cpu" in caplog.text and "/kept.json" in caplog.text
    assert seen_right.looked_at()[0] == 2 and list(seen_right.looked_at()[1]) == ["cpu on cpu"]


def test_a_fault_of_some_sizes_is_found_when_they_come(monkeypatch):
    monkeypatch.setattr(cpu, "int8_gemm", wrong_beyond_64_rows)
    for rows, wrong in ((32, False), (64, False), (65, True)):
        arguments = operands(m=rows, dtype=torch.float32)
        torch.testing.assert_close(ops.int8_gemm(*arguments[:5], "float32", "auto"), right_gemm(*arguments))
        assert seen_right.is_wrong(torch.device("cpu"), "cpu") == wrong


def halved_scale(x, group, act, pre_quant_scale):
    q, s = reference.quant_rows(x, group, act, pre_quant_scale)
    return q, s / 2


def rounds_down(x, group, act, pre_quant_scale):
    x = reference.prepared(x.float(), group, act, pre_quant_scale)
    s = reference.row_scale(x)
    return (x / s[:, None]).floor().clamp(-127, 127).to(torch.int8), s


def scale_of_the_first_row(x, group, act, pre_quant_scale):
    x = reference.prepared(x.float(), group, act, pre_quant_scale)
    s = reference.row_scale(x)[:1].expand(x.shape[0]).contiguous()
    return (x / s[:, None]).round().clamp(-127, 127).to(torch.int8), s


def does_not_rotate(x, group, act, pre_quant_scale):
    return reference.quant_rows(x, 0, act, pre_quant_scale)


def no_activation(x, group, act, pre_quant_scale):
    return reference.quant_rows(x, group, "none", pre_quant_scale)


def no_smoothing(x, group, act, pre_quant_scale):
    return reference.quant_rows(x, group, act, None)


@pytest.mark.parametrize("fault", (halved_scale, rounds_down, scale_of_the_first_row, does_not_rotate, no_activation, no_smoothing))
def test_a_wrong_quantizer_is_not_used(fault, monkeypatch, caplog):
    monkeypatch.setattr(cpu, "quant_rows", fault)
    x, smooth = torch.randn(40, 256), torch.rand(256) + 0.5
    q, s = ops.quant_rows(x, 64, "gelu_tanh", smooth, "auto")
    expected_q, expected_s = reference.quant_rows(x, 64, "gelu_tanh", smooth)
    assert torch.equal(q, expected_q) and torch.equal(s, expected_s)
    assert "cpu computes wrong results" in caplog.text
    again, _ = ops.quant_rows(x, 64, "gelu_tanh", smooth, "auto")
    assert torch.equal(again, expected_q)


def test_right_kernels_are_not_taken_for_wrong(caplog):
    """Odd shapes, outliers, zeros, huge and tiny values, infinities and NaN of the model's own, all of this CPU's kernels and torch's."""
    rng = random.Random()
    seed = rng.randrange(1 << 30)
    rng.seed(seed)
    torch.manual_seed(seed)
    for i in range(60):
        k, m, n = rng.choice((16, 64, 256, 272, 1040, 2048)), rng.choice((1, 2, 3, 17, 65, 130)), rng.choice((1, 8, 24, 129, 256))
        dtype, act = rng.choice(DTYPES), rng.choice(reference.ACTIVATIONS)
        group = rng.choice([g for g in (0, 16, 64, 256) if not g or k % g == 0])
        powers = (-3, 0) if dtype is torch.float16 else (-20, -3, 0, 2, 3)
        x = torch.randn(m, 2 * k if act == "swiglu" else k) * 10.0 ** rng.choice(powers)
        x[:, rng.randrange(k)] *= rng.choice((1, 100, 1000))
        x[rng.randrange(m)] = rng.choice((0.0, -6.0, -10.0, 1e-30, torch.inf, torch.nan))
        smooth = rng.choice((None, torch.rand(k) * 3 + 1e-3))
        x = x.to(dtype)
        w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        ws = rng.choice((torch.rand(n, 1) * 1e-2, torch.rand(1, 1)))
        bias = rng.choice((None, (torch.randn(n) * 10.0 ** rng.randrange(-3, 4)).to(dtype)))
        kernel = rng.choice(("auto", "torch"))
        rows = ops.quant_rows(x, group, act, smooth, kernel)
        ops.int8_gemm(*rows, w, ws, bias, str(dtype).removeprefix("torch."), kernel)
        assert not seen_right.looked_at()[1], f"seed {seed}, case {i}"
    assert not caplog.records


def test_what_is_near_the_largest_number_may_overflow():
    q, s, w, ws, bias, dtype = operands(dtype=torch.float16)
    s = s * 1e4
    y = right_gemm(q, s, w, ws, bias, dtype)
    assert y.isinf().any() and y.isfinite().any()
    assert not seen_right.Product((q, s, w, ws, bias, dtype)).error(y)
    y[y.isfinite()] = torch.inf
    assert seen_right.Product((q, s, w, ws, bias, dtype)).error(y)


def test_out_of_memory_in_a_check_is_tried_later(monkeypatch, caplog):
    def full(self, y):
        raise torch.cuda.OutOfMemoryError("full")
    clock = [100.0]
    monkeypatch.setattr(seen_right.time, "monotonic", lambda: clock[0])
    arguments = operands(dtype=torch.float32)
    monkeypatch.setattr(cpu, "int8_gemm", ignores_the_bias)
    with monkeypatch.context() as patched, caplog.at_level(logging.INFO):
        patched.setattr(seen_right.Product, "error", full)
        for _ in range(3):
            ops.int8_gemm(*arguments[:5], "float32", "auto")
    assert caplog.text.count("no memory to check a kernel") == 1 and not seen_right.looked_at()[1]
    clock[0] += 2 * seen_right.RETRY
    torch.testing.assert_close(ops.int8_gemm(*arguments[:5], "float32", "auto"), right_gemm(*arguments))


def test_off_is_off(monkeypatch):
    monkeypatch.setattr(seen_right, "disabled", lambda: True)
    monkeypatch.setattr(cpu, "int8_gemm", ignores_the_bias)
    arguments = operands(dtype=torch.float32)
    assert torch.equal(ops.int8_gemm(*arguments[:5], "float32", "auto"), ignores_the_bias(*arguments))


def test_the_fastest_is_chosen_of_those_that_are_right(monkeypatch, tmp_path):
    arguments = operands(dtype=torch.float32)
    found = {"slow": torch_mm.int8_gemm, "wrong": ignores_the_bias, "fast": right_gemm}
    takes = {"slow": 3.0, "wrong": 1.0, "fast": 2.0}

    def seconds(call):
        call()
        return takes[call.args[0]]
    chosen = autotune.choose(Choices(tmp_path / "choices.json"), "shape", found, arguments, seconds)
    assert chosen == "fast" and seen_right.is_wrong(torch.device("cpu"), "wrong")


def test_a_stored_choice_that_is_wrong_here_is_not_used(monkeypatch):
    arguments = operands(dtype=torch.float32)
    found = {"stored": functools.partial(ignores_the_bias), "next": right_gemm}
    taken, y = autotune._launched(torch.device("cpu"), "stored", found, arguments)
    assert taken is right_gemm and torch.equal(y, right_gemm(*arguments))
    found = {"stored": ignores_the_bias}
    monkeypatch.setattr(torch_mm, "int8_gemm", last_row_is_zero)
    taken, y = autotune._launched(torch.device("cpu"), "stored", found, arguments)
    assert taken is reference.int8_gemm and torch.equal(y, right_gemm(*arguments))


@pytest.mark.parametrize("k", [64, 1536, 4096])
def test_a_kernel_may_compute_float64_in_fp32(k):
    """As they all do; the check against eager asks for float64 when it wants to know better."""
    for seed in range(5):
        x = torch.randn(256, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        _, _, w, ws, bias, _ = operands(1, k, seed=seed)
        assert ops.int8_linear(x, w, ws, bias.double(), group=16).dtype is torch.float64
    assert not seen_right.looked_at()[1]
