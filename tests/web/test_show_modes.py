"""Show Modes in a real browser, with ComfyUI's own frontend."""
from __future__ import annotations

import json

import pytest

from benchmarks.comfy_server import ComfyServer, find_comfyui

pytestmark = pytest.mark.e2e

NODES = [
    {"id": 1, "type": "UNETLoader", "pos": [0, 0], "outputs": [{"name": "MODEL", "type": "MODEL", "links": [1]}],
     "widgets_values": ["tiny_flux.safetensors", "default"]},
    {"id": 2, "type": "ApplyModes", "pos": [400, 0], "inputs": [{"name": "model", "type": "MODEL", "link": 1}],
     "outputs": [{"name": "MODEL", "type": "MODEL", "links": [2]}], "widgets_values": ['["convrot", "int8"]']},
    {"id": 3, "type": "ShowModes", "pos": [800, 0], "inputs": [{"name": "model", "type": "MODEL", "link": 2}]},
]
WORKFLOW = {"version": 0.4, "last_node_id": 3, "last_link_id": 2, "nodes": NODES,
            "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "MODEL"]]}
# The value of an expression as soon as it is true, undefined after a minute.
UNTIL = """(async () => {
    for (let i = 0; i < 600; i++) { const value = %s; if (value) return value; await new Promise(r => setTimeout(r, 100)); }
})()"""


def test_the_text_appears_on_the_node_and_is_no_input(models_dir, tmp_path):
    from .browser import CHROMIUM, evaluate  # needs aiohttp, which is ComfyUI's

    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with ComfyServer(find_comfyui(), tmp_path / "comfyui", models=models_dir) as server:
        _, _, text, prompt = evaluate(server.url, [
            UNTIL % "window.app && window.app.graph && window.app.extensionManager && true",
            f"new Promise(r => setTimeout(r, 3000)).then(() => app.loadGraphData({json.dumps(WORKFLOW)})).then(() => app.queuePrompt(0))",
            UNTIL % "app.graph._nodes.find(n => n.type === 'ShowModes').widgets[0].value",
            "app.graphToPrompt().then(prompt => [prompt.output['3'].inputs, prompt.workflow.nodes[2].widgets_values])",
        ], tmp_path / "profile")
    assert text.splitlines()[0] == '["convrot", "int8"]' and "layers (" in text
    assert prompt[0] == {"model": ["2", 0]} and not prompt[1]
