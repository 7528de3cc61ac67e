"""What a node shows while it works and afterwards: live to the client that queued it, and in the prompt's history."""
from __future__ import annotations

import re
import time
from typing import Protocol

import comfy.utils
from comfy_api.latest import io
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

from ...int8.echo import without_folders

# ComfyUI's message, and the key in a node's ui output, that web/int8_compile.js listens to.
EVENT = "int8_compile"
# Seconds between two messages that differ in a number only.
INTERVAL = 0.1
# For the Schema of a node that shows something. not_idempotent: of two nodes with the same inputs each runs, and shows its own report,
# where core would give the second the first one's output.
# Where the core can, the report is sent again when the node did not run.
SCHEMA = {name: True for name in ("not_idempotent", "has_intermediate_output") if name in io.Schema.__dataclass_fields__}


class Report(Protocol):
    """CompileReport, QuantizeReport, ModesReport."""

    def status(self) -> str: ...

    def short(self) -> list[str]: ...

    def text(self) -> str: ...

    def warnings(self) -> list[str]: ...

    def to_dict(self) -> dict: ...


def for_client(value):
    """JSON values without the folders in their texts: what a compiler complains of names some."""
    if isinstance(value, str):
        return without_folders(value)
    if isinstance(value, dict):
        return {key: for_client(item) for key, item in value.items()}
    return [for_client(item) for item in value] if isinstance(value, (list, tuple)) else value


class NodeStatus:
    """Of the node that runs now; calls of it may come much later, from the sampler or another thread. A node that does several things has a
    report of each kind. Outside of a server it only keeps the reports."""

    def __init__(self, report: Report | None = None):
        context = get_executing_context()
        self._node = context.node_id if context else None
        self._client = None
        self._reports: dict[type, Report] = {}  # the last of each kind, in the order in which they first came
        self._sent = "", 0.0
        self._has_progress = False
        # Its keys stay, for it may be written to a client while it changes.
        self._entry = {"node": self._node, "status": "", "short": "", "text": "", "warnings": [], "details": {}}
        if report is not None:
            self(report)

    @property
    def ui(self) -> dict:
        """The node's ui output. ComfyUI writes it into the history when the prompt has ended, and sends it again when the node did not
        run: by then the report in it is that of the last sampling. (A list in a list: ComfyUI takes a dict for a file.)"""
        return {EVENT: [[self._entry]]}

    def __call__(self, report: Report | None, doing: str = "", progress: tuple[int, int] | None = None) -> None:
        """Something has happened, or doing is under way. report None: there is none yet. progress: (done, in all), for the node's progress
        bar; raises InterruptProcessingException, as every progress bar of ComfyUI does."""
        if report is not None:
            self._reports[type(report)] = report
            reports = list(self._reports.values())
            self._entry.update(for_client({"status": "; ".join(r.status() for r in reports),
                                           "short": "\n".join(line for r in reports for line in r.short()),
                                           "text": "\n".join(r.text() for r in reports),
                                           "warnings": [text for r in reports for text in r.warnings()],
                                           "details": {key: value for r in reports for key, value in r.to_dict().items()}}))
        self._show_progress(progress)
        kind, now = re.sub(r"[0-9]+", "", doing), time.monotonic()
        if self._node is None or (doing and kind == self._sent[0] and now - self._sent[1] < INTERVAL):
            return
        self._sent = kind, now
        from server import PromptServer  # there is one: a node of it has run

        if get_executing_context() is not None:  # else it is the builder's thread, when another client's prompt may run
            self._client = PromptServer.instance.client_id
        if self._client is not None:
            PromptServer.instance.send_sync(EVENT, {**self._entry, "doing": without_folders(doing)}, self._client)

    def _show_progress(self, progress: tuple[int, int] | None):
        """On this node, while another one runs: the sampler, whose own bar stays as it is."""
        context = get_executing_context()
        if context is None or self._node in (None, context.node_id):
            return
        if progress is not None:
            done, total = progress
            comfy.utils.ProgressBar(total, node_id=self._node).update_absolute(done)
        elif self._has_progress:
            get_progress_state().finish_progress(self._node)
        self._has_progress = progress is not None
