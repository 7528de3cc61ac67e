"""Inputs that take more than one type."""
from __future__ import annotations

from comfy_api.latest import io


def matching(input_id: str, types: list, tooltip: str, output_tooltip: str | None = None) -> tuple[io.Input, io.Output]:
    """An input of any of types, and an output of the type that is connected there."""
    if not hasattr(io, "MatchType"):  # ComfyUI before MatchType: the output is of any type
        return (io.MultiType.Input(input_id, types=types, tooltip=tooltip),
                io.AnyType.Output(display_name="model", tooltip=output_tooltip))
    template = io.MatchType.Template("patchable", allowed_types=types)
    return (io.MatchType.Input(input_id, template=template, tooltip=tooltip),
            io.MatchType.Output(template=template, display_name="model", tooltip=output_tooltip))
