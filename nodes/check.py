"""INT8 Compile Check: what this machine can do, measured."""
from __future__ import annotations

import functools
import json

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..compile.check.linear_table import SIZES
from ..compile.check.linear_table import sizes as sizes_named
from ..compile.check.plot import plot, require_matplotlib
from ..compile.comfyui.machine_check import run_check
from ..compile.comfyui.node_status import for_client


class INT8CompileCheck(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="INT8CompileCheck",
            display_name="INT8 Compile Check",
            category="INT8 Compile",
            description="What this machine can do: what is installed and what is missing, how fast one layer is in bf16, fp8 and INT8 by "
                        "each kernel, and whether INT8 and compile pay here.",
            inputs=[
                io.Combo.Input("sizes", options=list(SIZES), default=SIZES[0], tooltip="quick: four layers, some seconds. full: twelve "
                               "from Flux, Wan and SDXL, and a block, compiled: a minute or two."),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The report that the node shows."),
                io.String.Output(display_name="json", tooltip="The same for programs: facts, milliseconds, ratios, advice."),
                io.Image.Output(display_name="plot", tooltip="The times as bars. Needs matplotlib."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> float:
        return float("nan")  # is never what it was: the machine may have changed

    @classmethod
    def execute(cls, sizes) -> io.NodeOutput:
        progress = None

        def tick(done: int, total: int):
            nonlocal progress
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress = progress or comfy.utils.ProgressBar(total)
            progress.update_absolute(done)
        result = run_check(functools.partial(sizes_named, sizes), _own_ids(), tick)
        text = for_client(result.text())
        shown = ui.PreviewText(text).as_dict()
        picture = _picture(result)
        if isinstance(picture, torch.Tensor):
            shown.update(ui.PreviewImage(picture).as_dict())
        return io.NodeOutput(text, json.dumps(for_client(result.to_dict()), indent=1), picture, ui=shown)


def _picture(result) -> torch.Tensor | ExecutionBlocker:
    """[1, H, W, 3]. Without matplotlib what is connected to the plot says what to install, and the report is there all the same."""
    try:
        require_matplotlib()
    except RuntimeError as error:
        return ExecutionBlocker(str(error))
    return plot(result)[None]


def _own_ids() -> list[str]:
    from . import NODES  # this module is one of its parts

    return [node.define_schema().node_id for node in NODES]
