"""ComfyUI's Load LoRA (Bypass) and INT8 layers: it takes hold of a model's layers when its node runs."""
from __future__ import annotations

import copy

import pytest
import torch
from toys import difference

from .test_compile import CHEAP

pytestmark = [pytest.mark.comfy, pytest.mark.rotating(3)]


@pytest.mark.rotating
@pytest.mark.parametrize("method", ["convrot", "auto"])
def test_its_effect_is_the_same_before_and_behind_int8_layers_whoever_sampled_last(flux, nodes, sample, bypass, method):
    plain, want = sample(flux), sample(bypass(flux))
    effect = difference(want, plain)
    assert effect > 0.05
    int8 = nodes.INT8QuantizeModel(flux, method=method)

    def branches():
        return {"float": bypass(flux), "behind": bypass(int8), "before": nodes.INT8QuantizeModel(bypass(flux), method=method)}

    old, first = branches(), {}
    for last in (flux, int8):
        sample(last)
        for branch in old, branches():  # of a cached node, and of one that runs now
            for name, model in branch.items():
                sample(last)
                latent = sample(model)
                assert difference(latent, want) < (1e-6 if name == "float" else effect / 4), name
                if branch is old:
                    assert torch.equal(first.setdefault(name, latent), latent)
    assert torch.equal(sample(flux), plain) and difference(sample(int8), plain) < effect / 4


def test_a_model_without_our_nodes_has_its_lora_after_int8_layers_were_there(flux, nodes, sample, bypass):
    want = sample(bypass(flux))
    sample(nodes.INT8QuantizeModel(flux, method="convrot"))
    assert torch.equal(sample(bypass(flux)), want)


@pytest.mark.rotating
def test_another_strength_and_compile(flux, nodes, sample, bypass):
    int8 = nodes.INT8QuantizeModel(flux, method="convrot")
    plain = sample(int8)
    for strength in (1.0, 0.3):
        want = sample(bypass(flux, strength=strength))
        image = sample(bypass(int8, strength=strength))
        assert difference(image, want) < difference(image, plain) / 2
        compiled = nodes.CompileModel(int8, **CHEAP)
        assert difference(sample(bypass(compiled, strength=strength)), image) < 1e-3
        assert difference(sample(nodes.CompileModel(bypass(int8, strength=strength), **CHEAP)), image) < 1e-3
    assert torch.equal(sample(int8), plain)


@pytest.mark.parametrize("is_on", [True, False], ids=["on", "taken off"])
def test_int8_layers_of_a_file_have_nothing_of_a_bypass_lora_that_was_on_it(flux, nodes, comfy, sample, bypass, lora, tmp_path, is_on):
    """They take the place of core's, and get what those hold."""
    from int8_compile.compile.comfyui.int8_checkpoint import save_int8_model

    save_int8_model(nodes.INT8QuantizeModel(flux, method="convrot"), tmp_path / "int8.safetensors")

    def images(model, used):
        if used:
            sample(used)
        ours = nodes.INT8QuantizeModel(model)
        if used and not is_on:
            sample(model)
        return {"plain": sample(ours), "LoRA": sample(lora(ours, "tiny_flux_b")), "bypass": sample(bypass(ours)),
                "before": sample(nodes.INT8QuantizeModel(used or bypass(model)))}

    want = images(comfy.sd.load_diffusion_model(str(tmp_path / "int8.safetensors")), None)
    assert min(difference(want["plain"], image) for name, image in want.items() if name != "plain") > 0.05
    native = comfy.sd.load_diffusion_model(str(tmp_path / "int8.safetensors"))
    for name, image in images(native, bypass(native)).items():
        assert torch.equal(image, want[name]), name


def test_an_int8_layer_without_compile_is_what_it_was_once_a_bypass_lora_is_off(wan, nodes, sample, bypass):
    int8 = nodes.INT8QuantizeModel(wan, method="convrot")
    want = sample(int8)
    sample(bypass(int8, "tiny_wan_a"))
    assert torch.equal(sample(int8), want)
    assert not any("forward" in vars(layer) for layer in wan.model.modules())


@pytest.mark.parametrize("int8", [False, True], ids=["float", "INT8"])
def test_a_clone_with_a_model_of_its_own_has_bypass_loras_of_its_own(flux, nodes, sample, bypass, lora, int8):
    """As where INT8 Lazy Torch Compile turns dynamic VRAM off, and on several GPUs."""
    if not hasattr(flux, "deepclone_multigpu"):
        pytest.skip("this ComfyUI has no models of several GPUs")
    model = nodes.INT8QuantizeModel(flux, method="convrot") if int8 else flux
    branches = {"plain": model, "bypass": bypass(model), "LoRA": lora(model, "tiny_flux_b")}
    want = {name: sample(branch) for name, branch in branches.items()}
    assert difference(want["bypass"], want["plain"]) > 0.05
    sample(branches["bypass"])  # is on while the other model is made
    other = {name: branch.clone(model_override=model.deepclone_multigpu().get_clone_model_override())
             for name, branch in branches.items()}
    for name in ("plain", "bypass", "LoRA", "bypass", "plain"):
        assert difference(sample(other[name]), want[name]) < 1e-6, name
        assert torch.equal(sample(branches[name]), want[name]), name
    sample(branches["bypass"])
    assert difference(sample(other["bypass"]), want["bypass"]) < 1e-6


@pytest.mark.rotating
@pytest.mark.parametrize("name", ["tiny_flux", "tiny_wan"])
def test_another_strength_compiles_nothing(load, nodes, sample, bypass, name):
    from int8_compile.compile.comfyui.compile_model import reports

    model, graphs = load(name), []
    for strength in (1.0, -0.5, 0.3, 1.0):
        patched = bypass(model, f"{name}_a", strength)
        compiled = nodes.CompileModel(patched, **CHEAP)
        assert torch.equal(sample(compiled), sample(patched))
        graphs.append(reports(compiled)[0].graphs)
    assert graphs == graphs[:1] * 4


FACTORS = {"lora": ("lora_up.weight", "lora_down.weight"), "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
           "lokr": ("lokr_w1", "lokr_w2_a", "lokr_w2_b")}


def factors(kind: str, out: int, ins: int) -> dict[str, torch.Tensor]:
    """Of a layer of out x ins, as files have them."""
    shapes = {"lora": ((out, 4), (4, ins)), "loha": ((out, 4), (4, ins)) * 2, "lokr": ((2, 4), (out // 2, 4), (4, ins // 4))}[kind]
    return {name: torch.randn(shape) * shape[1] ** -0.5 for name, shape in zip(FACTORS[kind], shapes)} | {"alpha": torch.tensor(3.0)}


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_another_strength_of_a_loha_or_lokr_compiles_nothing(flux, nodes, sample, bypass, comfy, kind):
    from int8_compile.compile.comfyui.compile_model import reports

    weights = {f"lora_unet_{name.replace('.', '_')}.{factor}": tensor for name, layer in flux.model.diffusion_model.named_modules()
               if name.endswith((".0.img_mlp.0", ".1.linear2")) for factor, tensor in factors(kind, *layer.weight.shape).items()}
    graphs = []
    for strength in (1.0, -0.5, 0.3, 1.0):
        patched = comfy.sd.load_bypass_lora_for_models(flux, None, weights, strength, 0)[0]
        compiled = nodes.CompileModel(patched, **CHEAP)
        image = sample(patched)
        assert torch.equal(sample(compiled), image) and difference(image, sample(flux)) > 1e-3
        graphs.append(reports(compiled)[0].graphs)
    assert graphs == graphs[:1] * 4


def linear(value: float = 0.7, dtype=torch.float32, kind: str = "lora"):
    """(net of one layer, a patcher of it, an adapter for it, manager with it at the strength value)"""
    import comfy.model_patcher
    from comfy.weight_adapter import BypassInjectionManager, adapters

    net = torch.nn.Sequential(torch.nn.Linear(24, 40, dtype=dtype))
    adapter = next(filter(None, (each.load("0", {f"0.{name}": tensor for name, tensor in factors(kind, 40, 24).items()}, 3.0, None)
                                 for each in adapters)))
    manager = BypassInjectionManager()
    manager.add_adapter("0", adapter, strength=value)
    return net, comfy.model_patcher.ModelPatcher(net, torch.device("cpu"), torch.device("cpu")), adapter, manager


@pytest.mark.parametrize("kind", [*FACTORS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_strength_that_is_a_tensor_computes_what_a_number_does(comfy, bypass, dtype, kind):
    x = torch.randn(3, 5, 24, dtype=dtype)
    for strength in (0.3, -1.7, 0.0, 1):
        net, patcher, adapter, manager = linear(strength, dtype, kind)
        (injection,) = manager.create_injections(net)
        assert adapter.multiplier == strength
        want = net[0](x) + adapter.h(x, None)
        injection.inject(patcher)
        assert torch.equal(net(x), want) and isinstance(adapter.multiplier, torch.Tensor)
        injection.eject(patcher)
        assert "forward" not in vars(net[0])


def test_what_else_may_be_done_with_cores_hooks_may_be_done_still(comfy, bypass):
    x = torch.randn(2, 24)
    net, patcher, adapter, manager = linear()
    plain = net(x)
    (first,), (second,) = manager.create_injections(net), manager.create_injections(net)
    for injection in (first, second):  # both act on the hooks that were made last
        injection.inject(patcher)
    once = net(x)
    adapter.multiplier = 0.0
    assert torch.equal(net(x), plain) and not torch.equal(once, plain)
    adapter.multiplier = 0.7
    torch.testing.assert_close(net(x), once)
    adapter.weights = tuple(w * 0 if isinstance(w, torch.Tensor) else w for w in adapter.weights)
    assert torch.equal(net(x), plain)
    for injection in (first, second):
        injection.eject(patcher)
    assert "forward" not in vars(net[0]) and torch.equal(net(x), plain)

    net, patcher, adapter, manager = linear()
    injections = manager.create_injections(net)
    copy.deepcopy(injections)[0].inject(patcher)
    assert torch.equal(net(x), net[0](x)) and net[0].forward.__self__ is manager.hooks[0]
    injections[0].eject(patcher)

    for other in (None, linear()[1].model[0]):  # no patcher, or one of something else: the model that they were made for
        net, patcher, adapter, manager = linear()
        (injection,) = manager.create_injections(net)
        injection.inject(other)
        assert "forward" in vars(net[0])
        manager.hooks[0].eject()
        injection.inject(patcher)
        assert net[0].forward.__self__ is manager.hooks[0]
        injection.eject(other)
        assert "forward" not in vars(net[0])


def test_a_layer_that_is_no_submodule_and_a_strength_for_each_channel(comfy, bypass):
    net, patcher, _, manager = linear(torch.linspace(0, 1, 40))
    hidden = torch.nn.Module()
    hidden.layers = [net[0]]
    manager.adapters = {"layers.0": manager.adapters["0"]}
    (injection,) = manager.create_injections(hidden)
    plain = net[0](torch.ones(1, 24))
    injection.inject(patcher)
    assert not torch.equal(net[0](torch.ones(1, 24)), plain)
    injection.eject(patcher)
    assert torch.equal(net[0](torch.ones(1, 24)), plain)


def test_where_its_weights_find_no_memory_the_model_is_as_it_was(flux, sample, bypass, monkeypatch):
    from comfy.weight_adapter.bypass import BypassForwardHook

    plain, patched = sample(flux), bypass(flux)
    want, move, left = sample(patched), BypassForwardHook._move_adapter_weights_to_device, [3]

    def no_memory(*arguments):
        left[0] -= 1
        if not left[0]:
            raise torch.OutOfMemoryError("no room")
        return move(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(BypassForwardHook, "_move_adapter_weights_to_device", no_memory)
        sample(flux)
        with pytest.raises(torch.OutOfMemoryError):
            sample(patched)
    assert torch.equal(sample(flux), plain) and torch.equal(sample(patched), want)


@pytest.mark.parametrize("sampled", [True, False])
def test_core_trains_a_copy_of_the_model_without_it(wan, sample, bypass, sampled):
    from comfy_extras import nodes_train as training

    plain, patched = sample(wan), bypass(wan, "tiny_wan_a")
    want = sample(patched)
    if not sampled:
        sample(wan)
    random = torch.Generator().manual_seed(3)
    inputs = {item.id: [getattr(item, "default", None)] for item in training.TrainLoraNode.define_schema().inputs}
    inputs |= {"latents": [{"samples": torch.randn(1, 16, 2, 8, 8, generator=random)}], "positive": [[[
        torch.randn(1, 20, 4096, generator=random), {}]]], "steps": [2], "seed": [3], "existing_lora": ["[None]"], "rank": [2]}

    def losses(model, bypass_mode):
        torch.manual_seed(4)
        with torch.inference_mode():
            return training.TrainLoraNode.execute(**inputs | {"model": [model], "bypass_mode": [bypass_mode]}).args[1]["loss"]
    for bypass_mode in (False, True):
        assert losses(patched, bypass_mode) == losses(wan, bypass_mode)
    assert torch.equal(sample(wan), plain) and torch.equal(sample(patched), want)
