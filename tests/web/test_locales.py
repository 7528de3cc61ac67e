"""The interface in Chinese, as ComfyUI's own frontend shows it."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

REPO = Path(__file__).resolve().parents[2]


def chinese(name: str) -> dict:
    return json.loads((REPO / "locales" / "zh" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def page(page_of_examples):
    def speak(language):
        page_of_examples.evaluate(f"app.extensionManager.setting.set('Comfy.Locale', '{language}')")
        page_of_examples.browser.reload()
        page_of_examples.wait()
    speak("zh")
    yield page_of_examples
    speak("en")


def test_titles_inputs_tooltips_settings_and_commands_are_chinese(page):
    want, before = chinese("nodeDefs")["CompileModel"], len(page.errors())
    page.load(json.loads((REPO / "example_workflows" / "Compile Model.json").read_text()))
    assert page.evaluate("app.graph.nodes.find(n => n.type === 'CompileModel').title") == want["display_name"] == "编译模型"
    labels = page.evaluate("app.graph.nodes.find(n => n.type === 'CompileModel').widgets.map(w => [w.name, w.label])")
    assert {name: label for name, label in labels if name in want["inputs"]} == {
        name: texts["name"] for name, texts in want["inputs"].items() if name != "model"}

    page.evaluate("app.canvas.ds.scale = 1, app.canvas.ds.offset = [-400, 200], app.canvas.setDirty(true, true)")
    page.point_at("CompileModel", "fullgraph")
    page.until(f"document.body.innerText.includes({json.dumps(want['inputs']['fullgraph']['tooltip'])})", 10)

    page.evaluate("app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    category = chinese("main")["settingsCategories"]["INT8 Compile"]
    page.until(f"[...document.querySelectorAll('[role=dialog] *')].find(e => e.children.length === 0 && e.textContent.trim() === "
               f"'{category}')?.click() ?? document.querySelector('[role=dialog]')?.innerText.includes('{category}')", 10)
    for texts in chinese("settings").values():
        page.until(f"document.querySelector('[role=dialog]').innerText.includes({json.dumps(texts['name'])})", 10)
    assert page.evaluate("fetch('/i18n').then(r => r.json()).then(texts => texts.zh.commands)") == chinese("commands")
    assert page.errors()[before:] == []
