"""The search that a mode can have: measures step after step, can be interrupted and goes on from a file, and ends in a config."""
from __future__ import annotations

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

from ...int8.files.whole import writing_whole
from .errors import ModeConfigError
from .mode import Mode

logger = logging.getLogger(__name__)

ARGUMENTS = ("forward_loop", "checkpoint", "progress", "interrupt")
CHECKPOINT_VERSION = 1


class Searcher(ABC):
    """Subclass it for Mode.search_algorithm. model: what the mode will convert; a search leaves it as it is, its training flags too.

    forward_loop: calls the model, as forward_loop(model), with what is typical. checkpoint: the file that measurements are kept in.
    progress: called as progress(done, total). interrupt: called before each step, raises to stop; all that was measured is in the file.
    """

    @final
    def __init__(self, owner: str, model, config, forward_loop: Callable | None = None, checkpoint: str | os.PathLike | None = None,
                 progress: Callable[[int, int], None] | None = None, interrupt: Callable[[], None] | None = None):
        self.owner = owner
        self.model = model
        self.config = config
        self.forward_loop = forward_loop
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.progress = progress or (lambda done, total: None)
        self.interrupt = interrupt or (lambda: None)

    @abstractmethod
    def steps(self) -> list[str]:
        """Names of what is to be measured. Raises ModeConfigError where the search cannot be done."""

    @abstractmethod
    def identity(self, step: str) -> str:
        """Of what is measured in a step: a measurement in the file counts only while this is equal."""

    def before(self, steps: list[str]) -> None:  # noqa: B027 (most searches need none)
        """Once before the steps that are not in the file; not called where there are none."""

    @abstractmethod
    def measure(self, step: str):
        """The result of a step, as JSON values."""

    @abstractmethod
    def decide(self, results: Mapping[str, Any]):
        """The config with what was found; from the results of all steps only, so that it is the same after an interruption."""

    @final
    def search(self):
        """The config that decide gives."""
        steps = self.steps()
        known = self._load()
        identities = {step: self.identity(step) for step in steps}
        results = {step: known[step]["result"] for step in steps if known.get(step, {}).get("identity") == identities[step]}
        missing = [step for step in steps if step not in results]
        if results:
            logger.info("%s: %d of %d measurements come from %s", self.owner, len(results), len(steps), self.checkpoint)
        training = [(module, module.training) for module in self.model.modules()] if hasattr(self.model, "modules") else []
        try:
            if missing:
                self.interrupt()
                self.before(missing)
            for step in missing:
                self.interrupt()
                self.progress(len(results), len(steps))
                results[step] = self.measure(step)
                known[step] = {"identity": identities[step], "result": results[step]}
                self._save(known)
        finally:
            for module, flag in training:
                module.training = flag
        self.progress(len(steps), len(steps))
        return self.decide({step: results[step] for step in steps})

    def _load(self) -> dict[str, dict]:
        if self.checkpoint is None or not self.checkpoint.exists():
            return {}
        try:
            content = json.loads(self.checkpoint.read_text(encoding="utf-8"))
            if content["version"] == CHECKPOINT_VERSION and content["mode"] == self.owner:
                return {step: entry for step, entry in content["results"].items() if set(entry) == {"identity", "result"}}
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        logger.warning("%s: %s is no checkpoint of this search; everything is measured again.", self.owner, self.checkpoint)
        return {}

    def _save(self, known: dict[str, dict]) -> None:
        if self.checkpoint is None:
            return
        with writing_whole(self.checkpoint) as partial:
            partial.write_text(json.dumps({"version": CHECKPOINT_VERSION, "mode": self.owner, "results": known}), encoding="utf-8")


def run_search(mode: Mode, model, config, kwargs: Mapping):
    """The config that the mode's search finds; of kwargs, those that a search takes are used."""
    algorithm = mode.search_algorithm
    found = algorithm(mode.name, model, config, **{name: kwargs[name] for name in ARGUMENTS if name in kwargs}).search()
    if not isinstance(found, mode.config_class) or mode.needs_search(found):
        raise ModeConfigError(f"{mode}: its search must end in a {mode.config_class.__name__} that needs no search.")
    return found
