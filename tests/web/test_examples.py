"""The example workflows in a real browser. Their API format and pictures are made here:

UPDATE_EXAMPLES=1 pytest -c tests/pytest.ini --rootdir=tests tests/web/test_examples.py
"""
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).resolve().parents[2] / "example_workflows"
WORKFLOWS = sorted(EXAMPLES.glob("*.json"))
UPDATE = bool(os.environ.get("UPDATE_EXAMPLES"))
# Of the picture, in pixels.
WIDTH, MARGIN = 1024, 20


def api_path(path: Path) -> Path:
    return EXAMPLES / "api" / f"{path.stem.lower().replace(' ', '_')}.json"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_an_example_opens_without_missing_nodes_and_its_api_format_is_what_comfyui_queues(page_of_examples, path):
    page, workflow = page_of_examples, json.loads(path.read_text())
    before = len(page.errors())
    page.load(workflow)
    assert sorted(page.evaluate("app.graph.nodes.map(n => n.type)")) == sorted(node["type"] for node in workflow["nodes"])
    assert not page.evaluate("app.graph.nodes.filter(n => !LiteGraph.registered_node_types[n.type] || n.has_errors).map(n => n.type)")
    api = page.evaluate("app.graphToPrompt().then(p => p.output)")
    if UPDATE:
        api_path(path).write_text(json.dumps(api, indent=2) + "\n")
        photograph(page, path.with_suffix(".jpg"))
    assert json.loads(api_path(path).read_text()) == api
    assert page.errors()[before:] == []


def photograph(page, path: Path):
    """The graph, as wide as the picture."""
    left, top, right, bottom = page.evaluate("""(() => {
        const boxes = app.graph.nodes.map(n => n.getBounding());
        const [left, top] = [0, 1].map(i => Math.min(...boxes.map(b => b[i])));
        const [right, bottom] = [0, 1].map(i => Math.max(...boxes.map(b => b[i] + b[i + 2])));
        return [left, top, right, bottom]; })()""")
    x, y, room = 90, 130, 1400  # beside ComfyUI's own bars
    scale = room / (right - left)
    page.evaluate(f"app.canvas.ds.scale = {scale}, app.canvas.ds.offset = [{x / scale - left}, {y / scale - top}], "
                  "app.canvas.setDirty(true, true), new Promise(r => setTimeout(r, 1500))")
    width, height = room + 2 * MARGIN, (bottom - top) * scale + 2 * MARGIN
    page.browser.screenshot(path, {"x": x - MARGIN, "y": y - MARGIN, "width": width, "height": height, "scale": WIDTH / width})
