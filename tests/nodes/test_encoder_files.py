"""Save INT8 Model of the text encoders of ComfyUI's families: what it writes is read by its own Load CLIP, as INT8 or in high precision."""
from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toys import difference

from benchmarks.tiny_models import draw, fill

pytestmark = pytest.mark.rotating(3)

L = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3}
XXL = {"d_model": 64, "num_heads": 2, "d_kv": 32, "vocab_size": 1000}  # which Load CLIP tells by its 10240 rows


def llama(hidden_size: int, layers: int = 3, heads: int = 2) -> dict:
    return {"hidden_size": hidden_size, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": heads, "vocab_size": 1000}


# family: (type for Load CLIP, {part: (its config, its layers in INT8)}); the names and sizes by which core tells them are real, the
# others small. Layers in INT8: None where Load CLIP reads the part in high precision only.
FAMILIES = {
    "flux": ("FLUX", {"clip_l": (L, None), "t5xxl": (XXL, 168)}),
    "chroma": ("CHROMA", {"t5xxl": (XXL, 168)}),
    "wan": ("WAN", {"umt5xxl": (XXL, 168)}),
    "omnigen2": ("OMNIGEN2", {"qwen25_3b": (llama(256), 21)}),
    "z-image": ("LUMINA2", {"qwen3_4b": (llama(2560), 21)}),
    "klein": ("FLUX2", {"qwen3_8b": (llama(4096, 28, 1), 196)}),
    "lumina": ("LUMINA2", {"gemma2_2b": (llama(256), 21)}),
    "hunyuan video": ("HUNYUAN_VIDEO", {"clip_l": (L, None), "llama": (llama(256, 4), 28)}),
    "qwen image": ("QWEN_IMAGE", {"qwen25_7b": (llama(256, 3, 4), 181)}),
    "auraflow": ("STABLE_DIFFUSION", {"pile_t5xl": (XXL, None)}),
    "flux2": ("FLUX2", {"mistral3_24b": (llama(5120, 31, 1), 217)}),
}
# The tensors by which core tells them.
TOLD_BY = {
    "clip_l": {"text_model.encoder.layers.0.mlp.fc1.weight": (128, 64)},
    "t5xxl": {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 64)},
    "umt5xxl": {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 64)},
    "pile_t5xl": {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (5120, 64)},
    "qwen25_3b": {"model.layers.0.self_attn.k_proj.bias": (256,)},
    "qwen25_7b": {"model.layers.0.self_attn.k_proj.bias": (512,)},
    "gemma2_2b": {"model.layers.0.post_feedforward_layernorm.weight": (256,)},
    "qwen3_4b": {"model.layers.0.post_attention_layernorm.weight": (2560,), "model.layers.0.self_attn.q_norm.weight": (128,)},
    "qwen3_8b": {"model.layers.0.post_attention_layernorm.weight": (4096,), "model.layers.0.self_attn.q_norm.weight": (128,)},
    "llama": {"model.layers.0.post_attention_layernorm.weight": (256,)},
    "mistral3_24b": {"model.layers.0.post_attention_layernorm.weight": (5120,), "model.layers.39.post_attention_layernorm.weight": (5120,)},
}


def _tokenizer(part: str) -> dict[str, torch.Tensor]:
    """What core makes the tokenizer of, in the part's file."""
    from comfy.text_encoders import llama

    if part in ("umt5xxl", "gemma2_2b", "pile_t5xl"):
        model = (Path(llama.__file__).parent / "t5_pile_tokenizer" / "tokenizer.model").read_bytes()
        return {"spiece_model": torch.frombuffer(bytearray(model), dtype=torch.uint8)}
    if part == "mistral3_24b":
        vocabulary = [{"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode()} for byte in range(256)]
        special = [{"rank": rank, "token_str": f"<{rank}>"} for rank in range(100)]
        tekken = {"config": {"default_num_special_tokens": 100, "default_vocab_size": 356}, "vocab": vocabulary, "special_tokens": special}
        return {"tekken_model": torch.frombuffer(bytearray(json.dumps(tekken).encode()), dtype=torch.uint8)}
    return {}


def _load(comfy, files, family: str):
    kind, parts = FAMILIES[family]
    options = {f"{part}_model_config": dict(config) for part, (config, _) in parts.items()}
    options["model_config"] = dict(L)  # core takes this one where it finds CLIP-L's table of positions
    kind = getattr(comfy.sd.CLIPType, kind)
    if isinstance(files[0], dict):
        return comfy.sd.load_text_encoder_state_dicts(files, clip_type=kind, model_options=options)
    return comfy.sd.load_clip([str(path) for path in files], clip_type=kind, model_options=options)


def _weight(name: str, shape, rng) -> torch.Tensor:
    if "embed" in name or "shared" in name:
        return torch.randn(shape, generator=rng)
    weight = draw(name, shape, rng)
    return weight / 6 if name.endswith("SelfAttention.q.weight") else weight  # T5's attention has no 1 / sqrt(d_kv)


@pytest.fixture(params=[name if name in ("flux", "auraflow") else pytest.param(name, marks=pytest.mark.rotating) for name in FAMILIES])
def family(request):
    return request.param


@pytest.fixture
def clip(comfy, family, tmp_path, monkeypatch):
    from comfy.text_encoders import hunyuan_video, qwen_image
    from safetensors.torch import save_file

    # Llama's own is absent from some copies of ComfyUI; which tokenizer it is does not matter here.
    folder = Path(hunyuan_video.__file__).parent / "qwen25_tokenizer"
    llama_tokenizer = SimpleNamespace(from_pretrained=lambda path, **_: qwen_image.Qwen2Tokenizer.from_pretrained(folder))
    monkeypatch.setattr(hunyuan_video, "LlamaTokenizerFast", llama_tokenizer)
    parts = FAMILIES[family][1]
    small = [{name: torch.zeros(shape, dtype=torch.float16) for name, shape in TOLD_BY[part].items()} | _tokenizer(part) for part in parts]
    model = _load(comfy, small, family).cond_stage_model
    rng = torch.Generator().manual_seed(3)
    paths = []
    for part in parts:
        state = {name: _weight(name, tensor.shape, rng).half() if tensor.is_floating_point() else tensor
                 for name, tensor in getattr(model, part).transformer.state_dict().items()}
        paths.append(tmp_path / f"{part}.safetensors")
        save_file(state | _tokenizer(part), paths[-1])
    yield _load(comfy, paths, family)
    shutil.rmtree(tmp_path)


def encode(clip) -> torch.Tensor:
    """Of a prompt whose tokens are in the small vocabulary."""
    tokens = clip.tokenize("a red fox in a snowy forest, oil on canvas")
    small = {name: [[(token % 1000, *rest) for token, *rest in row] for row in rows] for name, rows in tokens.items()}
    return clip.encode_from_tokens(small)


def int8_of(clip, part: str) -> int:
    return sum(name.startswith(f"{part}.") and tensor.dtype == torch.int8 for name, tensor in clip.cond_stage_model.state_dict().items())


def test_load_clip_reads_what_was_written(comfy, clip, family, nodes, output_folder):
    from int8_compile.nodes.checkpoint import SaveINT8Model

    parts = FAMILIES[family][1]
    expected, quantized = encode(clip), nodes.INT8QuantizeModel(clip, method="rowwise")
    int8 = difference(encode(quantized), expected)
    assert 1e-4 < int8 < 0.15
    if not any(count for _, count in parts.values()):
        with pytest.raises(ValueError, match=f"reads {', '.join(parts)} in high precision only"):
            SaveINT8Model.execute(quantized, "small")
        return
    SaveINT8Model.execute(quantized, "small")
    written = [next(output_folder.glob(f"small_{part}_0*.safetensors" if len(parts) > 1 else "small_0*.safetensors")) for part in parts]
    for files in (written, written[::-1]):
        loaded = _load(comfy, files, family)
        assert {part: int8_of(loaded, part) for part in parts} == {part: count or 0 for part, (_, count) in parts.items()}
        assert 1e-4 < difference(encode(loaded), expected) < 1.1 * int8


def test_ace_steps_pair_of_encoders_is_refused(comfy, nodes, output_folder):
    from int8_compile.nodes.checkpoint import SaveINT8Model

    small = [{name: torch.zeros(shape) for name, shape in TOLD_BY["llama"].items()} for _ in range(2)]
    clip = comfy.sd.load_text_encoder_state_dicts(small, clip_type=comfy.sd.CLIPType.ACE, model_options={"_model_config": llama(256)})
    fill(clip.cond_stage_model, 3)
    with pytest.raises(ValueError, match="reads qwen3_06b, qwen3_2b in high precision only"):
        SaveINT8Model.execute(nodes.INT8QuantizeModel(clip, method="rowwise"), "small")
    assert not list(output_folder.iterdir())
