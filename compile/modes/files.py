"""A plain torch model and its record of modes in one safetensors file."""
from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ...int8.files.whole import writing_whole
from .errors import ModeRecordError
from .record import MAX_CHARACTERS, METADATA_KEY
from .restore import mode_state, restore_modes


def save_model(model: torch.nn.Module, path: str | os.PathLike) -> None:
    """Writes model's state_dict, in ComfyUI's layout for INT8 layers, and its modes. The file is whole or not there."""
    from safetensors.torch import save_file

    path, seen, tensors = Path(path), set(), {}
    for name, tensor in model.state_dict().items():
        # A tied weight is written twice: the format has no references.
        tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    with writing_whole(path) as partial:
        save_file(tensors, partial, metadata={METADATA_KEY: json.dumps(mode_state(model))})


def load_model(model, path: str | os.PathLike) -> torch.nn.Module:
    """A copy of model (as before its modes, or a recipe) with the modes and the weights of a file.

    Raises what restore_modes and load_state_dict raise; ModeRecordError for a file without a record.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        record = (file.metadata() or {}).get(METADATA_KEY)
        if record is None:
            raise ModeRecordError(f"{Path(path).name} has no record of modes ({METADATA_KEY} in its metadata).")
        if len(record) > MAX_CHARACTERS:
            raise ModeRecordError(f"The record of modes has {len(record)} characters; {MAX_CHARACTERS} are the limit.")
        model = restore_modes(model, record)
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
    return model
