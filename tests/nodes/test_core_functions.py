"""INT8 layers under the functions of ComfyUI that take a Linear's weight themselves, as old as 0.26 and as new as 0.38 and kitchen 0.2.40.

Where the ComfyUI at hand is older, stand-ins written from the description of the newer functions take their place.
"""
from __future__ import annotations

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from toys import difference

from .conftest import Ops

pytestmark = pytest.mark.comfy

K, N = 256, 128
INT8_KINDS = ("core INT8", "rowwise", "convrot", "smoothquant")
KINDS = ("float", *INT8_KINDS)
# Of an INT8 multiplication of such layers, relative.
NOISE = 0.03
ACTIVATIONS = {
    None: lambda x, w: x,
    "none": lambda x, w: x,
    "gelu_tanh": lambda x, w: F.gelu(x, approximate="tanh"),
    "swiglu": lambda x, w: F.silu(x[..., :K]) * x[..., K:],
    "rms_norm": lambda x, w: F.rms_norm(x, (K,), w, 1e-6),
    "new": lambda x, w: x.tanh(),  # an activation that the pack has never heard of
}


@pytest.fixture
def core(comfy):
    from int8_compile.compile.comfyui import int8_layer

    return int8_layer


@pytest.fixture
def make(comfy, core):
    """Layers [N, K] of one weight: in float, as core loads INT8, and of the pack by each method."""
    from int8_compile.int8.plan import LayerPlan

    generator = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(N, K, generator=generator) / 16, torch.randn(N, generator=generator)
    cpu = torch.device("cpu")

    def make(kind, kernel="auto"):
        if kind == "float":
            layer = comfy.ops.manual_cast.Linear(K, N, dtype=torch.float32)
            layer.weight, layer.bias = (torch.nn.Parameter(t.clone(), requires_grad=False) for t in (weight, bias))
            return layer
        smoothing = torch.logspace(-0.5, 0.5, K) if kind == "smoothquant" else None
        ours = core._int8_layer(weight, bias, LayerPlan("x", "convrot" if kind == "core INT8" else kind, smoothing), kernel, cpu, cpu,
                                torch.float32)
        if kind != "core INT8":
            return ours
        native = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32).Linear(K, N, device=cpu, dtype=torch.float32)
        native.weight, native.bias, native.quant_format, native.layout_type = ours.weight, ours.bias, core.QUANT_FORMAT, core.INT8_LAYOUT
        return native
    make.weight, make.bias = weight, bias
    return make


def eager_activation(comfy, x, input_act, act_weight, act_eps):
    if input_act is None:
        return x
    if input_act == "rms_norm":
        return F.rms_norm(x, (x.shape[-1],), act_weight, act_eps)
    return {**comfy.ops.INPUT_ACT_EAGER, "new": torch.tanh}[input_act](x)


def past_forward(comfy, linear, x):
    """What core makes of the layer's INT8 weight without asking the layer."""
    return F.linear(x, linear.weight, linear.bias)


def is_int8(comfy, linear):
    weight = linear.weight
    return (not comfy.model_management.in_training and isinstance(weight, comfy.ops.QuantizedTensor)
            and weight._layout_cls == "TensorWiseINT8Layout" and not weight._params.transposed)


def core_033(comfy):
    def linear_input_act(linear, x, input_act):
        x = eager_activation(comfy, x, input_act, None, 0.0)
        return past_forward(comfy, linear, x) if is_int8(comfy, linear) else linear(x)
    return linear_input_act


def core_036(comfy):
    def linear_input_act(linear, x, input_act, act_weight=None, act_eps=0.0, residual=None, residual_scale=None):
        x = eager_activation(comfy, x, input_act, act_weight, act_eps)
        asked = is_int8(comfy, linear) and not getattr(linear, "_full_precision_mm", False)
        y = past_forward(comfy, linear, x) if asked else linear(x)
        return y if residual is None else torch.addcmul(residual, y, residual_scale)
    return linear_input_act


def core_to_come(comfy):
    """With an argument that does not exist yet, and through the tensor where it can answer (kitchen 0.2.40)."""
    def linear_input_act(linear, x, input_act, act_weight=None, act_eps=0.0, residual=None, residual_scale=None, *, output_scale=1.0):
        asked = is_int8(comfy, linear) and not getattr(linear, "_full_precision_mm", False)
        if asked and hasattr(linear.weight, "linear_input_act") and input_act != "new":
            y = linear.weight.linear_input_act(x, linear.bias, input_act, act_weight, act_eps)
        else:
            x = eager_activation(comfy, x, input_act, act_weight, act_eps)
            y = past_forward(comfy, linear, x) if asked else linear(x)
        return output_scale * (y if residual is None else torch.addcmul(residual, y, residual_scale))
    return linear_input_act


CORES = {"0.33": core_033, "0.36": core_036, "to come": core_to_come}


@pytest.fixture
def with_core(comfy, core, monkeypatch):
    """ComfyUI with that linear_input_act, and the pack's in front of it or not."""
    def with_core(version, patched=True):
        monkeypatch.setattr(comfy.ops, "linear_input_act", CORES[version](comfy))
        if patched:
            core.patch_linear_input_act()
        return comfy.ops.linear_input_act
    return with_core


def inputs(act):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, 9, 2 * K if act == "swiglu" else K, generator=generator)
    return x, torch.rand(K, generator=generator) + 0.5, torch.randn(2, 9, N, generator=generator), torch.randn(N, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ["gelu_tanh", "swiglu", "new"])
@pytest.mark.parametrize("version", CORES)
def test_linear_of_an_activation_is_right_for_every_kind_of_layer(with_core, make, version, act, kind):
    x, *_ = inputs(act)
    want = F.linear(ACTIVATIONS[act](x, None), make.weight, make.bias)
    assert difference(with_core(version)(make(kind), x, act), want) < NOISE


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act != "none"])
@pytest.mark.parametrize("version", ["0.36", "to come"])
def test_residuals_and_norms_of_newer_cores_are_right_with_and_without_the_packs_function(with_core, make, version, act, kind, patched):
    x, norm, residual, scale = inputs(act)
    linear_input_act, layer = with_core(version, patched), make(kind)
    want = F.linear(ACTIVATIONS[act](x, norm), make.weight, make.bias)
    arguments = {"act_weight": norm, "act_eps": 1e-6} if act == "rms_norm" else {}
    assert difference(linear_input_act(layer, x, act, **arguments), want) < NOISE
    got = linear_input_act(layer, x, act, norm if act == "rms_norm" else None, 1e-6, residual=residual, residual_scale=scale)
    assert difference(got, residual + scale * want) < NOISE
    if version == "to come":
        assert difference(linear_input_act(layer, x, act, **arguments, output_scale=3.0), 3 * want) < NOISE


@pytest.mark.parametrize("kind", INT8_KINDS[1:])
@pytest.mark.parametrize("act", [None, "none"])
@pytest.mark.parametrize("version", CORES)
def test_a_call_without_an_activation_is_right_for_our_layers_on_every_core(with_core, make, version, act, kind):
    """Core itself knows "none" by this name in the kernels only."""
    x, _, residual, scale = inputs(act)
    want = F.linear(x, make.weight, make.bias)
    assert difference(with_core(version)(make(kind), x, act), want) < NOISE
    if version != "0.33":
        got = with_core(version)(make(kind), x, act, residual=residual, residual_scale=scale)
        assert difference(got, residual + scale * want) < NOISE


@pytest.mark.parametrize("version", CORES)
def test_what_core_refuses_is_refused_by_core(with_core, make, version):
    with pytest.raises(TypeError, match="unexpected keyword argument 'never'"):
        with_core(version)(make("float"), torch.randn(1, K), "gelu_tanh", never=1)
    with pytest.raises(KeyError):
        with_core(version)(make("smoothquant"), torch.randn(1, K), "unknown to all")


@pytest.mark.parametrize("kind", INT8_KINDS[1:])
@pytest.mark.parametrize("act", ["gelu_tanh", "swiglu"])
def test_the_real_function_of_this_core_is_right_too(comfy, core, make, kind, act):
    core.patch_linear_input_act()
    x, *_ = inputs(act)
    want = F.linear(ACTIVATIONS[act](x, None), make.weight, make.bias)
    assert difference(comfy.ops.linear_input_act(make(kind), x, act), want) < NOISE


def of_other_names(core):
    return lambda module, given, activation: core(module, given, activation)


def open_and_looking(core):
    def linear_input_act(linear, x, act, *args, **kwargs):
        assert linear.weight.device == x.device
        return core(linear, x, act, *args, **kwargs)
    return linear_input_act


def of_newer_names(core):
    def linear_input_act(linear, x, input_act, act_weight=None, act_eps=1e-6, **more):
        return core(linear, x, input_act, **more)
    return linear_input_act


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapper", [of_other_names, open_and_looking, of_newer_names])
@pytest.mark.parametrize("version", CORES)
def test_another_packs_wrapper_of_it_is_no_reason_to_do_without(comfy, with_core, core, make, monkeypatch, version, wrapper, kind):
    x, _, residual, scale = inputs("gelu_tanh")
    want = F.linear(ACTIVATIONS["gelu_tanh"](x, None), make.weight, make.bias)
    monkeypatch.setattr(comfy.ops, "linear_input_act", wrapper(with_core(version, patched=False)))
    core.patch_linear_input_act()
    assert difference(comfy.ops.linear_input_act(make(kind), x, "gelu_tanh"), want) < NOISE
    layer = make(kind)
    layer.forward = functools.partial(type(layer).forward, layer)  # as a bypass LoRA's: core's function is asked
    assert difference(comfy.ops.linear_input_act(layer, x, "gelu_tanh"), want) < NOISE
    if wrapper is not of_other_names and version != "0.33":
        got = comfy.ops.linear_input_act(make(kind), x, "gelu_tanh", residual=residual, residual_scale=scale)
        assert difference(got, residual + scale * want) < NOISE


@pytest.mark.parametrize("kind", INT8_KINDS)
def test_a_function_of_another_pack_that_looks_like_ours_is_none_of_it(comfy, with_core, core, make, monkeypatch, kind):
    cores = with_core("0.33", patched=False)
    core.patch_linear_input_act()
    ours, (x, *_) = comfy.ops.linear_input_act, inputs("gelu_tanh")
    core.patch_linear_input_act()
    assert comfy.ops.linear_input_act is ours
    # With all that functools.wraps copies, and past it.
    monkeypatch.setattr(comfy.ops, "linear_input_act", functools.wraps(ours)(lambda linear, x, input_act: cores(linear, x, input_act)))
    core.patch_linear_input_act()
    want = F.linear(ACTIVATIONS["gelu_tanh"](x, None), make.weight, make.bias)
    assert difference(comfy.ops.linear_input_act(make(kind), x, "gelu_tanh"), want) < NOISE


def test_cores_own_that_is_put_back_is_replaced_before_the_next_sampling(comfy, core, nodes, sample, load, monkeypatch):
    """It would multiply smoothed layers without their factors."""
    model = nodes.INT8QuantizeModel(load("tiny_wan"), method="smoothquant")
    sample(model)
    expected = sample(model)
    monkeypatch.setattr(comfy.ops, "linear_input_act", comfy.ops.linear_input_act.__wrapped__)
    assert torch.equal(sample(model), expected)


def test_an_activation_is_handed_to_the_quantizer(with_core, make):
    """The pack's function saves a pass over the largest tensor of a block: no separate activation runs."""
    with Ops() as ops:
        with_core("0.36")(make("convrot"), torch.randn(4, K), "gelu_tanh")
    assert ops.counts["int8_compile::quant_rows"] == 1 and ops.counts["aten::gelu"] <= 1 and not ops.counts["aten::addcmul"]


@pytest.mark.parametrize("version", CORES)
def test_a_bypass_lora_on_the_layer_sees_the_activated_input(with_core, make, version):
    layer = make("convrot")
    seen, forward = [], layer.forward

    def bypass(x):
        seen.append(x)
        return forward(x)
    layer.forward = bypass
    x = torch.randn(4, K)
    with_core(version)(layer, x, "gelu_tanh")
    assert torch.equal(seen[0], F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("kind", INT8_KINDS[1:])
def test_core_asks_the_layer_before_it_takes_the_weight(make, kind, comfy):
    """Lumina 2 and Z-Image blocks (core pull request 15928) and linear_input_act leave such a layer to its own forward."""
    assert make(kind)._full_precision_mm
    assert make(kind, "comfy_kitchen")._full_precision_mm is (kind == "smoothquant")


def fused_norm(comfy, linear, x, norm):
    """As a block of Lumina 2 calls it, where kitchen has it natively: the INT8 weight past the layer, else None."""
    if (not isinstance(linear.weight, comfy.ops.QuantizedTensor) or linear._full_precision_mm or len(linear.weight_function)
            or len(linear.bias_function) or getattr(linear, "comfy_force_cast_weights", False)):
        return None
    return past_forward(comfy, linear, F.rms_norm(x, (K,), norm, 1e-6))


@pytest.mark.parametrize("kind", INT8_KINDS)
@pytest.mark.parametrize("kernel", ["auto", "comfy_kitchen"])
def test_blocks_that_take_the_weight_themselves_are_right(comfy, make, kind, kernel):
    layer = make(kind, kernel)
    x, norm, *_ = inputs(None)
    got = fused_norm(comfy, layer, x, norm)
    if got is None:
        got = layer(F.rms_norm(x, (K,), norm, 1e-6))
    assert difference(got, F.linear(F.rms_norm(x, (K,), norm, 1e-6), make.weight, make.bias)) < NOISE


@pytest.mark.parametrize("method", ["rowwise", "convrot", "smoothquant"])
def test_comfy_kitchens_kernel_runs_layers_of_every_method(make, method):
    x, *_ = inputs(None)
    layer = make(method, "comfy_kitchen")
    assert difference(layer(x), F.linear(x, make.weight, make.bias)) < NOISE
    layer.is_full_precision = True
    in_float = layer(x)
    layer.is_full_precision = False
    assert difference(layer(x), in_float) > 1e-4  # the input is rounded too


@pytest.mark.parametrize("kind", INT8_KINDS[1:])
def test_a_weight_whose_storage_core_has_reordered_is_multiplied_by_its_own_layout(comfy, make, kind):
    """QuantizedTensor.optimize_for_gemv of kitchen 0.2.40 may do so; here the columns are reversed."""
    from dataclasses import dataclass, replace

    base = comfy.quant_ops.TensorWiseINT8Layout

    class Reordered(base):
        @dataclass(frozen=True)
        class Params(base.Params):
            reversed: bool = False

        @classmethod
        def dequantize(cls, qdata, params):
            return base.dequantize(qdata.flip(1) if params.reversed else qdata, params)
    layer = make(kind)
    old, before = layer.weight, comfy.quant_ops.get_layout_class("TensorWiseINT8Layout")
    fields = {name: getattr(old._params, name) for name in ("scale", "orig_dtype", "orig_shape", "convrot", "convrot_groupsize")}
    x, *_ = inputs(None)
    want = layer(x)
    plain = Reordered.Params(**fields)
    comfy.quant_ops.register_layout_class("Reordered", Reordered)
    for layout, qdata, params in (("TensorWiseINT8Layout", old._qdata, plain),
                                  ("Reordered", old._qdata.flip(1), replace(plain, reversed=True))):
        layer.weight = torch.nn.Parameter(comfy.ops.QuantizedTensor(qdata, layout, params), requires_grad=False)
        assert difference(layer(x), want) < NOISE and bool(layer.artifact_tensors()) is not params.reversed
    assert comfy.quant_ops.get_layout_class("TensorWiseINT8Layout") is before


def test_the_twin_of_a_layer_in_the_builder_answers_what_core_asks(comfy, with_core, make):
    layer = make("smoothquant")
    cls, arguments = layer.artifact_replacement()
    twin = cls(*arguments)
    for name, tensor in layer.artifact_tensors().items():
        setattr(twin, name, tensor)
    x, norm, residual, scale = inputs("gelu_tanh")
    for version in CORES:
        linear_input_act = with_core(version)
        assert torch.equal(linear_input_act(twin, x, "gelu_tanh"), layer(x, act="gelu_tanh"))
        assert difference(linear_input_act(twin, x, "new"), layer(x.tanh())) < 1e-6
    got = linear_input_act(twin, x, "rms_norm", norm, 1e-6, residual=residual, residual_scale=scale)
    assert difference(got, residual + scale * layer(F.rms_norm(x, (K,), norm, 1e-6))) < 1e-6
    assert fused_norm(comfy, twin, x, norm) is None
    assert (twin.weight.dtype, twin.weight.shape, twin.weight.device) == (layer.weight.dtype, layer.weight.shape, layer.weight.device)
    with pytest.raises(TypeError):  # never a result without the layer's rotation and smoothing
        F.linear(x, twin.weight)


@pytest.mark.parametrize("kind", INT8_KINDS)
def test_full_precision_is_honoured(core, comfy, make, kind):
    """full_precision_matrix_mult of a file, or a device that core says cannot multiply INT8: the weight alone is rounded."""
    layer = make(kind)
    layer._full_precision_mm = True
    x, *_ = inputs(None)
    weight = layer.weight.dequantize()
    want = F.linear(x if kind != "smoothquant" else x * layer.pre_quant_scale, weight, layer.bias)
    with Ops() as ops:
        got = layer(x)
    if kind != "core INT8":  # core before 0.36 multiplies in INT8 all the same
        assert difference(got, want) < 1e-6 and not ops.counts["int8_compile::int8_gemm"] and layer.artifact_tensors() == {}
    layer._full_precision_mm = False
    assert difference(layer(x), want) > 1e-6


def test_a_device_without_int8_multiplies_in_full_precision(comfy, make, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "supports_int8_compute", lambda device=None: False, raising=False)
    assert make("convrot").is_full_precision
    monkeypatch.setattr(comfy.model_management, "supports_int8_compute", lambda device=None: True)
    assert not make("convrot").is_full_precision


@contextlib.contextmanager
def use_quantized_matmul(comfy, model):
    """Core's of 0.36: layers that were in full precision are taken out of it for a while."""
    previous = []
    try:
        for module in model.modules():
            if hasattr(module, "can_use_quantized_matmul") and module.can_use_quantized_matmul(set()):
                previous.append((module, module._full_precision_mm))
                module._full_precision_mm = False
        yield
    finally:
        for module, full_precision in previous:
            module._full_precision_mm = full_precision


@pytest.mark.parametrize("before", [True, False])
def test_core_takes_a_layer_out_of_full_precision_for_a_while(core, comfy, make, monkeypatch, before):
    layer = make("convrot")
    base = next(kind for kind in type(layer).__mro__ if kind.__qualname__.endswith("MixedPrecisionOps.Linear"))
    monkeypatch.setattr(base, "can_use_quantized_matmul", lambda self, disabled: self.quant_format not in disabled, raising=False)
    layer.is_full_precision = before
    with use_quantized_matmul(comfy, torch.nn.Sequential(layer)):
        assert not layer.is_full_precision
    assert layer.is_full_precision is before


def test_compiled_blocks_have_no_graph_break_at_these_functions(with_core, make, graphs):
    x, norm, residual, scale = inputs("gelu_tanh")
    linear_input_act = with_core("0.36")

    def block(layer, x, norm, residual, scale):
        y = linear_input_act(layer, x, "gelu_tanh")
        return y + linear_input_act(layer, x, "rms_norm", norm, 1e-6, residual=residual, residual_scale=scale)
    for kind in ("convrot", "smoothquant"):
        layer = make(kind)
        torch.compiler.reset()
        got = torch.compile(block, backend="aot_eager", fullgraph=True)(layer, x, norm, residual, scale)
        assert difference(got, block(layer, x, norm, residual, scale)) < NOISE / 2  # a last bit before rounding is a step after it


class Bank(torch.nn.Module):
    """Stands for core's MoEExperts: an INT8 weight [experts * N, K] of its own meaning, used by expert_linear."""

    def __init__(self, weight):
        super().__init__()
        self.in_features, self.out_features, self.num_experts = K, N, 1
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.quant_format = "int8_tensorwise"

    def expert_linear(self, x, expert):
        return F.linear(x, self.weight.dequantize()[expert * N:(expert + 1) * N])


def test_only_linear_layers_are_adopted_from_an_int8_file(comfy, core, flux, make, nodes, sample):
    model = flux.model.diffusion_model
    ops = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32)
    model.native = make("core INT8")
    model.bank = ops.MoEExperts(1, K, N, device="cpu")
    model.stand_in = Bank(model.native.weight.detach())
    model.embedding = ops.Embedding(N, K, device="cpu", dtype=torch.float32)
    model.bank.bias = None
    for module in (model.bank, model.embedding):
        module.weight = torch.nn.Parameter(model.native.weight.detach(), requires_grad=False)
        module.quant_format, module.layout_type = core.QUANT_FORMAT, core.INT8_LAYOUT
    model.native._full_precision_mm = True
    adopted = nodes.INT8QuantizeModel(flux)
    assert list(adopted.object_patches) == ["diffusion_model.native"]
    ours = adopted.object_patches["diffusion_model.native"]
    assert ours.is_full_precision and ours.weight is model.native.weight and "_full_precision_mm" not in vars(ours)
    comfy.model_management.load_models_gpu([adopted])
    try:
        assert model.native is ours and type(model.bank) is ops.MoEExperts
        assert torch.equal(model.stand_in.expert_linear(torch.ones(1, K), 0), F.linear(torch.ones(1, K), model.bank.weight.dequantize()))
        assert difference(model.embedding(torch.tensor([3])), model.native.weight.dequantize()[3:4]) < 1e-6
    finally:
        adopted.unpatch_model()
