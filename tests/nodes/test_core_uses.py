"""The list of what the pack uses of ComfyUI's internals: a change of one is said in one line, and ends no prompt."""
from __future__ import annotations

import logging

import pytest
import torch

pytestmark = pytest.mark.comfy


@pytest.fixture
def core(comfy):
    from int8_compile.compile.comfyui import core as comfy_core

    comfy_core.usable.cache_clear()
    yield comfy_core
    comfy_core.usable.cache_clear()


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name.endswith("comfyui.core")]


def test_this_comfyui_has_all_that_the_pack_uses(core, caplog):
    core.check_all()
    assert lines(caplog) == []
    assert not any(core.changes(feature) for feature in core.WITHOUT)
    assert {use.feature for use in core.USES} == core.WITHOUT.keys() and all(use.seen for use in core.USES)


@pytest.mark.parametrize("changed", [lambda s: (s, None, None), None])
def test_a_changed_or_missing_function_is_one_line_and_the_model_is_left_as_it_is(comfy, core, flux, nodes, sample, monkeypatch, caplog,
                                                                                  changed):
    want = sample(flux)
    with caplog.at_level(logging.WARNING):
        with monkeypatch.context() as patch:
            if changed is None:
                patch.delattr(comfy.ops, "cast_bias_weight")
            else:
                patch.setattr(comfy.ops, "cast_bias_weight", changed)
            core.check_all()
            model = nodes.INT8QuantizeModel(flux, method="convrot")
            assert nodes.INT8QuantizeModel(flux, method="auto").wrappers == flux.wrappers
        assert model.object_patches == {}
    assert torch.equal(sample(model), want)
    problem = "comfy.ops.cast_bias_weight " + ("is gone" if changed is None else "takes other arguments")
    found = lines(caplog)
    assert len(found) == 2  # for INT8 layers and for offloaded blocks
    assert all(line.count("\n") == 0 and problem in line and "Update " in line for line in found)
    assert "models stay as they were loaded" in found[0]


def test_the_node_says_that_it_left_the_model_as_it_is(comfy, core, flux, monkeypatch):
    from int8_compile.compile.comfyui.int8_calibrate import quantize_model
    from int8_compile.int8.options import Int8Options

    reports = []
    with monkeypatch.context() as patch:
        patch.delattr(comfy.ops, "uncast_bias_weight")
        quantize_model(flux, Int8Options(), lambda report, *_: reports.append(report))
    report, = reports
    assert report.status() == "not quantized" and "comfy.ops.uncast_bias_weight is gone" in report.text() and report.warnings()


def test_a_linear_input_act_that_is_another_one_is_left_alone(comfy, core, monkeypatch, caplog):
    from int8_compile.compile.comfyui import int8_layer

    def linear_input_act(x, layer, kind):
        return x
    monkeypatch.setattr(comfy.ops, "linear_input_act", linear_input_act)
    int8_layer.patch_linear_input_act()
    assert comfy.ops.linear_input_act is linear_input_act and "computed before the layer, which is slower" in lines(caplog)[0]


def test_another_packs_open_wrapper_is_no_change(comfy, core, monkeypatch):
    monkeypatch.setattr(comfy.ops, "linear_input_act", lambda *args, **kwargs: None)
    assert core.usable(core.FUSED_ACTIVATION)


def test_the_line_says_which_of_the_two_is_too_old(core, monkeypatch, caplog):
    monkeypatch.setattr(core, "USES", (core.Use("comfy.ops.not_there", core.INT8, "0.38.1"),))
    for version in ("0.30.2", "0.39.0"):
        monkeypatch.setattr(core, "comfyui_version", lambda version=version: version)
        core.usable.cache_clear()
        assert not core.usable(core.INT8)
    assert [line.rpartition(". ")[2] for line in lines(caplog)] == ["Update ComfyUI.", "Update the pack."]


def test_what_an_older_comfyui_has_not_yet_is_no_change_and_what_a_newer_one_has_no_more_is(core, monkeypatch):
    use = core.Use("comfy.ops.not_there", core.INT8, "0.38.1", since="0.36.0")
    monkeypatch.setattr(core, "USES", (use,))
    for version, problems in (("0.33.0", 0), ("0.36.0", 1), ("0.40.0rc1", 1), ("1.0", 1)):
        monkeypatch.setattr(core, "comfyui_version", lambda version=version: version)
        assert len(core.changes(core.INT8)) == problems


def test_offloaded_blocks_do_without(comfy, core, monkeypatch):
    from int8_compile.compile.comfyui.offload import around_block

    block = object()
    monkeypatch.delattr(comfy.ops, "CastWeightBiasOp")
    assert around_block(block) is block


def test_a_changed_wrapper_interface_leaves_the_model_uncompiled(comfy, core, flux, nodes, sample, monkeypatch, caplog):
    want = sample(flux)
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_base.BaseModel, "apply_model", lambda self, step: None)
        model = nodes.CompileModel(flux, backend="eager")
    assert torch.equal(sample(model), want) and not model.wrappers
    assert "models run uncompiled" in lines(caplog)[0]
