"""Show Modes in a real browser, with ComfyUI's own frontend."""
from __future__ import annotations

import pytest

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


def test_the_text_appears_on_the_node_and_is_no_input(comfy_page):
    page = comfy_page()
    page.load(WORKFLOW)
    page.queue()
    page.until("app.graph.nodes.some(n => n.type === 'ShowModes' && n.widgets?.[0]?.value)")
    text = page.text("ShowModes")
    assert text.splitlines()[0] == '["convrot", "int8"]' and "layers (" in text
    inputs, values = page.evaluate("app.graphToPrompt().then(p => [p.output['3'].inputs, p.workflow.nodes[2].widgets_values ?? []])")
    assert inputs == {"model": ["2", 0]} and not values
