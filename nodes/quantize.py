"""INT8 Quantize Model: the Linear layers of a loaded model in INT8."""
from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..compile.comfyui.mode_records import quantize_and_record
from ..compile.comfyui.node_status import SCHEMA, NodeStatus
from ..int8.options import KERNELS, METHODS, Int8Options
from ..int8.quantize import presets
from .inputs import matching


def quantize_inputs() -> list:
    """The inputs of every node that quantizes; int8_options makes Int8Options of their values."""
    return [
        io.Combo.Input("method", options=list(METHODS), default="auto",
                       tooltip="convrot: rotates channels so that outliers do not cost precision. rowwise: no rotation, a little faster. "
                       "smoothquant: smooths and rotates. auto: what measures best, layer by layer. smoothquant and auto look at three "
                       "steps of the first sampling; of a CLIP, at the first prompt."),
        io.String.Input("keep_layers", default="", multiline=True,
                        tooltip="Layers to leave in high precision: a glob a line, matched against the whole name below the diffusion "
                        "model, such as double_blocks.0.*, or preset: and a family for what others keep of it, such as preset:z-image "
                        f"({', '.join(presets())})"),
        io.Float.Input("min_sqnr_db", default=0.0, min=0.0, max=100.0, step=0.5,
                       tooltip="Leave layers in high precision whose output would be noisier than this, as measured in the first sampling. "
                       "0: off. 30 is a mild limit."),
        io.Combo.Input("kernel", options=list(KERNELS), default="auto",
                       tooltip="What multiplies. auto: the best for this device. triton: this pack's GPU kernel. comfy_kitchen: ComfyUI's "
                       "own. torch: torch._int_mm."),
    ]


def int8_options(method, keep_layers, min_sqnr_db, kernel) -> Int8Options:
    return Int8Options(method=method, keep_layers=Int8Options.parse_keep_layers(keep_layers), min_sqnr_db=min_sqnr_db, kernel=kernel)


class INT8QuantizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        model_in, model_out = matching("model", [io.Model, io.Clip], "A model or text encoder (CLIP) loaded in bf16, fp16 or fp32, or from "
                                       "an INT8 file. It is not changed.", "The same model with INT8 layers.")
        return io.Schema(
            node_id="INT8QuantizeModel",
            display_name="INT8 Quantize Model",
            category="INT8 Compile",
            description="Quantizes the Linear layers of a model's or text encoder's blocks to INT8 (W8A8): about half the memory, and "
                        "faster on cards with INT8 tensor cores and CPUs with VNNI. Remove the node and the model is as before.",
            inputs=[model_in, *quantize_inputs()],
            outputs=[model_out],
            **SCHEMA,
        )

    @classmethod
    def execute(cls, model, method, keep_layers, min_sqnr_db, kernel) -> io.NodeOutput:
        status, options = NodeStatus(), int8_options(method, keep_layers, min_sqnr_db, kernel)
        if isinstance(model, CLIP):
            quantized = model.clone()
            quantized.patcher = quantize_and_record(model.patcher, options, status)
        elif isinstance(model, ModelPatcher):
            quantized = quantize_and_record(model, options, status)
        else:
            raise ValueError(f"INT8 Quantize Model cannot quantize a {type(model).__name__}, only a MODEL or a CLIP. Connect it without "
                             "this node.")
        return io.NodeOutput(quantized, ui=status.ui)
