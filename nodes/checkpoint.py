"""Save INT8 Model and Load INT8 Model: INT8 checkpoints in ComfyUI's native format."""
from __future__ import annotations

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io
from safetensors import SafetensorError

from ..compile.comfyui.int8_encoder import save_encoder
from ..compile.comfyui.mode_records import recorded, save_model
from ..compile.comfyui.node_status import SCHEMA, NodeStatus
from ..int8.echo import echo
from .inputs import matching
from .quantize import int8_options, quantize_inputs


class SaveINT8Model(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        model_in, _ = matching("model", [io.Model, io.Clip], "A model or CLIP from INT8 Quantize Model, or a model from Load INT8 Model.")
        return io.Schema(
            node_id="SaveINT8Model",
            display_name="Save INT8 Model",
            category="INT8 Compile",
            description="Writes a quantized model or text encoder, with its LoRAs, as an INT8 checkpoint that ComfyUI's own Load Diffusion "
                        "Model or Load CLIP reads. The file is about half the size of bf16.",
            inputs=[
                model_in,
                io.String.Input("filename_prefix", default="diffusion_models/int8", tooltip="Below ComfyUI's output folder; a counter is "
                                "added. Move the file to models/diffusion_models to load it; those of a CLIP, one for each encoder, to "
                                "models/text_encoders."),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename_prefix) -> io.NodeOutput:
        if not isinstance(model, (CLIP, ModelPatcher)):
            raise ValueError(f"Save INT8 Model cannot save a {type(model).__name__}, only a MODEL or a CLIP. Connect it to a save node "
                             "of its type.")
        try:
            (save_encoder if isinstance(model, CLIP) else save_model)(model, filename_prefix)
        except (OSError, SafetensorError, UnicodeError) as error:
            raise ValueError(f"Save INT8 Model: the file cannot be written ({echo(str(error))}). Choose another filename_prefix, or make "
                             "room on the disk of the output folder.") from error
        return io.NodeOutput()


class LoadINT8Model(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadINT8Model",
            display_name="Load INT8 Model",
            category="INT8 Compile",
            description="Loads a diffusion model and quantizes it to INT8 while reading, so that memory stays near the INT8 size. An INT8 "
                        "file is loaded as it is.",
            inputs=[
                io.Combo.Input("unet_name", options=folder_paths.get_filename_list("diffusion_models"),
                               tooltip="A safetensors file in bf16, fp16 or fp32, or in ComfyUI's INT8 format."),
                *quantize_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The model with INT8 layers.")],
            **SCHEMA,
        )

    @classmethod
    def execute(cls, unet_name, method, keep_layers, min_sqnr_db, kernel) -> io.NodeOutput:
        from ..compile.comfyui.int8_checkpoint import load_int8_model

        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        status = NodeStatus()
        model = load_int8_model(path, int8_options(method, keep_layers, min_sqnr_db, kernel), on_progress=status)
        return io.NodeOutput(recorded(model), ui=status.ui)
