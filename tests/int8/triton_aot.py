"""Compiles every Triton kernel that ships for the architectures named, without a GPU; prints what each needs as JSON.

    python tests/int8/triton_aot.py 80 90 --every-quantizer 80

In a process of its own, because the tests' process has Triton in interpreter mode.
"""
from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
if "int8_compile" not in sys.modules:
    spec = importlib.util.spec_from_file_location("int8_compile", REPO / "__init__.py", submodule_search_locations=[str(REPO)])
    sys.modules["int8_compile"] = importlib.util.module_from_spec(spec)  # not executed: the kernels need nothing of it

import torch  # noqa: E402
import triton  # noqa: E402
from int8_compile.int8.kernels import triton_configs, triton_gemm, triton_gemm_jit, triton_quant  # noqa: E402
from int8_compile.int8.kernels.reference import ACTIVATIONS, Normed  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
HAS_GLUON = triton_gemm.has_gluon()
if HAS_GLUON:
    from int8_compile.int8.kernels import gluon_gemm
    from triton.experimental.gluon._runtime import GluonASTSource

MATRIX_INSTRUCTIONS = ("IGMMA", "IMMA", "HGMMA", "HMMA")
EPILOGUE = dict(s_ptr="*fp32", ws_ptr="*fp32", bias_ptr="*bf16", y_ptr="*bf16", M="i32", N="i32")


def compile_for(arch: int, kernel, types: dict, constants: dict, unaligned: tuple = ("M",), **options) -> dict:
    """What the kernel takes: registers and stack (bytes of spills) a thread, shared memory a program, seconds to compile; its matrix
    instructions; fused: multiply-adds but those that round, to an integer or to tf32; in_flight: how many products it leaves under way
    where it waits, by program order."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # As the launcher finds at run time for the sizes of models.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name][0] in "*i" and name not in unaligned}
    start = time.perf_counter()
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        usage, sass = (subprocess.run([CUOBJDUMP, flag, cubin], capture_output=True, text=True, check=True).stdout
                       for flag in ("-res-usage", "-sass"))
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage).group(1)) for what in ("REG", "STACK"))
    # The division of integers has a conversion that is no value's.
    return dict(registers=registers, stack=stack, shared=binary.metadata.shared, seconds=round(time.perf_counter() - start, 2),
                in_flight=[int(left, 16) for left in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\w+)", sass)],
                from_float=bool(re.search(r" F2I(?!\.FTZ\.U32\.TRUNC)", sass)),
                fused=len(re.findall(r" FFMA\S* (?!.*\b(?:12582912|8192)\b)", sass)),
                mma=[op for op in MATRIX_INSTRUCTIONS if f" {op}." in sass])


def gemm(arch: int, config, ragged: bool = False, plain: bool = False, fp32: bool = False, added: int = 0) -> dict:
    """One tile. fp32: the result is. ragged: N is a multiple of nothing, K not of the step. plain: one scale for all of W, no bias. added:
    see triton_gemm_jit."""
    constants = dict(SCALAR_WS=plain, HAS_BIAS=not plain, BM=config.bm, BN=config.bn, BK=config.bk, GROUP_M=triton_gemm.GROUP_M,
                     **(dict(ADDED=added) if added else dict(SPLIT_K=config.split_k)))
    options = dict(num_warps=config.warps, num_stages=config.stages)
    types = dict(EPILOGUE, K="i32", **(dict(y_ptr="*i32") if config.split_k > 1 else dict(y_ptr="*fp32") if fp32 else {}))
    if config.kernel in triton_configs.GLUON:
        types.update((name, f"tensordesc<i8[{rows}, {config.bk}],{gluon_gemm.layout(rows, config.bk)!r}>")
                     for name, rows in (("q_desc", config.bm), ("w_desc", config.bn)))
        constants["STAGES"] = config.stages
        options = gluon_gemm.options(config)
        constants.pop("SPLIT_K", None)
        kernel = gluon_gemm.KERNELS[config.kernel, added > 0]
    elif config.kernel == "tma":
        types.update(q_desc=f"tensordesc<i8[{config.bm}, {config.bk}]>", w_desc=f"tensordesc<i8[{config.bn}, {config.bk}]>")
        kernel = triton_gemm_jit.adding_tma_kernel if added else triton_gemm_jit.tma_kernel
    else:
        types.update(q_ptr="*i8", w_ptr="*i8")
        constants.update(EVEN_K=not ragged)
        kernel = triton_gemm_jit.adding_pointer_kernel if added else triton_gemm_jit.pointer_kernel
    if added:
        types.update(residual_ptr=types["y_ptr"], gate_ptr=types["y_ptr"], gate_stride="i32", gate_rows="i32")
    return compile_for(arch, kernel, types, constants, ("M", "N", "gate_rows") if ragged else ("M", "gate_rows"), **options)


def gemms(arch: int) -> dict[str, dict]:
    """All tiles; those for ragged shapes; the largest of each kernel once more split and without bias."""
    found = {str(config): gemm(arch, config) for tma in (True, False) for config in triton_configs.tiles(arch, tma, gluon=HAS_GLUON)}
    found.update((f"{config} ragged", gemm(arch, config, ragged=True)) for config in triton_configs.tiles(arch, ragged=True))
    # A wider result takes more shared memory on its way out.
    found.update((f"{config} fp32", gemm(arch, config, fp32=True)) for config in triton_configs.tiles(arch, gluon=HAS_GLUON))
    for kernel in ("pointer", "tma", *triton_configs.GLUON):
        for config in [config for config in triton_configs.tiles(arch, gluon=HAS_GLUON) if config.kernel == kernel][:1]:
            found[f"{config} plain"] = gemm(arch, config, plain=True)
            if kernel not in triton_configs.GLUON:
                found[f"{config._replace(split_k=4)}"] = gemm(arch, config._replace(split_k=4))
    # What multiplies the layers that end a block of Flux, Wan and Z-Image; the largest of them once more with a gate a row.
    first = {triton_configs.configs(arch, m, n, k, gluon=HAS_GLUON)[0]._replace(split_k=1)
             for n, k in ((3072, 3072), (3072, 12288), (5120, 13824), (3840, 10240)) for m in (1024, 4096, 16384)}
    first = sorted(first, key=lambda config: -config.bm * config.bn)
    for config, kind in (*((config, triton_gemm_jit.GATED_TILES) for config in first), (first[0], triton_gemm_jit.GATED_ROWS)):
        found[f"{config} added {kind.value}"] = gemm(arch, config, added=kind.value)
    for name, split in (("sum", 4), ("epilogue of torch._int_mm", 1)):
        constants = dict(SCALAR_WS=False, HAS_BIAS=True, SPLIT_K=split, BM=triton_gemm.SUM_BM, BN=triton_gemm.SUM_BN)
        found[name] = compile_for(arch, triton_gemm_jit.sum_kernel, dict(EPILOGUE, parts_ptr="*i32"), constants, num_warps=4, num_stages=1)
    return found


def quantizer(arch: int, k: int, act: int, group: int, smooth: bool, x_type: str, precision: str) -> dict:
    kernel, blocks, warps = triton_quant.launch(k, group, precision)
    types = dict(x_ptr=f"*{x_type}", smooth_ptr="*fp32", h_ptr="*fp32", q_ptr="*i8", s_ptr="*fp32", stride="i32", min_scale="fp32")
    constants = dict(K=k, ACT=act, SMOOTH=smooth, GROUP=group, PRECISION=precision, PTX=True, **blocks)
    return compile_for(arch, kernel, types, constants, ("M", "stride") if k % 16 else ("M",), num_warps=warps,
                       num_stages=triton_quant.STAGES)


def quantizers(arch: int, every: bool) -> dict[str, dict]:
    """Activation x group x smoothing x type of x: all of them only if asked for, else a few of each."""
    found = {}
    combinations = itertools.product(range(len(ACTIVATIONS)), (0, 16, 64, 256), (False, True))
    for i, (act, group, smooth) in enumerate(combinations):
        if not every and i % 5:
            continue
        if smooth and not group:  # a row whose bytes are not neighbours in a thread, see _store_int8
            found[f"quant fp32 255 {ACTIVATIONS[act]} group 0 smooth"] = quantizer(arch, 255, act, 0, True, "fp32", "tf32x3")
        for x_type, precision in (("bf16", "tf32"), ("fp32", "tf32x3"))[:1 + (group > 0 and smooth)]:
            # Those of Flux; the longest that stay in registers; longer ones.
            k = (3072, triton_quant.MAX_ROW[precision], 28672)[i % 3]
            found[f"quant {x_type} {k} {ACTIVATIONS[act]} group {group}{' smooth' * smooth}"] = quantizer(arch, k, act, group, smooth,
                                                                                                          x_type, precision)
    return found


def norm_quantizer(arch: int, k: int, steps: int, group: int = 0) -> dict:
    """Of bf16 x, with the steps of a norm that are given in bf16."""
    kernel, blocks, warps = triton_quant.launch(k, group, "tf32", normed=True)
    types = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "factor_ptr", "shift_ptr"), "*bf16")
    types.update((name, "*fp32") for name in ("mean_ptr", "rstd_ptr", "smooth_ptr", "h_ptr", "s_ptr"))
    types.update((name, "i32") for name in ("stride", "factor_stride", "factor_rows", "shift_stride", "shift_rows"))
    types.update(q_ptr="*i8", min_scale="fp32")
    constants = dict(K=k, STEPS=steps, SMOOTH=False, GROUP=group, PRECISION="tf32", PTX=True, **blocks)
    return compile_for(arch, kernel, types, constants, ("factor_rows", "shift_rows"), num_warps=warps, num_stages=triton_quant.STAGES,
                       **triton_quant.EXACT)


def norm_quantizers(arch: int) -> dict[str, dict]:
    """Of Flux, Wan and Z-Image, the last with all steps; the longest that stay in registers."""
    one = torch.ones(1)
    adaptive = triton_quant.steps(Normed(mean=one, rstd=one, factor=one, shift=one, plus_one=True))
    every = triton_quant.steps(Normed(*6 * (one,), plus_one=True))
    kinds = (3072, adaptive, 256), (5120, adaptive, 0), (3840, every, 256), (triton_quant.MAX_ROW["tf32"], every, 0)
    kinds = kinds if arch in (80, 90) else kinds[:3]
    return {f"quant after a norm {k} steps {steps} group {group}": norm_quantizer(arch, k, steps, group) for k, steps, group in kinds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=int, nargs="+")
    parser.add_argument("--every-quantizer", type=int, nargs="*", default=(), help="architectures that get all of them")
    args = parser.parse_args()
    print(json.dumps({arch: {**gemms(arch), **quantizers(arch, arch in args.every_quantizer), **norm_quantizers(arch)}
                      for arch in args.arch}))
