"""What a file may ask for: INT8 structure, in the shapes that Save INT8 Model writes. Everything else is a damaged file."""
from __future__ import annotations

import json
import time

import pytest
import torch
from int8_compile.compile.modes import MODES, Mode, ModeRecordError, ModeRegistry, ModuleHost, mode_state, restore_modes
from int8_compile.compile.modes.errors import ApplyModeError
from int8_compile.compile.modes.record import parse_state
from int8_compile.int8.hadamard import MAX_GROUP, hadamard
from safetensors.torch import save_file

NATIVE = {"format": "int8_tensorwise"}


def record(*modes) -> str:
    return json.dumps({"version": 1, "modes": [{"name": name, "config": config, "metadata": metadata} for name, config, metadata in modes]})


@pytest.fixture(scope="module", params=["plain", "comfy"])
def registry(request):
    if request.param == "plain":
        return MODES
    request.getfixturevalue("comfy")
    from int8_compile.compile.comfyui.modes import PATCHER_MODES
    return PATCHER_MODES


pytestmark = pytest.mark.comfy


def test_a_mode_that_is_never_saved_is_in_no_record(registry):
    unsaved = [mode.name for mode in registry if not mode.save_mode_in_state]
    assert unsaved == ["compile"]
    for modes in ([("compile", {}, {})], [("int8", {}, {}), ("compile", {"backend": "eager"}, {})],
                  [("compile", {"options": "{}"}, {"x": 1})]):
        with pytest.raises(ModeRecordError, match="the mode compile, which is never saved"):
            parse_state(record(*modes), registry)


def test_the_same_holds_for_a_mode_of_another_pack():
    registry = ModeRegistry(ModuleHost())

    @registry.register
    class Runs(Mode):
        name = "other.runs"
        save_mode_in_state = False

        def restore(self, model, config, metadata):
            raise AssertionError("it ran")

    with pytest.raises(ModeRecordError):
        restore_modes(torch.nn.Linear(1, 1), record(("other.runs", {}, {})), registry=registry)


@pytest.mark.parametrize("mode, metadata", [
    ("convrot", {"run": "x"}), ("smoothquant", {"run": "x"}), ("export", {"path": "/tmp/x"}), ("int8", {"layers": {}, "run": 1}),
    ("int8", {"layers": [["a", "16", False]]}), ("int8", {"layers": 5}), ("export", {"layers": []}), ("int8", {"layers": [["a", 16]]})])
def test_metadata_that_a_mode_does_not_write_are_refused(registry, mode, metadata):
    with pytest.raises(ApplyModeError):
        parse_state(record((mode, {}, metadata)), registry)


def test_a_record_names_no_file_to_write_and_no_kernel(comfy):
    from int8_compile.compile.comfyui.modes import PATCHER_MODES

    state = parse_state(record(("int8", {"kernel": "triton"}, {}), ("export", {"filename_prefix": "../../x"}, {})), PATCHER_MODES)
    assert state.entries[0].config.kernel == "auto" and state.last.config.filename_prefix == ""


def test_what_modes_write_is_what_they_read(registry):
    if registry is MODES:
        model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(2)])
        from int8_compile.compile.modes import apply_modes

        for chain in (["int8"], ["convrot", "int8"], ["convrot", "int8", "export"], ["convrot", "export"]):
            saved = mode_state(apply_modes(model, chain))
            assert [entry.name for entry in parse_state(json.dumps(saved), registry)] == chain


# _quantization_metadata, as JSON text
STORED = ["5", "null", "true", '"x"', "[]", "{}", "{", "", '{"layers": null}', '{"layers": 5}', '{"layers": "x"}', '{"layers": []}',
          '{"layers": [["a", {}]]}', '{"layers": {"a": null}}', '{"layers": {"a": 5}}', '{"layers": {"a": []}}', '{"layers": {"a": {}}}',
          '{"layers": {"a": {"format": null}}}', '{"layers": {"a": {"format": []}}}', '{"layers": {"a": {"format": {}}}}', "[" * 100_000,
          '{"layers": ' + "[" * 100_000, "9" * 10_000, "\x00"]
# comfy_quant, as a tensor
ENTRIES = [b"5", b"null", b"[]", b'"x"', b"{", b"", b"\xff\xfe", b"{}", b'{"format": null}', b'{"format": 5}', b'{"format": []}',
           b"[" * 4000, b"{" * 100_000, torch.tensor([0.5, float("nan")]), torch.tensor([1 << 40]),
           torch.zeros(3, dtype=torch.int8), torch.zeros(0),
           torch.zeros(5, dtype=torch.uint16), torch.zeros(2, 2, dtype=torch.uint8), torch.tensor(True)]
GROUPS = [65536, 4**31, 2, 0, -4, 8, 2048, 4096, 1e9, 256.0, "256", None, [256], True, 10**400]


@pytest.fixture(scope="module")
def load_int8(comfy):
    from int8_compile.compile.comfyui.int8_checkpoint import load_int8_model
    from int8_compile.int8.options import Int8Options

    return lambda path: load_int8_model(str(path), Int8Options())


@pytest.fixture
def file(models_dir, tmp_path):
    """file(metadata, tensors to add) -> a copy of tiny_flux with them."""
    from safetensors.torch import load_file

    def file(metadata=None, **tensors):
        content = load_file(models_dir / "models" / "diffusion_models" / "tiny_flux.safetensors")
        content.update({key.replace("__", "."): value for key, value in tensors.items()})
        save_file(content, tmp_path / "odd.safetensors", metadata=metadata)
        return tmp_path / "odd.safetensors"
    return file


def damaged(load_int8, path):
    with pytest.raises(ValueError, match=r"^Load INT8 Model: 'odd\.safetensors' is damaged") as raised:
        load_int8(path)
    assert len(str(raised.value)) < 700 and str(path.parent) not in str(raised.value)


@pytest.mark.parametrize("text", STORED, ids=lambda text: text[:40])
def test_quantization_metadata_of_another_type_are_a_damaged_file(load_int8, file, text):
    damaged(load_int8, file({"_quantization_metadata": text}))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: str(entry)[:40])
def test_an_entry_of_another_type_is_a_damaged_file(load_int8, file, entry):
    if isinstance(entry, bytes):
        entry = torch.tensor(list(entry), dtype=torch.uint8)
    damaged(load_int8, file(double_blocks__0__img_mlp__0__comfy_quant=entry))


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("where", ["entry", "params", "metadata"])
def test_a_rotation_group_that_there_is_none_of_is_a_damaged_file(load_int8, file, group, where):
    conf = {**NATIVE, "params": {"convrot": True, "convrot_groupsize": group}} if where == "params" else {
        **NATIVE, "convrot": True, "convrot_groupsize": group}
    if where == "metadata":
        damaged(load_int8, file({"_quantization_metadata": json.dumps({"layers": {"double_blocks.0.img_mlp.0": conf}})}))
    else:
        entry = torch.tensor(list(json.dumps(conf).encode())[:4096], dtype=torch.uint8)
        damaged(load_int8, file(double_blocks__0__img_mlp__0__comfy_quant=entry))


def test_a_file_of_a_type_that_no_model_has_is_damaged(load_int8, file):
    damaged(load_int8, file(double_blocks__0__extra=torch.zeros(3, dtype=torch.uint16)))


@pytest.mark.parametrize("size", [4 * MAX_GROUP, 4**31, 1 << 40, 0, -4, 3])
def test_no_matrix_is_made_of_such_a_group(size):
    started = time.thread_time()
    with pytest.raises(ValueError, match="A Hadamard group must be a power of 4"):
        hadamard(size, torch.device("cpu"))
    assert time.thread_time() - started < 0.1
    assert hadamard(MAX_GROUP, torch.device("cpu")).shape == (MAX_GROUP, MAX_GROUP)


@pytest.mark.parametrize("group", [65536, 4**31, 96])
def test_nor_where_the_stock_loader_has_read_the_file(comfy, models_dir, tmp_path, group):
    """Which believes any group; our nodes do not take such layers over."""
    from int8_compile.compile.comfyui.int8_model import adopt_native_layers, put_int8_layers
    from int8_compile.int8.plan import LayerPlan

    patcher = comfy.sd.load_diffusion_model(str(models_dir / "models" / "diffusion_models" / "tiny_flux.safetensors")).clone()
    put_int8_layers(patcher, [LayerPlan("double_blocks.0.img_mlp.0", "convrot")], "auto")
    ((name, layer),) = patcher.object_patches.items()
    native = comfy.ops.mixed_precision_ops().Linear(layer.in_features, layer.out_features)
    native.weight = layer.weight
    native.weight._params.__dict__["convrot_groupsize"] = group
    patcher.object_patches[name] = native
    with pytest.raises(ValueError, match="INT8 Quantize Model: layer 'double_blocks"):
        adopt_native_layers(patcher, "auto")


def test_a_header_that_no_model_has_is_refused_unread(load_int8, tmp_path):
    header = json.dumps({f"layer{number}.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(500_000)})
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    started = time.thread_time()
    damaged(load_int8, path)
    assert time.thread_time() - started < 0.1


# What kernels take the address of

LAYER = "double_blocks.0.img_mlp.0"
WRONG_TENSORS = {
    "scale of 3": {"weight_scale": torch.ones(3)}, "no scale": {"weight_scale": torch.ones(0)}, "scale of a weight": {
        "weight_scale": torch.ones(1024, 256)}, "scale of int8": {"weight_scale": torch.ones(1024, 1, dtype=torch.int8)},
    "more rows": {"weight": torch.ones(65536, 256, dtype=torch.int8), "weight_scale": torch.ones(65536, 1)},
    "more rows, one scale": {"weight": torch.ones(65536, 256, dtype=torch.int8), "weight_scale": torch.ones(1)},
    "no rows": {"weight": torch.ones(0, 256, dtype=torch.int8), "weight_scale": torch.ones(0, 1)},
    "fewer columns": {"weight": torch.ones(1024, 16, dtype=torch.int8)}, "flat": {"weight": torch.ones(1024 * 256, dtype=torch.int8)},
    "deep": {"weight": torch.ones(1024, 256, 1, dtype=torch.int8)}}


@pytest.fixture(scope="module")
def int8_tensors(comfy, models_dir, tmp_path_factory):
    """Of an INT8 file as Save INT8 Model writes it."""
    from int8_compile.compile.comfyui.int8_checkpoint import save_int8_model
    from int8_compile.compile.comfyui.int8_model import put_int8_layers
    from int8_compile.int8.plan import LayerPlan
    from safetensors.torch import load_file

    patcher = comfy.sd.load_diffusion_model(str(models_dir / "models" / "diffusion_models" / "tiny_flux.safetensors")).clone()
    put_int8_layers(patcher, [LayerPlan(LAYER, "rowwise")], "auto")
    path = tmp_path_factory.mktemp("int8") / "int8.safetensors"
    save_int8_model(patcher, path)
    return load_file(path)


@pytest.mark.parametrize("stored", ["entry", "metadata"])
@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_tensors_that_kernels_would_read_past_the_end_of_are_a_damaged_file(comfy, load_int8, int8_tensors, tmp_path, wrong, stored):
    """By both loaders: one server died of it, and another's image was made of what lay behind in memory."""
    from int8_compile.compile.comfyui.int8_model import adopt_native_layers

    prefix = next(key for key in int8_tensors if key.endswith(f"{LAYER}.weight")).removesuffix("weight")
    tensors = {**int8_tensors, **{prefix + name: tensor for name, tensor in WRONG_TENSORS[wrong].items()}}
    metadata = None
    if stored == "metadata":
        del tensors[f"{prefix}comfy_quant"]
        metadata = {"_quantization_metadata": json.dumps({"layers": {prefix.removesuffix("."): NATIVE}})}
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path, metadata=metadata)
    for load in (load_int8, lambda path: adopt_native_layers(comfy.sd.load_diffusion_model(str(path)).clone(), "auto")):
        with pytest.raises(ValueError, match=r"damaged") as raised:
            load(path)
        assert len(str(raised.value)) < 700 and str(path.parent) not in str(raised.value)


@pytest.mark.parametrize("scale, bias, rows", [(3, None, 4), (0, None, 4), (64, 3, 4), (64, 65, 4), (1, 0, 4), (64, None, 3)])
def test_a_kernel_never_sees_scales_or_a_bias_of_another_size(scale, bias, rows):
    from int8_compile.int8.kernels import ops

    q, weight = torch.ones(4, 64, dtype=torch.int8), torch.ones(64, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match="are not of a weight"):
        ops.int8_gemm(q, torch.ones(rows), weight, torch.ones(scale), None if bias is None else torch.ones(bias), "float32", "auto")
    with pytest.raises(ValueError, match="pre_quant_scale"):
        ops.quant_rows(torch.ones(4, 64), 0, "none", torch.ones(scale), "auto") if scale != 64 else ops.quant_rows(
            torch.ones(4, 128), 0, "swiglu", torch.ones(128), "auto")
    with pytest.raises(ValueError, match="are not of a weight"):
        ops.int8_gemm(q, torch.ones(4), torch.ones(0, 64, dtype=torch.int8), torch.ones(0), None, "float32", "auto")
