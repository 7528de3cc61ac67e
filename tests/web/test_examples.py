"""The example workflows in a real browser. Their API format and pictures are made here:

UPDATE_EXAMPLES=1 pytest -c tests/pytest.ini --rootdir=tests tests/web/test_examples.py
"""
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.workflows import zimage_prompt

pytestmark = [pytest.mark.e2e, pytest.mark.rotating(2)]

EXAMPLES = Path(__file__).resolve().parents[2] / "example_workflows"
WORKFLOWS = sorted(EXAMPLES.glob("*.json"))
UPDATE = bool(os.environ.get("UPDATE_EXAMPLES"))
REPORTING = ("OptimizeModel", "CompileModel", "INT8LazyTorchCompile", "INT8QuantizeModel", "LoadINT8Model", "ApplyModes")
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


# The longest that anything says without a message of its own.
REPORT = ["0.86x: 0.115 -> 0.133 s a step (slower than without: bypass this node)", "compiled: 57 blocks, 12 of 57 block calls uncompiled",
          "being kept for the next start"]
OPTIMIZED = ["0.86x: 0.115 -> 0.133 s a step (slower than without: bypass this node); 37 -> 15 MB",
             "smallest: INT8 in 29 of 29 layers, compiling in the background, in part compiled already", "layers decided earlier"]
# Pairs of nodes of which one lies over the other, in the units of the graph.
OVERLAPS = """(() => {
    const { scale } = app.canvas.ds, title = LiteGraph.NODE_TITLE_HEIGHT;
    const onScreen = [...document.querySelectorAll('.lg-node[data-node-id]')].map(e => {
        const { x, y, width, height } = e.getBoundingClientRect();
        return [e.dataset.nodeId, x / scale, y / scale, width / scale, height / scale]; });
    const boxes = LiteGraph.vueNodesMode ? onScreen
        : app.graph.nodes.map(n => [n.id, n.pos[0], n.pos[1] - title, n.size[0], n.size[1] + title]);
    const over = (a, b, i) => Math.min(a[i] + a[i + 2], b[i] + b[i + 2]) - Math.max(a[i], b[i]) > 1;
    const name = (box) => app.graph.getNodeById(box[0]).type;
    const pairs = boxes.flatMap((a, i) => boxes.slice(0, i).map(b => [a, b]));
    return [boxes.length, pairs.filter(([a, b]) => over(a, b, 1) && over(a, b, 2)).map(([a, b]) => [name(a), name(b)])];
})()"""


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_reports_cover_no_neighbour_in_either_renderer(page_of_examples, path):
    page, workflow = page_of_examples, json.loads(path.read_text())
    shown = "app.graph.nodes.filter(n => n.widgets?.some(w => w.name === 'shown'))"
    try:
        for nodes_2 in (False, True):
            page.use_renderer(nodes_2)
            page.load(workflow)
            for node in workflow["nodes"]:
                short = OPTIMIZED if node["type"] == "OptimizeModel" else REPORT
                report = {"node": str(node["id"]), "short": "\n".join(short), "text": "\n".join([*short, "more"]), "warnings": []}
                page.evaluate(f"app.api.dispatchEvent(new CustomEvent('int8_compile', {{ detail: {json.dumps(report)} }}))")
            assert page.evaluate(f"{shown}.length") == sum(node["type"] in REPORTING for node in workflow["nodes"])
            fit(page)
            page.until(f"{OVERLAPS}[0] === {len(workflow['nodes'])}", 20)
            assert page.evaluate(f"{OVERLAPS}[1]") == [], f"nodes 2.0: {nodes_2}"
            texts = f"{shown}.map(n => n.widgets.find(w => w.name === 'shown').element)"
            assert page.evaluate(f"{texts}.filter(e => e.scrollHeight > e.clientHeight + 1).length") == 0, "a report is cut off"
    finally:
        page.use_renderer(False)


# What Optimize Model says of a model of real width.
USUAL = ["1.56x: 14.1 -> 9.05 s a step; 3439 -> 909 MB", "balanced: INT8 in 25 of 28 layers, compiled",
         "decided earlier: nothing is measured again"]


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2.0"])
def test_a_node_has_room_for_its_report_before_it_has_one_and_for_details_while_they_are_open(page_of_examples, nodes_2):
    """In a graph that ComfyUI has arranged, with little between the nodes."""
    page = page_of_examples
    report = {"short": "\n".join(USUAL), "text": "\n".join([*USUAL, *(f"{n} layers 256 -> 1792, 1044 rows: INT8, 4.11 -> 1.17 ms, 40.0 dB"
                                                              for n in range(20))]), "warnings": []}
    prompt = zimage_prompt(model_nodes=[("OptimizeModel", page.server.defaults("OptimizeModel"))])
    node = "app.graph.nodes.find(n => n.type === 'OptimizeModel')"
    settled = f"""new Promise(done => {{ let size; const look = () => {{
        const now = String({node}.size); if (now === size) return done(now); size = now; setTimeout(look, 500); }}; look(); }})"""
    try:
        page.use_renderer(nodes_2)
        page.evaluate(f"app.loadApiJson({json.dumps(prompt)}, 'prompt'), new Promise(r => setTimeout(r, 1000))")
        fit(page)
        page.until(f"{OVERLAPS}[0] === {len(prompt)}", 20)
        before = page.evaluate(settled)
        detail = f"{{ node: String({node}.id), ...{json.dumps(report)} }}"
        page.evaluate(f"app.api.dispatchEvent(new CustomEvent('int8_compile', {{ detail: {detail} }}))")
        assert page.text("OptimizeModel") == report["short"]
        assert page.evaluate(settled) == before and page.evaluate(f"{OVERLAPS}[1]") == []
        for _ in range(2):
            page.open_details("OptimizeModel", True)
            assert float(page.evaluate(settled).split(",")[1]) > float(before.split(",")[1]) + 100
            page.open_details("OptimizeModel", False)
            assert page.evaluate(settled) == before
        # All that it may say of a later start is seen at once, though most lines of the table take two.
        longest = [*USUAL, "measured: latent 128x128, batch 1, prompt length 512", *report["text"].splitlines()[3:9]]
        detail = f"{{ node: String({node}.id), ...{json.dumps({**report, 'text': chr(10).join(longest)})} }}"
        page.evaluate(f"app.api.dispatchEvent(new CustomEvent('int8_compile', {{ detail: {detail} }}))")
        page.open_details("OptimizeModel", True)
        page.evaluate(settled)
        element = f"{node}.widgets.find(w => w.element?.querySelector('details')).element"
        assert page.evaluate(f"{element}.scrollHeight - {element}.clientHeight") <= 1
        page.open_details("OptimizeModel", False)
    finally:
        page.use_renderer(False)


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2.0"])
def test_a_node_that_was_saved_with_less_room_takes_no_more_until_it_reports(page_of_examples, nodes_2):
    page = page_of_examples
    workflow = json.loads((EXAMPLES / "Optimize Model.json").read_text())
    [saved] = [node for node in workflow["nodes"] if node["type"] == "OptimizeModel"]
    saved["size"] = [270, 100]
    node = "app.graph.nodes.find(n => n.type === 'OptimizeModel')"
    try:
        page.use_renderer(nodes_2)
        page.load(workflow)
        assert page.evaluate(f"new Promise(r => setTimeout(() => r({node}.size[1]), 2000))") < 150
        report = json.dumps({"node": str(saved["id"]), "short": "\n".join(USUAL), "text": "", "warnings": []})
        page.evaluate(f"app.api.dispatchEvent(new CustomEvent('int8_compile', {{ detail: {report} }}))")
        page.until(f"{node}.size[1] > 150", 5)
    finally:
        page.use_renderer(False)


def test_a_report_in_chinese_has_room_for_letters_that_are_twice_as_wide(page_of_examples):
    """Counted, not seen: a machine may have no such letters."""
    page = page_of_examples
    page.load(json.loads((EXAMPLES / "Optimize Model.json").read_text()))
    node = "app.graph.nodes.find(n => n.type === 'OptimizeModel')"
    heights = []
    for letter in ("x", "\u5b57"):
        report = json.dumps({"short": letter * 160, "text": "", "warnings": []})
        page.evaluate(f"app.api.dispatchEvent(new CustomEvent('int8_compile', {{ detail: {{ node: String({node}.id), ...{report} }} }}))")
        heights.append(page.evaluate(f"{node}.widgets.find(w => w.name === 'shown').options.getMinHeight()"))
    assert heights[1] >= heights[0] + 3 * 16


def photograph(page, path: Path):
    x, y, width, height = fit(page)
    width, height = width + 2 * MARGIN, height + 2 * MARGIN
    page.browser.screenshot(path, {"x": x - MARGIN, "y": y - MARGIN, "width": width, "height": height, "scale": WIDTH / width})


def fit(page) -> tuple[float, float, float, float]:
    """Shows the whole graph. Gives its left, top, width and height in the window."""
    left, top, right, bottom = page.evaluate("""(() => {
        const boxes = app.graph.nodes.map(n => n.getBounding());
        const [left, top] = [0, 1].map(i => Math.min(...boxes.map(b => b[i])));
        const [right, bottom] = [0, 1].map(i => Math.max(...boxes.map(b => b[i] + b[i + 2])));
        return [left, top, right, bottom]; })()""")
    x, y, room = 90, 130, 1400  # beside ComfyUI's own bars
    scale = room / (right - left)
    page.evaluate(f"app.canvas.ds.scale = {scale}, app.canvas.ds.offset = [{x / scale - left}, {y / scale - top}], "
                  "app.canvas.setDirty(true, true), new Promise(r => setTimeout(r, 1500))")
    return x, y, room, (bottom - top) * scale
