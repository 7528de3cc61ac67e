"""What inductor makes of INT8 layers."""
from __future__ import annotations

import functools

import pytest
import torch
from int8_compile.compile.engine import CompiledModule
from int8_compile.compile.options import CompileOptions
from int8_compile.int8.kernels import ops, reference, seen_right


class Attention(torch.nn.Module):
    """q, k and v of one x, and a fourth layer that gets another."""

    def __init__(self, width=64):
        super().__init__()
        for name in "qkvo":
            q, s = reference.quant_rows(torch.randn(width, width), 64)
            self.register_buffer(name, q)
            self.register_buffer(f"{name}_scale", s[:, None])
        self.up, self.down = torch.nn.Linear(width, width), torch.nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (ops.int8_linear(x, getattr(self, n), getattr(self, f"{n}_scale"), group=64) for n in "qkv")
        x = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return ops.int8_linear(x, self.o, self.o_scale, group=64)


@pytest.fixture
def quantizations(monkeypatch):
    """Shapes of what is quantized, as it runs."""
    seen = []
    real = ops.implementation

    def watched(kernel, device):
        class Watched:
            int8_gemm = staticmethod(real(kernel, device).int8_gemm)

            @staticmethod
            def quant_rows(x, *args):
                seen.append(tuple(x.shape))
                return real(kernel, device).quant_rows(x, *args)
        return Watched
    monkeypatch.setattr(ops, "implementation", watched)
    monkeypatch.setattr(seen_right, "_RIGHT", {})  # what other tests have run
    return seen


def test_compiled_q_k_and_v_share_one_quantization_of_x(quantizations):
    model = torch.nn.Sequential(Attention(), Attention()).requires_grad_(False)
    x = torch.randn(2, 10, 64)
    want = model(x)
    assert len(quantizations) == 8
    quantizations.clear()
    compiled = CompiledModule(CompileOptions())
    with torch.inference_mode():
        got = compiled.run(model, lambda: model(x), filter_guards=True, passthrough=lambda error: False)
    assert compiled.report.failure == "" and quantizations == [(20, 64)] * 4
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


class Normed(torch.nn.Module):
    def __init__(self, width=64):
        super().__init__()
        q, s = reference.quant_rows(torch.randn(width, width))
        self.register_buffer("weight", q)
        self.register_buffer("scale", s[:, None])

    def forward(self, x):
        return x + ops.int8_linear(torch.nn.functional.layer_norm(x, x.shape[-1:]), self.weight, self.scale)


def test_a_kernel_that_fails_where_eager_does_not_call_it_is_not_the_models_error(monkeypatch):
    """What the graph pass has put there: the model runs eager, and the image is right."""
    model = torch.nn.Sequential(Normed(), Normed()).requires_grad_(False)
    x = torch.randn(2, 10, 64)
    want = model(x)

    # Raised by what has no Python code, so that the last frame is in int8/kernels.
    monkeypatch.setattr(seen_right, "bucket", functools.partial(int, "no number"))
    monkeypatch.setattr(seen_right, "quant_rows", lambda kernel, functions, *arguments: reference.quant_rows(*arguments))
    monkeypatch.setattr(seen_right, "int8_gemm", lambda kernel, functions, *arguments: reference.int8_gemm(*arguments))
    compiled = CompiledModule(CompileOptions())
    with torch.inference_mode():
        got = compiled.run(model, lambda: model(x), filter_guards=True, passthrough=lambda error: False)
    assert torch.equal(got, want) and "no number" in compiled.report.failure
