"""An artifact that is loaded, and who looks at what it computes."""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .artifact import Artifact
from .block_guards import ClassGuards
from .origins import are_comfyuis
from .source_guards import CodeFingerprint

# Steps in which all that an artifact was made of is looked at before each block: whether the model patches between blocks what they run.
# Later only the values that they read are.
YOUNG = 2


@dataclass
class Loaded:
    """seen_right: see Verification."""

    artifact: Artifact
    sources: CodeFingerprint
    classes: ClassGuards
    usable: bool = True
    young: float = YOUNG
    seen_right: set = field(default_factory=set)

    def may_serve(self, comfyuis: bool) -> bool:
        """Whether it can be called. comfyuis: it must call no other code than ComfyUI's."""
        return self.usable and (not comfyuis or self._is_comfyuis)

    @functools.cached_property
    def _is_comfyuis(self) -> bool:
        return are_comfyuis(module for module, _ in self.sources.called)

    def change(self) -> str:
        """What is not as the artifact was made of it, empty where all is."""
        return self.sources.mismatch() or self.classes.difference()

    def change_on_the_way(self) -> str:
        """The same, asked before each block of a step."""
        if not self.young and self.sources.values_unchanged() and self.classes.values_unchanged():
            return ""
        return self.change()


class Seen(Protocol):
    """What was compiled: an artifact that is loaded, or what torch compiled for a region. seen_right: in which situations."""

    seen_right: set


class Verifier(Protocol):
    """compile.verification.verifier.Verification."""

    def is_due(self, compiled: Seen) -> bool: ...

    def call(self, compiled: Seen, kind: str, region: str, module: torch.nn.Module, args: tuple, kwargs: dict, run: Callable,
             distrust: Callable[[str], Any]) -> Any: ...
