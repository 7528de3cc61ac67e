"""Compile Model: torch.compile for an object of a model, with every option of it."""
from __future__ import annotations

import copy
import logging

import torch
from comfy.controlnet import ControlNet
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io

from ..compile import options as compile_options
from ..compile.comfyui.compile_model import add_compile, add_method_compile, check_target, non_dynamic_clone
from ..compile.comfyui.memory_format import set_memory_format
from ..compile.comfyui.node_status import SCHEMA, NodeStatus
from ..compile.options import CompileOptions
from ..compile.report import CompileReport
from ..int8.echo import echo
from .inputs import matching

logger = logging.getLogger(__name__)

TITLE = "Compile Model"
BACKGROUND_TOOLTIP = ("Sample uncompiled at once, while a separate process compiles the blocks; compiled code takes over at a step "
                      "boundary when it is ready, in this image or a later one.")
MEMORY_FORMATS = ("preserve_format", "contiguous_format", "channels_last", "channels_last_3d")


class BackendCombo(io.Combo.Input):
    """The backends are asked of torch when the node is described, not when the pack is imported: that would load dynamo."""

    def as_dict(self):
        self.options = compile_options.list_backends()
        return super().as_dict()


class CompileModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        model_in, model_out = matching("model", [io.Model, io.Clip, io.Vae, io.ControlNet],
                                       "The model to compile. The model that comes in is not changed.")
        return io.Schema(
            node_id="CompileModel",
            display_name=TITLE,
            category="INT8 Compile",
            description="Compiles a model with torch.compile when it first samples. Repeated blocks are compiled once and shared, "
                        "so a big model costs about what one of its blocks costs.",
            inputs=[
                model_in,
                io.Boolean.Input("is_patcher", default=True, tooltip="True for a MODEL, which is itself a patcher. "
                                 "False for a CLIP, VAE or ControlNet, which hold one and compile when they are first used."),
                io.String.Input("object_to_patch", default="diffusion_model", tooltip="Dotted path of the object to compile, such as "
                                "diffusion_model or diffusion_model.single_blocks. Empty, or the default with another type: all of it."),
                io.Combo.Input("memory_format", options=list(MEMORY_FORMATS), default="preserve_format", tooltip="Memory layout of the "
                               "object's convolution weights. channels_last speeds up UNets, channels_last_3d video convolutions; "
                               "transformers have few convolutions and gain nothing."),
                io.Boolean.Input("fullgraph", default=False, tooltip="Demand that each block is one graph. Off, code that cannot be "
                                 "compiled runs as it is between graphs."),
                io.Boolean.Input("dynamic", default=False, tooltip="Off: the sizes that change between images (resolution, prompt length, "
                                 "batch) are compiled for any value, all else as it is. On: torch.compile(dynamic=True), where every size "
                                 "and number may change."),
                io.Combo.Input("mode", options=list(compile_options.TORCH_COMPILE_MODES), default="default",
                               tooltip="default: short compile. max-autotune(-no-cudagraphs): searches faster kernels for minutes. "
                               "reduce-overhead: CUDA graphs, for small models."),
                io.String.Input("options", default="", multiline=True, tooltip='Inductor options as a JSON object, such as '
                                '{"epilogue_fusion": true}, on top of the mode. Empty: none.'),
                io.Boolean.Input("disable", default=False, tooltip="Pass the model on uncompiled, to compare."),
                BackendCombo("backend", default="inductor", tooltip="The compiler. inductor unless you know why; eager and aot_eager "
                             "find out which stage fails; velocator and xelerate need their package."),
                io.Boolean.Input("background", default=False, optional=True, tooltip=BACKGROUND_TOOLTIP),
            ],
            outputs=[model_out],
            **SCHEMA,
        )

    @classmethod
    def validate_inputs(cls, memory_format, options, backend="inductor") -> bool | str:
        try:
            _memory_format(memory_format)
            # The backend as linked input is not known yet; execute checks again.
            compile_options.parse_options(options or "", backend or "inductor")
            if backend not in (None, *compile_options.list_backends()):
                return f"Unknown backend '{echo(backend)}'. Choose one of: {', '.join(compile_options.list_backends())}."
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, is_patcher, object_to_patch, memory_format, fullgraph, dynamic, mode, options, disable,
                backend, background=False) -> io.NodeOutput:
        layout = _memory_format(memory_format)
        settings = CompileOptions(backend=backend, fullgraph=fullgraph, dynamic=dynamic, mark_sizes=not dynamic, mode=mode,
                                  options=compile_options.parse_options(options, backend), background=background, title=TITLE)
        compile_options.require_backend(backend)
        _check_type(model, is_patcher)
        object_to_patch = object_to_patch.strip()
        compile_options.check_path(object_to_patch)
        if not is_patcher and object_to_patch == "diffusion_model":
            object_to_patch = ""  # the default of a MODEL means all of a CLIP, VAE or ControlNet
        patched = _clone(model, disable)
        patcher = patched if is_patcher else patched.control_model_wrapped if isinstance(patched, ControlNet) else patched.patcher
        check_target(patcher, object_to_patch)
        if layout is not torch.preserve_format:
            changed = set_memory_format(patcher, object_to_patch, layout)
            logger.info("%s: %d weights in %s", TITLE, changed, memory_format)
        status = NodeStatus(None if disable else CompileReport(TITLE))
        if not disable:
            (add_compile if is_patcher else add_method_compile)(patcher, object_to_patch, settings, status)
        return io.NodeOutput(patched, ui=status.ui)


def _clone(model, disable: bool):
    """A clone to patch: of a MODEL or CLIP with its own method, of a VAE or ControlNet around a clone of its patcher."""
    if isinstance(model, VAE):
        patched = copy.copy(model)
        patched.patcher = model.patcher.clone()
        return patched
    if isinstance(model, ControlNet):
        patched = model.copy()
        patched.previous_controlnet = model.previous_controlnet
        patched.control_model_wrapped = model.control_model_wrapped.clone()
        return patched
    if disable or not isinstance(model, ModelPatcher):
        return model.clone()
    try:
        return non_dynamic_clone(model, TITLE)
    except RuntimeError as error:
        logger.warning("%s Compiling with dynamic VRAM: expect graph breaks.", error)
        return model.clone()


def _memory_format(name: str) -> torch.memory_format:
    if name not in MEMORY_FORMATS:
        raise ValueError(f"Invalid memory format '{echo(name)}'. Choose one of: {', '.join(MEMORY_FORMATS)}.")
    return getattr(torch, name)


def _check_type(model, is_patcher: bool) -> None:
    if isinstance(model, ModelPatcher) and not is_patcher:
        raise ValueError("This input is a MODEL, which is itself a patcher: set is_patcher to true.")
    if isinstance(model, (CLIP, VAE, ControlNet)) and is_patcher:
        raise ValueError(f"This input is a {type(model).__name__}, which holds a patcher: set is_patcher to false.")
    if not isinstance(model, (ModelPatcher, CLIP, VAE, ControlNet)):
        raise ValueError(f"Compile Model cannot compile a {type(model).__name__}, only a MODEL, CLIP, VAE or ControlNet. "
                         "Connect it without this node.")
