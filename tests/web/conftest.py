"""ComfyUI in a real browser, in both of its renderers."""
from __future__ import annotations

import contextlib
import json

import pytest

from benchmarks.comfy_server import ComfyServer, find_comfyui

# What ComfyUI's own page reports as errors: files of a new user that are not there yet, its own deprecations, reloading a page.
COMFYUIS_OWN = ("Failed to load resource: the server responded with a status of 404", "accessed before initialization", "beforeunload")

# Empty files of the names in the workflows: else ComfyUI offers to download them, in front of the graph.
FILES = {"diffusion_models": ("flux1-dev.safetensors", "flux1-dev-int8_00001_.safetensors"),
         "text_encoders": ("clip_l.safetensors", "t5xxl_fp16.safetensors"), "vae": ("ae.safetensors",)}


class Comfy:
    """A page with ComfyUI. browser: a Browser."""

    def __init__(self, browser, url: str):
        self.browser = browser
        self.evaluate, self.until = browser.evaluate, browser.until
        browser.open(url)
        self.wait()

    def wait(self):
        self.until("window.app && window.app.graph && window.app.extensionManager && true")
        self.until("new Promise(r => setTimeout(r, 2000)).then(() => !!app.extensionManager.setting.get('Comfy.Locale'))")

    def use_renderer(self, nodes_2: bool):
        self.evaluate(f"app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {json.dumps(nodes_2)})")

    def load(self, workflow: dict):
        self.evaluate(f"app.loadGraphData({json.dumps(workflow)})")

    def errors(self) -> list[str]:
        return [error for error in self.browser.errors if "int8" in error.lower() or not any(own in error for own in COMFYUIS_OWN)]

    def double_click(self, x: float, y: float):
        for count in (1, 2):
            self._mouse("mousePressed", x, y, count)
            self._mouse("mouseReleased", x, y, count)

    def drag(self, start: tuple[float, float], end: tuple[float, float]):
        """From here to there, in pixels of the window."""
        self._mouse("mouseMoved", *start)
        self._mouse("mousePressed", *start)
        for part in (0.2, 0.6, 1.0):
            self._mouse("mouseMoved", *(a + (b - a) * part for a, b in zip(start, end)))
        self._mouse("mouseReleased", *end)

    def point_at(self, node_type: str, widget: str):
        """The mouse rests on a widget, in the classic renderer."""
        x, y = self.evaluate(f"""(() => {{
            const node = app.graph.nodes.find(n => n.type === '{node_type}');
            const {{ y }} = node.widgets.find(w => w.name === '{widget}');
            const [left, top] = app.canvas.ds.convertOffsetToCanvas([node.pos[0] + 60, node.pos[1] + y + 10]);
            const box = app.canvas.canvas.getBoundingClientRect();
            return [left + box.left, top + box.top]; }})()""")
        for nearer in (5, 0):
            self.browser.command("Input.dispatchMouseEvent", type="mouseMoved", x=x - nearer, y=y)

    def _mouse(self, event: str, x: float, y: float, count: int = 1):
        self.browser.command("Input.dispatchMouseEvent", type=event, x=x, y=y, button="left", buttons=int(event != "mouseReleased"),
                             clickCount=count)

    def press_enter(self):
        for event in ({"type": "keyDown", "text": "\r"}, {"type": "keyUp"}):
            self.browser.command("Input.dispatchKeyEvent", key="Enter", code="Enter", windowsVirtualKeyCode=13, **event)

    def add_by_search(self, words: str, x: float, y: float):
        """Double-click on the empty canvas at x, y (pixels), words, Enter, and a click where the node shall be."""
        before = self.evaluate("app.graph.nodes.length")
        for patience in (5, 5, 30):  # on a busy machine two clicks come too far apart
            self.double_click(x, y)
            with contextlib.suppress(TimeoutError):
                self.until("!!document.activeElement.closest('[role=dialog]') && document.activeElement.tagName === 'INPUT'", patience)
                break
        self.browser.command("Input.insertText", text=words)
        self.until(f"[...document.querySelectorAll('[role=dialog] *')].some(e => e.textContent.trim() === {json.dumps(words)})")
        self.press_enter()
        self.until(f"app.graph.nodes.length === {before + 1} && !document.querySelector('[role=dialog]')")
        self._mouse("mousePressed", x, y)
        self._mouse("mouseReleased", x, y)

    def connect(self, source: str, output: int, target: str, slot: int):
        """Drags a link between two nodes, by their types."""
        places = [self.evaluate(f"""(() => {{
            const node = app.graph.nodes.find(n => n.type === '{kind}');
            const [x, y] = app.canvas.ds.convertOffsetToCanvas(node.getConnectionPos({json.dumps(is_input)}, {number}));
            const box = app.canvas.canvas.getBoundingClientRect();
            return [x + box.left, y + box.top]; }})()""") for kind, is_input, number in ((source, False, output), (target, True, slot))]
        self.drag(*places)

    def queue(self):
        self.evaluate("app.queuePrompt(0)")

    def text(self, node_type: str) -> str:
        """What a node shows."""
        return self.evaluate(f"app.graph.nodes.find(n => n.type === '{node_type}')?.widgets?.find(w => w.name === 'shown')?.value ?? ''")

    def details(self, node_type: str) -> str:
        """What a node has behind its disclosure."""
        return self.evaluate(f"app.graph.nodes.find(n => n.type === '{node_type}')?.widgets?.find(w => w.name === 'shown')?.details ?? ''")

    def open_details(self, node_type: str, is_open: bool):
        self.evaluate(f"app.graph.nodes.find(n => n.type === '{node_type}').widgets.find(w => w.name === 'shown').element"
                      f".querySelector('details').open = {json.dumps(is_open)}")

    def seen(self, node_type: str) -> bool:
        """Whether that is on the screen."""
        return self.evaluate(f"""(() => {{
            const box = app.graph.nodes.find(n => n.type === '{node_type}')?.widgets?.find(w => w.name === 'shown')?.element
                ?.getBoundingClientRect();
            return !!box && box.width > 50 && box.height > 10;
        }})()""")


@pytest.fixture
def comfy_page(models_dir, tmp_path, request):
    """comfy_page(**environment) -> Comfy."""
    stack = request.getfixturevalue("stack")
    return lambda **environment: open_comfy(stack, tmp_path, models_dir, env=environment)


def open_comfy(stack: contextlib.ExitStack, folder, models_dir, settings: dict | None = None, **arguments) -> Comfy:
    """A page of a server with folder/comfyui as its base directory. settings: ComfyUI's. arguments: of ComfyServer."""
    from .browser import CHROMIUM, Browser  # needs aiohttp, which is ComfyUI's

    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    # Else ComfyUI greets a new user with its templates, in front of the workflow.
    stored = folder / "comfyui" / "user" / "default" / "comfy.settings.json"
    stored.parent.mkdir(parents=True)
    stored.write_text(json.dumps({"Comfy.TutorialCompleted": True, **(settings or {})}))
    server = stack.enter_context(ComfyServer(find_comfyui(), folder / "comfyui", models=models_dir, **arguments))
    page = Comfy(stack.enter_context(Browser(folder / "profile")), server.url)
    page.server = server
    return page


@pytest.fixture(scope="session")
def page_of_examples(models_dir, tmp_path_factory):
    """For tests that open workflows and run nothing."""
    folder = tmp_path_factory.mktemp("examples")
    for kind, names in FILES.items():
        (folder / "comfyui" / "models" / kind).mkdir(parents=True)
        for name in names:
            (folder / "comfyui" / "models" / kind / name).touch()
    with contextlib.ExitStack() as stack:
        yield open_comfy(stack, folder, models_dir, settings={
            "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False, "Comfy.Graph.CanvasMenu": False})


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack
