"""A safetensors file that is read tensor by tensor, for Load INT8 Model: never in memory as a whole, and as it was when it was opened."""
from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import comfy.utils
import torch

from ...int8.echo import echo
from ...int8.files.owners import CacheError, open_regular

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
          "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
# Detection of some families looks into small tensors (SD 2's v-prediction); large ones only give their shape.
SMALL_BYTES = 1 << 16
MAX_HEADER_BYTES = 16 << 20  # of a file: 3000 layers take 1 MB, the workflow that made it a few; Python takes up to fifty times that
MAX_PARTS = 500_000  # three for each tensor, and those of the workflow; Python's JSON holds all threads, for a second with these
MAX_TENSORS, MAX_DIMENSIONS, MAX_TENSOR_BYTES = 1 << 16, 64, 1 << 62  # what models have is far below; torch takes no more dimensions


def read_header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """The header of a safetensors file and its size, read: safe_open maps the file, and who cuts it short then ends the process.
    Raises ValueError."""
    size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes; {MAX_HEADER_BYTES} are the limit")
    text = file.read(size).decode()  # in UTF-8 alone, as the format has it
    if (parts := text.count("[") + text.count("{")) > MAX_PARTS:
        raise ValueError(f"{parts} brackets; {MAX_PARTS} are the limit")
    header = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    texts = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(header, dict) or not (texts is None or (isinstance(texts, dict) and all(isinstance(v, str) for v in texts.values()))):
        raise ValueError("its header is none")
    "".join((*header, *(texts or ()), *(texts or {}).values())).encode()  # raises for half of a character
    return size, header


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name that is there twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} in its header")


def _check(tensors: dict[str, Any], size: int) -> None:
    """Raises ValueError where the tensors that a header names do not fill size bytes, one behind the other, as the format demands."""
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"{len(tensors)} tensors; {MAX_TENSORS} are the limit")
    at = 0
    for entry in sorted(tensors.values(), key=_offsets):
        start, end = _offsets(entry)
        shape, kind = entry.get("shape"), DTYPES.get(str(entry.get("dtype")))
        if not isinstance(entry.get("dtype"), str):
            raise ValueError("a tensor without a type")
        if not isinstance(shape, list) or not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError("a tensor without a shape")
        if len(shape) > MAX_DIMENSIONS or max(shape, default=0) > MAX_TENSOR_BYTES or math.prod(filter(None, shape)) > MAX_TENSOR_BYTES:
            raise ValueError("a tensor that is larger than any can be")
        if start != at or end < start or (kind is not None and end - start != math.prod(shape) * kind.itemsize):
            raise ValueError("tensors that overlap, or are not of the size of their shape")
        at = end
    if at != size:
        raise ValueError(f"{size} bytes of tensors, of {at}")


def _offsets(entry) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise ValueError("a tensor without a place")
    return offsets[0], offsets[1]


def _written(file) -> tuple[int, ...]:
    """Another once somebody has written into an open file, or put another in its place; copies may bring their own time of change."""
    state = os.fstat(file.fileno())
    return state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


class CheckpointFile(Mapping):
    """A safetensors file as {key: tensor}; large tensors without their values. Raises ValueError for a file that is damaged."""

    def __init__(self, path: str):
        self.path = path
        try:
            with open_regular(Path(path)) as file:
                self._written = _written(file)
                size, header = read_header(file)
                self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
                _check(header, self._written[1] - 8 - size)
        except (OSError, ValueError, RuntimeError) as error:  # RecursionError, CacheError
            raise ValueError(f"Load INT8 Model: '{echo(Path(path).name)}' is damaged, cut short or not a safetensors file "
                             f"({echo(str(error))}). Download it again.") from error
        for key, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"Load INT8 Model: '{echo(Path(path).name)}' is damaged: {echo(key)} has the type {echo(entry['dtype'])}, "
                                 "which no model has.")
        self._start = 8 + size
        self._entries = header

    def shape(self, key: str) -> list[int]:
        return self._entries[key]["shape"] if key in self._entries else []

    def dtype(self, key: str) -> torch.dtype:
        return DTYPES[self._entries[key]["dtype"]]

    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(end - start for start, end in (entry["data_offsets"] for entry in self._entries.values()))

    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max((end - start for start, end in (entry["data_offsets"] for entry in self._entries.values())), default=0)

    def read(self, key: str, memory: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor of key, in memory (uint8, large enough) or in memory of its own; never a map of the file, whose pages would stay."""
        start, end = self._entries[key]["data_offsets"]
        raw = torch.empty(end - start, dtype=torch.uint8) if memory is None else memory[:end - start]
        with self._opened() as file:
            try:
                file.seek(self._start + start)
                got = file.readinto(memoryview(raw.numpy()))
            except OSError as error:
                raise ValueError(f"Load INT8 Model: '{echo(Path(self.path).name)}' cannot be read ({echo(str(error))}). Check the disk, or "
                                 "download the file again.") from error
            if got < end - start:
                self._changed()
            self._require_unchanged(file)
        return raw.view(self.dtype(key)).reshape(self.shape(key))

    def by_comfyui(self) -> dict[str, torch.Tensor]:
        """All of it, as ComfyUI's loader reads the file."""
        with self._opened() as file:
            self._require_unchanged(file)
        state = comfy.utils.load_torch_file(self.path)
        with self._opened() as file:
            self._require_unchanged(file)
        return state

    def _opened(self) -> BinaryIO:
        try:
            return open_regular(Path(self.path))
        except (OSError, CacheError):
            return self._changed()

    def _require_unchanged(self, file: BinaryIO) -> None:
        if _written(file) != self._written:
            self._changed()

    def _changed(self) -> NoReturn:
        raise ValueError(f"Load INT8 Model: '{echo(Path(self.path).name)}' changed while it was read. "
                         "Queue the prompt again once the file is whole.")

    def __getitem__(self, key):
        start, end = self._entries[key]["data_offsets"]
        if end - start <= SMALL_BYTES:
            return self.read(key)
        return torch.empty(self.shape(key), dtype=self.dtype(key), device="meta")

    def __iter__(self):
        return iter(self._entries)

    def __len__(self):
        return len(self._entries)
