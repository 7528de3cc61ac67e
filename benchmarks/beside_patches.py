"""IPAdapter, ControlNets and ComfyUI's own patches on SD1.5, in one server and one after the other: how many graphs each compiles, and
whether the image is that of the same prompt without the compile node.

    python benchmarks/beside_patches.py --packs FOLDER [--node INT8LazyTorchCompile] [--backend inductor] [--json FILE]

FOLDER holds ComfyUI_IPAdapter_plus and ComfyUI-Advanced-ControlNet. Small random models are made for both: an adapter for the two
attentions of the small SD1.5 that IPAdapter finds, image embeddings (no CLIP vision), a ControlNet.
"""
from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.beside_packs import commit_of, default_of, packs_in  # noqa: E402
from benchmarks.comfy_server import ComfyServer, find_comfyui, find_python, load_latent, relative_difference  # noqa: E402
from benchmarks.tiny_models import DEFAULT_NAMES, cache_dir, make_models  # noqa: E402
from benchmarks.workflows import reports, sd15_prompt  # noqa: E402

PACKS = ("ComfyUI_IPAdapter_plus", "ComfyUI-Advanced-ControlNet")
# (what is said, IPAdapter's weight and picture or None, ControlNet's node and strength or None, further arguments of the prompt;
# patch: a node of ComfyUI's and its inputs)
CONTROLNET, ADVANCED = "ControlNetApplyAdvanced", "ACN_AdvancedControlNetApply_v2"
IMAGES = (
    ("plain", None, None, {}),
    ("IPAdapter", (1.0, "a"), None, {}),
    ("another weight", (0.5, "a"), None, {}),
    ("another picture", (0.5, "b"), None, {}),
    ("another size", (0.5, "b"), None, {"width": 192}),
    ("off", None, None, {}),
    ("ControlNet", None, (CONTROLNET, 1.0), {}),
    ("another strength", None, (CONTROLNET, 0.4), {}),
    ("Advanced-ControlNet", None, (ADVANCED, 1.0), {}),
    ("its other strength", None, (ADVANCED, 0.4), {}),
    ("both", (1.0, "a"), (ADVANCED, 0.4), {}),
    ("both, other values", (0.7, "b"), (ADVANCED, 0.8), {}),
    ("CFG 1", (0.7, "b"), (ADVANCED, 0.8), {"cfg": 1.0}),
    ("both off", None, None, {}),
    ("IPAdapter again", (0.9, "a"), None, {}),
    *((name, None, None, {"patch": patch}) for name, patch in (
        ("PAG", ("PerturbedAttentionGuidance", {"scale": 3.0})), ("PAG, another scale", ("PerturbedAttentionGuidance", {"scale": 5.0})),
        ("SAG", ("SelfAttentionGuidance", {})), ("SAG, another scale", ("SelfAttentionGuidance", {"scale": 0.9})),
        ("FreeU", ("FreeU_V2", {})), ("FreeU, another b1", ("FreeU_V2", {"b1": 1.1})),
        ("HyperTile", ("HyperTile", {})), ("HyperTile, another size", ("HyperTile", {"tile_size": 128})),
        ("ToMe", ("TomePatchModel", {})), ("ToMe, another ratio", ("TomePatchModel", {"ratio": 0.5})))),
    ("all off", None, None, {}),
    ("PAG again", None, None, {"patch": ("PerturbedAttentionGuidance", {"scale": 3.0})}),
    ("PAG, another size", None, None, {"patch": ("PerturbedAttentionGuidance", {"scale": 3.0}), "width": 192}),
)
MAKE = """
import sys
from pathlib import Path
from comfy.cli_args import args
args.cpu = True
import comfy.cldm.cldm, comfy.ops, torch
from safetensors.torch import save_file
from benchmarks import tiny_models
base = Path(sys.argv[1])
for folder in ("controlnet", "ipadapter"):
    (base / "models" / folder).mkdir(parents=True, exist_ok=True)
(base / "input").mkdir(exist_ok=True)
net = comfy.cldm.cldm.ControlNet(
    image_size=32, in_channels=4, model_channels=320, hint_channels=3, num_res_blocks=[1], channel_mult=[1], num_heads=8,
    use_spatial_transformer=True, transformer_depth=[1], transformer_depth_middle=1, context_dim=768, legacy=False, dtype=torch.float32,
    device="cpu", operations=comfy.ops.disable_weight_init)
weights = tiny_models.fill(net, 21).state_dict()
save_file({f"control_model.{name}": weight.contiguous() for name, weight in weights.items()}, base / "models/controlnet/tiny.safetensors")
torch.manual_seed(22)
adapter = {f"ip_adapter.{2 * n + 1}.to_{part}_ip.weight": torch.randn(320, 768) * 0.1 for n in range(16) for part in "kv"}
adapter |= {"image_proj.proj.weight": torch.randn(4 * 768, 1024) * 0.03, "image_proj.proj.bias": torch.zeros(4 * 768),
            "image_proj.norm.weight": torch.ones(768), "image_proj.norm.bias": torch.zeros(768)}
save_file(adapter, base / "models/ipadapter/tiny.safetensors")
for name in "ab":
    torch.save(torch.randn(1, 1024), base / "input" / f"{name}.ipadpt")
torch.save(torch.zeros(1, 1024), base / "input" / "none.ipadpt")
"""


def prompt(server: ComfyServer, adapter, control, arguments: dict, compile_node: tuple[str, dict] | None) -> dict:
    arguments = {**arguments}
    patch = arguments.pop("patch", None)
    made = sd15_prompt(**arguments)

    def node(name, kind, **inputs):
        specs = server.object_info(kind)["input"]["required"]
        defaults = {key: default_of(spec) for key, spec in specs.items() if key not in inputs}
        made[name] = {"class_type": kind, "inputs": {**defaults, **inputs}}
        return [name, 0]
    model = made["sampler"]["inputs"]["model"]
    if adapter is not None:
        weight, picture = adapter
        model = node("adapted", "IPAdapterEmbeds", model=model, weight=weight, ipadapter=node("adapter", "IPAdapterModelLoader"),
                     pos_embed=node("embeds", "IPAdapterLoadEmbeds", embeds=f"{picture}.ipadpt"),
                     neg_embed=node("none", "IPAdapterLoadEmbeds", embeds="none.ipadpt"))
    if patch is not None:
        model = node("patched", patch[0], model=model, **patch[1])
    if compile_node is not None:
        kind, inputs = compile_node
        model = node("compiled", kind, model=model, **inputs)
    made["sampler"]["inputs"]["model"] = model
    if control is not None:
        kind, strength = control
        picture = node("picture", "EmptyImage", width=64, height=64, color=8323327)
        node("control", kind, positive=made["sampler"]["inputs"]["positive"], negative=made["sampler"]["inputs"]["negative"], image=picture,
             control_net=node("net", "ControlNetLoader"), strength=strength)
        made["sampler"]["inputs"].update(positive=["control", 0], negative=["control", 1])
    return made


def sampled(server: ComfyServer, made: dict):
    result = server.run(made, timeout=1800)
    if result.status != "success":
        raise RuntimeError(result.error)
    return load_latent(next(path for path in result.files(server) if path.suffix == ".latent")), reports(result.outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--packs", type=Path, required=True)
    parser.add_argument("--node", default="CompileModel", choices=("CompileModel", "INT8LazyTorchCompile"))
    parser.add_argument("--backend", default="aot_eager", choices=("aot_eager", "inductor"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--verbose", action="store_true", help="with each report's text")
    options = parser.parse_args()
    comfyui, packs = find_comfyui(), packs_in(options.packs, list(PACKS))
    if missing := [name for name in PACKS if name not in packs]:
        parser.error(f"{', '.join(missing)} not in {options.packs}")
    rows = []
    with tempfile.TemporaryDirectory() as work:
        base = Path(work) / "base"
        subprocess.run([find_python(comfyui), "-c", MAKE, str(base)], check=True, cwd=ROOT,
                       env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{comfyui}:{ROOT}"})
        models = make_models(comfyui, cache_dir(), (*DEFAULT_NAMES, "sd15"))
        with ComfyServer(comfyui, base, models=models, extra_packs=packs, env={"INT8_COMPILE_CACHE": "0"}) as server:
            compile_node = (options.node, {"backend": options.backend} if options.node == "CompileModel" else {})
            before, plain = 0, None
            for name, adapter, control, arguments in IMAGES:
                want, _ = sampled(server, prompt(server, adapter, control, arguments, None))
                got, said = sampled(server, prompt(server, adapter, control, arguments, compile_node))
                plain = want if plain is None else plain
                details = said[-1]["details"]
                effect = relative_difference(want, plain) if want.shape == plain.shape else float("nan")  # another size
                rows.append({"image": name, "difference": relative_difference(got, want), "effect": effect,
                             "graphs": details["graphs"] - before, "calls": details["last_calls"], "warnings": said[-1]["warnings"]})
                before = details["graphs"]
                row = rows[-1]
                print(f"{name:22} {row['difference']:.1e}  effect {effect:.2f}  graphs {row['graphs']}  "
                      f"{row['calls']}  {'; '.join(row['warnings'])[:150]}", flush=True)
                if options.verbose:
                    print(said[-1]["text"], flush=True)
    print(f"{before} graphs in all")
    if options.json:
        options.json.write_text(json.dumps({
            "date": datetime.date.today().isoformat(), "node": options.node, "backend": options.backend,
            "packs": {name: commit_of(path) for name, path in packs.items()}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
