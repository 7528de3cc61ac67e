"""INT8 text encoders: small ones of ComfyUI's own classes, which its own loader builds."""
from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from toys import difference

from benchmarks.tiny_models import fill

TEXT = "a red fox in a (snowy:1.3) forest, oil on canvas, by a master of the (north:0.8)"
LLAMA = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
T5 = {"d_model": 128, "d_ff": 256, "num_layers": 3, "num_heads": 4, "d_kv": 32}
# kind: (config, name of its part, type for Load CLIP, INT8 layers)
KINDS = {
    "t5": (T5, "t5base", "STABLE_AUDIO", 18),
    "qwen": (LLAMA, "qwen25_3b", "OMNIGEN2", 21),
    "gemma": ({**LLAMA, "vocab_size": 40000}, "gemma2_2b", "LUMINA2", 21),
}
# Relative difference of the conditioning, of random weights, which are harder to quantize than trained ones.
MOST = 0.1


def _weights(kind: str, config: dict) -> dict[str, torch.Tensor]:
    import comfy.ops
    from comfy.text_encoders import llama, t5

    if kind == "t5":
        whole = json.loads((Path(t5.__file__).parent / "t5_config_base.json").read_text())
        model = t5.T5({**whole, **config}, torch.float32, "cpu", comfy.ops.disable_weight_init)
    else:
        family = {"qwen": llama.Qwen25_3B, "gemma": llama.Gemma2_2B}[kind]
        model = family(config, torch.float32, "cpu", comfy.ops.disable_weight_init)
    state = fill(model, 3).state_dict()
    # T5's attention has no 1 / sqrt(d_kv): it is in the weights.
    return {name: tensor / T5["d_kv"] ** 0.5 if name.endswith("SelfAttention.q.weight") else tensor for name, tensor in state.items()}


def _load(comfy, path, kind: str, **options):
    config, part, clip_type, _ = KINDS[kind]
    return comfy.sd.load_clip([str(path)], clip_type=getattr(comfy.sd.CLIPType, clip_type),
                              model_options={f"{part}_model_config": dict(config), **options})


@pytest.fixture(scope="session")
def files(comfy, tmp_path_factory):
    from comfy.text_encoders import llama
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("encoders")
    for kind, (config, *_) in KINDS.items():
        state = {name: tensor.half().contiguous() for name, tensor in _weights(kind, config).items()}
        if kind == "gemma":  # Load CLIP makes its tokenizer of the file
            model = Path(llama.__file__).parent / "t5_pile_tokenizer" / "tokenizer.model"
            state["spiece_model"] = torch.frombuffer(bytearray(model.read_bytes()), dtype=torch.uint8)
        save_file(state, folder / f"{kind}.safetensors")
    return folder


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def clip(comfy, files, kind):
    return _load(comfy, files / f"{kind}.safetensors", kind)


def encode(clip, text: str = TEXT) -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize(text))


def save(clip) -> None:
    from int8_compile.nodes.checkpoint import SaveINT8Model

    SaveINT8Model.execute(clip, "text_encoders/small")


def int8_layers(clip) -> list:
    return [layer for layer in clip.patcher.object_patches.values() if type(layer).__name__ == "Int8Linear"]


@pytest.mark.rotating
@pytest.mark.parametrize("method", ["rowwise", "convrot", "smoothquant", "auto"])
def test_an_int8_encoder_gives_nearly_the_same_conditioning_at_half_the_weights(clip, kind, nodes, method):
    expected = encode(clip)
    quantized = nodes.INT8QuantizeModel(clip, method=method)
    got = encode(quantized)
    layers = int8_layers(quantized)
    assert len(layers) == KINDS[kind][3]
    assert 1e-4 < difference(got, expected) < MOST
    cosine = torch.nn.functional.cosine_similarity(got, expected, dim=-1)
    assert cosine[expected.norm(dim=-1) > 0].min() > 0.98
    stored = sum(layer.weight.nbytes + layer.weight._params.scale.nbytes for layer in layers)
    assert stored <= 0.55 * sum(2 * layer.in_features * layer.out_features for layer in layers)
    assert clip.patcher.model_size() - quantized.patcher.model_size() >= 0.45 * 2 * sum(x.in_features * x.out_features for x in layers)
    # In turn, each gives its own.
    assert torch.equal(encode(clip), expected) and torch.equal(encode(quantized), got)
    other = encode(quantized, "something else")
    assert torch.equal(encode(quantized), got) and (other.shape != got.shape or not torch.equal(other, got))


@pytest.mark.parametrize("kind", ["qwen"], indirect=True)
def test_layers_multiply_in_int8_although_core_wants_text_encoders_in_full_precision(clip, nodes):
    quantized = nodes.INT8QuantizeModel(clip, method="rowwise")
    encode(quantized)
    layer = int8_layers(quantized)[0]
    x = torch.randn(5, layer.in_features)
    from int8_compile.int8.kernels import reference

    q, s = reference.quant_rows(x)
    exact = (q.double() @ layer.weight._qdata.double().T) * s.double()[:, None] * layer.weight._params.scale.double().flatten()
    if layer.bias is not None:
        exact += layer.bias.double()
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.rotating
@pytest.mark.parametrize("kind", ["t5", "qwen"], indirect=True)
@pytest.mark.parametrize("method", ["convrot", "auto"])
@pytest.mark.parametrize("before", [True, False], ids=["lora first", "int8 first"])
def test_a_lora_reaches_the_int8_layers_wherever_it_comes(clip, nodes, method, before):
    def with_lora(clip, strength):
        clip = clip.clone()
        names = [name for name in clip.patcher.model.state_dict() if name.endswith(("q_proj.weight", "SelfAttention.q.weight"))]
        generator = torch.Generator().manual_seed(1)
        patches = {}
        for name in names:
            n, k = clip.patcher.model.state_dict()[name].shape
            patches[name] = ("diff", (torch.randn(n, k, generator=generator) / k ** 0.5 / 2,))
        assert set(clip.add_patches(patches, strength)) == set(names)
        return clip
    expected = {strength: encode(with_lora(clip, strength)) for strength in (0.5, 1.0)}
    plain = encode(clip)
    quantized = None if before else nodes.INT8QuantizeModel(clip, method=method)
    for strength in (0.5, 1.0, 0.5):
        model = (nodes.INT8QuantizeModel(with_lora(clip, strength), method=method) if before else with_lora(quantized, strength))
        got = encode(model)
        assert difference(got, expected[strength]) < MOST < difference(expected[strength], plain)
    assert torch.equal(encode(clip), plain)


@pytest.mark.rotating
@pytest.mark.parametrize("kind", ["t5", "gemma"], indirect=True)
@pytest.mark.parametrize("method", ["convrot", "auto"])
def test_a_compiled_int8_encoder_gives_the_same_whichever_node_comes_first(clip, kind, nodes, graphs, method):
    from int8_compile.compile.comfyui.compile_model import reports

    eager = encode(nodes.INT8QuantizeModel(clip, method=method))
    quantized = nodes.INT8QuantizeModel(clip, method=method)
    compiled = nodes.CompileModel(quantized, is_patcher=False, backend="aot_eager")
    got = encode(compiled)
    assert difference(got, eager) < 1e-3 and reports(compiled.patcher)[0].failure == "" and reports(compiled.patcher)[0].graphs
    after = graphs()
    assert torch.equal(encode(compiled), got) and graphs() == after
    behind = nodes.INT8QuantizeModel(nodes.CompileModel(clip, is_patcher=False, backend="aot_eager"), method=method)
    assert difference(encode(behind.clone()), eager) < 1e-3 and len(int8_layers(behind)) == (0 if method == "auto" else KINDS[kind][3])
    assert torch.equal(encode(compiled), got)


@pytest.mark.parametrize("kind", ["qwen"], indirect=True)
def test_each_clone_measures_and_quantizes_itself_and_not_the_one_it_is_a_clone_of(clip, nodes):
    quantized = nodes.INT8QuantizeModel(clip, method="auto")
    clones = [quantized.clone() for _ in range(2)]
    first = encode(clones[0])
    assert int8_layers(clones[0]) and not int8_layers(clones[1]) and not int8_layers(quantized)
    assert torch.equal(encode(clones[1]), first)
    assert [id(layer) for layer in int8_layers(clones[0])] == [id(layer) for layer in int8_layers(clones[1])]
    del quantized, clones[0]
    gc.collect()
    assert torch.equal(encode(clones[0]), first)
    if not hasattr(clip.patcher, "is_dynamic") or not clip.patcher.cached_patcher_init:
        return
    apart = clones[0].clone(disable_dynamic=True)
    assert difference(encode(apart), first) < 1e-3


@pytest.mark.parametrize("kind", ["qwen"], indirect=True)
@pytest.mark.parametrize("method", ["smoothquant", "auto"])
def test_what_takes_images_out_of_its_tokens_can_be_looked_at(clip, nodes, method):
    encode_plain = clip.cond_stage_model.encode_token_weights

    def encode_once(tokens):  # as Gemma 4 does
        for row in tokens["qwen25_3b"]:
            assert row.pop()[0].pop("data") == "image"
        return encode_plain(tokens)

    tokens = clip.tokenize(TEXT)
    expected = clip.encode_from_tokens(tokens)
    clip.cond_stage_model.encode_token_weights = encode_once
    for row in tokens["qwen25_3b"]:
        row.append(({"type": "image", "data": "image"}, 1.0))
    quantized = nodes.INT8QuantizeModel(clip, method=method)
    assert 1e-4 < difference(quantized.encode_from_tokens(tokens), expected) < MOST and len(int8_layers(quantized)) == 21


@pytest.mark.parametrize("kind", ["qwen"], indirect=True)
def test_prompts_with_hooks_are_encoded_and_decide_nothing(comfy, clip, nodes):
    import comfy.hooks

    expected = encode(clip)
    quantized = nodes.INT8QuantizeModel(clip, method="auto")
    hooked = quantized.clone()
    hooked.patcher.forced_hooks = comfy.hooks.HookGroup()
    assert torch.equal(encode(hooked), expected) and not int8_layers(hooked)
    assert difference(encode(quantized), expected) < MOST and int8_layers(quantized)


@pytest.fixture
def hooked(clip):
    """As Set CLIP Hooks."""
    import comfy.hooks

    names = [name for name in clip.patcher.model.state_dict() if name.endswith(("q_proj.weight", "SelfAttention.q.weight"))]
    generator = torch.Generator().manual_seed(1)
    shapes = {name: clip.patcher.model.state_dict()[name].shape for name in names}
    hook = comfy.hooks.WeightHook(0.0, 1.0)
    hook.weights_clip = {name: ("diff", (torch.randn(shape, generator=generator) / shape[1] ** 0.5 / 2,)) for name, shape in shapes.items()}
    hook.need_weight_init = False
    hooks = comfy.hooks.HookGroup()
    hooks.add(hook)

    def hooked(clip):
        clip = clip.clone()
        clip.patcher.forced_hooks = hooks.clone()
        clip.patcher.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip))
        return clip
    return hooked


@pytest.mark.parametrize("kind", ["t5", "qwen"], indirect=True)
@pytest.mark.parametrize("method", ["convrot", "auto"])
def test_a_hook_lora_is_in_the_int8_layers_for_its_prompts(clip, nodes, hooked, method):
    plain, expected = encode(clip), encode(hooked(clip))
    quantized = nodes.INT8QuantizeModel(clip, method=method)
    in_int8 = encode(quantized)
    assert difference(encode(hooked(quantized)), expected) < MOST < difference(expected, plain)
    assert torch.equal(encode(quantized), in_int8) and torch.equal(encode(clip), plain)


@pytest.mark.parametrize("kind", ["qwen"], indirect=True)
def test_an_encoder_of_an_int8_file_takes_hooks_and_is_not_merged_with_or_without_them(comfy, clip, kind, nodes, hooked, output_folder):
    expected, plain = encode(hooked(clip)), encode(clip)
    save(nodes.INT8QuantizeModel(clip, method="convrot"))
    (path,) = (output_folder / "text_encoders").iterdir()
    loaded = nodes.INT8QuantizeModel(_load(comfy, path, kind))
    in_int8 = encode(loaded)
    assert difference(encode(hooked(loaded)), expected) < MOST < difference(expected, plain)
    assert torch.equal(encode(loaded), in_int8)
    for merged in (loaded, hooked(loaded)):
        with pytest.raises(ValueError, match="ComfyUI cannot merge them into another model"):
            clip.clone().add_patches(dict(merged.get_key_patches().items()), 0.5, 0.5)


@pytest.mark.rotating
@pytest.mark.parametrize("kind", ["qwen", "gemma"], indirect=True)
@pytest.mark.parametrize("method", ["rowwise", "convrot", "smoothquant"])
def test_stock_load_clip_reads_the_file_and_this_node_runs_it_in_int8(comfy, clip, kind, nodes, output_folder, method):
    quantized = nodes.INT8QuantizeModel(clip, method=method)
    expected, eager = encode(quantized), encode(clip)
    save(quantized)
    (path,) = (output_folder / "text_encoders").iterdir()
    loaded = _load(comfy, path, kind)
    stock = encode(loaded)  # without this pack's kernels: core dequantizes
    assert 1e-4 < difference(stock, eager) < MOST
    again = nodes.INT8QuantizeModel(loaded)
    assert len(int8_layers(again)) == KINDS[kind][3] and not int8_layers(loaded)
    got = encode(again)
    assert difference(got, eager) < MOST and not torch.equal(got, stock)
    if method != "smoothquant":  # which is written as convrot
        assert difference(got, expected) < 1e-3
    assert torch.equal(encode(quantized), expected)


@pytest.mark.parametrize("kind", ["t5"], indirect=True)
def test_what_load_clip_reads_in_high_precision_only_is_not_written_in_int8(clip, nodes, output_folder):
    with pytest.raises(ValueError, match="Load CLIP reads t5base in high precision only"):
        save(nodes.INT8QuantizeModel(clip, method="convrot"))
    with pytest.raises(ValueError, match="this text encoder has no INT8 layers"):
        save(clip)
    assert not list(output_folder.rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["t5"], indirect=True)
def test_cores_own_saving_writes_what_its_loader_reads(comfy, clip, kind, nodes, output_folder):
    from comfy_extras.nodes_model_merging import CLIPSave

    expected, quantized = encode(clip), nodes.INT8QuantizeModel(clip, method="convrot")
    int8 = encode(quantized)
    CLIPSave().save(quantized, "text_encoders/small")
    (path,) = (output_folder / "text_encoders").iterdir()
    assert difference(encode(_load(comfy, path, kind)), expected) < 1e-3
    quantized.load_model()
    state = quantized.get_sd()  # for a checkpoint
    assert not any(tensor.dtype == torch.int8 for tensor in state.values() if isinstance(tensor, torch.Tensor))
    assert torch.equal(encode(quantized), int8) and torch.equal(encode(clip), expected)


@pytest.mark.parametrize("kind", ["qwen"], indirect=True)
def test_cores_own_saving_has_no_smoothed_layers(clip, nodes):
    smoothed = nodes.INT8QuantizeModel(clip, method="smoothquant")
    eager, int8 = encode(clip), encode(smoothed)
    state = smoothed.state_dict_for_saving()
    assert sum(tensor.dtype == torch.int8 for tensor in state.values() if isinstance(tensor, torch.Tensor)) == 21
    assert not any(name.endswith("pre_quant_scale") for name in state)
    assert torch.equal(encode(smoothed), int8) and torch.equal(encode(clip), eager)


@pytest.mark.parametrize("kind", ["t5"], indirect=True)
def test_a_deleted_encoder_that_was_compiled_goes_with_its_layers(comfy, files, kind, nodes):
    import comfy.model_management

    clip = _load(comfy, files / f"{kind}.safetensors", kind)
    compiled = nodes.CompileModel(nodes.INT8QuantizeModel(clip, method="auto"), is_patcher=False, backend="eager")
    encode(compiled)
    alive = [weakref.ref(part) for part in (clip.cond_stage_model, *int8_layers(compiled))]
    del clip, compiled
    comfy.model_management.unload_all_models()
    gc.collect()
    assert len(alive) == 19 and [part() for part in alive] == [None] * 19


@pytest.mark.parametrize("kind", ["t5"], indirect=True)
def test_nodes_of_models_say_what_a_clip_is_not(clip, nodes):
    for node in (nodes.INT8LazyTorchCompile, nodes.ApplyModes, nodes.OptimizeModel):
        with pytest.raises(ValueError, match="this input is a CLIP, not a MODEL"):
            node(clip)
        for value in (True, 1, "unet", ["unet"], {}, None):
            with pytest.raises(ValueError, match="the input model is a value, not a MODEL"):
                node(value)
    for value in (True, 1, "unet", ["unet"], {}, None, torch.zeros(1)):
        with pytest.raises(ValueError, match=r"Save INT8 Model cannot save a .*, only a MODEL or a CLIP"):
            nodes.SaveINT8Model(value, filename_prefix="x")


@pytest.mark.parametrize("kind", ["t5"], indirect=True)
def test_layers_are_kept_by_name_and_other_types_refused(clip, nodes):
    quantized = nodes.INT8QuantizeModel(clip, method="convrot", keep_layers="*.SelfAttention.*")
    assert len(int8_layers(quantized)) == 6
    with pytest.raises(ValueError, match=r"the nearest is 't5base\.transformer"):
        nodes.INT8QuantizeModel(clip, keep_layers="t5base.*.nothing")
    with pytest.raises(ValueError, match=r"keep_layers: 'diffusion_model\.\*' matches no layer"):
        nodes.INT8QuantizeModel(clip, keep_layers="diffusion_model.*")
    with pytest.raises(ValueError, match=r"no Linear layers to quantize .*: all of its layers are INT8 already"):
        nodes.INT8QuantizeModel(nodes.INT8QuantizeModel(clip, method="convrot"), method="rowwise")
    with pytest.raises(ValueError, match="cannot quantize a str, only a MODEL or a CLIP"):
        nodes.INT8QuantizeModel("model")
