"""The Triton quantizer, on a GPU or in the interpreter: any length of row, activations at their extremes, and what tf32 costs."""
from __future__ import annotations

import importlib.util

import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed on this platform", allow_module_level=True)

from int8_compile.int8.hadamard import hadamard
from int8_compile.int8.kernels import reference, triton_quant
from int8_compile.int8.plan import smoothing_scale

from .conftest import CUDA, On

QUANT = On(triton_quant).quant_rows


def assert_agrees(x, group=0, act="none", scale=None):
    q, s = QUANT(x, group, act, scale, precision="tf32x3")
    want_q, want_s = reference.quant_rows(x, group, act, scale)
    torch.testing.assert_close(s, want_s, rtol=1e-5, atol=0, equal_nan=True)
    # A value on a rounding boundary may fall to either side, where sums are taken in another order.
    assert (q.int() - want_q.int()).abs().max() <= 1
    assert (q != want_q).sum() <= max(2, 1e-3 * q.numel())
    if CUDA and group:  # what half-precision x runs there
        q, s = QUANT(x, group, act, scale, precision="tf32")
        torch.testing.assert_close(s, want_s, rtol=1e-3, atol=0, equal_nan=True)
        assert (q.int() - want_q.int()).abs().max() <= 1 and (q != want_q).sum() <= max(2, 0.05 * q.numel())


@pytest.mark.parametrize("k", [256, 257])
def test_rows_are_as_right_when_their_kernel_is_launched_again_at_any_address(k):
    """From the second call on it is bound, see bound.py; x[1:] of odd rows begins at an odd address."""
    for m in (5, 5, 5, 1, 9):
        x = torch.randn(m + 1, k)
        assert_agrees(x)
        assert_agrees(x[1:])


@pytest.mark.parametrize("k", [1, 17, 255, 257, 1000, 3072, 3840, 8960, 13824, 18944, 24576, 24577, 28672, 40000], ids=str)
@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_rows_of_any_length(k, act):
    x = torch.randn(3, 2 * k if act == "swiglu" else k)
    x[1, k // 2] = 300
    group = next((g for g in (256, 64, 16) if k % g == 0), 0)
    assert_agrees(x, group, act)
    assert_agrees(x, 0, act, torch.rand(k) + 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_are_not_neighbours(dtype):
    wide = torch.randn(6, 2000).to(dtype)
    for x in (wide[::2, 100:612], wide[:, ::2], wide.t()[:512].t()):
        assert_agrees(x, 16 if x.shape[1] % 16 == 0 else 0, "gelu_tanh")


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("largest", [5.0, 88.0, 200.0, 65504.0, 1e18])
def test_activations_of_large_values(act, largest):
    x = torch.linspace(-largest, largest, 512).repeat(2, 1)
    if act == "swiglu":
        x = torch.cat((x, torch.randn(2, 512)), 1)
    assert_agrees(x, 0, act)


def test_zero_rows_and_what_is_not_a_number():
    x = torch.randn(5, 512)
    x[0], x[1, 7], x[2, 9], x[3] = 0, float("nan"), float("inf"), 1e-38
    for group in (0, 256):
        q, s = QUANT(x, group)
        assert not q[0].any() and not q[3].any() and s[0] == s[3] == torch.tensor(reference.MIN_QUANT_SCALE)
        assert s[1].isnan() and not s[2].isfinite() and s[4].isfinite()


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="Unknown activation 'relu'"):
        QUANT(torch.randn(1, 16), 0, "relu")


@pytest.mark.parametrize("group", [16, 64, 256])
def test_factors_make_the_whole_rotation(group):
    inner, second = triton_quant.factors(group, torch.device("cpu"))
    outer = group // 16
    assert torch.equal(torch.kron(second[:outer, :outer], inner), hadamard(group, torch.device("cpu")))


def distributions():
    x = torch.randn(64, 3072)
    some, few = x.clone(), x.clone()
    some[:, 7::100] *= 30
    few[:, [7, 300, 600, 2000]] *= 100
    return {"gaussian": x, "some channels": some, "few channels": few, "offset": x + 5 * torch.randn(64, 1).sign()}


@pytest.mark.parametrize("group", [64, 256])
@pytest.mark.parametrize("act", ["none", "gelu_tanh"])
@pytest.mark.parametrize("smooth", [False, True], ids=["", "smooth"])
def test_tf32_costs_less_than_a_tenth_of_a_decibel(group, act, smooth):
    """Of the SQNR of a layer's output. The kernel rounds to tf32 itself, so that here the same values enter the dots as on a GPU."""
    print("seed", torch.seed())
    weight = torch.randn(256, 3072) / 55
    for name, x in distributions().items():
        x = x.bfloat16()
        exact = reference.activation(x.float(), act)
        scale = smoothing_scale(weight, exact.abs().amax(0), 0.5) if smooth else None
        qw, ws = reference.quant_rows(weight / (1 if scale is None else scale), group)
        y = exact @ weight.t()

        def sqnr(q, s, qw=qw, ws=ws, y=y):
            got = (q.float() @ qw.float().t()) * s[:, None] * ws
            return 10 * torch.log10(y.square().mean() / (got - y).square().mean())

        ours = sqnr(*QUANT(x, group, act, scale, precision="tf32"))
        best = sqnr(*reference.quant_rows(x, group, act, scale))
        print(f"{name}: {best:.3f} dB, tf32 {ours - best:+.4f}")
        assert ours > best - 0.1, name


def test_tf32_keeps_eleven_bits_to_nearest():
    x = torch.randn(64, 256) * 10.0 ** torch.randint(-20, 20, (64, 1))
    rounded = (x + x * 8192) - x * 8192
    assert not (rounded.view(torch.int32) & 0x1FFF).any()
    assert ((rounded - x).abs() <= 2.0 ** -11 * x.abs()).all()


NORMS = {"layer norm": "mean rstd weight bias", "layer norm without weight": "mean rstd", "rms norm": "rstd weight",
         "adaptive layer norm": "mean rstd factor shift plus_one", "modulation": "factor shift",
         "all": "mean rstd weight bias factor shift", "shift": "shift", "bias": "bias", "nothing": ""}


def normed_of(x, names, images=1, dtype=torch.float32, strided=False):
    """Normed of names for x [M, K]: what a model would have of it. strided: factor and shift as mod.chunk(6, -1) gives them."""
    k, names = x.shape[1], names.split()
    mean = x.float().mean(-1)
    given = dict(mean=mean, rstd=(x.float() - mean[:, None]).square().mean(-1).add(1e-6).rsqrt(), weight=torch.rand(k).to(dtype) + 0.5,
                 bias=torch.randn(k).to(dtype))
    modulation = torch.randn(images, 6 * k).to(dtype).chunk(6, -1)
    given["shift"], given["factor"] = modulation[:2] if strided else (each.contiguous() for each in modulation[:2])
    return reference.Normed(**{name: given[name] for name in names if name in given}, plus_one="plus_one" in names)


def assert_agrees_after(x, normed, group=0, scale=None):
    """Bit for bit with the rows normed first. With the oracle too where nothing is rotated: it divides by a row's scale, so that a value on
    a rounding boundary may fall to either side."""
    q, s = On(triton_quant).norm_quant_rows(x, normed, group, scale, precision="tf32x3")
    want_q, want_s = QUANT(reference.modulated(x.float(), normed), group, "none", scale, precision="tf32x3")
    assert torch.equal(q, want_q) and torch.equal(s, want_s)
    want_q, want_s = reference.norm_quant_rows(x, normed, group, scale)
    if CUDA or group:
        torch.testing.assert_close(s, want_s, rtol=1e-5, atol=0)
        assert (q.int() - want_q.int()).abs().max() <= 1 and (q != want_q).sum() <= max(2, 1e-3 * q.numel())
    else:
        assert torch.equal(s, want_s) and torch.equal(q, want_q)


@pytest.mark.parametrize("names", NORMS.values(), ids=NORMS)
def test_a_norm_and_a_modulation_before_it_are_as_exact_as_apart(names):
    torch.manual_seed(0)
    for k, group, images in ((48, 0, 2), (1000, 0, 4), (1000, 0, 1), (48, 16, 4), (320, 64, 2), (512, 256, 1)):
        x = torch.randn(4, k) * 3 + 1
        assert_agrees_after(x, normed_of(x, names, images), group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
def test_a_modulation_is_of_any_type_and_any_rows_of_its_own(dtype, strided):
    torch.manual_seed(0)
    wide = torch.randn(8, 700).bfloat16()
    for x, images, group in ((wide[:, 50:562], 2, 0), (wide[::2, :512], 4, 64), (wide[:4, :512].t().contiguous().t(), 1, 0)):
        normed = normed_of(x, "mean rstd factor shift plus_one", images, dtype, strided)
        assert_agrees_after(x, normed, group, torch.rand(512) + 0.5)
        assert_agrees_after(x, normed._replace(mean=torch.stack((normed.mean, normed.rstd), 1)[:, 0], factor=normed.factor[:1]))
    x = wide[:, :512]
    assert_agrees_after(x, normed_of(x, "factor shift", 2)._replace(shift=torch.randn(512, 2).t()))


@pytest.mark.parametrize("k", [1, 255, 3840, 8193, 24577, 28672], ids=str)
def test_rows_of_any_length_are_normed(k):
    torch.manual_seed(0)
    x = torch.randn(2, k).bfloat16()
    for names in ("mean rstd weight bias factor shift plus_one", "mean"):
        assert_agrees_after(x, normed_of(x, names, 2, strided=True), scale=torch.rand(k).bfloat16() + 0.5)
    assert On(triton_quant).norm_quant_rows(x[:0], normed_of(x[:0], names, 1))[0].shape == (0, k)
