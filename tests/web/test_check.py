"""The check in a real browser: the command of the palette, and the node, in both renderers."""
from __future__ import annotations

import pytest

from .test_status import errors, node, run

pytestmark = pytest.mark.e2e


def test_the_command_shows_the_report_in_a_window(comfy_page):
    page = comfy_page()
    page.evaluate("app.extensionManager.command.execute('INT8Compile.Check')")
    text = page.until("document.querySelector('dialog[open] pre')?.textContent", 120)
    assert text.startswith("INT8 Compile Check: ") and "ok       native INT8: yes" in text and "int8 rotated" in text
    page.evaluate("document.querySelector('dialog[open] button').click()")
    page.until("!document.querySelector('dialog')")
    assert not errors(page)


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2.0"])
def test_the_node_shows_the_report(comfy_page, nodes_2):
    page = comfy_page()
    page.use_renderer(nodes_2)
    page.load({"version": 0.4, "last_node_id": 1, "last_link_id": 0, "nodes": [node(1, "INT8CompileCheck", 100, values=["quick"])],
               "links": []})
    run(page)
    assert page.text("INT8CompileCheck").startswith("INT8 Compile Check: ") and page.seen("INT8CompileCheck")
    assert not errors(page)
