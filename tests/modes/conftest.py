from __future__ import annotations

import pytest
from int8_compile.compile.modes import MODES, ModeRegistry, ModuleHost

from .small_model import Model


@pytest.fixture
def model():
    return Model().eval()


@pytest.fixture
def registry():
    """The built-in modes in a registry that a test may add to."""
    registry = ModeRegistry(ModuleHost())
    for mode in MODES:
        registry.register(type(mode))
    return registry
