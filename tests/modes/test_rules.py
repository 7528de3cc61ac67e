"""Which modes may follow which, and what a mode's definition must be."""
from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from int8_compile.compile.modes import (
    MODES,
    ApplyModeError,
    Mode,
    ModeConfigError,
    ModelRecipe,
    ModeOrderError,
    ModeRecordError,
    ModeRegistryError,
    UnknownModeError,
    apply_modes,
    mode_state,
    restore_modes,
)

from .small_model import Model, forward_loop

KWARGS = {"forward_loop": forward_loop}


class Nothing(Mode):
    """Converts nothing. make(name, **rules) gives a subclass."""

    def convert(self, model, config, **_):
        return model, {}

    def restore(self, model, config, metadata):
        return model


def make(name, **rules):
    return type("Made", (Nothing,), {"name": name, **rules})


@pytest.mark.parametrize("chain, message", [
    (["int8", "convrot"], "Cannot add convrot after int8: int8 does not allow convrot after it. "
                          "Put convrot before it or apply export between them."),
    (["int8", "smoothquant"], "Cannot add smoothquant after int8: int8 does not allow smoothquant after it. "
                              "Put smoothquant before it or apply export between them."),
    (["convrot", "smoothquant"], "Cannot add smoothquant after convrot: convrot does not allow smoothquant after it. "
                                 "Put smoothquant before it or apply export between them."),
    (["int8", "int8"], "Cannot add int8 after int8: int8 does not allow int8 after it. Apply export between them."),
    (["smoothquant", "convrot", "int8", "smoothquant"], "Cannot add smoothquant after int8: int8 does not allow smoothquant after it. "
                                                        "Put smoothquant before it or apply export between them."),
    (["compile", "int8"], "Cannot add int8 after compile: nothing may follow compile. Put int8 before it."),
    (["int8", "compile", "export"], "Cannot add export after compile: nothing may follow compile. Put export before it."),
    (["compile", "compile"], "Cannot add compile after compile: nothing may follow compile. Apply it once."),
    (["export"], "Cannot add export: there is nothing to export. Apply convrot or int8 or smoothquant first."),
    (["int8", "export", "export"], "Cannot add export: there is nothing to export. Apply convrot or int8 or smoothquant first."),
])
def test_a_chain_out_of_order_is_refused_before_anything_is_done(model, chain, message):
    def never(model):
        raise AssertionError("the model was called")

    with pytest.raises(ModeOrderError) as error:
        apply_modes(model, chain, {"forward_loop": never})
    assert str(error.value) == message
    done = apply_modes(model, chain[:-1], KWARGS)  # the same in a second call
    with pytest.raises(ModeOrderError) as error:
        apply_modes(done, chain[-1], KWARGS)
    assert str(error.value) == message
    # A record that says so is no better; one that names compile is none.
    record = {"version": 1, "modes": [{"name": name, "config": {}, "metadata": {}} for name in chain]}
    with pytest.raises(ModeRecordError if "compile" in chain else ModeOrderError):
        restore_modes(model, record)


def test_a_prohibition_holds_at_any_distance_until_it_is_exported(model, registry):
    registry.register(make("x"))
    with pytest.raises(ModeOrderError, match="convrot does not allow smoothquant"):
        apply_modes(model, ["convrot", "x", "smoothquant"], KWARGS, registry=registry)
    chain = ["convrot", "x", "export", "smoothquant", "int8"]
    done = apply_modes(model, chain, KWARGS, registry=registry)
    assert [mode["name"] for mode in mode_state(done, registry=registry)["modes"]] == chain


def test_next_modes_are_asked_of_the_last_mode_and_of_all_that_wait_for_their_export(model, registry):
    registry.register(make("a", next_modes={"b", "end"}, export_mode="end"))
    registry.register(make("b"))
    registry.register(make("c"))
    registry.register(make("end", is_export_mode=True))
    for chain in (["a", "c"], ["a", "b", "c"]):
        with pytest.raises(ModeOrderError, match="Cannot add c after a: only b, end may follow a"):
            apply_modes(model, chain, registry=registry)
    apply_modes(model, ["a", "b", "end", "c"], registry=registry)


def test_export_modes_end_what_was_applied_last_first(model, registry):
    registry.register(make("a", export_mode="end_a"))
    registry.register(make("b", export_mode="end_b"))
    registry.register(make("end_a", is_export_mode=True))
    registry.register(make("end_b", is_export_mode=True))
    with pytest.raises(ModeOrderError, match=r"^Cannot add end_a: b waits for end_b\. Apply end_b first\.$"):
        apply_modes(model, ["a", "b", "end_a"], registry=registry)
    apply_modes(model, ["a", "b", "end_b", "end_a", "a"], registry=registry)


def test_every_rule_of_the_built_in_modes_names_a_mode():
    MODES.check()
    assert sorted(mode.name for mode in MODES) == ["compile", "convrot", "export", "int8", "smoothquant"]


@pytest.mark.parametrize("rules, message", [
    ({"next_modes": {"sparse_gpt"}}, "x.next_modes names 'sparse_gpt', which is no mode."),
    ({"next_prohibited_modes": {"sparsity"}}, "x.next_prohibited_modes names 'sparsity', which is no mode."),
    ({"export_mode": "export_quantize"}, "x.export_mode names 'export_quantize', which is no export mode."),
    ({"export_mode": "int8"}, "x.export_mode names 'int8', which is no export mode."),
    ({"is_export_mode": True}, "x is the export mode of no mode."),
])
def test_a_rule_that_names_no_mode_is_found(registry, rules, message):
    registry.register(make("x", **rules))
    with pytest.raises(ModeRegistryError) as error:
        registry.check()
    assert str(error.value) == message


@dataclass
class NotFrozen:
    x: int = 0


@dataclass(frozen=True)
class NoDefault:
    x: int


@dataclass(frozen=True)
class NoJson:
    x: torch.Tensor | None = None


@pytest.mark.parametrize("rules, message", [
    ({"name": "int8"}, "The mode 'int8' is registered already, by .*Choose another name"),
    ({"name": "INT 8"}, "must be lower case letters"),
    ({"name": None}, "must be lower case letters"),
    ({"name": "x", "config_class": NotFrozen}, "must be a frozen dataclass"),
    ({"name": "x", "config_class": NoDefault}, r"NoDefault\.x needs a default"),
    ({"name": "x", "config_class": NoJson}, r"NoJson\.x: a configuration is saved as JSON"),
    ({"name": "x", "is_export_mode": True, "export_mode": "export"}, "an export mode has no export mode of its own"),
])
def test_a_definition_that_cannot_work_is_refused(registry, rules, message):
    with pytest.raises(ModeRegistryError, match=message):
        registry.register(make(**rules))
    assert len(list(registry)) == 5


def test_modes_come_and_go(registry):
    registry.register(make("x"))
    assert "x" in registry and registry["x"] is registry.get("x") and str(registry["x"]) == "x"
    registry.remove("x")
    assert "x" not in registry and registry.get("x") is None
    with pytest.raises(UnknownModeError, match="There is no mode 'x'"):
        registry.remove("x")


@pytest.mark.parametrize("modes, error, message", [
    ("int4", UnknownModeError, "Did you mean int8?"),
    ([("int8", {"min_sqnr": 3})], ModeConfigError, 'int8: unknown key "min_sqnr". Did you mean min_sqnr_db?'),
    ([("int8", {"min_sqnr_db": "30"})], ModeConfigError, "int8: 'min_sqnr_db' takes a number, not \"30\"."),
    ([("int8", {"min_sqnr_db": float("inf")})], ModeConfigError, "int8: 'min_sqnr_db' takes a number, not Infinity."),
    ([("int8", {"max_bytes": True})], ModeConfigError, "int8: 'max_bytes' takes a whole number, not true."),
    ([("int8", {"per": "block"})], ModeConfigError, 'int8: \'per\' takes "layer" or "role", not "block".'),
    ([("int8", {"keep_layers": ["blocks.9.*"]})], ModeConfigError, "int8: keep_layers: 'blocks.9.*' matches no layer"),
    ([("int8", {"keep_layers": ["*"]})], ModeConfigError, "int8: keep_layers keeps every layer."),
    ([("int8", {"keep_layers": "*"})], ModeConfigError, "int8: 'keep_layers' takes a list of text, not \"*\"."),
    ([("int8", {"chosen": {"first": "rowwise"}})], ModeConfigError, "int8: chosen names the layer 'first'"),
    ([("int8", {"chosen": [["first", "rowwise"], ["first", "rowwise"]]})], ModeConfigError, "int8: chosen names the layer 'first' twice."),
    ([("smoothquant", {"alpha": 2})], ModeConfigError, "smoothquant: alpha is a share from 0 to 1, not 2."),
    ([("compile", {"backend": "nonsense"})], ModeConfigError, "compile: Unknown backend 'nonsense'."),
    ([("compile", {"options": "{"})], ModeConfigError, "compile: Compilation failed due to invalid options: not JSON"),
    ([{"mode": "int8"}], ModeConfigError, 'A mode is {"name": ..., "config": ...}, not an object with mode.'),
    ([("int8", [])], ModeConfigError, "int8: the configuration must be an object, not []."),
    ([7], ModeConfigError, "A mode is a name, or a name and its configuration, not a int."),
])
def test_what_a_chain_says_wrong_is_explained(model, modes, error, message):
    with pytest.raises(error) as raised:
        apply_modes(model, modes, KWARGS)
    assert str(raised.value).startswith(message) or message in str(raised.value)


@pytest.mark.parametrize("modes", ["int8", MODES["int8"], ("int8", {}), {"name": "int8"}, [{"name": "int8", "config": {}}],
                                   [["int8", None]], [("int8", MODES["int8"].config_class())]])
def test_a_chain_can_be_written_in_several_ways(model, modes):
    assert mode_state(apply_modes(model, modes)) == mode_state(apply_modes(model, ["int8"]))


def test_smoothquant_and_a_search_need_something_to_look_at(model):
    for modes in ("smoothquant", ("int8", {"min_sqnr_db": 30})):
        with pytest.raises(ModeConfigError, match=r"pass mode_kwargs=\{'forward_loop': f\}"):
            apply_modes(model, modes)
    with pytest.raises(ApplyModeError, match="forward_loop called none of the layers"):
        apply_modes(model, "smoothquant", {"forward_loop": lambda model: None})


def test_mode_kwargs_are_for_all_modes_or_for_each(model):
    apply_modes(model, ["smoothquant", "int8"], [KWARGS, {}])
    with pytest.raises(ModeConfigError, match="mode_kwargs has 1 entries for 2 modes"):
        apply_modes(model, ["smoothquant", "int8"], [KWARGS])


def test_a_mode_that_makes_the_model_gets_the_recipe_and_is_first(model, registry):
    class Narrow(Mode):
        name = "narrow"
        require_model_like = True

        def convert(self, model, config, **_):
            return model.factory(seed=7), {}

        def restore(self, model, config, metadata):
            return self.convert(model, config)[0]

    registry.register(Narrow)
    recipe = ModelRecipe(Model)
    made = apply_modes(recipe, ["narrow", "int8"], registry=registry)
    assert restore_modes(recipe, mode_state(made, registry=registry), registry=registry).state_dict().keys() == made.state_dict().keys()
    for target, chain in ((model, ["narrow"]), (recipe, ["int8", "narrow"])):
        with pytest.raises(ApplyModeError, match="narrow makes the model itself: apply it first, to a ModelRecipe"):
            apply_modes(target, chain, registry=registry)


def test_modes_belong_to_the_whole_model(model):
    outer = torch.nn.Sequential(apply_modes(model, "int8"), torch.nn.Linear(64, 64))
    with pytest.raises(ApplyModeError, match="'0' inside this model has modes of its own"):
        apply_modes(outer, "convrot")
    with pytest.raises(ApplyModeError, match=r"applied to a torch\.nn\.Module, not to a dict"):
        apply_modes({}, "int8")
    with pytest.raises(ApplyModeError, match="The model has modes already: int8"):
        restore_modes(outer[0], mode_state(outer[0]))


def test_a_mode_hears_of_every_mode_after_it_and_of_every_save(model, registry):
    @dataclass(frozen=True)
    class Config:
        followed: bool = False

    class Listens(Nothing):
        name = "listens"
        config_class = Config

        def update_for_new_mode(self, model, config, metadata):
            return Config(followed=True), metadata

        def update_for_save(self, model, config, metadata):
            return config, {"layers": len(list(model.modules()))}

    registry.register(Listens)
    done = apply_modes(model, ["listens", "convrot", "int8"], registry=registry)
    entry = mode_state(done, registry=registry)["modes"][0]
    assert entry["config"] == {"followed": True} and entry["metadata"] == {"layers": len(list(done.modules()))}
    assert registry.host.get_state(done).entries[0].metadata == {}  # the model's own record stays
    alone = apply_modes(model, "listens", registry=registry)
    assert mode_state(alone, registry=registry)["modes"][0]["config"] == {"followed": False}


@pytest.mark.parametrize("metadata", [{"x": {1}}, {"x": float("nan")}, {1: 2}, {"x": (1,)}, {"x": torch.ones(1)}, None])
def test_metadata_that_json_would_not_give_back_is_refused(model, registry, metadata):
    registry.register(make("x", convert=lambda self, model, config, **_: (model, metadata)))
    with pytest.raises(ApplyModeError, match="its metadata must be a dict of JSON values"):
        apply_modes(model, "x", registry=registry)


def test_a_copy_of_the_model_has_its_record(model):
    import copy

    compiled = apply_modes(model, ["int8", ("compile", {"backend": "eager"})])
    assert mode_state(copy.deepcopy(compiled)) == mode_state(compiled)
    assert MODES.host.get_state(copy.deepcopy(compiled)).names == ("int8",)  # as torch leaves out what was compiled
