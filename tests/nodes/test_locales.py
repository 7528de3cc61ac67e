"""The interface in ComfyUI's languages. English is made here, of what nodes and extension say; every other language says the same:

UPDATE_LOCALES=1 pytest -c tests/pytest.ini --rootdir=tests tests/nodes/test_locales.py
"""
from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfy

REPO = Path(__file__).resolve().parents[2]
LOCALES = REPO / "locales"
FILES = ("nodeDefs", "commands", "settings", "main")
UPDATE = bool(os.environ.get("UPDATE_LOCALES"))
CHINESE = re.compile("[\u4e00-\u9fff]")


def key(identifier: str) -> str:
    """As the frontend looks it up."""
    return identifier.replace(".", "_")


def present(**texts) -> dict:
    return {name: text for name, text in texts.items() if text}


def node_texts() -> dict:
    from int8_compile import nodes

    schemas = [node.define_schema() for node in nodes.NODES]
    return {schema.node_id: present(
        display_name=schema.display_name, description=schema.description,
        inputs={key(i.id): present(name=i.display_name or i.id, tooltip=i.tooltip) for i in schema.inputs},
        outputs={str(n): texts for n, o in enumerate(schema.outputs) if (texts := present(name=o.display_name, tooltip=o.tooltip))},
    ) for schema in schemas}


def extension_texts() -> tuple[dict, dict, dict]:
    """Commands, settings, and the words of their categories, of the one file that registers them."""
    script = (REPO / "web" / "int8_compile.js").read_text(encoding="utf-8")
    commands, settings, words = {}, {}, {}
    for entry in re.split(r'(?=\bid: "INT8Compile\.)', script)[1:]:
        entry = entry.partition("\n    ]")[0]
        texts = dict(re.findall(r'\b(id|label|name|tooltip): "([^"]*)"', entry))
        identifier = key(texts.pop("id"))
        (commands if "label" in texts else settings)[identifier] = texts
        if category := re.search(r"category: (\[.*?\])", entry):
            words |= {word: word for word in json.loads(category[1])[:2]}
    assert len(commands) >= 2 and len(settings) >= 2
    return commands, settings, words


def english() -> dict[str, dict]:
    from int8_compile.nodes import CATEGORY

    commands, settings, categories = extension_texts()
    menu = {texts["label"]: texts["label"] for texts in commands.values()}
    return {"nodeDefs": node_texts(), "commands": commands, "settings": settings,
            "main": {"nodeCategories": {CATEGORY: CATEGORY}, "settingsCategories": categories, "menuLabels": menu}}


def read(language: str, name: str) -> dict:
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def flat(texts, path=()):
    if isinstance(texts, str):
        return {path: texts}
    return {k: v for name, part in texts.items() for k, v in flat(part, (*path, name)).items()}


@pytest.mark.parametrize("name", FILES)
def test_the_english_file_says_what_nodes_and_extension_say(comfy, name):
    made = english()[name]
    if UPDATE:
        (LOCALES / "en").mkdir(parents=True, exist_ok=True)
        (LOCALES / "en" / f"{name}.json").write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read("en", name) == made, "make it again with UPDATE_LOCALES=1, and translate what is new in locales/zh"


@pytest.mark.parametrize("name", FILES)
def test_the_chinese_file_says_all_of_it_in_chinese(name):
    english, chinese = flat(read("en", name)), flat(read("zh", name))
    assert not english.keys() - chinese.keys(), "not translated"
    assert not chinese.keys() - english.keys(), "no longer in English"
    assert not [path for path, text in chinese.items() if not text.strip()]
    # What vue-i18n takes for a placeholder or a plural. It shows tooltips as they are.
    assert not [path for path, text in {**english, **chinese}.items() if path[-1] != "tooltip" and re.search(r"[{}@|]", text)]
    assert not [path for path, text in english.items() if text.endswith(".") and not CHINESE.search(chinese[path])]
