"""Save, Load and Clear Compile Cache: compiled code that is kept on disk, carried to other machines, or deleted."""
from __future__ import annotations

import re
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..compile.artifacts import trusted_bundles
from ..compile.artifacts.bundle import MAX_NAME, Bundle, load_bundle, read_bundle, save_bundle
from ..compile.artifacts.store import CacheStore, default_key_file
from ..compile.comfyui import artifact_cache, compile_model, decisions
from ..int8.echo import echo
from ..int8.files.folders import folder_size, is_reserved
from ..int8.kernels.native import cache_folder

_FILE_NAME = re.compile(r"\w[\w .+%()-]{0,149}")


def _always_anew() -> float:
    return float("nan")  # is never what it was: the disk may have changed


class SaveCompileCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveCompileCache",
            display_name="Save Compile Cache",
            category="INT8 Compile",
            description="Writes what was compiled on this machine into one file, for other machines with the same GPU or CPU and the same "
                        "versions. They load it with Load Compile Cache and compile nothing.",
            inputs=[
                io.Model.Input("model", optional=True, tooltip="Save only what this model runs; it must have sampled. Not connected: "
                               "all that this machine has compiled."),
                io.AnyType.Input("after", optional=True, tooltip="Connect the sampler's latent or the image, so that there is something to "
                                 "save when this node runs. It is not looked at."),
                io.String.Input("filename_prefix", default="int8_compile", tooltip="Name of the file in the bundles folder of the compile "
                                "cache; a counter is added."),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file."),
                     io.String.Output(display_name="digest", tooltip="Its SHA-256: to be trusted on the machine that loads "
                                      "it, and to enter there.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> float:
        return _always_anew()

    @classmethod
    def execute(cls, filename_prefix, model=None, after=None) -> io.NodeOutput:
        if not _is_file_name(filename_prefix, "_00001_.zip"):
            raise ValueError(f"filename_prefix: '{echo(filename_prefix)}' must be a plain name, without folders, of 150 characters at "
                             f"most (of ASCII; {MAX_NAME} bytes).")
        _wait_for_builder()
        store = artifact_cache.open_store()
        entries = store.own() if model is None else _entries_of(model, store)
        if not entries:
            raise ValueError("Save Compile Cache: nothing has been compiled and kept yet. Make an image with a compile node first; connect "
                             "the sampler's latent to 'after', so that this node runs later than the sampler.")
        folder, name, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, str(artifact_cache.bundles()))
        path = Path(folder) / f"{name}_{counter:05}_.zip"
        digest = save_bundle(store, entries, path, artifact_cache.room_for_bundles())
        with (saved := read_bundle(path, tick=comfy.model_management.throw_exception_if_processing_interrupted)).copy:
            text = f"{path}\n{path.stat().st_size / 1e6:.1f} MB\n{saved.contents()}\ndigest: {digest}"
        return io.NodeOutput(str(path), digest, ui=ui.PreviewText(text))


class LoadCompileCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadCompileCache",
            display_name="Load Compile Cache",
            category="INT8 Compile",
            description="Adds a file from Save Compile Cache to the compile cache of this machine. The file holds code that will run here: "
                        "it is added only if its digest is on this server's list of trusted bundles (see help).",
            inputs=[
                io.String.Input("bundle", default="", tooltip="Name of a file in the bundles folder of the compile cache. Put it there by "
                                "hand: files from elsewhere are not loaded."),
                io.String.Input("trust", default="", tooltip="The whole digest that Save Compile Cache showed for that file. It must be on "
                                "the server's list of trusted bundles as well. Empty: says what the file holds and loads nothing."),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="What was added.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> float:
        return _always_anew()

    @classmethod
    def execute(cls, bundle, trust) -> io.NodeOutput:
        interrupted = comfy.model_management.throw_exception_if_processing_interrupted
        with (found := read_bundle(_path_of(bundle.strip()), tick=interrupted)).copy:
            _require_trust(found, trust.strip().lower())
            added, present = load_bundle(artifact_cache.open_store(), found, interrupted)
        text = f"{echo(found.path.name)}: {added} compiled added, {present} were there already.\n{found.contents()}"
        if any(held.labels[-1] != torch.__version__ for held in found.held):
            text += f"\nThis is torch {torch.__version__}: what was compiled by another version is not used."
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class ClearCompileCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ClearCompileCache",
            display_name="Clear Compile Cache",
            category="INT8 Compile",
            description="Deletes all compiled code of models from disk, and what Optimize Model has decided, and says what it leaves. "
                        "Models that are loaded go on as they are; the next start compiles and decides again.",
            inputs=[],
            outputs=[io.String.Output(display_name="report", tooltip="What was deleted, and what stays.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> float:
        return _always_anew()

    @classmethod
    def execute(cls) -> io.NodeOutput:
        store = artifact_cache.open_store()
        count, freed = store.clear()
        text = f"Deleted {count} compiled, {freed / 1e6:.1f} MB."
        if left := len(store.all()):
            text += f" {left} could not be deleted: check that ComfyUI may write in the compile cache's folder."
        if forgotten := decisions.clear():
            text += f" Also what Optimize Model had decided, of {forgotten} models."
        if bundles := artifact_cache.bundle_sizes():
            text += (f" {len(bundles)} bundles, {sum(bundles.values()) / 1e6:.1f} MB, stay: delete them by hand from the bundles folder of "
                     "the compile cache.")
        if others := _others_kept():
            text += f" Also left: {', '.join(others)}."
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def _others_kept() -> list[str]:
    """What this pack keeps besides compiled code of models and bundles, if it is there; with its size where that matters."""
    files = {"the signing key": default_key_file(), "the list of trusted bundles": trusted_bundles.list_file(),
             "measured choices of kernels": cache_folder() / "choices.json"}
    folders = {"the library of CPU kernels": "native", "the compiler's own files": "inductor", "what cache_compile keeps": "methods"}
    sizes = {name: folder_size(cache_folder() / below) for name, below in folders.items()}
    return [*(name for name, path in files.items() if path.exists()),
            *(f"{name} ({size / 1e6:.1f} MB)" for name, size in sizes.items() if size)]


def _wait_for_builder():
    """With progress; the user can interrupt it."""
    cache = artifact_cache.get_cache()
    if cache is None:
        return
    progress = None

    def check(unfinished: int):
        nonlocal progress
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress = progress or comfy.utils.ProgressBar(unfinished)
        progress.update_absolute(max(0, progress.total - unfinished))
    cache.builder.wait(check)


def _entries_of(model, store: CacheStore) -> list[Path]:
    """What the model's compile nodes have loaded, and what was built for its block classes since."""
    reports = compile_model.reports(model)
    loaded = {tuple(artifact.rsplit(" ", 1)) for report in reports for artifact in report.artifacts}
    classes = {name for report in reports for name, _ in report.regions}
    cache = artifact_cache.get_cache()
    built = {folder for name, folder in cache.builder.built if name in classes} if cache else set()
    return [folder for folder in store.own() if folder in built
            or any(folder.name == entry and folder.parents[2].name.startswith(f"{name}_") for name, entry in loaded)]


def _is_file_name(text: str, end: str = "") -> bool:
    """Whether it is a name that a file may have, with that end."""
    return bool(_FILE_NAME.fullmatch(text)) and len(text.encode()) <= MAX_NAME and not is_reserved(text + end)


def _path_of(bundle: str) -> Path:
    folder = artifact_cache.bundles()
    if not _is_file_name(bundle):
        raise ValueError(f"Load Compile Cache: '{echo(bundle)}' is not a file name. Put the file into the bundles folder of the compile "
                         "cache and enter its name, without a folder.")
    if not (folder / bundle).exists():
        raise ValueError(f"Load Compile Cache: there is no {echo(bundle)} in the bundles folder of the compile cache. "
                         f"There: {echo(', '.join(sorted(artifact_cache.bundle_sizes()))) or 'nothing'}.")
    return folder / bundle


def _require_trust(bundle: Bundle, trust: str):
    """trust says which file is meant; the server's list, which no prompt can write, says whether it may be loaded."""
    listed = bundle.digest in trusted_bundles.trusted()
    if listed and trust == bundle.digest:
        return
    entered = f"its digest is not '{echo(trust, 64)}', which was entered. " if trust and trust != bundle.digest else ""
    unknown = "" if listed else "it is not on this server's list of trusted bundles. "
    raise ValueError(f"Load Compile Cache: {echo(bundle.path.name)} holds code that would run here with your rights; {unknown}{entered}"
                     f"it was not loaded. It holds ({bundle.size / 1e6:.1f} MB):\n{bundle.contents()}\n"
                     f"Its digest is {bundle.digest}. If Save Compile Cache showed it where the file was made, enter it as trust, all of "
                     "it, and have it put on the list, in this pack's folder on the server: python -m trust DIGEST")
