"""GGUF models of ComfyUI-GGUF behind INT8 Lazy Torch Compile: what they compile, what is kept, and how far the image is from eager's.

    python benchmarks/beside_gguf.py --pack FOLDER/ComfyUI-GGUF [--types Q8_0 Q4_0 F16] [--families flux wan] [--json FILE]

Small random models are written as GGUF files (the package gguf, for this Python and ComfyUI's). Each is sampled without and with a LoRA,
with another strength, with another LoRA and without again: compiled in the process, then with background, then after a restart.
"""
from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.beside_packs import BUILD_SECONDS, COMPILE, SAME, commit_of  # noqa: E402
from benchmarks.comfy_server import ComfyServer, find_comfyui, load_latent, relative_difference  # noqa: E402
from benchmarks.tiny_models import cache_dir, make_models  # noqa: E402
from benchmarks.workflows import flux_prompt, reports, wan_prompt  # noqa: E402

PROMPTS = {"flux": flux_prompt, "wan": wan_prompt}
LORAS = {"flux": [("tiny_flux_a", 1.0), ("tiny_flux_a", 0.5), ("tiny_flux_b", 0.7)], "wan": [("tiny_wan_a", 1.0), ("tiny_wan_a", 0.5)]}
WAYS = "in the process", "background", "after a restart"


@dataclass
class Row:
    """One way to run one file. difference: the largest of all LoRAs' to eager. lora: the smallest that a LoRA makes. graphs: in all."""

    family: str
    type: str
    way: str
    difference: float
    lora: float
    graphs: int
    last: dict
    said: list[str]

    @property
    def is_right(self) -> bool:
        expected = self.graphs <= 2 if self.way == WAYS[0] else not self.graphs and set(self.last) == {"artifact"}
        return self.difference < SAME < self.lora and expected and not self.said


def write(source: Path, target: Path, family: str, kind: str) -> None:
    """Matrices of the model's blocks as kind, the rest in fp32, as those do who make such files."""
    import gguf
    from safetensors.torch import load_file

    target.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(target), arch=family)
    wanted, full = gguf.GGMLQuantizationType[kind], gguf.GGMLQuantizationType.F32
    for name, tensor in load_file(source).items():
        packed = tensor.ndim == 2 and min(tensor.shape) >= 128 and tensor.shape[1] % 256 == 0
        own = wanted if packed else full
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def row_of(server: ComfyServer, family: str, kind: str, way: str) -> Row:
    compiled = [(COMPILE, {**server.defaults(COMPILE), "background": way != WAYS[0]})]
    unet = "UnetLoaderGGUF", {"unet_name": f"{family}_{kind}.gguf"}
    if way == WAYS[1]:
        server.run(PROMPTS[family](unet=unet, width=64, height=64, steps=2, seed=2, model_nodes=compiled))
        server.wait_for_builder(BUILD_SECONDS)
    plain, differences, effects, said, details = None, [], [], [], {}
    for lora in (None, *LORAS[family], None):
        lora = lora and (f"{lora[0]}.safetensors", lora[1])
        seed = 1 if details else 3  # the last is not the first, which ComfyUI would not run again
        given = {"unet": unet, "width": 64, "height": 64, "steps": 2, "seed": seed, "lora": lora}
        latents = []
        for nodes in ([], compiled):
            result = server.run(PROMPTS[family](**given, model_nodes=nodes))
            if result.status != "success":
                raise SystemExit(f"{family} {kind}: {result.error}")
            latents.append(load_latent(next(path for path in result.files(server) if path.suffix == ".latent")))
        report = reports(result.outputs)[-1]
        details, said = report["details"], [*said, *report["warnings"]]
        differences.append(relative_difference(latents[1], latents[0]))
        if seed == 1 and plain is None:
            plain = load_latent(next(path for path in server.run(PROMPTS[family](**{**given, "lora": None})).files(server)
                                     if path.suffix == ".latent"))
        if lora:
            effects.append(relative_difference(latents[0], plain))
    last = {name: count for name, count in details["last_calls"].items() if count}
    return Row(family, kind, way, max(differences), min(effects), details["graphs"], last, list(dict.fromkeys(said)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True, help="ComfyUI-GGUF's folder")
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_0", "F16"])
    parser.add_argument("--families", nargs="+", choices=PROMPTS, default=["flux"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    comfyui, rows = find_comfyui(), []
    if comfyui is None:
        raise SystemExit("ComfyUI was not found: set COMFYUI_PATH to its folder")
    models = make_models(comfyui, cache_dir())
    for family in options.families:
        for kind in options.types:
            with tempfile.TemporaryDirectory() as folder:
                base = Path(folder) / "base"
                write(models / "models" / "diffusion_models" / f"tiny_{family}.safetensors",
                      base / "models" / "diffusion_models" / f"{family}_{kind}.gguf", family, kind)
                environment = {"INT8_COMPILE_CACHE": "1", "INT8_COMPILE_CACHE_DIR": str(Path(folder) / "cache"),
                               "INT8_COMPILE_CACHE_KEY_FILE": str(Path(folder) / "keys" / "key")}
                for way in WAYS:
                    own = {"INT8_COMPILE_CACHE": "0"} if way == WAYS[0] else environment
                    with ComfyServer(comfyui, base, models=models, extra_packs={"ComfyUI-GGUF": options.pack}, env=own) as server:
                        rows.append(row_of(server, family, kind, way))
                    sys.stdout.write(f"{'right' if rows[-1].is_right else 'WRONG'}: {asdict(rows[-1])}\n")
                    sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps({"date": str(datetime.date.today()), "commit": commit_of(ROOT).split()[0],
                                            "pack": commit_of(options.pack), "rows": list(map(asdict, rows))}, indent=1) + "\n")
    raise SystemExit(not all(row.is_right for row in rows))


if __name__ == "__main__":
    main()
