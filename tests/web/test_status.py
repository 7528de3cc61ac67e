"""What the nodes show, in a real browser with ComfyUI's own frontend, in both of its renderers."""
from __future__ import annotations

import pytest

pytestmark = pytest.mark.e2e

# What ComfyUI's own page reports as errors: files of a new user that are not there yet, its own deprecations, reloading a page.
COMFYUIS_OWN = ("Failed to load resource: the server responded with a status of 404", "accessed before initialization", "beforeunload")


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


def finished(page) -> list:
    """History entries of the prompts that have ended, oldest first."""
    return sorted(page.server._get("/history").values(), key=lambda entry: entry["prompt"][0])


def run(page):
    before = len(finished(page))
    page.queue()
    page.until(f"fetch('/history').then(r => r.json()).then(h => Object.keys(h).length > {before})", 180)
    page.evaluate("new Promise(r => setTimeout(r, 500))")


def errors(page) -> list[str]:
    return [error for error in page.browser.errors if "int8" in error.lower() or not any(own in error for own in COMFYUIS_OWN)]


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2.0"])
def test_text_while_it_works_and_a_report_that_stays(comfy_page, nodes_2):
    page = comfy_page()
    page.use_renderer(nodes_2)
    page.load(workflow())
    page.evaluate("""(() => { window.seen = []; setInterval(() => app.graph.nodes.forEach(n => {
        const text = n.widgets?.find(w => w.name === 'shown')?.value; if (text && !seen.includes(text)) seen.push(text); }), 20); })()""")
    run(page)
    seen = page.evaluate("seen")
    assert any(text.startswith("compiling DoubleStreamBlock 1/2") for text in seen), seen
    assert any(text.startswith("compiling SingleStreamBlock 2/2") for text in seen), seen
    assert any(text.startswith(("quantizing ", "measuring ", "looking at ")) for text in seen), seen

    compiled, quantized = page.text("CompileModel"), page.text("INT8QuantizeModel")
    assert compiled.startswith("ready: 2 regions, 5 blocks") and "graphs in" in compiled
    assert quantized.startswith("quantized 29 layers") and "MB" in quantized and "least SQNR" in quantized
    assert page.seen("CompileModel") and page.seen("INT8QuantizeModel")

    page.evaluate("app.graph.nodes.find(n => n.type === 'KSampler').widgets[0].value = 2")
    run(page)  # the nodes are served from ComfyUI's cache; the sampler runs
    assert (page.text("CompileModel"), page.text("INT8QuantizeModel")) == (compiled, quantized)
    run(page)  # everything is
    assert (page.text("CompileModel"), page.text("INT8QuantizeModel")) == (compiled, quantized)
    for entry in finished(page):  # what API clients get
        ((report,),) = entry["outputs"]["6"]["int8_compile"]
        assert report["text"] == compiled and report["details"]["graphs"] == 2

    page.browser.reload()
    page.wait()
    page.until("app.graph.nodes.some(n => n.type === 'CompileModel' && n.widgets.some(w => w.name === 'shown'))")
    assert (page.text("CompileModel"), page.text("INT8QuantizeModel")) == (compiled, quantized)
    assert not errors(page)


def test_a_fallback_is_a_toast_once_and_the_cache_is_cleared_by_a_command(comfy_page):
    page = comfy_page()
    page.evaluate("""(() => { window.toasts = []; const { toast } = app.extensionManager; const add = toast.add.bind(toast);
        toast.add = (message) => { toasts.push(message.detail); add(message); }; })()""")
    page.load(workflow(backend="cudagraphs"))
    run(page)
    page.evaluate("app.graph.nodes.find(n => n.type === 'KSampler').widgets[0].value = 2")
    run(page)
    assert page.evaluate("toasts.filter(t => t.startsWith('CUDA graphs do not exist on cpu')).length") == 1
    assert "CUDA graphs do not exist on cpu" in page.text("CompileModel")
    page.evaluate("app.extensionManager.command.execute('INT8Compile.ClearCache')")
    page.until("toasts.some(t => t.startsWith('Deleted 0 compiled'))")
    assert not errors(page)
