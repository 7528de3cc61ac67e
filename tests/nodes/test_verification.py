"""The check against eager on real models, as a sampler calls them."""
from __future__ import annotations

import copy
import json

import pytest
import torch
from toys import difference

from .test_compile import CHEAP

pytestmark = [pytest.mark.comfy, pytest.mark.rotating(3)]
CLASSES = {"DoubleStreamBlock", "SingleStreamBlock"}


def report_of(patcher):
    from int8_compile.compile.comfyui import compile_model
    state, = compile_model._COMPILED[patcher.model].values()
    return state.compiled.report


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    import folder_paths
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
def test_every_class_of_a_real_model_is_checked_and_right(load, nodes, sample, quantized):
    model = load("tiny_flux")
    model = nodes.INT8QuantizeModel(model, method="convrot") if quantized else model
    compiled = nodes.CompileModel(model, **CHEAP)
    assert difference(sample(compiled), sample(model)) < 1e-3
    report = report_of(compiled)
    assert set(report.checked) == CLASSES and not report.warnings()
    assert "checked against eager: 2 classes" in report.text() and report.last_calls["eager"] == 0


def test_a_wrong_graph_gives_eagers_image_and_a_file_without_the_prompt(load, nodes, sample, user_folder, monkeypatch):
    from int8_compile.compile import arguments, engine
    real = arguments.call_compiled
    monkeypatch.setattr(engine, "call_compiled", lambda *args, **kwargs: _scaled(real(*args, **kwargs)))
    model = load("tiny_flux")
    want = sample(model)
    compiled = nodes.CompileModel(model, **CHEAP)
    assert difference(sample(compiled), want) == 0.0
    assert len(report_of(compiled).warnings()) == 2 and str(user_folder) not in report_of(compiled).text()
    found = [json.loads(path.read_text()) for path in sorted(user_folder.glob("__int8_compile_checks/check-*.json"))]
    assert {failure["region"] for failure in found} == CLASSES
    assert all(failure["dtype"] == "float32" and failure["inputs"] and str(user_folder) not in str(failure) for failure in found)


def _scaled(result):
    return tuple(one * 1.01 for one in result) if isinstance(result, tuple) else result * 1.01


@pytest.mark.parametrize(("value", "is_checked"), [("off", False), ("first", True), ("sometimes", True)])
def test_the_environment_turns_it_off(load, nodes, sample, monkeypatch, value, is_checked):
    monkeypatch.setenv("INT8_COMPILE_VERIFY", value)
    compiled = nodes.CompileModel(load("tiny_flux"), **CHEAP)
    sample(compiled)
    assert bool(report_of(compiled).checked) == is_checked


@pytest.mark.rotating
@pytest.mark.parametrize(("value", "is_checked"), [("off", False), ("first", True), (["off"], True), (None, True), (False, True)])
def test_the_setting_turns_it_off_and_nothing_else_does(load, nodes, sample, user_folder, monkeypatch, caplog, value, is_checked):
    from int8_compile.compile.comfyui import user_settings

    monkeypatch.delenv("INT8_COMPILE_VERIFY", raising=False)
    monkeypatch.setattr(user_settings, "_said", set())
    (user_folder / "default").mkdir(exist_ok=True)
    (user_folder / "default" / "comfy.settings.json").write_text(json.dumps({"INT8Compile.Verify": value}))
    compiled = nodes.CompileModel(load("tiny_flux"), **CHEAP)
    sample(compiled)
    assert bool(report_of(compiled).checked) == is_checked
    assert caplog.text.count("INT8Compile.Verify is none of off, first, always; using first") == (value not in ("off", "first"))


def test_a_kernel_that_is_wrong_here_is_not_in_the_image(load, nodes, sample, user_folder, monkeypatch):
    """What the INT8 model gives with the next kernel, whose last bits are others (a value then may round to another step), and a file
    with figures."""
    from int8_compile.int8.kernels import cpu, seen_right

    model = load("tiny_flux")
    want = sample(nodes.INT8QuantizeModel(model))
    right = cpu.int8_gemm
    for name in ("_RIGHT", "_WRONG"):
        monkeypatch.setattr(seen_right, name, {})
    monkeypatch.setattr(cpu, "int8_gemm", lambda *args: right(*args) * 1.5)
    assert difference(sample(nodes.INT8QuantizeModel(model)), want) < 2e-2
    (found,) = [json.loads(path.read_text()) for path in user_folder.glob("__int8_compile_checks/check-*.json")]
    monkeypatch.setattr(seen_right, "_RIGHT", {})
    monkeypatch.setattr(seen_right, "_WRONG", {})
    monkeypatch.setenv("INT8_COMPILE_VERIFY", "off")
    assert difference(sample(nodes.INT8QuantizeModel(model)), want) > 0.1
    assert found["kernel"] == "cpu" and found["machine"]["torch"] and str(user_folder) not in str(found)


@pytest.mark.rotating
@pytest.mark.parametrize("method", ["rowwise", "convrot", "auto"])
def test_the_report_says_what_int8_costs_a_block_against_float(load, nodes, sample, method):
    model = load("tiny_flux")
    block = model.model.diffusion_model.double_blocks[0]
    quantized = nodes.INT8QuantizeModel(model, method=method)
    sample(quantized)  # auto decides here
    calls, results = [], []  # the block writes into its arguments
    hooks = [block.register_forward_pre_hook(lambda _, args, kwargs: calls.append(copy.deepcopy((args, kwargs))), with_kwargs=True),
             block.register_forward_hook(lambda _, args, result: results.append(copy.deepcopy(result)))]
    want = sample(quantized)
    for hook in hooks:
        hook.remove()
    compiled = nodes.CompileModel(quantized, **CHEAP)
    assert difference(sample(compiled), want) < 1e-3
    report = report_of(compiled)
    assert set(report.int8) == CLASSES and "INT8 against float: " in report.text() and not report.notes
    assert json.dumps(report.to_dict(), allow_nan=False)
    sample(model)  # loads the float layers
    args, kwargs = calls[0]
    with torch.no_grad():
        exact = block(*args, **kwargs)
    least = min(10 * torch.log10(one.square().sum() / (one - other).square().sum()).item() for one, other in zip(exact, results[0]))
    assert report.int8["DoubleStreamBlock"][0] == pytest.approx(least, abs=0.1)
    assert 15 < report.int8["DoubleStreamBlock"][1] < 60


def test_a_layer_that_loses_more_than_was_planned_is_named(load, nodes, sample):
    quantized = nodes.INT8QuantizeModel(load("tiny_flux"), method="rowwise")
    layers = {name: layer for name, layer in quantized.object_patches.items() if hasattr(layer, "planned_sqnr")}
    spoilt = next(name for name in layers if name.endswith("double_blocks.0.img_mlp.0"))
    layers[spoilt].planned_sqnr = 90.0
    compiled = nodes.CompileModel(quantized, **CHEAP)
    sample(compiled)
    (note,) = report_of(compiled).notes
    assert note.startswith("INT8 costs img_mlp.0 in DoubleStreamBlock more than was planned: ") and note in report_of(compiled).text()


def test_a_lora_and_a_file_that_was_int8_have_no_float_to_compare_with(load, nodes, sample, lora):
    quantized = nodes.INT8QuantizeModel(load("tiny_flux"), method="rowwise")
    compiled = nodes.CompileModel(lora(quantized), **CHEAP)
    sample(compiled)
    assert not report_of(compiled).warnings() and "txt_mlp" not in str(report_of(compiled).notes)


@pytest.mark.rotating
def test_what_int8_costs_is_said_of_the_model_that_runs_now(load, nodes, sample):
    model = load("tiny_flux")
    rowwise, convrot = (nodes.INT8QuantizeModel(model, method=method) for method in ("rowwise", "convrot"))
    kept = nodes.INT8QuantizeModel(model, method="rowwise", keep_layers="*mlp*")
    found = []
    for quantized in (rowwise, convrot, kept, rowwise, convrot):
        compiled = nodes.CompileModel(quantized, **CHEAP)
        sample(compiled)
        found.append(report_of(compiled).int8)
    assert found[0] == found[3] and found[1] == found[4] and len({str(each) for each in found}) == 3
    assert "mlp" not in found[2]["DoubleStreamBlock"][2]
    plain = nodes.CompileModel(model, **CHEAP)
    sample(plain)
    assert not report_of(plain).int8 and "INT8 against float" not in report_of(plain).text()


@pytest.mark.rotating
@pytest.mark.parametrize("failure", ["interrupt", "memory"])
def test_a_comparison_with_float_that_is_cut_off_is_made_later_and_leaves_nothing(load, nodes, sample, comfy, monkeypatch, failure):
    import comfy.model_management
    from int8_compile.compile.verification import quantization, verifier

    kind = comfy.model_management.InterruptProcessingException if failure == "interrupt" else torch.OutOfMemoryError
    monkeypatch.setattr(verifier, "_LATER", 1)
    quantized = nodes.INT8QuantizeModel(load("tiny_flux"), method="rowwise")
    want = sample(quantized)
    compiled = nodes.CompileModel(quantized, **CHEAP)
    calls = []

    def fails_once(*args):
        calls.append(args)
        if len(calls) == 3:
            raise kind("out of memory")
        return 40.0
    with monkeypatch.context() as changes:
        changes.setattr(quantization, "sqnr_db", fails_once)
        if failure == "interrupt":
            with pytest.raises(kind):
                sample(compiled)
        else:
            assert difference(sample(compiled), want) < 1e-3
    assert not any("forward" in vars(layer) for layer in quantized.object_patches.values())
    assert difference(sample(compiled), want) < 1e-3 and set(report_of(compiled).int8) == CLASSES


def test_after_a_bypass_lora_is_gone_the_model_runs_compiled_as_before(load, nodes, sample, comfy, models_dir):
    import comfy.sd
    import comfy.utils

    model = load("tiny_flux")
    compiled = nodes.CompileModel(model, **CHEAP)
    want = sample(compiled)
    graphs = report_of(compiled).graphs
    weights = comfy.utils.load_torch_file(str(models_dir / "models" / "loras" / "tiny_flux_a.safetensors"))
    bypassed, _ = comfy.sd.load_bypass_lora_for_models(compiled, None, weights, 0.6, 0.0)
    assert difference(sample(bypassed), want) > 1e-3
    assert torch.equal(sample(compiled), want) and report_of(compiled).last_calls["eager"] == 0
    assert not any("forward" in vars(module) for block in model.model.diffusion_model.double_blocks for module in block.modules())
    sample(compiled)
    assert report_of(compiled).graphs <= 2 * graphs  # with the LoRA, and without it
