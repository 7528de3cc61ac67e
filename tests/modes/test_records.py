"""Records come from files that anybody may have made."""
from __future__ import annotations

import json

import pytest
from int8_compile.compile.modes import MODES, ModeRecordError, UnknownModeError, apply_modes, mode_state, restore_modes
from int8_compile.compile.modes.record import parse_state


@pytest.fixture
def record(model):
    return mode_state(apply_modes(model, ["convrot", "int8"]))


def entry(**changes):
    return {"version": 1, "modes": [{"name": "int8", "config": {}, "metadata": {}, **changes}]}


@pytest.mark.parametrize("text, message", [
    ('{"version": 1, "modes": [], "x": "' + "a" * (5 << 20) + '"}', "4194304 are the limit"),
    ("[" * 100_000 + "]" * 100_000, "nested deeper than 16 levels"),
    ('{"version": 1, "modes": ' + "[" * 20 + "]" * 20 + "}", "nested deeper than 16 levels"),
    ("not json", "is not JSON"),
    ("", "is not JSON"),
    ("null", 'not an object with a whole number as "version"'),
    ("[1]", 'not an object with a whole number as "version"'),
    ('{"modes": []}', 'not an object with a whole number as "version"'),
    ('{"version": true, "modes": []}', 'not an object with a whole number as "version"'),
    ('{"version": "1", "modes": []}', 'not an object with a whole number as "version"'),
    ('{"version": 1e400, "modes": []}', "no finite number"),
    ('{"version": NaN, "modes": []}', "no finite number"),
    ('{"version": 1, "version": 1, "modes": []}', "a key occurs twice"),
    ('{"version": 2, "modes": []}', "has version 2; this INT8 Compile reads up to 1. Update INT8 Compile."),
    ('{"version": 0, "modes": []}', "has version 0, which cannot be read any more"),
    ('{"version": -1, "modes": []}', 'not an object with a whole number as "version"'),
    ('{"version": 1, "modes": {}}', '"modes" must be a list of at most 64'),
    ('{"version": 1}', '"modes" must be a list of at most 64'),
    (json.dumps({"version": 1, "modes": entry()["modes"] * 65}), '"modes" must be a list of at most 64'),
    ('{"version": 1, "modes": ["int8"]}', "A mode in the record must be an object"),
    ('{"version": 1, "modes": [{"name": "int8"}]}', "A mode in the record must be an object"),
    (json.dumps(entry(name=8)), "A mode in the record must be an object"),
    (json.dumps(entry(code="import os")), "A mode in the record must be an object"),
    (json.dumps(entry(metadata=[])), "int8: in the record, its metadata must be an object"),
    (json.dumps(entry(config=[])), "int8 in the record: the configuration must be an object, not []"),
    (json.dumps(entry(config={"evil": 1})), 'int8 in the record: unknown key "evil"'),
    (json.dumps(entry(config={"keep_layers": "*"})), "int8 in the record: 'keep_layers' takes a list of text"),
    (json.dumps(entry(config={"chosen": [["a", "int4"]]})), "int8 in the record: 'chosen' takes a list of (text, \"float\" or"),
    (json.dumps(entry(config={"max_bytes": 10**400})), None),
    (json.dumps(entry(config={"min_sqnr_db": 10**400})), "int8 in the record: 'min_sqnr_db' takes a number"),
    (json.dumps(entry(metadata={"layers": [["blocks.0.up", 64]]})), "int8 in the record: 'layers' takes a list of"),
    (json.dumps(entry(metadata={"layers": [["blocks.0.up", 7, False]]})), "a rotation group of 7 does not divide 64 channels"),
    (json.dumps(entry(metadata={"layers": [["__class__", 0, False]]})), "which in this model is absent"),
    (json.dumps(entry(metadata={"layers": [["norm", 0, False]]})), "which in this model is a BatchNorm1d"),
    (json.dumps(entry(metadata={"layers": [["", 0, False]]})), "which in this model is a Model"),
    (json.dumps(entry(metadata={"x": 1})), 'int8 in the record: unknown key "x"'),
    (json.dumps(entry(name="a" * 10_000)), "There is no mode '" + "a" * 64 + "'"),
], ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_a_hostile_record_is_refused_with_the_reason_and_the_model_stays(model, text, message):
    before = {name: id(module) for name, module in model.named_modules()}
    if message is None:  # absurd, but a valid limit
        restore_modes(model, text)
        return
    with pytest.raises((ModeRecordError, RuntimeError, UnknownModeError)) as error:
        restore_modes(model, text)
    assert message in str(error.value) and len(str(error.value)) < 1000
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_an_older_record_is_brought_up_to_date(record):
    def named_by_title(old):
        return {**old, "version": 1, "modes": [{"name": mode.pop("title"), **mode} for mode in old["modes"]]}

    old = {"version": 0, "modes": [{"title": mode.pop("name"), **mode} for mode in json.loads(json.dumps(record))["modes"]]}
    assert parse_state(json.dumps(old), MODES, migrations={0: named_by_title}) == parse_state(json.dumps(record), MODES)
    with pytest.raises(ModeRecordError, match="has version 0, which cannot be read any more"):
        parse_state(json.dumps(old), MODES)


def test_a_record_is_plain_json_and_stable(record, model):
    text = json.dumps(record)
    assert json.loads(text) == record
    assert mode_state(restore_modes(model, text)) == mode_state(restore_modes(model, record)) == record
