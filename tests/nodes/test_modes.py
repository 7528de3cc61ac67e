"""Modes of a MODEL: applied, recorded by the nodes, saved in INT8 files, restored from them."""
from __future__ import annotations

import itertools
import json
import logging
import re
import statistics

import pytest
import torch
from int8_compile.int8.echo import OF_A_PROMPT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toys import difference

pytestmark = [pytest.mark.comfy, pytest.mark.rotating(3)]
# Between two loads the float layers differ in the last bit, which INT8 rounding blows up to the size of its own noise.
NOISE = 0.01


@pytest.fixture
def modes(comfy):
    from int8_compile.compile import modes
    return modes


@pytest.fixture
def registry(comfy):
    from int8_compile.compile.comfyui.modes import PATCHER_MODES
    return PATCHER_MODES


@pytest.fixture
def names(registry):
    def names(model):
        from int8_compile.compile.comfyui.mode_records import recorded
        return list(registry.host.get_state(recorded(model)).names)
    return names


@pytest.fixture
def saved(comfy, models_dir, output_folder):
    """Saves a MODEL as the node does: -> the file."""
    from int8_compile.nodes import SaveINT8Model

    def saved(model):
        SaveINT8Model.execute(model=model, filename_prefix="saved")
        return max(output_folder.glob("saved_*.safetensors"))
    return saved


@pytest.fixture
def load_int8(comfy):
    """As the node Load INT8 Model, of any path."""
    from int8_compile.compile.comfyui.int8_checkpoint import load_int8_model
    from int8_compile.compile.comfyui.mode_records import recorded
    from int8_compile.int8.options import Int8Options

    return lambda path, **options: recorded(load_int8_model(str(path), Int8Options(**options)))


def record_of(path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["int8_compile.modes"])


def with_record(path, record):
    tensors = load_file(path)
    edited = path.with_name("edited.safetensors")
    save_file(tensors, edited, metadata=None if record is None else {"int8_compile.modes": record})
    return edited


def weights(model) -> dict:
    return {name: (layer.weight._qdata, layer.weight._params.scale, layer.weight._params.convrot)
            for name, layer in model.object_patches.items() if hasattr(layer, "quant_format")}


def assert_same_weights(a, b):
    assert a.keys() == b.keys() and a
    for name in a:
        assert torch.equal(a[name][0], b[name][0]) and torch.equal(a[name][1], b[name][1]) and a[name][2] == b[name][2], name


def test_every_rule_names_a_mode(registry, modes):
    registry.check()
    assert [mode.name for mode in registry] == ["smoothquant", "convrot", "int8", "export", "compile"]
    for mode in registry:  # the same rules as for plain models
        plain = modes.MODES[mode.name]
        for rule in ("next_modes", "next_prohibited_modes", "export_mode", "is_export_mode", "save_mode_in_state"):
            assert getattr(mode, rule) == getattr(plain, rule), (mode, rule)


@pytest.mark.parametrize("chain, node", [
    (["convrot", "int8"], {"method": "convrot"}),
    (["int8"], {"method": "rowwise"}),
    ([{"name": "convrot"}, {"name": "int8", "config": {"keep_layers": ["double_blocks.0.*"]}}],
     {"method": "convrot", "keep_layers": "double_blocks.0.*"}),
])
def test_a_chain_is_what_the_node_does_and_the_node_records_the_chain(load, nodes, sample, registry, modes, chain, node):
    applied = nodes.ApplyModes(load(), modes=json.dumps(chain))
    quantized = nodes.INT8QuantizeModel(load(), **node)
    assert_same_weights(weights(applied), weights(quantized))
    assert modes.mode_state(applied, registry=registry) == modes.mode_state(quantized, registry=registry)
    assert difference(sample(applied), sample(quantized)) < NOISE


@pytest.mark.parametrize("method, where", [("smoothquant", "all"), ("auto", "better")])
def test_what_is_measured_at_the_first_sampling_is_in_the_record_after_it(load, nodes, sample, registry, modes, method, where):
    quantized = nodes.INT8QuantizeModel(load(), method=method)
    smoothing, before = modes.mode_state(quantized, registry=registry)["modes"]
    assert smoothing == {"name": "smoothquant", "config": {"where": where}, "metadata": {}}
    assert before["config"]["chosen"] is None and before["metadata"]["layers"] == [] and before["metadata"]["waiting"] > 10
    assert f"{before['metadata']['waiting']} layers to be measured at the first sampling" in nodes.ShowModes(quantized)
    downstream = quantized.clone()
    image = sample(downstream)
    for model in (quantized, downstream):  # the plan is the model's, whichever clone was sampled
        entry = modes.mode_state(model, registry=registry)["modes"][1]
        assert "waiting" not in entry["metadata"]
        assert len(entry["config"]["chosen"]) == before["metadata"]["waiting"] == len(entry["metadata"]["layers"])
        assert all(20 < db < 60 for _, db in entry["metadata"]["sqnr_db"])
        assert "least SQNR" in nodes.ShowModes(model)
    if method == "smoothquant":
        assert {chosen for _, chosen in entry["config"]["chosen"]} == {"smoothquant"}
    assert torch.equal(sample(nodes.ApplyModes(downstream, modes="[]")), image)


@pytest.fixture
def half(load, nodes, sample):
    """dB that half of the layers are below."""
    from int8_compile.compile.comfyui.int8_calibrate import plans

    sample(model := nodes.INT8QuantizeModel(load(), method="convrot", min_sqnr_db=1.0))
    return statistics.median(plan.sqnr["convrot"] for plan in plans(model))


def test_what_was_chosen_is_applied_again_without_measuring(load, nodes, sample, registry, modes, half):
    chain = ["convrot", {"name": "int8", "config": {"min_sqnr_db": half}}]
    measured = nodes.ApplyModes(load(), modes=json.dumps(chain))
    sample(measured)
    config = modes.mode_state(measured, registry=registry)["modes"][1]["config"]
    assert {method for _, method in config["chosen"]} == {"convrot", "float"}
    again = nodes.ApplyModes(load(), modes=json.dumps(["convrot", {"name": "int8", "config": config}]))
    assert_same_weights(weights(again), weights(measured))


def test_the_model_gets_below_a_size_with_no_more_layers_than_needed(load, nodes, sample, registry, modes):
    flux = load()
    size = flux.model_size() / 2**20
    smallest = nodes.INT8QuantizeModel(flux, method="convrot").model_size() / 2**20
    limit = (size + smallest) / 2
    chain = ["convrot", {"name": "int8", "config": {"max_mb": limit}}]
    sample(fitted := nodes.ApplyModes(flux, modes=json.dumps(chain)))
    assert smallest < fitted.model_size() / 2**20 <= limit
    chosen = dict(modes.mode_state(fitted, registry=registry)["modes"][1]["config"]["chosen"])
    assert set(chosen.values()) == {"convrot", "float"}
    for layer in ("img_attn.qkv", "txt_mlp.0"):  # equal blocks stay equal
        assert len({chosen[f"double_blocks.{index}.{layer}"] for index in range(2)}) == 1
    impossible = nodes.ApplyModes(flux, modes=json.dumps(["convrot", {"name": "int8", "config": {"max_mb": 1.0}}]))
    with pytest.raises(ValueError, match=r"only \d+ of the \d+ bytes can be saved to get from .* to max_mb = 1\. Raise max_mb"):
        sample(impossible)
    assert sample(flux).isfinite().all()


def test_the_record_goes_on_with_every_clone(load, nodes, names, lora):
    applied = nodes.ApplyModes(load(), modes='["convrot", "int8"]')
    assert names(lora(applied)) == ["convrot", "int8"]
    assert names(nodes.INT8LazyTorchCompile(lora(applied), backend="cudagraphs")) == ["convrot", "int8", "compile"]
    assert names(nodes.ApplyModes(nodes.ApplyModes(load(), modes='["convrot"]'), modes='["int8"]')) == ["convrot", "int8"]
    assert names(nodes.INT8QuantizeModel(nodes.ApplyModes(load(), modes='["convrot"]'), method="convrot")) == ["convrot", "int8"]


def test_layers_below_the_limit_are_float_in_the_file_too(load, nodes, sample, saved, half):
    quantized = nodes.INT8QuantizeModel(load(), method="convrot", min_sqnr_db=half)
    downstream = quantized.clone()
    sample(downstream)
    for model in (quantized, downstream):
        chosen = dict(record_of(path := saved(model))["modes"][1]["config"]["chosen"])
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
        assert {name for name, method in chosen.items() if method == "float"}
        assert all((f"model.diffusion_model.{name}.comfy_quant" in keys) == (method != "float") for name, method in chosen.items())


def test_compile_is_read_off_what_compiles_and_is_not_saved(comfy, load, nodes, registry, modes, names, sample, graphs):
    flux = load()
    lazy = nodes.INT8LazyTorchCompile(flux, backend="cudagraphs")
    assert names(lazy) == ["compile"] and "cudagraphs" in nodes.ShowModes(lazy)
    # ComfyUI reloads the weights between clones whose attachments differ.
    assert lazy.attachments.keys() == flux.attachments.keys()
    applied = nodes.ApplyModes(flux, modes='["convrot", "int8", {"name": "compile", "config": {"backend": "aot_eager"}}]')
    assert names(applied) == ["convrot", "int8", "compile"]
    assert [m["name"] for m in modes.mode_state(applied, registry=registry)["modes"]] == ["convrot", "int8"]
    assert difference(sample(applied), sample(nodes.INT8QuantizeModel(flux, method="convrot"))) < 1e-3 and graphs() == 2
    # Compile first, quantize later, as the nodes allow: the record has compile last, as it happens.
    assert names(nodes.INT8QuantizeModel(lazy, method="convrot")) == ["convrot", "int8", "compile"]


@pytest.mark.parametrize("chain, message", [
    (["compile", "int8"], "Cannot add int8 after compile: nothing may follow compile. Put int8 before it."),
    (["int8", "convrot"], "Cannot add convrot after int8: int8 does not allow convrot after it. "
                          "Put convrot before it or apply export between them."),
    (["convrot", "smoothquant"], "Cannot add smoothquant after convrot: convrot does not allow smoothquant after it. "
                                 "Put smoothquant before it or apply export between them."),
    (["int8", "int8"], "Cannot add int8 after int8: int8 does not allow int8 after it. Apply export between them."),
    (["export"], "Cannot add export: there is nothing to export. Apply convrot or int8 or smoothquant first."),
    (["int4"], "There is no mode 'int4'. Did you mean int8? The modes are: compile, convrot, export, int8, smoothquant. "
               "A mode of another pack is there once that pack is loaded."),
    ([{"name": "int8", "config": {"kernels": "torch"}}],
     'int8: unknown key "kernels". Did you mean kernel? The keys are: keep_layers, min_sqnr_db, kernel, max_mb, faster_only, chosen.'),
    ([{"name": "int8", "config": {"kernel": "cutlass"}}],
     'int8: \'kernel\' takes "auto" or "triton" or "comfy_kitchen" or "torch", not "cutlass".'),
    ([{"name": "int8", "config": {"min_sqnr_db": 200}}], "int8: min_sqnr_db is a ratio in dB from 0 (off) to 100, not 200."),
    ([{"name": "int8", "config": {"max_mb": -1}}], "int8: max_mb is a size in MiB from 0 (off) on, not -1."),
    ([{"name": "int8", "config": {"chosen": {"nothing": "convrot"}}}],
     "int8: chosen names the layer 'nothing', which is no float Linear layer of this model's blocks. Set chosen to null to measure again."),
    ([{"name": "int8", "config": {"chosen": [["b", "float"], ["b", "rowwise"]]}}],
     "int8: chosen names the layer 'b' twice."),
    ([{"name": "compile", "config": {"backend": "nonsense"}}], "compile: Unknown backend 'nonsense'."),
])
def test_a_chain_that_cannot_be_is_refused_and_the_model_stays(flux, nodes, chain, message):
    before = dict(flux.object_patches), dict(flux.attachments), flux.patches_uuid
    with pytest.raises(RuntimeError) as error:
        nodes.ApplyModes(flux, modes=json.dumps(chain))
    assert str(error.value).startswith(message)
    assert (flux.object_patches, flux.attachments, flux.patches_uuid) == before


@pytest.mark.parametrize("text, message", [
    ("convrot, int8", "modes is not JSON"), ('"int8"', "must be a list such as"), ('[{"mode": "int8"}]', 'A mode is {"name"'),
    ("[1]", "A mode is a name"), ("[" * 100_000, "modes is not JSON"),
])
def test_text_that_is_no_list_of_modes_is_explained(flux, nodes, text, message):
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        nodes.ApplyModes(flux, modes=text)


@pytest.fixture
def failing(registry, modes):
    """A mode "test.fails" that changes the model and then fails, or does not, by its config."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Config:
        hook: str = ""

    class Fails(modes.Mode):
        name = "test.fails"
        config_class = Config

        def convert(self, model, config, **_):
            model.add_object_patch("diffusion_model.img_in", torch.nn.Identity())
            model.set_model_patch(lambda *a: a, "attn1_patch")
            if config.hook == "convert":
                raise torch.OutOfMemoryError("injected")
            return model, {"bad": {1}} if config.hook == "metadata" else {}

        def finish(self, model, config, **_):
            if config.hook == "finish":
                raise OSError("injected")

        def update_for_new_mode(self, model, config, metadata):
            if config.hook == "next":
                raise RuntimeError("injected")
            return config, metadata

    registry.register(Fails)
    yield
    registry.remove("test.fails")


@pytest.mark.parametrize("hook, position", [*itertools.product(["convert", "metadata", "next"], range(3)), ("finish", 0), ("finish", 2)])
def test_a_failure_at_any_step_leaves_the_model_bit_identical(flux, nodes, sample, failing, hook, position):
    chain = ["convrot", "int8", {"name": "compile", "config": {"backend": "eager"}}]
    chain.insert(position, {"name": "test.fails", "config": {"hook": hook}})
    image, before = sample(flux), (dict(flux.object_patches), dict(flux.attachments), flux.patches_uuid, str(flux.model_options),
                                   {k: dict(v) for k, v in flux.wrappers.items()})
    bits = {k: v.clone() for k, v in flux.model.state_dict().items()}
    with pytest.raises((RuntimeError, OSError, torch.OutOfMemoryError)):
        nodes.ApplyModes(flux, modes=json.dumps(chain))
    assert (flux.object_patches, flux.attachments, flux.patches_uuid, str(flux.model_options), flux.wrappers) == before
    after = flux.model.state_dict()
    assert after.keys() == bits.keys() and all(torch.equal(after[k], v) for k, v in bits.items())
    assert torch.equal(sample(flux), image)


@pytest.mark.parametrize("chain", [
    ["int8"], ["convrot", "int8"], ["smoothquant", "int8"], ["smoothquant", "convrot", "int8"],
    ["convrot", {"name": "int8", "config": {"keep_layers": ["double_blocks.0.*"], "kernel": "torch"}}],
    ["convrot", "int8", {"name": "export", "config": {"filename_prefix": ""}}],
    ["convrot", "int8", {"name": "compile", "config": {"backend": "eager"}}],
])
@pytest.mark.parametrize("loader", ["ours", "stock"])
def test_a_saved_model_comes_back_with_its_modes(comfy, load, nodes, sample, registry, modes, saved, load_int8, chain, loader):
    from int8_compile.compile.comfyui.mode_records import for_file

    model = nodes.ApplyModes(load(), modes=json.dumps(chain))
    path = saved(model)
    back = load_int8(path) if loader == "ours" else nodes.ApplyModes(comfy.sd.load_diffusion_model(str(path)), modes="")
    assert_same_weights(weights(back), weights(for_file(model)))
    record = record_of(path)
    assert modes.mode_state(back, registry=registry) == record
    want = [mode["name"] if isinstance(mode, dict) else mode for mode in chain if mode != chain[-1] or "compile" not in str(mode)]
    if "smoothquant" in want:  # whose factors the format has no place for
        want = ["convrot", "int8"]
    assert [mode["name"] for mode in record["modes"]] == want
    assert record["modes"][-1 if "export" not in str(chain) else -2]["config"]["kernel"] == "auto"
    assert difference(sample(back), sample(for_file(model))) < NOISE
    # And goes on from there: what is there already is said.
    assert "compile" in nodes.ShowModes(nodes.ApplyModes(back, modes='[{"name": "compile", "config": {"backend": "eager"}}]'))
    if "export" not in str(chain):
        with pytest.raises(modes.ModeOrderError, match="Cannot add int8 after int8"):
            nodes.ApplyModes(back, modes='["int8"]')


def test_export_writes_the_file_that_save_would(comfy, load, nodes, saved, tmp_path, load_int8):
    chain = ["smoothquant", "int8", {"name": "export", "config": {"filename_prefix": "exported/flux"}}]
    exported = nodes.ApplyModes(load(), modes=json.dumps(["convrot", "int8"]))
    nodes.ApplyModes(load(), modes=json.dumps(chain))
    (path,) = (tmp_path / "exported").iterdir() if (tmp_path / "exported").exists() else ()
    assert_same_weights(weights(load_int8(path)), weights(exported))
    assert [mode["name"] for mode in record_of(path)["modes"]] == ["convrot", "int8", "export"]


@pytest.mark.parametrize("method, want", [("convrot", ["convrot", "int8"]), ("rowwise", ["int8"])])
def test_a_file_with_native_metadata_only_gets_a_state_from_its_layers(comfy, flux, nodes, saved, load_int8, names, method, want):
    path = with_record(saved(nodes.INT8QuantizeModel(flux, method=method)), None)
    stock = comfy.sd.load_diffusion_model(str(path))
    assert names(load_int8(path)) == names(stock) == want
    assert names(nodes.INT8QuantizeModel(stock)) == want
    assert names(load_int8(models_file(comfy, flux), method=method)) == want
    assert "layers (" in nodes.ShowModes(stock)


def models_file(comfy, patcher):
    return patcher.cached_patcher_init[1][0]


def test_where_record_and_layers_disagree_the_layers_hold(flux, nodes, saved, load_int8, names, caplog):
    path = saved(nodes.INT8QuantizeModel(flux, method="convrot"))
    record = record_of(path)
    record["modes"][1]["metadata"]["layers"][0][1] = 16
    with caplog.at_level(logging.WARNING):
        model = load_int8(with_record(path, json.dumps(record)))
    assert "its record of modes does not agree with its INT8 layers. The layers hold: convrot, int8." in caplog.text
    assert all(getattr(record, OF_A_PROMPT, False) for record in caplog.records if "does not agree" in record.message)  # it names the file
    assert names(model) == ["convrot", "int8"] and "256" in str(model.get_attachment("int8_compile.modes"))


HOSTILE = {
    "huge": (lambda r: json.dumps({**r, "x": "a" * (5 << 20)}), "characters; 4194304 are the limit"),
    "deep": (lambda r: "[" * 50_000 + "]" * 50_000, "nested deeper than 16 levels"),
    "no JSON": (lambda r: "{", "is not JSON"),
    "a list": (lambda r: "[]", "not an object with a whole number"),
    "newer": (lambda r: json.dumps({**r, "version": 2}), "has version 2; this INT8 Compile reads up to 1. Update INT8 Compile."),
    "unknown mode": (lambda r: json.dumps({**r, "modes": [{"name": "os.system", "config": {}, "metadata": {}}]}), "There is no mode"),
    "wrong config": (lambda r: json.dumps(r).replace('"kernel": "auto"', '"kernel": [1]'), "'kernel' takes"),
    "wrong layers": (lambda r: json.dumps(r).replace('"layers": [', '"layers": ["x", '), "'layers' takes"),
    "a number for metadata": (lambda r: json.dumps({**r, "modes": [{"name": "int8", "config": {}, "metadata": 3}]}), "must be an object"),
    "NaN": (lambda r: json.dumps({**r, "version": float("nan")}), "no finite number"),
    "order": (lambda r: json.dumps({**r, "modes": r["modes"][::-1]}), "Cannot add convrot after int8"),
    "many": (lambda r: json.dumps({**r, "modes": r["modes"] * 100}), "a list of at most 64"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_records_are_refused_with_the_reason(comfy, flux, nodes, saved, load_int8, case):
    change, message = HOSTILE[case]
    path = saved(nodes.INT8QuantizeModel(flux, method="convrot"))
    edited = with_record(path, change(record_of(path)))
    stock = comfy.sd.load_diffusion_model(str(edited))  # not touched by it
    for use in (lambda: load_int8(edited), lambda: nodes.ApplyModes(stock, modes="[]"), lambda: nodes.ShowModes(stock)):
        with pytest.raises(ValueError) as error:
            use()
        assert str(error.value).startswith("edited.safetensors: ") and message in str(error.value)
        assert "connect Load Diffusion Model" in str(error.value)
    assert len(weights(nodes.INT8QuantizeModel(stock))) > 10


def test_show_modes_says_what_was_done(flux, nodes):
    assert nodes.ShowModes(flux) == "[]\nNo modes: the model is as it was loaded."
    text = nodes.ShowModes(nodes.ApplyModes(flux, modes='["convrot", ["int8", {"keep_layers": ["double_blocks.0.*"]}], "compile"]'))
    first, *lines = text.splitlines()
    assert json.loads(first) == ["convrot", {"name": "int8", "config": {"keep_layers": ["double_blocks.0.*"]}}, "compile"]
    assert lines[0] == "1. convrot" and lines[2] == "3. compile"
    assert lines[1].startswith("2. int8: ") and lines[1].endswith(' rotated), keep_layers = ["double_blocks.0.*"]')
    assert nodes.ShowModes(nodes.ApplyModes(flux, modes=first)) == text
