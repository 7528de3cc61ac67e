"""The check in a real browser: the command of the palette, and the node in both renderers."""
from __future__ import annotations

import pytest

from .test_status import node, run

pytestmark = [pytest.mark.e2e, pytest.mark.rotating(3)]


def test_the_command_opens_the_report_in_a_window_and_the_node_shows_it(comfy_page):
    page = comfy_page()
    page.evaluate("app.extensionManager.command.execute('INT8Compile.Check')")
    text = page.until("document.querySelector('dialog[open] pre')?.textContent", 300)
    assert text.startswith("INT8 Compile Check: ") and "ok       native INT8: yes" in text and "int8 rotated" in text
    page.evaluate("document.querySelector('dialog[open] button').click()")
    page.until("!document.querySelector('dialog')")

    page.load({"version": 0.4, "last_node_id": 1, "last_link_id": 0, "nodes": [node(1, "INT8CompileCheck", 100, values=["quick"])],
               "links": []})
    run(page)
    for nodes_2 in (False, True):
        page.use_renderer(nodes_2)
        page.until("new Promise(r => setTimeout(r, 1000)).then(() => true)")
        assert page.text("INT8CompileCheck").startswith("INT8 Compile Check: ") and page.seen("INT8CompileCheck")
    assert not page.errors()
