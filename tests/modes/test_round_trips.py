"""Applied, saved, loaded in a fresh process: the same state, weights and outputs."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from int8_compile.compile.modes import ModelRecipe, apply_modes, mode_state, restore_modes
from int8_compile.compile.modes.files import load_model, save_model

from .small_model import Model, forward_loop, typical

CHAINS = [
    ["smoothquant"],
    ["convrot"],
    ["int8"],
    [("smoothquant", {"alpha": 0.5})],
    ["smoothquant", "convrot"],
    ["smoothquant", "int8"],
    ["convrot", "int8"],
    ["smoothquant", "convrot", "int8"],
    [("convrot", {"keep_layers": ["*.down"]}), ("int8", {"keep_layers": ["blocks.0.*"]})],
    ["smoothquant", "export"],
    ["convrot", "int8", "export"],
    ["smoothquant", "int8", ("export", {"layers": "float"})],
    ["int8", ("export", {"layers": "float"}), "convrot", "int8"],
    ["convrot", "export", "smoothquant", "int8"],
    [("int8", {"min_sqnr_db": 36.0})],
    ["convrot", ("int8", {"max_bytes": 180_000})],
    [("int8", {"max_bytes": 180_000, "per": "role"})],
    [("compile", {"backend": "eager"})],
    ["convrot", "int8", ("compile", {"backend": "eager"})],
    ["smoothquant", "convrot", "int8", "export", ("compile", {"backend": "eager"})],
]
IDS = [f"{index:02}-" + "-".join(item if isinstance(item, str) else item[0] for item in chain) for index, chain in enumerate(CHAINS)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """{chain: (the model that was saved, what a fresh process made of its file)}, one process for all."""
    folder, models = tmp_path_factory.mktemp("chains"), {}
    for name, chain in zip(IDS, CHAINS):
        models[name] = apply_modes(Model().eval(), chain, {"forward_loop": forward_loop})
        save_model(models[name], folder / f"{name}.safetensors")
    subprocess.run([sys.executable, str(Path(__file__).with_name("fresh_process.py")), str(folder)], check=True)
    return {name: (model, torch.load(folder / f"{name}.pt")) for name, model in models.items()}


@pytest.mark.parametrize("name, chain", zip(IDS, CHAINS), ids=IDS)
def test_a_fresh_process_has_the_same_state_weights_and_outputs(loaded, name, chain):
    model, (state, weights, outputs) = loaded[name]
    assert state == mode_state(model)
    want = [item if isinstance(item, str) else item[0] for item in chain]
    assert [mode["name"] for mode in state["modes"]] == [name for name in want if name != "compile"]
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], value) and weights[key].dtype == value.dtype for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(outputs, model(typical()))


@pytest.mark.parametrize("chain", CHAINS, ids=IDS)
def test_the_model_still_does_what_it_did(model, chain):
    with torch.no_grad():
        want, got = model(typical()), apply_modes(model, chain, {"forward_loop": forward_loop})(typical())
    error = ((got - want).norm() / want.norm()).item()
    assert error < 0.03
    assert (error < 1e-5) == ("int8" not in str(chain))


def test_export_gives_back_the_very_weights_that_were_only_prepared(model):
    exported = apply_modes(model, ["smoothquant", "convrot", "export"], {"forward_loop": forward_loop})
    assert exported.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(exported.state_dict()[key], value) for key, value in model.state_dict().items())


def test_export_writes_the_file_once_all_modes_are_applied(model, tmp_path):
    path = tmp_path / "model.safetensors"
    exported = apply_modes(model, ["convrot", "int8", "export"], {"path": path})
    assert all(torch.equal(load_model(Model(3), path).state_dict()[key], value) for key, value in exported.state_dict().items())


def test_int8_weights_are_in_comfyuis_layout(model):
    state = apply_modes(model, ["convrot", "int8"]).state_dict()
    assert bytes(state["blocks.0.up.comfy_quant"].tolist()) == b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 64}'
    assert state["blocks.0.up.weight"].dtype == torch.int8 and state["blocks.0.up.weight_scale"].shape == (256, 1)


def test_where_the_layers_own_entry_disagrees_with_the_record_it_holds(model, tmp_path, caplog):
    quantized = apply_modes(model, ["convrot", "int8"])
    record = mode_state(quantized)
    record["modes"][1]["metadata"]["layers"][0][1] = 16
    restored = restore_modes(Model(3).eval(), record)
    restored.load_state_dict(quantized.state_dict())
    assert "layer 'blocks.0.up' is rotated in groups of 64 by its own entry in the file, of 16 by the record" in caplog.text
    with torch.no_grad():
        assert torch.equal(restored(typical()), quantized(typical()))


def test_a_recipe_is_built_and_restored(model):
    recipe = ModelRecipe(Model, kwargs={"seed": 0})
    quantized = apply_modes(recipe, ["convrot", "int8"])
    restored = restore_modes(recipe, json.dumps(mode_state(quantized)))
    assert mode_state(restored) == mode_state(quantized)
    assert restored.state_dict().keys() == quantized.state_dict().keys()


def test_an_empty_chain_gives_the_model_itself(model):
    assert apply_modes(model, []) is model and mode_state(model) == {"version": 1, "modes": []}


def test_a_file_without_a_record_is_refused(model, tmp_path):
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"plain\.safetensors has no record of modes"):
        load_model(model, tmp_path / "plain.safetensors")
