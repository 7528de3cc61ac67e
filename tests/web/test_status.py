"""What the nodes show, in a real browser with ComfyUI's own frontend, in both of its renderers."""
from __future__ import annotations

import contextlib
import json
import re
import time

import pytest

from benchmarks.workflows import flux_prompt

from .conftest import open_comfy

pytestmark = [pytest.mark.e2e, pytest.mark.rotating(2)]

def node(number, kind, x, inputs=(), output=None, links=(), values=()):
    return {"id": number, "type": kind, "pos": [x, 60 * number], "inputs": [{"name": n, "type": t, "link": link} for n, t, link in inputs],
            "outputs": [{"name": output, "type": output, "links": list(links)}] if output else [], "widgets_values": list(values)}


def workflow(backend="aot_eager"):
    nodes = [
        node(1, "UNETLoader", 0, output="MODEL", links=[1], values=["tiny_flux.safetensors", "default"]),
        node(2, "CLIPLoader", 0, output="CLIP", links=[2], values=["tiny_clip_l.safetensors", "sd3", "default"]),
        node(3, "CLIPTextEncode", 0, [("clip", "CLIP", 2)], "CONDITIONING", [3, 4], ["a fox"]),
        node(4, "EmptySD3LatentImage", 0, output="LATENT", links=[5], values=[128, 128, 1]),
        node(5, "INT8QuantizeModel", 400, [("model", "MODEL", 1)], "MODEL", [6], ["auto", "", 0.0, "auto"]),
        node(6, "CompileModel", 800, [("model", "MODEL", 6)], "MODEL", [7],
             [True, "diffusion_model", "preserve_format", False, False, "default", "", False, backend, False]),
        node(7, "KSampler", 1200, [("model", "MODEL", 7), ("positive", "CONDITIONING", 3), ("negative", "CONDITIONING", 4),
                                   ("latent_image", "LATENT", 5)], "LATENT", [8], [1, "fixed", 2, 1.0, "euler", "simple", 1.0]),
        node(8, "SaveLatent", 1200, [("samples", "LATENT", 8)], values=["status"]),
    ]
    links = [[1, 1, 0, 5, 0, "MODEL"], [2, 2, 0, 3, 0, "CLIP"], [3, 3, 0, 7, 1, "CONDITIONING"], [4, 3, 0, 7, 2, "CONDITIONING"],
             [5, 4, 0, 7, 3, "LATENT"], [6, 5, 0, 6, 0, "MODEL"], [7, 6, 0, 7, 0, "MODEL"], [8, 7, 0, 8, 0, "LATENT"]]
    return {"id": "3f1c1d6e-0000-4000-8000-000000000001", "version": 0.4, "last_node_id": 8, "last_link_id": 8, "nodes": nodes,
            "links": links}


def without_compile_model():
    made = workflow()
    made["nodes"] = [n for n in made["nodes"] if n["type"] != "CompileModel"]
    made["links"] = [link for link in made["links"] if link[0] not in (6, 7)]
    for n in made["nodes"]:
        for slot in (*n["inputs"], *n["outputs"]):
            if slot.get("link") in (6, 7):
                slot["link"] = None
            elif slot.get("links") == [6]:
                slot["links"] = []
    return made


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "nodes 2.0"])
def page(request, models_dir, tmp_path_factory):
    """A page and its server for all tests here. Without torch's cache of graphs: compiling takes its time."""
    folder = tmp_path_factory.mktemp("status")
    with contextlib.ExitStack() as stack:
        page = open_comfy(stack, folder, models_dir, env={"TORCHINDUCTOR_FX_GRAPH_CACHE": "0"})
        page.use_renderer(request.param)
        yield page
        assert not page.errors()


def watch(page):
    """From now on: seen, the texts that nodes have shown, and bars, the types of those that have shown progress."""
    page.evaluate("""(() => { clearInterval(window.watching); window.seen = []; window.bars = [];
        const look = () => app.graph.nodes.forEach(n => {
            const text = n.widgets?.find(w => w.name === 'shown')?.value; if (text && !seen.includes(text)) seen.push(text);
            if (n.progress !== undefined && !bars.includes(n.type)) bars.push(n.type); });
        // At each message as well: a busy page gets many between two looks.
        if (!window.look) app.api.addEventListener('int8_compile', () => window.look());
        window.look = look; window.watching = setInterval(look, 20); })()""")


def history(page) -> list:
    """Of the prompts that have ended, oldest first."""
    return sorted(page.server.get("/history").values(), key=lambda entry: entry["prompt"][0])


def run(page):
    before = len(history(page))
    page.queue()
    page.until(f"fetch('/history').then(r => r.json()).then(h => Object.keys(h).length > {before})", 180)
    page.evaluate("new Promise(r => setTimeout(r, 500))")


def set_input(page, node_type: str, name: str, value):
    page.evaluate(f"app.graph.nodes.find(n => n.type === '{node_type}').widgets.find(w => w.name === '{name}').value = {json.dumps(value)}")


def test_text_while_it_works_and_a_report_that_stays(page):
    page.load(workflow())
    watch(page)
    before = len(history(page))
    run(page)
    seen = page.evaluate("seen")
    assert any(text.startswith("compiling DoubleStreamBlock 1/2") for text in seen), seen
    assert any(text.startswith("compiling SingleStreamBlock 2/2") for text in seen), seen
    assert any(text.startswith(("quantizing ", "measuring ", "looking at ")) for text in seen), seen

    compiled, quantized = page.text("CompileModel"), page.text("INT8QuantizeModel")
    assert "compiled: 5 blocks" in compiled and "graphs in" not in compiled and len(compiled.splitlines()) <= 3
    assert quantized.startswith("quantized 29 layers") and "MB" in quantized and "least SQNR" not in quantized
    # Behind a disclosure, which makes the node larger and small again.
    assert "ready: 2 regions, 5 blocks" in page.details("CompileModel") and "least SQNR" in page.details("INT8QuantizeModel")
    height = "app.graph.nodes.find(n => n.type === 'INT8QuantizeModel').size[1]"
    before_details = page.evaluate(height)
    for is_open in (True, False):
        page.open_details("INT8QuantizeModel", is_open)
        page.until(f"({height} > {before_details}) === {json.dumps(is_open)}", 30)
    assert page.evaluate(height) == before_details
    assert "CompileModel" in page.evaluate("bars") and page.evaluate("app.graph.nodes.every(node => node.progress === undefined)")
    assert page.seen("CompileModel") and page.seen("INT8QuantizeModel")

    set_input(page, "KSampler", "seed", 2)
    run(page)  # the nodes are served from ComfyUI's cache; the sampler runs
    assert re.search(r"^\d+\.\d\dx: \S+ -> \S+ s a step", compiled := page.text("CompileModel")) and "compiled: 5 blocks" in compiled
    assert page.text("INT8QuantizeModel") == quantized
    run(page)  # everything is
    assert (page.text("CompileModel"), page.text("INT8QuantizeModel")) == (compiled, quantized)
    for entry in history(page)[before:]:  # what API clients get
        ((report,),) = entry["outputs"]["6"]["int8_compile"]
        assert "ready: 2 regions, 5 blocks" in report["text"] and report["details"]["graphs"] == 2
    ratio = report["details"]["gain"]["ratio"]  # of three digits
    assert report["short"] == compiled and abs(ratio - float(compiled.partition("x")[0])) < 0.006

    sizes = "app.graph.nodes.map(n => n.size[1])"
    before_reload = page.evaluate(sizes)
    for _ in range(2):
        page.browser.reload()
        page.wait()
        page.until("app.graph.nodes.some(n => n.type === 'CompileModel' && n.widgets.some(w => w.name === 'shown'))")
        assert (page.text("CompileModel"), page.text("INT8QuantizeModel")) == (compiled, quantized)
        assert page.evaluate(sizes) == before_reload, "a node grew"


def test_nodes_in_a_subgraph_show_their_reports(page):
    page.load(workflow())
    inside = page.evaluate("""(() => {
        app.graph.convertToSubgraph(new Set(app.graph.nodes.filter(n => ['INT8QuantizeModel', 'CompileModel'].includes(n.type))));
        window.inside = app.graph.nodes.find(n => n.subgraph).subgraph;
        return inside.nodes.map(n => n.type); })()""")
    assert sorted(inside) == ["CompileModel", "INT8QuantizeModel"]
    run(page)
    shown = page.evaluate("inside.nodes.map(n => n.widgets.find(w => w.name === 'shown')?.value ?? '')")
    texts = dict(zip(inside, shown))
    assert "compiled: 5 blocks" in texts["CompileModel"] and texts["INT8QuantizeModel"].startswith("quantized 29 layers")


def test_nodes_of_a_prompt_in_api_format_that_have_words_for_numbers_show_their_reports(page):
    nodes = [("INT8QuantizeModel", page.server.defaults("INT8QuantizeModel")),
             ("CompileModel", {**page.server.defaults("CompileModel"), "backend": "aot_eager"})]
    prompt = flux_prompt(width=64, height=64, steps=1, model_nodes=nodes)
    page.evaluate(f"app.loadApiJson({json.dumps(prompt)}, 'prompt'), new Promise(r => setTimeout(r, 1000))")
    run(page)
    assert "compiled: 5 blocks" in page.text("CompileModel") and page.text("INT8QuantizeModel").startswith("quantized 29 layers")


def test_a_node_is_found_by_search_dropped_connected_and_queued(page):
    page.load(without_compile_model())
    page.evaluate("app.canvas.ds.scale = 0.7, app.canvas.ds.offset = [120, 60], app.canvas.setDirty(true, true)")
    page.add_by_search("Compile Model", 700, 560)
    page.connect("INT8QuantizeModel", 0, "CompileModel", 0)
    page.connect("CompileModel", 0, "KSampler", 0)
    names = "(id) => app.graph.getNodeById(id).type"
    links = page.evaluate(f"[...app.graph.links.values()].map(l => [l.origin_id, l.target_id].map({names}))")
    assert ["INT8QuantizeModel", "CompileModel"] in links and ["CompileModel", "KSampler"] in links
    set_input(page, "CompileModel", "backend", "aot_eager")
    set_input(page, "KSampler", "seed", 3)
    run(page)
    assert "compiled: " in page.text("CompileModel") and page.text("INT8QuantizeModel").startswith("quantized ")


def test_an_interrupt_ends_a_compile_and_the_next_prompt_works(page):
    page.load(workflow(backend="inductor"))
    watch(page)
    before = len(history(page))
    page.queue()
    page.until("seen.some(text => text.startsWith('compiling DoubleStreamBlock'))", 120)
    start = time.monotonic()
    page.evaluate("app.extensionManager.command.execute('Comfy.Interrupt')")
    while len(history(page)) == before:
        assert time.monotonic() - start < 2, "no kernel is built yet, and it still compiles"
        time.sleep(0.05)
    assert "execution_interrupted" in [message[0] for message in history(page)[-1]["status"]["messages"]]
    assert "CompileModel" in page.evaluate("bars")
    page.until("!app.graph.nodes.some(n => n.widgets?.find(w => w.name === 'shown')?.value.startsWith('compiling'))", 5)
    set_input(page, "CompileModel", "backend", "aot_eager")
    set_input(page, "CompileModel", "fullgraph", True)  # as nothing before it was compiled
    run(page)
    assert "compiled: 5 blocks" in page.text("CompileModel")


def test_a_fallback_is_a_toast_once_and_the_cache_is_cleared_by_a_command(comfy_page):
    page = comfy_page()
    page.evaluate("""(() => { window.toasts = []; const { toast } = app.extensionManager; const add = toast.add.bind(toast);
        toast.add = (message) => { toasts.push(message.detail); add(message); }; })()""")
    page.load(workflow(backend="cudagraphs"))
    run(page)
    set_input(page, "KSampler", "seed", 2)
    run(page)
    assert page.evaluate("toasts.filter(t => t.startsWith('CUDA graphs do not exist on cpu')).length") == 1
    assert "CUDA graphs do not exist on cpu" in page.text("CompileModel")
    page.evaluate("app.extensionManager.command.execute('INT8Compile.ClearCache')")
    page.until("toasts.some(t => t.startsWith('Deleted 0 compiled'))")
    assert not page.errors()
