"""A compiled INT8 block with norm, modulation, GELU, gate and residual inside the pack's operations, and with them beside (what inductor
makes of them by itself): seconds a call on this machine's CPU, in turns, in one run. Needs ComfyUI.

    python benchmarks/fused_blocks.py [--rounds 9] [--tokens 1024] [--json FILE]
"""
from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import find_comfyui  # noqa: E402
from benchmarks.demo_report import cpu_name  # noqa: E402
from benchmarks.tiny_models import fill  # noqa: E402
from benchmarks.wrapper_overhead import load_pack  # noqa: E402

TEXT = 256  # tokens
WIDTHS = 3072, 5120  # Flux's and Wan's
FEED_FORWARD = {3072: 14336, 5120: 13824}  # Wan's, of 5B and 14B


def flux_double(width: int, tokens: int):
    from comfy.ldm.flux.layers import DoubleStreamBlock

    block = DoubleStreamBlock(width, width // 128, 4.0, qkv_bias=True, dtype=torch.float32, device="cpu", operations=torch.nn)
    return block, lambda: dict(img=torch.randn(1, tokens, width), txt=torch.randn(1, TEXT, width), vec=torch.randn(1, width),
                               pe=torch.randn(1, 1, tokens + TEXT, 64, 2, 2), transformer_options={})


def flux_single(width: int, tokens: int):
    from comfy.ldm.flux.layers import SingleStreamBlock

    block = SingleStreamBlock(width, width // 128, 4.0, dtype=torch.float32, device="cpu", operations=torch.nn)
    return block, lambda: dict(x=torch.randn(1, tokens + TEXT, width), vec=torch.randn(1, width),
                               pe=torch.randn(1, 1, tokens + TEXT, 64, 2, 2), transformer_options={})


def wan(width: int, tokens: int):
    from comfy.ldm.wan.model import WanAttentionBlock

    block = WanAttentionBlock("t2v_cross_attn", width, FEED_FORWARD[width], width // 128, cross_attn_norm=True,
                              operation_settings=dict(operations=torch.nn, device="cpu", dtype=torch.float32))
    return block, lambda: dict(x=torch.randn(1, tokens, width), e=torch.randn(1, 6, width), freqs=torch.randn(1, tokens, 1, 64, 2, 2),
                               context=torch.randn(1, TEXT, width), transformer_options={})


BLOCKS = {"Flux, double": flux_double, "Flux, single": flux_single, "Wan": wan}


def compiled(block: torch.nn.Module, fused: bool):
    """(the block's forward, compiled; [quantizers with a norm, with a GELU, products that are added], filled in by its first call)"""
    from int8_compile.int8 import graph_pass

    count = [0, 0, 0]

    class Pass(graph_pass.Int8GraphPass):
        def __call__(self, graph):
            graph_pass.deduplicate_activation_quant(graph)
            if fused:
                count[:] = graph_pass.fused_graph.fuse(graph)

        def uuid(self):
            return super().uuid() + bytes([fused])
    torch._dynamo.reset()
    return torch.compile(block.forward, fullgraph=True, dynamic=False, options={"post_grad_custom_pre_pass": Pass()}), count


def measure(name: str, width: int, tokens: int, rounds: int) -> dict:
    from int8_compile.int8.linear import Int8Linear

    torch.manual_seed(0)
    block, inputs = BLOCKS[name](width, tokens)
    fill(block.requires_grad_(False).eval(), seed=1)
    for each, layer in list(block.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            block.set_submodule(each, Int8Linear.from_float(layer.weight, layer.bias, rotated=True))
    given = inputs()
    calls, results, counts = {}, {}, {}
    for way, fused in (("beside", False), ("inside", True)):
        calls[way], counts[way] = compiled(block, fused)
        results[way] = calls[way](**given)
    parts = [r if isinstance(r, tuple) else (r,) for r in results.values()]
    apart = max(float((a - b).norm() / a.norm()) for a, b in zip(*parts))
    seconds: dict[str, list[float]] = {way: [] for way in calls}
    for i in range(rounds):
        for way in (list(calls) if i % 2 else list(calls)[::-1]):
            start = time.perf_counter()
            calls[way](**given)
            seconds[way].append(time.perf_counter() - start)
    median = {way: statistics.median(times) for way, times in seconds.items()}
    gain = statistics.median(b / a for a, b in zip(seconds["inside"], seconds["beside"]))
    return {"block": name, "width": width, "tokens": tokens, "seconds": {way: round(t, 4) for way, t in median.items()},
            "gain": round(gain, 3), **dict(zip(("normed", "activated", "added"), counts["inside"])), "difference": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=1024, help="of the image")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(find_comfyui()))
    sys.argv = sys.argv[:1]
    import comfy.cli_args

    comfy.cli_args.args.cpu = comfy.cli_args.args.use_pytorch_cross_attention = True
    load_pack()
    found = []
    with torch.inference_mode():
        for width in args.widths:
            for name in BLOCKS:
                found.append(measure(name, width, args.tokens, args.rounds))
                print(found[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps({"date": str(datetime.date.today()), "device": cpu_name(), "threads": torch.get_num_threads(),
                                         "torch": torch.__version__, "blocks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
