"""How a kind of model is copied, and where its record of modes is."""
from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .errors import ApplyModeError
from .state import ModeState

# The attribute of the root module: copied, pickled and freed with it.
ATTRIBUTE = "_int8_compile_modes"


@dataclass(frozen=True)
class ModelRecipe:
    """A model that is still to be made: factory(*args, **kwargs)."""

    factory: Any
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)

    def build(self):
        return self.factory(*self.args, **self.kwargs)


class Host(Protocol):
    """What apply_modes must know of a kind of model. A failed apply_modes only ever has changed what ``clone`` returned."""

    def get_state(self, model) -> ModeState: ...

    def set_state(self, model, state: ModeState) -> None: ...

    def clone(self, model) -> Any:
        """A copy to work on, its record too: changing it leaves model as it is."""


class ModuleHost:
    """torch.nn.Module. A copy has modules and buffers of its own, and parameters that share their memory with the original's."""

    def get_state(self, model: torch.nn.Module) -> ModeState:
        """Raises ApplyModeError for anything but a module, and a module that contains one with modes."""
        if not isinstance(model, torch.nn.Module):
            raise ApplyModeError(f"Modes are applied to a torch.nn.Module, not to a {type(model).__name__}.")
        inner = [name for name, module in model.named_modules() if name and ATTRIBUTE in module.__dict__]
        if inner:
            raise ApplyModeError(f"'{inner[0]}' inside this model has modes of its own. Apply modes to it, or only to the whole model.")
        return model.__dict__.get(ATTRIBUTE, ModeState())

    def set_state(self, model: torch.nn.Module, state: ModeState) -> None:
        model.__dict__[ATTRIBUTE] = state

    def clone(self, model: torch.nn.Module) -> torch.nn.Module:
        memo = {}
        for parameter in model.parameters():
            # Its own object, so that requires_grad is too; detach shares memory and version counter.
            memo[id(parameter)] = (torch.nn.Parameter(parameter.detach(), parameter.requires_grad)
                                   if type(parameter) is torch.nn.Parameter else parameter)
        working = copy.deepcopy(model, memo)
        self.set_state(working, self.get_state(model))
        return working
