"""The search for each layer's precision: bounded, interruptible, resumable, and not repeated by a restore."""
from __future__ import annotations

import itertools
import json

import pytest
import torch
from int8_compile.compile.modes import ApplyModeError, ModeConfigError, Searcher, apply_modes, mode_state, restore_modes
from int8_compile.compile.modes import int8 as int8_mode

from .small_model import Model, forward_loop

LIMIT = 180_000


def size(model) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.fixture
def measured(monkeypatch):
    """Weights that were measured, in order."""
    calls, measure = [], int8_mode.measure
    monkeypatch.setattr(int8_mode, "measure", lambda weight, *args: calls.append(tuple(weight.shape)) or measure(weight, *args))
    return calls


def search(model, config=None, **kwargs):
    return apply_modes(model, ("int8", config or {"max_bytes": LIMIT}), {"forward_loop": forward_loop, **kwargs})


def chosen(model) -> dict:
    return dict(mode_state(model)["modes"][-1]["config"]["chosen"])


def test_the_model_gets_below_the_limit_with_no_more_layers_than_needed(model):
    found = search(model)
    kinds = [method != "float" for method in chosen(found).values()]
    assert size(found) <= LIMIT < size(model)
    assert True in kinds and False in kinds
    assert size(search(model, {"max_bytes": size(model)})) == size(model)
    with pytest.raises(ModeConfigError, match=r"only \d+ of the \d+ bytes can be saved to get from \d+ bytes to max_bytes = 1000\. Raise"):
        search(model, {"max_bytes": 1000})


def test_no_layer_is_noisier_than_the_limit(model):
    loud = search(model, {"min_sqnr_db": 1.0})
    assert "float" not in chosen(loud).values()
    assert set(chosen(search(model, {"min_sqnr_db": 99.0})).values()) == {"float"}


def test_equal_layers_of_equal_blocks_are_decided_together_where_asked(model):
    found = chosen(search(model, {"max_bytes": LIMIT, "per": "role"}))
    for layer in ("up", "down"):
        assert len({found[f"blocks.{index}.{layer}"] for index in range(3)}) == 1


def test_a_restore_neither_searches_nor_needs_data(model, measured):
    found = search(model)
    count = len(measured)
    restored = restore_modes(Model(4), mode_state(found))
    restored.load_state_dict(found.state_dict())
    again = apply_modes(model, ("int8", mode_state(found)["modes"][0]["config"]))
    assert len(measured) == count
    for other in (restored, again):
        assert mode_state(other) == mode_state(found)
        assert all(torch.equal(other.state_dict()[key], value) for key, value in found.state_dict().items())


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_an_interrupted_search_goes_on_where_it_was_with_the_same_result(model, measured, tmp_path, after):
    want, progress = chosen(search(model)), []
    everything = len(measured)
    measured.clear()

    calls = itertools.count()

    def interrupt():
        if next(calls) > after:
            raise Stop

    path = tmp_path / "folder" / "search.json"
    with pytest.raises(Stop):
        search(model, checkpoint=path, interrupt=interrupt)
    done = len(json.loads(path.read_text())["results"]) if path.exists() else 0
    assert done == after
    found = search(model, checkpoint=path, progress=lambda *step: progress.append(step))
    assert chosen(found) == want and len(measured) == everything
    assert progress == [(index, 6) for index in range(after, 7)]
    # All of it is known now, for any limit; nothing has to be called.
    again = apply_modes(model, ("int8", {"min_sqnr_db": 1.0}), {"checkpoint": path})
    assert len(measured) == everything and "float" not in chosen(again).values()


def test_a_measurement_counts_only_for_the_weight_that_it_is_of(model, measured, tmp_path):
    search(model, checkpoint=tmp_path / "search.json")
    measured.clear()
    with torch.no_grad():
        model.blocks[1].up.weight *= 2
    search(model, checkpoint=tmp_path / "search.json")
    assert measured == [(256, 64), (256, 64)]  # row-wise and rotated


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"version": 9, "mode": "int8", "results": {}}',
                                     '{"version": 1, "mode": "int8", "results": {"blocks.0.up": 3}}'])
def test_a_file_that_is_no_checkpoint_is_said_and_replaced(model, tmp_path, caplog, content):
    path = tmp_path / "search.json"
    path.write_text(content)
    assert chosen(search(model, checkpoint=path)) == chosen(search(model))
    assert "is no checkpoint of this search" in caplog.text
    assert len(json.loads(path.read_text())["results"]) == 6


def test_a_search_leaves_the_models_training_flags(model):
    model.train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    mean = model.norm.running_mean.clone()
    search(model)
    assert [module.training for module in model.modules()] == before and torch.equal(model.norm.running_mean, mean)


def test_a_mode_without_a_search_says_so(registry):
    with pytest.raises(ApplyModeError, match="convrot has nothing to search for"):
        registry["convrot"].search_algorithm  # noqa: B018
    assert issubclass(registry["int8"].search_algorithm, Searcher)
