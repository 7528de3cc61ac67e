"""Optimize Model: one node that decides, by measuring, what makes this model fast on this machine."""
from __future__ import annotations

from comfy_api.latest import io

from ..compile.comfyui import decisions
from ..compile.comfyui.node_status import SCHEMA, NodeStatus
from ..compile.comfyui.optimize import GOALS, optimize
from ..int8.echo import echo
from .compile_model import BACKGROUND_TOOLTIP


class OptimizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OptimizeModel",
            display_name="Optimize Model",
            category="INT8 Compile",
            description="Makes a model faster, or smaller, by what is measured on this machine when it first samples: which layers gain as "
                        "INT8 and stay exact enough, and whether compiling pays. What it decided is kept for the next start. Where nothing "
                        "pays it passes the model on, and says so.",
            inputs=[
                io.Model.Input("model", tooltip="A model from any loader, with LoRA or without. It is not changed."),
                io.Combo.Input("goal", options=list(GOALS), default="balanced", tooltip="fastest: what measures fastest, no layer noisier "
                               "than 25 dB. balanced: the same with 30 dB, so nearer to the original. smallest: INT8 wherever 25 dB are "
                               "held, faster or not: about half the memory. exact: compiled only, no INT8."),
                io.Boolean.Input("background", default=True, tooltip=BACKGROUND_TOOLTIP),
            ],
            outputs=[io.Model.Output(tooltip="The same model, optimized when it first samples.")],
            **SCHEMA,
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> int:
        return decisions.revision()  # a model that turned out slower is not sampled again as it is

    @classmethod
    def execute(cls, model, goal, background) -> io.NodeOutput:
        if goal not in GOALS:
            raise ValueError(f"Optimize Model: unknown goal '{echo(goal)}'. Choose one of: {', '.join(GOALS)}.")
        if type(background) is not bool:
            raise ValueError(f"Optimize Model: background is true or false, not {echo(background)}.")
        status = NodeStatus()
        return io.NodeOutput(optimize(model, goal, background, status), ui=status.ui)
