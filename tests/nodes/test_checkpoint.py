"""INT8 files: written for ComfyUI's own loader, made while a float file is read, refused with a reason where they cannot be."""
from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toys import difference

pytestmark = pytest.mark.comfy
posix_only = pytest.mark.skipif(os.name != "posix", reason="pipes and devices in folders are POSIX")


@pytest.fixture
def save(tmp_path):
    from int8_compile.compile.comfyui.int8_checkpoint import save_int8_model

    def save(model, name="saved.safetensors"):
        path = tmp_path / "folder" / name
        save_int8_model(model, path)
        assert name in [p.name for p in path.parent.iterdir()] and not list(path.parent.glob(".*"))
        return str(path)
    return save


@pytest.fixture
def load_int8(comfy, models_dir):
    from int8_compile.compile.comfyui.int8_checkpoint import load_int8_model
    from int8_compile.int8.options import Int8Options

    def load_int8(path="tiny_flux", **options):
        if "/" not in str(path):
            path = models_dir / "models" / "diffusion_models" / f"{path}.safetensors"
        return load_int8_model(str(path), Int8Options(**options))
    return load_int8


@pytest.fixture
def edited(models_dir, tmp_path):
    """A copy of tiny_flux's file with its tensors changed."""
    def edited(change, metadata=None):
        tensors = load_file(models_dir / "models" / "diffusion_models" / "tiny_flux.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "edited.safetensors", metadata=metadata)
        return tmp_path / "edited.safetensors"
    return edited


# Between two loads the float layers differ in the last bit, which INT8 rounding blows up to the size of its own noise.
NOISE = 0.01


def ours(model):
    return [name for name, m in model.model.named_modules() if type(m).__name__ == "Int8Linear"] + list(model.object_patches)


@pytest.mark.parametrize("family", ["tiny_flux", "tiny_wan"])
@pytest.mark.parametrize("method", ["rowwise", "convrot"])
def test_a_saved_file_is_read_by_the_stock_loader_bit_for_bit(comfy, load, nodes, sample, save, family, method):
    quantized = nodes.INT8QuantizeModel(load(family), method=method)
    image = sample(quantized)
    path = save(quantized)
    stock = comfy.sd.load_diffusion_model(path)
    for name, layer in quantized.object_patches.items():
        read = comfy.utils.get_attr(stock.model, name).weight
        assert torch.equal(read._qdata, layer.weight._qdata) and torch.equal(read._params.scale, layer.weight._params.scale)
        assert read._params.convrot == layer.weight._params.convrot
    assert difference(sample(stock), image) < 2 * NOISE  # ComfyUI's kernels
    adopted = nodes.INT8QuantizeModel(stock)
    assert adopted.object_patches.keys() == quantized.object_patches.keys()
    for name, layer in quantized.object_patches.items():
        x = torch.randn(3, layer.in_features)
        assert torch.equal(adopted.object_patches[name](x), layer(x))
    assert difference(sample(adopted), image) < NOISE


def test_layers_that_an_int8_file_left_in_high_precision_stay_so(comfy, flux, nodes, save):
    kept = nodes.INT8QuantizeModel(flux, method="convrot", keep_layers="double_blocks.0.*")
    for method in ("auto", "convrot"):
        adopted = nodes.INT8QuantizeModel(comfy.sd.load_diffusion_model(save(kept)), method=method)
        assert adopted.object_patches.keys() == kept.object_patches.keys()


def test_the_file_is_half_of_bf16_where_layers_are_wide(load, nodes, save):
    model = load()
    path = save(nodes.INT8QuantizeModel(model, method="convrot"))
    with safe_open(path, "pt") as file:
        sizes = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    layers = [k.removesuffix(".comfy_quant") for k in sizes if k.endswith(".comfy_quant")]
    stored = sum(sizes[f"{n}.{part}"].nbytes for n in layers for part in ("weight", "weight_scale", "comfy_quant"))
    assert stored < 0.53 * sum(2 * sizes[f"{n}.weight"].numel() for n in layers)


def test_a_lora_is_saved_with_the_model(comfy, flux, nodes, sample, save, lora):
    branch = lora(nodes.INT8QuantizeModel(flux, method="convrot"), "tiny_flux_a", 1.0)
    image = sample(branch)
    saved = nodes.INT8QuantizeModel(comfy.sd.load_diffusion_model(save(branch)))
    assert difference(sample(saved), image) < NOISE < difference(sample(nodes.INT8QuantizeModel(flux, method="convrot")), image) / 3


def test_smoothed_and_unmeasured_layers_are_saved_as_convrot(comfy, flux, nodes, sample, save):
    want = sample(nodes.INT8QuantizeModel(flux, method="convrot"))
    unmeasured = nodes.INT8QuantizeModel(flux, method="smoothquant")
    before = save(unmeasured, "before.safetensors")
    smoothed = sample(measured := nodes.INT8QuantizeModel(flux, method="smoothquant"))
    after = save(measured, "after.safetensors")
    assert not any("pre_quant_scale" in key for key in comfy.utils.load_torch_file(after))
    for path in (before, after):
        saved = nodes.INT8QuantizeModel(comfy.sd.load_diffusion_model(path))
        assert difference(sample(saved), want) < NOISE
    assert torch.equal(sample(measured), smoothed)
    from int8_compile.compile.comfyui.int8_checkpoint import native_model

    assert 0 < native_model(measured).model_size() <= measured.model_size() < flux.model_size()


def test_a_model_without_int8_layers_is_not_saved(flux, save):
    with pytest.raises(ValueError, match=r"no INT8 layers\. Put INT8 Quantize Model before"):
        save(flux)


def test_a_write_that_fails_leaves_no_file(flux, nodes, tmp_path):
    from int8_compile.compile.comfyui.int8_checkpoint import save_int8_model

    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(OSError):
        save_int8_model(nodes.INT8QuantizeModel(flux, method="convrot"), tmp_path / "taken.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["taken.safetensors"]


@pytest.mark.parametrize("family", ["tiny_flux", "tiny_wan"])
@pytest.mark.parametrize("method", ["auto", "rowwise"])
def test_quantized_while_reading_is_what_is_quantized_after_loading(load, load_int8, nodes, sample, family, method):
    model = load(family)
    after = nodes.INT8QuantizeModel(model, method="convrot" if method == "auto" else method)
    reading = load_int8(family, method=method)
    assert set(ours(reading)) >= set(after.object_patches)
    assert difference(sample(reading), sample(after)) < NOISE
    for name, layer in after.object_patches.items():
        assert torch.equal(reading.get_model_object(name).weight._qdata, layer.weight._qdata), name
    assert reading.model_size() < 0.6 * model.model_size()


def test_kept_layers_are_read_as_they_are(load_int8, sample):
    model = load_int8(keep_layers=("double_blocks.0.*",))
    assert model.model.diffusion_model.double_blocks[0].img_mlp[0].weight.dtype.is_floating_point
    assert sample(model).isfinite().all()
    with pytest.raises(ValueError, match="'double' matches no layer"):
        load_int8(keep_layers=("double",))


def test_a_second_load_and_a_clone_without_dynamic_vram_are_quantized_too(load_int8, sample):
    model = load_int8()
    function, arguments = model.cached_patcher_init[:2]
    again = function(*arguments, disable_dynamic=True)
    assert len(again.object_patches) == len(model.object_patches)
    assert torch.equal(sample(again), sample(model))
    assert torch.equal(sample(model.deepclone_multigpu(torch.device("cpu"))), sample(model))


def test_a_loaded_model_compiles_and_takes_a_lora(load_int8, load, nodes, sample, lora, graphs):
    model = load_int8()
    compiled = nodes.CompileModel(model, backend="aot_eager")
    assert difference(sample(compiled), sample(model)) < 1e-3 and graphs() == 2
    assert difference(sample(lora(model)), sample(lora(load()))) < 0.05


def _to_fp8(tensors):
    key = "double_blocks.0.img_mlp.0.weight"
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)


def _nan(tensors):
    tensors["single_blocks.1.linear1.weight"][3, 3] = float("nan")


def _add(key, value=None):
    return lambda tensors: tensors.update({key: torch.zeros(1) if value is None else value})


def _native(conf):
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("change, message", [
    (_to_fp8, r"layer 'double_blocks\.0\.img_mlp\.0'.*quantized already \(torch.float8_e4m3fn\)"),
    (_nan, r"layer 'single_blocks\.1\.linear1'.*NaN"),
    (_add("double_blocks.0.img_attn.qkv.qweight"), "quantized already .Nunchaku"),
    (_add("double_blocks.0.img_attn.qkv.scale_weight"), "quantized already .scaled fp8"),
    (_add("double_blocks.0.img_attn.qkv.weight.absmax"), "quantized already .bitsandbytes"),
    (_add("double_blocks.0.img_mlp.0.comfy_quant", _native({"format": "nvfp4"})), "quantized already .nvfp4"),
    (lambda tensors: tensors.clear() or tensors.update(a=torch.zeros(3)), "model type of 'edited.safetensors' is not known"),
])
def test_files_that_cannot_be_quantized_are_refused_with_the_reason(edited, load_int8, change, message):
    with pytest.raises(ValueError, match=message):
        load_int8(edited(change))


@pytest.mark.parametrize("change", [
    lambda header: header["a"].update(data_offsets=[0, 15]), lambda header: header["a"].update(data_offsets=[4, 16]),
    lambda header: header["a"].update(data_offsets=[16, 0]), lambda header: header["a"].update(data_offsets=None),
    lambda header: header["a"].update(data_offsets=[0, 16.0]), lambda header: header["a"].update(data_offsets=[0, True]),
    lambda header: header["a"].update(shape=[5]), lambda header: header["a"].update(shape=[-2, -2]),
    lambda header: header["a"].pop("shape"), lambda header: header["a"].pop("dtype"), lambda header: header["a"].update(dtype=[]),
    lambda header: header["a"].update(shape="4"), lambda header: header.update(b=header["a"]), lambda header: header.update(b=[]),
    lambda header: header.update(b={"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}), lambda header: header.pop("a"),
    lambda header: header.update(__metadata__=[]), lambda header: header.update(__metadata__={"a": 1})])
def test_headers_that_the_tensors_do_not_fill_are_refused_as_by_safetensors(tmp_path, comfy, change):
    from int8_compile.compile.comfyui.checkpoint_file import CheckpointFile

    path = tmp_path / "made.safetensors"
    for damage in (lambda header: None, change):
        header = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
        damage(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
        if damage is change:
            with pytest.raises(ValueError, match="is damaged, cut short or not a safetensors file"):
                CheckpointFile(str(path))
            with pytest.raises(safetensors.SafetensorError):
                safetensors.safe_open(path, "pt").__enter__()
        else:
            found = CheckpointFile(str(path))
            assert found.metadata == {"format": "pt"} and found.size() == 16 and torch.equal(found.read("a"), torch.zeros(4))


A = b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'


@pytest.mark.parametrize("text", [
    f"{{{A.decode()}}}".encode("utf-16"), b"\xef\xbb\xbf{%s}" % A, b"{%s}" % A.replace(b"a", b"a\xed\xa0\x80", 1),
    b"{%s}" % A.replace(b"a", b"\\ud800", 1), b'{"__metadata__":{"a":"\\ud800"},%s}' % A, b"{%s}" % A.replace(b"]}", b'],"b":NaN}'),
    b"{%s}" % A.replace(b'"shape"', b'"dtype":"F32","shape"'), b'{"__metadata__":{},"__metadata__":{},%s}' % A,
    b'{%s,"b":{"dtype":"F32","shape":[4611686018427387904,4,0],"data_offsets":[16,16]}}' % A,
    b'{%s,"b":{"dtype":"F32","shape":[%s0],"data_offsets":[16,16]}}' % (A, b"9," * 3000),
    b"{%s}" % A.replace(b"[4]", b"[%s9]" % (b"9," * 500_000))], ids=range(11))
def test_headers_that_are_no_json_of_numbers_that_can_be_are_refused_at_once_as_by_safetensors(tmp_path, comfy, text):
    from int8_compile.compile.comfyui.checkpoint_file import CheckpointFile

    path = tmp_path / "made.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    start = time.monotonic()
    with pytest.raises(ValueError, match="is damaged, cut short or not a safetensors file"):
        CheckpointFile(str(path))
    assert time.monotonic() - start < 5, "Python multiplies long numbers with all threads waiting"
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(path, "pt").__enter__()


@pytest.mark.parametrize("part", ["[],", "{},", '{"a":[]},'])
def test_json_in_a_header_that_is_slow_to_read_is_refused_at_once(tmp_path, comfy, edited, load_int8, part):
    from int8_compile.compile.comfyui import checkpoint_file
    from int8_compile.compile.comfyui.int8_checkpoint import QUANTIZATION

    path = tmp_path / "made.safetensors"
    parts = part * ((checkpoint_file.MAX_HEADER_BYTES - 1000) // len(part)) + "0"
    text = b"{%s}" % A.replace(b"]}", b'],"b":[%s]}' % parts.encode())
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    start = time.monotonic()
    with pytest.raises(ValueError, match="brackets; 500000 are the limit"):
        checkpoint_file.CheckpointFile(str(path))
    save_file({"a": torch.zeros(4)}, path, {QUANTIZATION: '{"layers":{},"b":[%s0]}' % (part * 1_000_000)})
    with pytest.raises(ValueError, match="brackets; 500000 are the limit"):
        load_int8(path)
    assert time.monotonic() - start < 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux, for /proc")
def test_an_error_of_the_disk_says_which_file(edited, monkeypatch):
    from int8_compile.compile.comfyui import checkpoint_file

    path = edited(lambda tensors: None)
    file = checkpoint_file.CheckpointFile(str(path))
    monkeypatch.setattr(checkpoint_file, "open_regular", lambda path: open("/proc/self/mem", "rb"))  # noqa: SIM115
    with pytest.raises(ValueError, match=f"'{path.name}' cannot be read .*Check the disk"):
        file.read(next(iter(file)))


def test_damaged_files_and_unsuitable_methods_are_refused(edited, load_int8, tmp_path, comfy):
    path = edited(lambda tensors: None)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="damaged, cut short"):
        load_int8(path)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_int8(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="look at the model's activations"):
        load_int8(method="smoothquant")


@pytest.mark.parametrize("how", ["cut short", "written over", "exchanged", "written over by a copy of the same time",
                                 pytest.param("a pipe", marks=posix_only), pytest.param("a device", marks=posix_only)])
def test_a_file_that_changes_while_it_is_read_is_refused(edited, how):
    from int8_compile.compile.comfyui.int8_checkpoint import load_int8_model
    from int8_compile.int8.options import Int8Options

    path = edited(lambda tensors: None)
    content, state = path.read_bytes(), path.stat()

    def change(*_):
        if how in ("exchanged", "a pipe", "a device"):
            path.unlink(missing_ok=True)
        if how == "a pipe":
            return os.mkfifo(path)
        if how == "a device":
            return path.symlink_to("/dev/zero")
        with open(path, "r+b" if path.exists() else "wb") as file:
            file.write(content[:1000] if how == "written over" else content)
            file.truncate(100_000 if how == "cut short" else len(content))
        if how.endswith("time"):
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ValueError, match="changed while it was read"):
        load_int8_model(str(path), Int8Options("rowwise"), on_progress=change)
    path.unlink()
    path.write_bytes(content)
    load_int8_model(str(path), Int8Options("rowwise"))


@posix_only
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
def test_what_is_no_file_by_now_is_refused_at_once(comfy, flux, nodes, save, load_int8, monkeypatch, make):
    from int8_compile.compile.comfyui.checkpoint_file import CheckpointFile

    path = Path(save(nodes.INT8QuantizeModel(flux, method="convrot")))
    by_comfyui = CheckpointFile.by_comfyui

    def exchanged(self):
        path.unlink()
        make(path)
        return by_comfyui(self)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFile, "by_comfyui", exchanged)
        with pytest.raises(ValueError, match="changed while it was read"):
            load_int8(path)
    with pytest.raises(ValueError, match="damaged, cut short or not a safetensors file"):
        load_int8(path)


@posix_only
def test_a_record_is_looked_for_in_the_file_that_was_opened(edited, monkeypatch):
    """What takes its path between the two would be waited for with all threads of the process."""
    from int8_compile.compile.comfyui import mode_records

    path, opened = edited(lambda tensors: None), mode_records.open_regular

    def exchanged(path):
        file = opened(path)
        path.unlink()
        os.mkfifo(path)
        return file
    before = mode_records._metadata(path)
    monkeypatch.setattr(mode_records, "open_regular", exchanged)
    assert mode_records._metadata(path) == before
    monkeypatch.undo()
    assert mode_records._metadata(path) == {}


def test_a_native_file_that_is_exchanged_before_comfyui_reads_it_is_refused(comfy, flux, nodes, save, load_int8, monkeypatch):
    """What says how its layers are rotated is of one file, the weights would be of another."""
    import comfy.utils

    path = Path(save(nodes.INT8QuantizeModel(flux, method="convrot")))
    read = comfy.utils.load_torch_file

    def exchanged(*args, **kwargs):
        other = path.with_name("other.safetensors")
        other.write_bytes(path.read_bytes())
        os.replace(other, path)
        return read(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(comfy.utils, "load_torch_file", exchanged)
        with pytest.raises(ValueError, match="changed while it was read"):
            load_int8(path)
    load_int8(path)


def test_a_native_file_with_wrong_scales_is_refused(comfy, flux, nodes, save, load_int8, tmp_path):
    tensors = load_file(save(nodes.INT8QuantizeModel(flux, method="convrot")))
    key = next(k for k in tensors if k.endswith(".weight_scale"))
    tensors[key] = tensors[key][:-1]
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="weight_scale"):
        load_int8(tmp_path / "wrong.safetensors")
