"""The modes of a ComfyUI MODEL: what the INT8 and compile nodes do, as modes of its ModelPatcher.

Every mode works on a clone, by object patches and wrappers; the model that came in keeps its weights.
"""
from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Literal

from comfy.patcher_extension import WrappersMP

from ...int8.echo import echo
from ...int8.hadamard import group_size
from ...int8.options import KERNELS, Int8Options
from ...int8.plan import LayerPlan
from ...int8.report import ProgressCallback, as_number, no_progress
from ..modes.compile import Compile, CompileConfig
from ..modes.convrot import ConvRot
from ..modes.errors import ApplyModeError, ModeConfigError
from ..modes.export import Export
from ..modes.int8 import Int8
from ..modes.layers import check_chosen, check_record
from ..modes.mode import Mode, NoConfig
from ..modes.record import METADATA_KEY
from ..modes.registry import ModeRegistry
from ..modes.smoothquant import SmoothQuant
from ..modes.state import ModeEntry, ModeState
from ..options import check_path
from ..report import CompileReport
from .compile_model import LazyCompile, add_compile, check_target, non_dynamic_clone
from .int8_calibrate import planned_layers, plans, put_and_tell, quantize_model
from .int8_layer import prefix_of
from .int8_model import adopt_native_layers, int8_layers, layers_to_quantize
from .object_patches import object_of

logger = logging.getLogger(__name__)

TITLE = "Apply Modes"
MODE_METHODS = Literal["float", "rowwise", "convrot", "smoothquant"]


@dataclass(frozen=True)
class PatcherCompileConfig(CompileConfig):
    """target: dotted path below the BaseModel of what is compiled."""

    target: str = "diffusion_model"

    def __post_init__(self):
        check_path(self.target)


class PatcherHost:
    """comfy.model_patcher.ModelPatcher: its record is an attachment, which its clones share."""

    def get_state(self, patcher) -> ModeState:
        """Compile is read off the wrappers that compile: so it always says what will run, whichever node added it, and a model that is
        only compiled has no attachment, for which ComfyUI would reload its weights (ModelPatcher.clone_has_same_weights)."""
        stored = patcher.get_attachment(METADATA_KEY) or ModeState()
        wrappers = [w for group in patcher.wrappers.get(WrappersMP.APPLY_MODEL, {}).values() for w in group if isinstance(w, LazyCompile)]
        compiled = [ModeEntry(Compile.name, PatcherCompileConfig.of(w.options, target=w.target), saved=False) for w in wrappers]
        return ModeState((*stored.entries, *compiled))

    def set_state(self, patcher, state: ModeState) -> None:
        entries = tuple(entry for entry in state if entry.name != Compile.name)
        if entries:
            patcher.set_attachments(METADATA_KEY, ModeState(entries))

    def clone(self, patcher):
        return patcher.clone()


# The modes of a ComfyUI MODEL. Another pack adds its own: see web/docs/ApplyModes.md.
PATCHER_MODES = ModeRegistry(PatcherHost())


@dataclass(frozen=True)
class PatcherSmoothQuantConfig:
    """where: "all" layers, or only those kinds where it measures "better" than rotation alone and than neither."""

    where: Literal["all", "better"] = "all"


@PATCHER_MODES.register
class PatcherSmoothQuant(SmoothQuant):
    """Takes effect with int8, which then measures the model's activations at its first sampling; layers are also rotated."""

    config_class = PatcherSmoothQuantConfig

    def convert(self, model, config, **_):
        return model, {}

    def update_for_restore(self, config, metadata):
        return config, check_record(metadata, self.name, NoConfig)

    def restore(self, model, config, metadata):
        raise ApplyModeError("smoothquant: its factors are in no file. Apply smoothquant and int8 to the float model again.")


@PATCHER_MODES.register
class PatcherConvRot(ConvRot):
    """Takes effect with int8: weights are rotated and quantized in one pass."""

    config_class = NoConfig

    def convert(self, model, config, **_):
        return model, {}

    def update_for_restore(self, config, metadata):
        return config, check_record(metadata, self.name, NoConfig)

    def restore(self, model, config, metadata):
        return model


@dataclass(frozen=True)
class PatcherInt8Config:
    """keep_layers, min_sqnr_db, kernel, max_mb, faster_only: see Int8Options. chosen: what was measured, (layer, method); None: not yet,
    or nothing to measure. Where it is given nothing is measured again."""

    keep_layers: tuple[str, ...] = ()
    min_sqnr_db: float = 0.0
    kernel: Literal[KERNELS] = "auto"  # type: ignore[valid-type]
    max_mb: float = 0.0
    faster_only: bool = False
    chosen: tuple[tuple[str, MODE_METHODS], ...] | None = None

    def __post_init__(self):
        self.to_options("convrot")  # its ValueErrors
        check_chosen(self.chosen)

    def to_options(self, method: str) -> Int8Options:
        return Int8Options(method, self.keep_layers, self.min_sqnr_db, self.kernel, self.max_mb, self.faster_only)


@dataclass(frozen=True)
class Int8Record:
    """Metadata of int8. layers: (name, ConvRot group or 0, whether it is smoothed) of each INT8 layer. waiting: layers that the first
    sampling will decide on. sqnr_db: what was measured of each layer, with its method."""

    layers: tuple[tuple[str, int, bool], ...] = ()
    waiting: int = 0
    sqnr_db: tuple[tuple[str, float], ...] = ()


@PATCHER_MODES.register
class PatcherInt8(Mode):
    """What INT8 Quantize Model does, by the method that the modes before say: smoothquant, convrot, or neither (rowwise)."""

    name = Int8.name
    config_class = PatcherInt8Config
    next_prohibited_modes = Int8.next_prohibited_modes
    export_mode = Int8.export_mode

    def convert(self, model, config, on_progress: ProgressCallback = no_progress, **_):
        """on_progress: see quantize_model."""
        if config.chosen is None:
            model = quantize_model(model, config.to_options(_method(model)), on_progress)
        else:
            put_and_tell(model, _chosen_plans(model, config), config.to_options(_method(model)), on_progress, ())
        return model, int8_metadata(model)

    def update_for_restore(self, config, metadata):
        """The kernel is this machine's choice, not the file's."""
        return dataclasses.replace(config, kernel="auto"), check_record(metadata, self.name, Int8Record)

    def restore(self, model, config, metadata):
        if not int8_layers(model):
            raise ApplyModeError("int8: its record is of INT8 weights, which this model does not have. Load the INT8 file that it is from.")
        return adopt_native_layers(model, config.kernel)

    def update_for_save(self, model, config, metadata):
        """With what the first sampling has found since. The kernel is this machine's choice."""
        chosen = tuple((plan.name, _method_of(_layers(model).get(plan.name))) for plan in plans(model)) or config.chosen
        return dataclasses.replace(config, kernel="auto", chosen=chosen), int8_metadata(model)


def _method(patcher) -> str:
    """The method of Int8Options that the modes of patcher since its last export ask for."""
    modes: dict[str, ModeEntry] = {}
    for entry in PATCHER_MODES.host.get_state(patcher):
        modes = {} if entry.name == Export.name else {**modes, entry.name: entry}
    if smoothing := modes.get(SmoothQuant.name):
        return "auto" if smoothing.config.where == "better" else "smoothquant"
    return "convrot" if ConvRot.name in modes else "rowwise"


def _chosen_plans(patcher, config: PatcherInt8Config) -> list[LayerPlan]:
    names = layers_to_quantize(patcher, config.to_options("convrot"))
    for name, method in config.chosen:
        if name not in names:
            raise ModeConfigError(f"int8: chosen names the layer '{echo(name)}', which is no float Linear layer of this model's blocks. "
                                  "Set chosen to null to measure again.")
        if method == "smoothquant":
            raise ModeConfigError(f"int8: chosen has smoothquant for '{echo(name)}', whose factors are in no record. Set chosen to null to "
                                  "measure again.")
    return [LayerPlan(name, method, reason="" if method != "float" else "as chosen before") for name, method in config.chosen]


def _layers(patcher) -> dict[str, tuple[int, bool]]:
    """{name: (ConvRot group, smoothed)}, those of a sampled clone's plan too."""
    layers = int8_layers(patcher)
    for plan in plans(patcher):
        if plan.method != "float" and plan.name not in layers:
            weight = object_of(patcher, f"{prefix_of(patcher)}{plan.name}.weight")
            layers[plan.name] = group_size(weight.shape[1]) if plan.rotate else 0, plan.pre_quant_scale is not None
    return layers


def _method_of(layer: tuple[int, bool] | None) -> str:
    if layer is None:
        return "float"
    group, smoothed = layer
    return "smoothquant" if smoothed else "convrot" if group else "rowwise"


def int8_metadata(patcher) -> dict:
    """The values of Int8Record that say something."""
    layers, planned = _layers(patcher), plans(patcher)
    waiting = 0 if planned else len([name for name in planned_layers(patcher) if name not in layers])
    measured = [[plan.name, as_number(plan.sqnr[plan.method])] for plan in planned if plan.method in plan.sqnr]
    return {"layers": [[name, group, smoothed] for name, (group, smoothed) in layers.items()],
            **({"waiting": waiting} if waiting else {}), **({"sqnr_db": measured} if measured else {})}


@dataclass(frozen=True)
class PatcherExportConfig:
    """filename_prefix: of the file, below ComfyUI's output folder; a counter is added. Empty: no file."""

    filename_prefix: str = "diffusion_models/int8"

    def __post_init__(self):
        check_path(self.filename_prefix, "filename_prefix")


@PATCHER_MODES.register
class PatcherExport(Export):
    """Layers become what ComfyUI's INT8 format can hold (smoothed ones are rotated only), and the file is written."""

    config_class = PatcherExportConfig

    def convert(self, model, config, **_):
        from .int8_checkpoint import native_model  # needs a core with native INT8; the compile modes do not
        return native_model(model), {}

    def update_for_restore(self, config, metadata):
        """A record says what the layers are, not where a file is to be written."""
        return dataclasses.replace(config, filename_prefix=""), check_record(metadata, self.name, NoConfig)

    def restore(self, model, config, metadata):
        return model

    def finish(self, model, config, **_):
        if config.filename_prefix:
            from .mode_records import save_model
            save_model(model, config.filename_prefix)


@PATCHER_MODES.register
class PatcherCompile(Compile):
    """What INT8 Lazy Torch Compile does."""

    config_class = PatcherCompileConfig

    def convert(self, model, config, on_progress=None, title=TITLE, judge=None, **_):
        """on_progress: see CompiledModule.run. title: of the node, for its messages. judge: see LazyCompile."""
        options = config.to_options(title)
        check_target(model, config.target)
        try:
            model = non_dynamic_clone(model, title)
        except RuntimeError as error:
            logger.warning("%s Compiling with dynamic VRAM: expect graph breaks.", error)
        if on_progress is not None:
            on_progress(CompileReport(title))
        add_compile(model, config.target, options, on_progress, judge)
        return model, {}
