"""The mode compile: the model's repeated blocks are compiled when it is first called. Last, and of this process only."""
from __future__ import annotations

import torch

from ..engine import CompiledModule
from ..options import MODES, CompileOptions, parse_options, require_backend
from .errors import ModeConfigError
from .mode import Mode
from .registry import MODES


@MODES.register
class Compile(Mode):
    name = "compile"
    config_class = CompileOptions
    next_modes = frozenset()
    save_mode_in_state = False

    def convert(self, model, config, **_):
        try:
            require_backend(config.backend)
            parse_options(config.options, config.backend)
        except (ValueError, RuntimeError) as error:
            raise ModeConfigError(f"compile: {error}") from error
        if config.mode not in MODES:
            raise ModeConfigError(f"compile: unknown mode '{config.mode}'. Choose one of: {', '.join(MODES)}.")
        model._compiled_call_impl = CompiledCall(model, config)
        return model, {}

    def restore(self, model, config, metadata):
        return self.convert(model, config)[0]


class CompiledCall:
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
