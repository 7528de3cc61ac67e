"""INT8 Compile Check: what this machine can do, measured."""
from __future__ import annotations

import functools
import json
from collections.abc import Callable

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..compile.check.linear_table import SIZES
from ..compile.check.linear_table import sizes as sizes_named
from ..compile.check.plot import plot, require_matplotlib
from ..compile.check.ways import advice, plot_ways, table, to_dict
from ..compile.comfyui.machine_check import run_check
from ..compile.comfyui.model_check import ModelInputs, measure_model
from ..compile.comfyui.node_status import for_client

FULL = SIZES[-1]
NO_PICTURES = "There are no pictures: connect model, positive, latent_image and vae, and set sizes to full."


class INT8CompileCheck(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="INT8CompileCheck",
            display_name="INT8 Compile Check",
            category="INT8 Compile",
            description="What this machine can do: what is installed and what is missing, how fast one layer is in bf16, fp8 and INT8 by "
                        "each kernel, and whether INT8 and compile pay here. With a model and sizes full also that model, in each way.",
            inputs=[
                io.Combo.Input("sizes", options=list(SIZES), default=SIZES[0], tooltip="quick: four layers, some seconds. full: twelve "
                               "from Flux, Wan and SDXL, and a block, compiled: a minute or two; and the model that is connected."),
                io.Model.Input("model", optional=True, tooltip="With sizes full: three images of it uncompiled and compiled, as it is and "
                               "by each INT8 method. Minutes. Connect what is before INT8 and compile nodes."),
                io.Conditioning.Input("positive", optional=True, tooltip="As for a sampler; with model."),
                io.Conditioning.Input("negative", optional=True, tooltip="As for a sampler; without it positive is taken, for cfg 1."),
                io.Latent.Input("latent_image", optional=True, tooltip="Size and batch of the images; with model."),
                io.Vae.Input("vae", optional=True, tooltip="For pictures, which are compared then. Without it latents are."),
                io.Int.Input("steps", default=8, min=1, max=1000, optional=True, tooltip="Of each image of the model."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, optional=True, tooltip="Of each image of the model."),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The report that the node shows."),
                io.String.Output(display_name="json", tooltip="The same for programs: facts, milliseconds, ratios, advice."),
                io.Image.Output(display_name="plot", tooltip="The times as bars. Needs matplotlib."),
                io.Image.Output(display_name="pictures", tooltip="Of the model in each way, in the order of the table, with the same seed. "
                                "Needs model and vae, and sizes full."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> float:
        return float("nan")  # is never what it was: the machine may have changed

    @classmethod
    def execute(cls, sizes, model=None, positive=None, negative=None, latent_image=None, vae=None, steps=8, cfg=1.0) -> io.NodeOutput:
        progress, before = None, 0

        def tick(done: int, total: int):
            nonlocal progress
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress = progress or comfy.utils.ProgressBar(total)
            progress.update_absolute(before + done, before + total)
        inputs = ModelInputs(model, positive, negative, latent_image, vae, steps, cfg) if model is not None and sizes == FULL else None
        if inputs is not None:
            inputs.check()
        result = run_check(functools.partial(sizes_named, sizes), _own_ids(), tick)
        text, data, pictures = result.text(), result.to_dict(), None
        plots: list[Callable[[], torch.Tensor]] = [functools.partial(plot, result)]
        if inputs is not None:
            before = 1 if progress is None else progress.current
            ways, pictures = measure_model(inputs, tick)
            text = "\n".join([advice(ways, inputs.quality), text, "", inputs.title(), *table(ways, inputs.quality)])
            data["model"] = {"steps": steps, "cfg": cfg, "quality": inputs.quality, "ways": to_dict(ways)}
            plots.append(functools.partial(plot_ways, ways, inputs.quality))
        elif model is not None:
            text += "\n\nThe model that is connected was not measured: for that set sizes to full."
        shown_text, picture = for_client(text), _picture(plots)
        shown = ui.PreviewText(shown_text).as_dict()
        if isinstance(picture, torch.Tensor):
            shown.update(ui.PreviewImage(picture).as_dict())
        return io.NodeOutput(shown_text, json.dumps(for_client(data), indent=1), picture,
                             ExecutionBlocker(NO_PICTURES) if pictures is None else pictures, ui=shown)


def _picture(plots: list[Callable[[], torch.Tensor]]) -> torch.Tensor | ExecutionBlocker:
    """[1, H, W, 3], one below the other. Without matplotlib what is connected to the plot says what to install, and the report is there
    all the same."""
    try:
        require_matplotlib()
    except RuntimeError as error:
        return ExecutionBlocker(str(error))
    return torch.cat([plotted() for plotted in plots])[None]


def _own_ids() -> list[str]:
    from . import NODES  # this module is one of its parts

    return [node.define_schema().node_id for node in NODES]
