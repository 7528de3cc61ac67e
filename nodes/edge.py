"""What leaves the server: an error names no folder of it to whoever queued the prompt; the console has the whole of it."""
from __future__ import annotations

import functools
import inspect
import logging
import os
from pathlib import Path

import folder_paths
from comfy.controlnet import ControlNet
from comfy.sd import CLIP, VAE
from comfy_api.latest import io

from ..compile.artifacts.store import default_key_file
from ..compile.comfyui import artifact_cache
from ..int8.echo import OF_A_PROMPT, echo, without_folders, writable
from ..pack import NAME, PACKAGE

logger = logging.getLogger(__name__)

VALUES = (bool, int, float, str, list, dict, type(None))  # of JSON
MAX_CHARACTERS = 6000  # of what core or torch says; this pack's longest message lists the options of the compiler


def for_clients(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """node, whose errors of any type are raised on without absolute paths in their text, which any log can write."""
    execute = node.execute.__func__
    signature = inspect.signature(execute)

    @functools.wraps(execute)
    def guarded(cls, *args, **kwargs):
        try:
            _check_model(cls, signature.bind_partial(cls, *args, **kwargs).arguments)
            return execute(cls, *args, **kwargs)
        except Exception as error:
            _clean(error)
            raise
    node.execute = classmethod(guarded)
    return node


def _check_model(node: type[io.ComfyNode], arguments: dict) -> None:
    """Core takes what comes out of a node of several types for any of them, and what a prompt has in the place of a link as it is."""
    model = arguments.get("model", ...)
    if not isinstance(model, (CLIP, VAE, ControlNet, *VALUES)):
        return
    schema = node.define_schema()
    taken = next((found for found in schema.inputs if type(found) is io.Model.Input and found.id == "model"), None)
    if taken and not (model is None and taken.optional):
        if isinstance(model, VALUES):
            raise ValueError(f"{schema.display_name}: the input model is a value, not a MODEL. Connect it to a node that loads a model.")
        raise ValueError(f"{schema.display_name}: this input is a {type(model).__name__}, not a MODEL. Connect it without this node.")


def _clean(error: Exception) -> None:
    folders = _folders()
    _make_writable(error)
    before = str(error)
    if isinstance(error, OSError):  # its text is made of these
        for name in ("filename", "filename2"):
            if isinstance(path := getattr(error, name), (str, bytes, os.PathLike)):
                setattr(error, name, echo(Path(os.fsdecode(path)).name))
    if (kind := type(error)).__module__.startswith(f"{PACKAGE}."):  # which ComfyUI names by its path, and tells
        kind.__module__ = kind.__module__.replace(PACKAGE, NAME, 1)
    error.args = tuple(without_folders(part, folders)[:MAX_CHARACTERS] if isinstance(part, str) else part for part in error.args)
    if str(error) != before:
        logger.error("%s", writable(before, lines=False), extra={OF_A_PROMPT: True})


def _make_writable(error: BaseException) -> None:
    """A prompt's text may be half a surrogate pair, or drive a terminal: a console that cannot write the text, or that of an error before
    this one, ends the thread of ComfyUI that runs prompts."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        # Errors before this one repeat what a file holds.
        error.args = tuple(writable(part, lines=len(seen) == 1) if isinstance(part, str) else part for part in error.args)
        error = error.__cause__ or error.__context__


def _folders() -> list[str]:
    """Known ones, whose names may have spaces; the innermost first."""
    folders = [artifact_cache.folder(), default_key_file().parent, Path.home(), Path(folder_paths.base_path),
               Path(folder_paths.get_user_directory()), Path(folder_paths.get_input_directory()),
               Path(folder_paths.get_output_directory()), Path(folder_paths.get_temp_directory())]
    return sorted({str(path.absolute()) for path in folders if len(path.parts) > 1}, key=len, reverse=True)
