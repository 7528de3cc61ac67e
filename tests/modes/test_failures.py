"""All modes or none: after a failure the model that came in is bit for bit what it was."""
from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from int8_compile.compile.modes import Mode, apply_modes, mode_state, restore_modes

from .small_model import Model, forward_loop, typical
from .test_round_trips import CHAINS, IDS


@dataclass(frozen=True)
class FailsConfig:
    where: str = "convert"


class Fails(Mode):
    """Changes the model, then fails."""

    name = "fails"
    config_class = FailsConfig

    def convert(self, model, config, **_):
        model.first = torch.nn.Linear(8, 64)
        model.norm.running_mean.add_(1)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if config.where == "convert":
            raise torch.OutOfMemoryError("injected")
        if config.where == "interrupt":
            raise KeyboardInterrupt
        return (model,) if config.where == "result" else (model, {"x": model} if config.where == "metadata" else {})

    def restore(self, model, config, metadata):
        return self.convert(model, config)[0]

    def finish(self, model, config, **_):
        if config.where == "finish":
            raise OSError("injected")


def fingerprint(model):
    return ({key: (id(p), p._version, p.requires_grad, p.clone()) for key, p in model.named_parameters()},
            {key: (id(b), b.clone()) for key, b in model.named_buffers()}, [(name, id(m)) for name, m in model.named_modules()],
            mode_state(model))


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b)) if isinstance(a, tuple) else a == b


@pytest.mark.parametrize("chain", CHAINS, ids=IDS)
def test_a_failure_at_each_step_of_each_chain_leaves_the_model_as_it_was(model, registry, chain):
    registry.register(Fails)
    before = fingerprint(model)
    with torch.no_grad():
        output = model(typical())
    compiled = "compile" in str(chain[-1])
    for position in range(len(chain) + (not compiled)):
        with pytest.raises(torch.OutOfMemoryError):
            apply_modes(model, [*chain[:position], "fails", *chain[position:]], {"forward_loop": forward_loop}, registry=registry)
        assert same(fingerprint(model), before)
    with torch.no_grad():
        assert torch.equal(model(typical()), output)


@pytest.mark.parametrize("where, error", [("convert", torch.OutOfMemoryError), ("interrupt", KeyboardInterrupt), ("finish", OSError),
                                          ("result", RuntimeError), ("metadata", RuntimeError)])
def test_a_model_that_has_modes_keeps_them_after_a_failure(model, registry, where, error):
    registry.register(Fails)
    quantized = apply_modes(model, ["convrot"], registry=registry)
    before = fingerprint(quantized)
    with pytest.raises(error):
        apply_modes(quantized, ["int8", ("fails", {"where": where})], registry=registry)
    assert same(fingerprint(quantized), before)


def test_nothing_is_written_where_a_later_mode_fails(model, registry, tmp_path):
    registry.register(Fails)
    with pytest.raises(torch.OutOfMemoryError):
        apply_modes(model, ["int8", "export", "fails"], {"path": tmp_path / "model.safetensors"}, registry=registry)
    assert not list(tmp_path.iterdir())


def test_a_failed_restore_leaves_the_model_as_it_was(model, registry):
    registry.register(Fails)
    before = fingerprint(model)
    record = mode_state(apply_modes(model, "int8"))
    record["modes"].append({"name": "fails", "config": {}, "metadata": {}})
    with pytest.raises(torch.OutOfMemoryError):
        restore_modes(model, record, registry=registry)
    assert same(fingerprint(model), before)


def test_weights_that_cannot_be_quantized_are_named(model):
    model.blocks[1].up.weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"int8: layer 'blocks\.1\.up': the weight has NaN"):
        apply_modes(model, "int8")


def test_a_record_of_another_model_is_refused(model):
    record = mode_state(apply_modes(model, ["convrot", "int8"]))
    other = Model()
    del other.blocks[2]
    with pytest.raises(RuntimeError, match=r"the record names the layer 'blocks\.2\.up', which in this model is absent"):
        restore_modes(other, record)
