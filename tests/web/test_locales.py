"""The interface in Chinese, as ComfyUI's own frontend shows it."""
from __future__ import annotations

import json

import pytest

from .conftest import open_comfy
from .test_examples import EXAMPLES

pytestmark = pytest.mark.e2e


def test_nodes_tooltips_settings_and_commands_are_chinese(stack, models_dir, tmp_path):
    page = open_comfy(stack, tmp_path, models_dir, settings={"Comfy.Locale": "zh"})
    page.load(json.loads((EXAMPLES / "Compile Model.json").read_text()))
    title, name, tooltip = page.evaluate("""(() => {
        const node = app.graph.nodes.find(n => n.type === 'CompileModel');
        return [node.title, node.inputs.find(i => i.name === 'fullgraph').label ?? '', '']; })()""")
    print(title, name, tooltip)
    assert not page.errors()
