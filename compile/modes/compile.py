"""The mode compile: the model's repeated blocks are compiled when it is first called. Last, and of this process only."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from ..block_calls import OwnCall
from ..engine import CompiledModule
from ..options import CompileOptions, parse_options, require_backend
from .errors import ModeConfigError
from .mode import Mode
from .registry import MODES


@dataclass(frozen=True)
class CompileConfig:
    """What of CompileOptions is recorded; the defaults are those of INT8 Lazy Torch Compile."""

    backend: str = "inductor"
    fullgraph: bool = False
    dynamic: bool | None = True
    mark_sizes: bool = True
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    options: str = "{}"
    blocks_only: bool = True
    background: bool = False

    @classmethod
    def of(cls, options: CompileOptions, **more):
        return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(CompileConfig)}, **more)

    def to_options(self, title: str) -> CompileOptions:
        """Raises ModeConfigError for a backend or an option that is not there, or that a workflow may not set."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(CompileConfig)}
        try:
            require_backend(self.backend)
            return CompileOptions(**{**values, "options": parse_options(self.options, self.backend)}, title=title)
        except (ValueError, RuntimeError) as error:
            raise ModeConfigError(f"compile: {error}") from error


@MODES.register
class Compile(Mode):
    name = "compile"
    config_class = CompileConfig
    next_modes = frozenset()
    save_mode_in_state = False

    def convert(self, model, config, **_):
        model._compiled_call_impl = CompiledCall(model, config.to_options("Mode compile"))
        return model, {}

    def restore(self, model, config, metadata):
        return self.convert(model, config)[0]


class CompiledCall(OwnCall):
    """In the slot of torch.nn.Module.compile, which copies and state_dict leave out: the same call with the blocks compiled."""

    def __init__(self, model: torch.nn.Module, options: CompileOptions):
        self.model = model
        tensor = next(iter((*model.parameters(), *model.buffers())), None)
        self.engine = CompiledModule(options, None if tensor is None else tensor.device)

    def __call__(self, *args, **kwargs):
        def call():
            # Where nothing repeats the engine puts the whole model's compiled call in this slot.
            current = self.model._compiled_call_impl
            return (self.model._call_impl if current is self else current)(*args, **kwargs)
        return self.engine.run(self.model, call, filter_guards=True, passthrough=lambda error: isinstance(error, torch.OutOfMemoryError))
