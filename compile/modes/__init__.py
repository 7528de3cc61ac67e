"""Modes: what was done to a model, as an ordered record that can be saved and restored.

Plain torch. ``apply_modes(model, ["convrot", "int8"])`` gives a changed copy of model, ``mode_state(copy)`` its record.
"""
from .apply import apply_modes
from .compile import Compile
from .convrot import ConvRot
from .errors import ApplyModeError, ModeConfigError, ModeOrderError, ModeRecordError, ModeRegistryError, UnknownModeError
from .export import Export
from .host import Host, ModelRecipe, ModuleHost
from .int8 import Int8
from .mode import Mode, NoConfig
from .record import METADATA_KEY
from .registry import MODES, ModeRegistry
from .restore import mode_state, restore_modes
from .search import Searcher
from .smoothquant import SmoothQuant
from .state import ModeEntry, ModeState

__all__ = [
    "METADATA_KEY", "MODES", "ApplyModeError", "Compile", "ConvRot", "Export", "Host", "Int8", "Mode", "ModeConfigError", "ModeEntry",
    "ModeOrderError", "ModeRecordError", "ModeRegistry", "ModeRegistryError", "ModeState", "ModelRecipe", "ModuleHost", "NoConfig",
    "Searcher", "SmoothQuant", "UnknownModeError", "apply_modes", "mode_state", "restore_modes",
]
