"""ComfyUI in a real browser, in both of its renderers."""
from __future__ import annotations

import contextlib
import json

import pytest

from benchmarks.comfy_server import ComfyServer, find_comfyui


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

    def queue(self):
        self.evaluate("app.queuePrompt(0)")

    def text(self, node_type: str) -> str:
        """What a node shows."""
        return self.evaluate(f"app.graph.nodes.find(n => n.type === '{node_type}')?.widgets?.find(w => w.name === 'shown')?.value ?? ''")

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
    from .browser import CHROMIUM, Browser  # needs aiohttp, which is ComfyUI's

    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    stack = request.getfixturevalue("stack")

    def comfy_page(**environment):
        # Else ComfyUI greets a new user with its templates, in front of the workflow.
        settings = tmp_path / "comfyui" / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
        server = stack.enter_context(ComfyServer(find_comfyui(), tmp_path / "comfyui", models=models_dir, env=environment,
                                                 extra_args=("--use-pytorch-cross-attention",)))
        page = Comfy(stack.enter_context(Browser(tmp_path / "profile")), server.url)
        page.server = server
        return page
    return comfy_page


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack
