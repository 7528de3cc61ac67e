"""Run as a program, by a user id that nobody knows: samples through each node that keeps something, and says what came of it."""
from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
from toys import difference  # noqa: E402

from benchmarks.comfy_server import find_comfyui  # noqa: E402
from benchmarks.wrapper_overhead import load_pack  # noqa: E402


def main(checkpoint: str):
    sys.path.insert(0, str(find_comfyui()))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True
    import comfy.sample
    import comfy.sd

    load_pack()
    from int8_compile import nodes
    from int8_compile.compile.comfyui.artifact_cache import get_cache
    from int8_compile.compile.comfyui.compile_model import reports
    from int8_compile.int8.kernels import native

    def run(node, model, **inputs):
        defaults = {i.id: i.default for i in node.define_schema().inputs if i.id != "model"}
        return node.execute(model=model, **{**defaults, **inputs})[0]

    def sample(model):
        generator = torch.Generator().manual_seed(7)
        conds = [[[torch.randn(1, 20, 4096, generator=generator), {"pooled_output": torch.randn(1, 2048, generator=generator)}]]] * 2
        latent = torch.zeros(1, 16, 16, 16)
        return comfy.sample.sample(model, comfy.sample.prepare_noise(latent, 1), 2, 1.0, "euler", "simple", *conds, latent,
                                   disable_pbar=True, seed=1)

    model = comfy.sd.load_diffusion_model(checkpoint)
    eager = sample(model)
    quantized = run(nodes.INT8QuantizeModel, model)
    image = sample(quantized)
    compiled = {node.__name__: run(node, quantized) for node in (nodes.CompileModel, nodes.INT8LazyTorchCompile)}
    print(json.dumps({"int8": difference(image, eager), "native": native.library() is not None, "cache": get_cache() is not None,
                      "compiled": {name: difference(sample(model), image) for name, model in compiled.items()},
                      "status": {name: [report.status() for report in reports(model)] for name, model in compiled.items()}}))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    with torch.inference_mode():
        main(sys.argv[1])
