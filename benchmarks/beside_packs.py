"""Other packs' nodes on the MODEL line together with ours, run: each pack of a folder in a ComfyUI server of its own, then all at once.

    python benchmarks/beside_packs.py --packs FOLDER [--only KJNodes ...] [--nodes GLOB ...] [--families flux sd15] [--kept] [--json FILE]

FOLDER holds packs as ComfyUI's custom_nodes does. Every node of theirs that takes a MODEL and gives one, and whose other inputs have
defaults, is tried with tiny models: alone (what does not run so is named), before INT8 Lazy Torch Compile, behind it, with INT8 layers
before both (compiled by aot_eager, which computes what eager does: inductor's last bits move INT8's roundings); then with its first
strength changed. Each latent is compared with that of the same nodes without the compile node. A table comes out: differences, graphs that
each of these compiled, what the node said; with --kept also whether a restart compiles nothing.
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import fnmatch
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import ComfyServer, PromptRejected, RunResult, find_comfyui, load_latent, relative_difference  # noqa: E402
from benchmarks.tiny_models import DEFAULT_NAMES, cache_dir, make_models  # noqa: E402
from benchmarks.workflows import flux_prompt, reports, sampled_again, sd15_prompt, wan_prompt  # noqa: E402

PROMPTS = {"flux": flux_prompt, "sd15": sd15_prompt, "wan": wan_prompt}
COMPILE, EXACT, QUANTIZE = "INT8LazyTorchCompile", "CompileModel", "INT8QuantizeModel"
SAME = 1e-3  # relative difference
BUILD_SECONDS = 120
WIDGETS = ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO")


@dataclass
class Row:
    """One node of a pack in one family. difference: of the latent to that without the compile node, by what came before what. graphs: that
    were compiled, by the same. said: what the compile node's report warned of."""

    pack: str
    commit: str
    node: str
    family: str
    error: str = ""  # of the node alone: nothing else is tried
    difference: dict[str, float] = field(default_factory=dict)
    graphs: dict[str, int] = field(default_factory=dict)
    kept: str = ""
    said: list[str] = field(default_factory=list)
    int8_noise: float = 0.0  # what INT8 costs without the compile node

    @property
    def is_right(self) -> bool:
        return not self.error and all(value <= max(SAME, self.int8_noise * (name == "INT8")) for name, value in self.difference.items())


def packs_in(folder: Path, only: list[str]) -> dict[str, Path]:
    found = {path.name: path for path in sorted(folder.iterdir()) if (path / "__init__.py").is_file()}
    return {name: path for name, path in found.items() if not only or any(each.lower() in name.lower() for each in only)}


def commit_of(pack: Path) -> str:
    done = subprocess.run(["git", "-C", str(pack), "log", "-1", "--format=%h %cs"], capture_output=True, text=True)
    return done.stdout.strip() or "?"


def nodes_of(server: ComfyServer, pack: str) -> dict[str, dict]:
    """{id: inputs beside the model} of the pack's nodes that can be put between a loader and a sampler."""
    found = {}
    for name, info in server.object_info().items():
        if info.get("python_module") != f"custom_nodes.{pack}" or (info.get("output") or [None])[0] != "MODEL":
            continue
        required = info["input"].get("required", {})
        if [spec[0] for spec in required.values()].count("MODEL") != 1 or required.get("model", [""])[0] != "MODEL":
            continue
        inputs = {key: value for key, spec in required.items() if key != "model" and (value := default_of(spec)) is not None}
        if inputs.keys() == required.keys() - {"model"}:
            found[name] = inputs
    return found


def default_of(spec: list):
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    choices = kind if isinstance(kind, list) else options.get("options", [])
    if isinstance(kind, list) or kind == "COMBO":
        return options.get("default", choices[0] if choices else None)
    return options.get("default", {"BOOLEAN": False, "STRING": ""}.get(kind)) if kind in WIDGETS else None


def other_strength(server: ComfyServer, node: str, inputs: dict) -> dict | None:
    """inputs with the first number that is no whole one moved a little; None where there is none."""
    for name, spec in server.object_info(node)["input"]["required"].items():
        if spec[0] == "FLOAT" and name in inputs:
            low, high = spec[1].get("min", 0.0), spec[1].get("max", 1.0)
            value = inputs[name] * 0.9 if inputs[name] else min(0.1, high)
            return {**inputs, name: max(low, value)} if max(low, value) != inputs[name] else None
    return None


class Tries:
    def __init__(self, server: ComfyServer, family: str):
        self.server = server
        self.family = family
        self.number = 0
        self.graphs: dict[str, int] = {}  # of the loaded model, by compile node

    def run(self, nodes: list[tuple[str, dict]]) -> RunResult:
        """RuntimeError with its message where the prompt fails."""
        self.number += 1
        prompt = PROMPTS[self.family](steps=2, cfg=3.0, model_nodes=[(node, dict(inputs)) for node, inputs in nodes])
        try:
            result = self.server.run(sampled_again(prompt, self.number))
        except PromptRejected as error:
            raise RuntimeError(str(error)) from None
        if result.status != "success":
            raise RuntimeError(result.failure)
        return result

    def latent(self, result: RunResult):
        return load_latent(next(path for path in result.files(self.server) if path.suffix == ".latent"))

    def fill(self, row: Row, inputs: dict) -> None:
        ours, quantize = (COMPILE, self.server.defaults(COMPILE)), (QUANTIZE, {**self.server.defaults(QUANTIZE), "method": "convrot"})
        exact = EXACT, {**self.server.defaults(EXACT), "backend": "aot_eager"}
        node = row.node, inputs
        try:
            want = self.latent(self.run([node]))
        except RuntimeError as error:
            row.error = _short(str(error))
            return
        other = other_strength(self.server, *node)
        try:
            self.compare(row, "before ours", [node, ours], want)
            self.compare(row, "behind ours", [ours, node], want)
            if other is not None:
                try:
                    changed = self.latent(self.run([(row.node, other)]))
                except RuntimeError as error:
                    row.said.append(f"alone with another strength: {_short(str(error))}")
                else:
                    self.compare(row, "another strength", [(row.node, other), ours], changed)
            int8 = self.latent(self.run([quantize, node]))
            row.int8_noise = relative_difference(int8, want)
            self.compare(row, "INT8", [quantize, node, exact], int8)
        except (RuntimeError, TimeoutError) as error:
            row.said.append(f"FAILED: {_short(str(error))}")
            row.difference["failed"] = float("inf")

    def compare(self, row: Row, order: str, nodes: list, want) -> None:
        result = self.run(nodes)
        details = _details(result)
        ours = next(node for node, _ in nodes if node in (COMPILE, EXACT))
        before, now = self.graphs.get(ours, 0), details["graphs"]
        self.graphs[ours] = now
        row.graphs[order] = now - (before if before <= now else 0)  # fewer: another life of the model
        row.difference[order] = relative_difference(self.latent(result), want)
        if order != "INT8" and row.difference[order] > SAME:  # some nodes patch what they have patched, while the model is loaded
            self.server.free()
            if "unet" in (result := self.run(nodes)).cached_nodes:  # ComfyUI frees when it has nothing to do
                result = self.run(nodes)
            difference = relative_difference(self.latent(result), want)
            row.said.append(f"{order}: {row.difference[order]:.0e}, and {difference:.0e} once the model was loaded anew")
            row.difference[order] = difference
        row.said += [text for text in (details["failure"], *details["fallbacks"]) if text and text not in row.said]


def _details(result: RunResult) -> dict:
    return reports(result.outputs)[-1]["details"]


def _short(text: str) -> str:
    return text.strip().partition("\n")[0][:160]


@contextlib.contextmanager
def serving(options, work: Path, packs: dict[str, Path]) -> Iterator[ComfyServer]:
    env = {"INT8_COMPILE_CACHE": "1", "INT8_COMPILE_CACHE_DIR": str(work / "cache"),
           "INT8_COMPILE_CACHE_KEY_FILE": str(work / "keys" / "key")}
    with ComfyServer(options.comfyui, work / "base", models=options.models, extra_packs=packs, env=env) as server:
        yield server


def rows_of(options, pack: str, path: Path) -> Iterator[Row]:
    commit = commit_of(path)
    with tempfile.TemporaryDirectory() as folder, serving(options, Path(folder), {pack: path}) as server:
        nodes = {name: inputs for name, inputs in nodes_of(server, pack).items()
                 if any(fnmatch.fnmatch(name, each) for each in options.nodes)}
        if not nodes:
            why = next((line for line in server.log_text().splitlines() if "Cannot import" in line and pack in line), "")
            why = why.partition("module for custom nodes: ")[2]
            yield Row(pack, commit, "-", "-", why or "none of its nodes is of this kind")
        tries = {family: Tries(server, family) for family in options.families}
        for name, inputs in nodes.items():
            for family in options.families:
                row = Row(pack, commit, name, family)
                tries[family].fill(row, inputs)
                yield row


def kept(options, row: Row, path: Path) -> str:
    """Whether the next start compiles nothing."""
    with tempfile.TemporaryDirectory() as folder:
        for start in range(2):
            with serving(options, Path(folder), {row.pack: path}) as server:
                nodes = [(row.node, nodes_of(server, row.pack)[row.node]), (COMPILE, server.defaults(COMPILE))]
                details = _details(Tries(server, row.family).run(nodes))
                if start:
                    return "yes" if not details["graphs"] and not details["last_calls"].get("eager") else f"{details['graphs']} graphs"
                with contextlib.suppress(RuntimeError):
                    server.wait_for_builder(BUILD_SECONDS)
    return ""


def table(rows: list[Row]) -> str:
    orders = ("before ours", "behind ours", "another strength", "INT8")
    lines = ["| pack | node | family | " + " | ".join(orders) + " | kept | said |", "|" + "---|" * (len(orders) + 5)]
    for row in rows:
        cells = [f"{row.pack} {row.commit}", row.node, row.family,
                 *(f"{row.difference[order]:.0e}, {row.graphs[order]} graphs" if order in row.difference else "" for order in orders),
                 row.kept, f"alone: {row.error}" if row.error else "; ".join(map(_short, row.said))]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--packs", type=Path, required=True, help="a folder of packs")
    parser.add_argument("--only", nargs="+", default=[], help="parts of their names")
    parser.add_argument("--nodes", nargs="+", default=["*"], help="globs of node ids")
    parser.add_argument("--families", nargs="+", choices=PROMPTS, default=["flux", "sd15"])
    parser.add_argument("--kept", action="store_true", help="also restart, for each row")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.comfyui = find_comfyui()
    options.models = make_models(options.comfyui, cache_dir(), (*DEFAULT_NAMES, *({"sd15"} & {*options.families})))
    packs, rows = packs_in(options.packs, options.only), []
    for pack, path in packs.items():
        for row in rows_of(options, pack, path):
            if options.kept and row.is_right:
                row.kept = kept(options, row, path)
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
    if len(packs) > 1:
        with tempfile.TemporaryDirectory() as folder, serving(options, Path(folder), packs) as server:
            row = Row("all", f"{len(packs)} packs", "-", options.families[0])
            tries = Tries(server, row.family)
            want = tries.latent(tries.run([]))
            tries.compare(row, "before ours", [(COMPILE, server.defaults(COMPILE))], want)
            rows.append(row)
    print(f"\n{datetime.date.today()}, ComfyUI beside {', '.join(packs)}\n\n{table(rows)}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"date": datetime.date.today().isoformat(), "rows": list(map(asdict, rows))}, indent=1) + "\n")
    sys.exit(not all(row.is_right or row.error for row in rows))


if __name__ == "__main__":
    main()
