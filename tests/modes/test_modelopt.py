"""The same definitions in NVIDIA ModelOpt and here: which chains do they accept? (pip install nvidia-modelopt)"""
from __future__ import annotations

import itertools

import pytest
import torch
from int8_compile.compile.modes import MODES, Mode, ModeOrderError, ModeRegistry, ModuleHost, apply_modes

pytest.importorskip("modelopt.torch.opt", reason="nvidia-modelopt is not installed")
from modelopt.torch.opt.config import ModeloptBaseConfig
from modelopt.torch.opt.conversion import apply_mode
from modelopt.torch.opt.mode import ModeDescriptor, _ModeRegistryCls

RULES = ("next_modes", "next_prohibited_modes", "export_mode", "is_export_mode")
# What is asked of the last mode and of the export stack, in both alike.
STACKS = {
    "a": {"export_mode": "end_a"},
    "b": {"export_mode": "end_b", "next_modes": {"end_b", "c"}},
    "c": {},
    "end_a": {"is_export_mode": True},
    "end_b": {"is_export_mode": True},
    "last": {"next_modes": set()},
}
# A prohibition reaches over what comes between, here; in ModelOpt only the last mode and the top of the stack are asked.
DISTANCE = {"q": {"next_prohibited_modes": {"a"}}, "x": {}, "a": {}}
BUILT_IN = {mode.name: {rule: getattr(mode, rule) for rule in RULES} for mode in MODES}


def accepted_by_modelopt(definitions, length) -> set:
    class Config(ModeloptBaseConfig):
        pass

    registry = _ModeRegistryCls("compare")
    for name, rules in definitions.items():
        members = {"name": name, "config_class": Config, "convert": lambda model, config: (model, {}),
                   "restore": lambda model, config, metadata: model, **rules}
        registry.register_mode(type("Descriptor", (ModeDescriptor,), {
            key: property(lambda self, value=value: value) for key, value in members.items()}))

    def accepts(chain):
        try:
            apply_mode(torch.nn.Linear(1, 1), list(chain), registry=registry)
        except AssertionError:
            return False
        return True
    return {chain for chain in itertools.product(definitions, repeat=length) if accepts(chain)}


def accepted_here(definitions, length) -> tuple[set, dict]:
    """(accepted chains, {refused chain: the reason})"""
    registry = ModeRegistry(ModuleHost())
    for name, rules in definitions.items():
        registry.register(type("Made", (Mode,), {"name": name, "convert": lambda self, model, config: (model, {}), **rules}))
    accepted, refused = set(), {}
    for chain in itertools.product(definitions, repeat=length):
        try:
            apply_modes(torch.nn.Linear(1, 1), list(chain), registry=registry)
            accepted.add(chain)
        except ModeOrderError as error:
            refused[chain] = str(error)
    return accepted, refused


def ends_several(definitions, chain) -> bool:
    """Whether an export mode in chain meets two modes that wait for it: here it ends both, in ModelOpt the last only."""
    waiting = []
    for name in chain:
        if definitions[name].get("is_export_mode"):
            if waiting[-2:] == [name, name]:
                return True
            waiting = waiting[:-1]
        elif definitions[name].get("export_mode"):
            waiting.append(definitions[name]["export_mode"])
    return False


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("definitions", [STACKS, BUILT_IN, DISTANCE], ids=["stacks", "built in", "distance"])
def test_both_accept_the_same_chains_but_for_the_two_differences_that_are_meant(definitions, length):
    theirs, (ours, refused) = accepted_by_modelopt(definitions, length), accepted_here(definitions, length)
    differ = {chain for chain in ours ^ theirs if not ends_several(definitions, chain)}
    assert ours & theirs and differ <= theirs
    assert all("does not allow" in refused[chain] for chain in differ)
    if length == 4:
        assert (("a", "a", "end_a", "end_a") in theirs) == (definitions is STACKS)
        assert (("q", "x", "x", "a") in differ) == (definitions is DISTANCE)
        assert (("smoothquant", "convrot", "int8", "export") in ours & theirs) == (definitions is BUILT_IN)
