"""One quantization of x serves q, k and v where nothing is compiled, and never one of other values."""
from __future__ import annotations

import gc
import types

import pytest
import torch

from .conftest import Ops

pytestmark = pytest.mark.comfy


def attention(model):
    return model.get_model_object("diffusion_model.blocks.0.self_attn")


@pytest.fixture
def quantized(wan, nodes, comfy, monkeypatch):
    from int8_compile.int8 import shared_input
    monkeypatch.setattr(shared_input, "TRUSTED", "")  # these tests call the layers, as ComfyUI's code does
    model = nodes.INT8QuantizeModel(wan, method="convrot")
    comfy.model_management.load_models_gpu([model])
    yield model
    model.unpatch_model()


def run(parent, change=lambda x: None):
    """What q, k and v make of one x that is changed before v sees it, and how often it was quantized."""
    with Ops() as ops:
        x = torch.randn(1, 37, parent.q.in_features, generator=torch.Generator().manual_seed(1))
        results = [parent.q(x), parent.k(x)]
        change(x)
        results.append(parent.v(x))
    return results, ops.counts["int8_compile::quant_rows"]


@pytest.mark.parametrize("inference", [True, False])
def test_q_k_and_v_quantize_their_input_once(quantized, inference):
    parent = attention(quantized)
    with torch.inference_mode(inference):
        want, first = run(parent)
        again, later = run(parent)
    # The first time proves that the siblings see the same values.
    assert (first, later) == (3, 1)
    assert all(torch.equal(a, b) for a, b in zip(want, again))
    for layer in (parent.q, parent.k, parent.v):
        layer.shared_input = None
    alone, counted = run(parent)
    assert counted == 3 and all(torch.equal(a, b) for a, b in zip(want, alone))


def test_a_whole_model_samples_the_same(wan, nodes, sample):
    model = nodes.INT8QuantizeModel(wan, method="convrot")
    want = sample(model)
    for name in model.object_patches:
        model.get_model_object(name).shared_input = None
    assert torch.equal(sample(model), want)


@pytest.mark.parametrize("inference", [True, False])
def test_an_input_changed_between_siblings_is_quantized_anew(quantized, inference):
    parent = attention(quantized)
    with torch.inference_mode(inference):
        for _ in range(3):
            (_, _, got), _ = run(parent, change=lambda x: x.mul_(-0.5).add_(1))
            x = torch.randn(1, 37, parent.q.in_features, generator=torch.Generator().manual_seed(1)).mul_(-0.5).add_(1)
            assert torch.equal(got, parent.v(x))


def test_other_activation_or_smoothing_is_not_shared(quantized):
    parent = attention(quantized)
    x = torch.randn(1, 5, parent.q.in_features)
    for _ in range(2):
        want = parent.q(torch.nn.functional.gelu(x, approximate="tanh"))
        parent.k(x)
        assert torch.allclose(parent.q(x, act="gelu_tanh"), want, atol=1e-2 * float(want.abs().max()))


def test_the_rows_go_with_their_input(quantized):
    parent = attention(quantized)
    x = torch.randn(1, 5, parent.q.in_features)
    parent.q(x)
    assert parent.q.shared_input._last is not None
    del x
    gc.collect()
    assert parent.q.shared_input._last is None


def halved(module, args):
    args[0].mul_(0.5)


def foreign(forward):
    """A pack's attention, which adds to its input between q and the rest."""
    def attention(self, x, freqs, *args, **kwargs):
        self.q(x)
        x += 0.5
        return forward(self, x, freqs, *args, **kwargs)
    return attention


@pytest.mark.rotating
@pytest.mark.parametrize("kind", ["hook", "method", "class"])
@pytest.mark.parametrize("compile", [False, True])
def test_what_another_pack_changes_between_siblings_counts_whatever_ran_before(load, nodes, sample, comfy, monkeypatch, kind, compile):
    def patched(model, patch):
        with monkeypatch.context() as changes:
            attentions = [block.self_attn for block in model.model.diffusion_model.blocks]
            if kind == "hook":
                hooks = [patch.get_model_object(f"diffusion_model.blocks.{i}.self_attn.k").register_forward_pre_hook(halved)
                         for i in range(len(attentions))]
            elif kind == "method":
                for attention in attentions:
                    changes.setattr(attention, "forward", types.MethodType(foreign(type(attention).forward), attention), raising=False)
            else:
                changes.setattr(type(attentions[0]), "forward", foreign(type(attentions[0]).forward))
            result = sample(patch)
            for hook in hooks if kind == "hook" else ():
                hook.remove()
        return result
    images = []
    for plain_first in (True, False):
        model = load("tiny_wan")
        quantized = nodes.INT8QuantizeModel(model, method="rowwise")
        plain = sample(quantized) if plain_first else None
        chosen = nodes.CompileModel(quantized, backend="eager") if compile else quantized
        images.append((plain, patched(model, chosen)))
    (plain, after), (_, alone) = images
    assert torch.equal(after, alone) and not torch.equal(plain, alone)
