"""Apply Modes and Show Modes: what is done to a model, as an ordered list that is recorded with it."""
from __future__ import annotations

import json

from comfy_api.latest import io, ui

from ..compile.comfyui.mode_records import apply_to_patcher, describe
from ..compile.comfyui.modes import PATCHER_MODES
from ..compile.comfyui.node_status import SCHEMA, NodeStatus
from ..compile.modes.mode import Mode

MAX_TEXT = 1 << 20  # characters; with what was chosen for 3000 layers it has a fifth of that
EXAMPLE = '["convrot", "int8", "compile"]'


class ApplyModes(io.ComfyNode):
    # For other packs, which find this class by its id: see web/docs/ApplyModes.md.
    Mode = Mode
    register_mode = PATCHER_MODES.register

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplyModes",
            display_name="Apply Modes",
            category="INT8 Compile",
            description="Does several things to a model in order, such as rotate, quantize, compile, and records them with it. All of them "
                        "or none: the model that comes in is not changed.",
            inputs=[
                io.Model.Input("model", tooltip="A model from any loader. What an INT8 file records is restored first."),
                io.String.Input("modes", default=EXAMPLE, multiline=True, tooltip="A JSON list, in order: smoothquant, convrot, int8, "
                                'export, compile, or another pack\'s mode. With settings: {"name": "int8", "config": {"kernel": "torch"}}. '
                                "Empty: only what the file records."),
            ],
            outputs=[io.Model.Output(tooltip="The model with these modes, recorded.")],
            **SCHEMA,
        )

    @classmethod
    def execute(cls, model, modes) -> io.NodeOutput:
        status = NodeStatus()
        applied = apply_to_patcher(model, _parse(modes), status)
        return io.NodeOutput(applied, ui=status.ui)


class ShowModes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShowModes",
            display_name="Show Modes",
            category="INT8 Compile",
            description="Shows what was done to a model: its modes in order, with their settings and what was measured.",
            inputs=[io.Model.Input("model", tooltip="The model whose modes are shown. It is not changed.")],
            outputs=[io.String.Output(display_name="text", tooltip="The modes: a JSON list that Apply Modes takes, then a line for each.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> float:
        return float("nan")  # differs from itself: what the first sampling measured is shown by the next run

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        text = describe(model)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def _parse(text: str) -> list:
    if len(text) > MAX_TEXT:
        raise ValueError(f"Apply Modes: modes has {len(text)} characters; {MAX_TEXT} are the limit.")
    try:
        modes = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Apply Modes: modes is not JSON ({error}). Write a list such as {EXAMPLE}.") from None
    if not isinstance(modes, list):
        raise ValueError(f"Apply Modes: modes must be a list such as {EXAMPLE}, not {type(modes).__name__}.")
    return modes
