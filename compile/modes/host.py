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
WRAPPERS = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class ModelRecipe:
    """A model that is still to be made: factory(*args, **kwargs)."""

    factory: Any
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)

    @classmethod
    def of(cls, model_like) -> ModelRecipe | None:
        """Of a class or function, (it,), (it, args) or (it, args, kwargs); None for a model."""
        if isinstance(model_like, cls):
            return model_like
        if isinstance(model_like, tuple) and 1 <= len(model_like) <= 3 and callable(model_like[0]):
            return cls(*model_like)
        return cls(model_like) if isinstance(model_like, type) or type(model_like).__name__ == "function" else None

    def build(self):
        return self.factory(*self.args, **self.kwargs)


class Host(Protocol):
    """What apply_modes must know of a kind of model. A failed apply_modes only ever has changed what ``clone`` returned.

    ComfyUI's ModelPatcher fits: clone is patcher.clone(), the record an attachment of the patcher (its on_model_patcher_clone hands the
    record on), snapshot and damage are empty since modes use object patches, and commit gives patches_uuid a new value so that ComfyUI
    reloads. Its modes are of their own, with the same names, rules and configs: see the built-in ones.
    """

    def get_state(self, model) -> ModeState: ...

    def set_state(self, model, state: ModeState) -> None: ...

    def clone(self, model) -> Any:
        """A copy to work on: changing it leaves model as it is."""

    def commit(self, model, working) -> Any:
        """What apply_modes returns, once all modes are in working."""

    def snapshot(self, model) -> Any: ...

    def damage(self, model, snapshot) -> str:
        """What of model was changed since snapshot, in words; empty where nothing was."""


class ModuleHost:
    """torch.nn.Module. A copy has modules and buffers of its own, and parameters that share their memory with the original's."""

    def get_state(self, model: torch.nn.Module) -> ModeState:
        """Raises ApplyModeError for anything but a module, a wrapper of another module, and a module that contains one with modes."""
        if not isinstance(model, torch.nn.Module):
            raise ApplyModeError(f"Modes are applied to a torch.nn.Module, not to a {type(model).__name__}.")
        if isinstance(model, WRAPPERS) or type(model).__name__ == "OptimizedModule":
            raise ApplyModeError(f"Apply modes to the model inside the {type(model).__name__}, and wrap it afterwards.")
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

    def commit(self, model, working: torch.nn.Module) -> torch.nn.Module:
        if not isinstance(working, torch.nn.Module):
            raise ApplyModeError(f"The modes left a {type(working).__name__}, not a module.")
        return working

    def snapshot(self, model: torch.nn.Module) -> dict[str, int]:
        # Inference tensors do not count their versions.
        return {name: p._version for name, p in model.named_parameters() if not p.is_inference()}

    def damage(self, model: torch.nn.Module, snapshot: dict[str, int]) -> str:
        changed = [name for name, p in model.named_parameters() if name in snapshot and p._version != snapshot[name]]
        return f"{len(changed)} parameters, the first is '{changed[0]}'" if changed else ""
