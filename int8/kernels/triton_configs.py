"""Tiles of the INT8 GEMM per architecture, ordered for a shape by the time that a model of waves predicts. No Triton here.

The model is continuous in m, so neighbouring sizes get neighbouring tiles; it orders candidates, and a measurement may choose another.
"""
from __future__ import annotations

import functools
from typing import NamedTuple


class GemmConfig(NamedTuple):
    """kernel: "pointer", "tma" or one of GLUON. bm, bn: the tile of y; bk: the step along K. split_k: programs that share a tile, each a
    part of K."""
    kernel: str
    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    split_k: int = 1

    def __str__(self) -> str:
        return f"{self.kernel} {self.bm}x{self.bn}x{self.bk} warps {self.warps} stages {self.stages} split {self.split_k}"


class Architecture(NamedTuple):
    """shared: bytes of shared memory a program may take (CUDA programming guide). sms: of the usual card. macs: dense INT8 multiply-adds
    a cycle and SM (vendors' peak figures / clock / SMs). l2: bytes a cycle and SM from the L2 cache, about; only the order of tiles
    depends on it."""
    shared: int
    sms: int
    macs: int
    l2: int


ARCHITECTURES = {
    0: Architecture(64 << 10, 304, 2048, 32),  # AMD: MI300X
    80: Architecture(163 << 10, 108, 2048, 48),
    86: Architecture(99 << 10, 82, 1024, 20),
    89: Architecture(99 << 10, 128, 1024, 16),
    90: Architecture(227 << 10, 132, 4096, 32),
    120: Architecture(99 << 10, 170, 1024, 16),
}
# Those without a line of their own; any other is treated as the one that has least of everything.
ALIASES = {87: 80, 100: 80, 103: 80, 110: 80, 121: 120}
FALLBACK_ARCH = 86

# (bm, bn, bk, warps, stages); none spills on any of these cards with Triton 3.6 to 3.9 (tests/int8/test_triton_compiles.py).
POINTER_TILES = (
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 4),
    (128, 128, 128, 8, 3),
    (128, 128, 64, 4, 4),
    (64, 256, 64, 4, 4),
    (64, 128, 128, 4, 3),
    (128, 64, 128, 4, 3),
    (64, 64, 128, 4, 4),
    (32, 128, 128, 4, 4),
    (32, 64, 128, 4, 4),
    (16, 128, 128, 4, 4),
    (16, 64, 256, 4, 3),
)
# sm_90. wgmma takes 64 rows and a warp group of 4 warps. Triton (3.6 and 3.9) waits for each INT8 product before the next step along K: of
# steps twice as long there are half as many, and two programs of 4 warps fill each other's waits where an SM has room for both.
TMA_TILES = (
    (128, 256, 128, 8, 4),
    (128, 256, 256, 8, 2),
    (256, 128, 128, 8, 4),
    (128, 128, 128, 8, 4),
    (128, 128, 256, 8, 3),
    (128, 128, 128, 4, 4),
    (128, 128, 128, 4, 3),
    (64, 256, 128, 4, 4),
    (64, 128, 128, 4, 4),
)
# sm_90, the kernels of gluon_gemm, which leave a product under way: its threads load, or a warp more does. Never split.
GLUON = ("gluon", "gluon_specialized")
GLUON_TILES = (
    ("gluon", 128, 256, 128, 8, 4),
    ("gluon", 256, 128, 128, 8, 4),
    ("gluon", 128, 128, 128, 8, 4),
    ("gluon", 128, 128, 128, 4, 3),
    ("gluon", 64, 256, 128, 4, 4),
    ("gluon", 64, 128, 128, 4, 4),
    ("gluon_specialized", 128, 256, 128, 8, 4),
    ("gluon_specialized", 256, 128, 128, 8, 4),
    ("gluon_specialized", 128, 128, 128, 4, 3),
)


class Speed(NamedTuple):
    """What a tile takes on an H100 SXM, in microseconds: in all, a step along K, a wave of programs. resident: programs on an SM."""
    fixed: float
    step: float
    wave: float
    resident: int


# Fitted to benchmarks/results/nvidia-h100-80gb-hbm3-2026-11-26.json, step tune (13 layers, 16 to 16384 rows): the tile that this predicts
# to be the fastest takes 1.7 % more than the one that is, at most 14 %; the model of waves that other cards go by, 16 % and 46 %.
HOPPER = {
    ("tma", 128, 256, 128, 8, 4): Speed(5.7, 0.781, 3.75, 1),
    ("tma", 128, 256, 256, 8, 2): Speed(6.7, 2.494, 2.20, 1),
    ("tma", 256, 128, 128, 8, 4): Speed(5.7, 0.779, 3.97, 1),
    ("tma", 128, 128, 128, 8, 4): Speed(6.0, 0.510, 1.97, 1),
    ("tma", 128, 128, 256, 8, 3): Speed(6.0, 0.947, 1.75, 1),
    ("tma", 128, 128, 128, 4, 4): Speed(6.0, 0.489, 2.10, 1),
    ("tma", 128, 128, 128, 4, 3): Speed(3.9, 0.748, 2.97, 2),
    ("tma", 64, 256, 128, 4, 4): Speed(6.2, 0.502, 2.11, 1),
    ("tma", 64, 128, 128, 4, 4): Speed(5.0, 0.478, 1.30, 2),
    ("gluon", 128, 256, 128, 8, 4): Speed(5.1, 0.628, 3.93, 1),
    ("gluon", 256, 128, 128, 8, 4): Speed(5.2, 0.640, 3.73, 1),
    ("gluon", 128, 128, 128, 8, 4): Speed(6.3, 0.398, 1.98, 1),
    ("gluon", 128, 128, 128, 4, 3): Speed(3.5, 0.689, 2.73, 2),
    ("gluon", 64, 256, 128, 4, 4): Speed(6.0, 0.403, 1.75, 1),
    ("gluon", 64, 128, 128, 4, 4): Speed(4.9, 0.471, 1.39, 2),
    ("gluon_specialized", 128, 256, 128, 8, 4): Speed(5.6, 0.632, 3.64, 1),
    ("gluon_specialized", 256, 128, 128, 8, 4): Speed(5.6, 0.643, 3.46, 1),
    ("gluon_specialized", 128, 128, 128, 4, 3): Speed(4.0, 0.700, 2.51, 2),
    ("pointer", 64, 128, 128, 4, 3): Speed(1.3, 0.763, 3.43, 3),
    ("pointer", 64, 64, 128, 4, 4): Speed(2.3, 0.535, 2.09, 3),
    ("pointer", 32, 128, 128, 4, 4): Speed(4.2, 0.509, 1.25, 2),
    ("pointer", 32, 64, 128, 4, 4): Speed(4.6, 0.542, 0.00, 4),
    ("pointer", 16, 128, 128, 4, 4): Speed(3.8, 0.687, 0.25, 3),
    ("pointer", 16, 64, 256, 4, 3): Speed(4.5, 0.864, 0.00, 3),
}
HOPPER_CLOCK = 1755  # cycles a microsecond
HOPPER_SPLIT = 6.0  # microseconds that summing the parts takes
SPLITS = (1, 2, 4, 8)
# What n is a multiple of for Triton to store whole vectors; of another n each value is stored by itself, which takes registers.
VECTOR_N = 16
MAX_SCALAR_STORES = 32  # a thread
# A program takes at least this much of K: less does not pay for summing the parts.
MIN_SPLIT_K = 512
# The part of the shorter of multiplying and loading that the longer does not hide, about.
NOT_OVERLAPPED = 0.25
# sm_90: shared memory of an SM, and what of it each program takes beside its own, bytes. No more than two programs have registers.
SM_SHARED, RESERVED, MAX_RESIDENT = 228 << 10, 1 << 10, 2
MAX_CANDIDATES = 12
# Cycles: first loads and last stores of a program; launch of the kernel that sums the parts of a split.
PROGRAM_OVERHEAD = 1500
LAUNCH = 4000


def like(arch: int) -> int:
    """The architecture of the table that arch (major * 10 + minor; 0 for AMD) runs."""
    return arch if arch in ARCHITECTURES else ALIASES.get(arch, FALLBACK_ARCH)


def tiles(arch: int, tma: bool = True, ragged: bool = False, gluon: bool = False) -> tuple[GemmConfig, ...]:
    """All tiles that arch may run, unsplit. tma: the operands are aligned as TMA needs them. ragged: n is no multiple of VECTOR_N. gluon:
    there is Gluon too."""
    shared = ARCHITECTURES[like(arch)].shared
    found = [GemmConfig("pointer", *tile) for tile in POINTER_TILES]
    found = [c for c in found if c.stages * (c.bm + c.bn) * c.bk <= shared]
    if arch == 90 and tma:
        found = [GemmConfig("tma", *tile) for tile in TMA_TILES] + [c for c in found if c.bm <= 64 and c.bn <= 128]
        found += [GemmConfig(*tile) for tile in GLUON_TILES if gluon]
    return tuple(c for c in found if not ragged or c.bm * c.bn <= MAX_SCALAR_STORES * 32 * c.warps)


def resident(config: GemmConfig) -> int:
    """Programs of a TMA or Gluon tile that one SM has room for: what each holds of q and w, and about a byte of each of its results."""
    shared = config.stages * (config.bm + config.bn) * config.bk + config.bm * config.bn + RESERVED
    return min(MAX_RESIDENT, SM_SHARED // shared) if config.warps == 4 else 1


def cycles(config: GemmConfig, arch: int, m: int, n: int, k: int, sms: int) -> float:
    """Predicted cycles of y [m, n] with k products each."""
    speed = HOPPER.get(config[:6]) if arch == 90 else None
    if speed is not None:
        waves = _cdiv(_cdiv(m, config.bm) * _cdiv(n, config.bn) * config.split_k, sms * speed.resident)
        steps = _cdiv(_cdiv(k, config.bk), config.split_k)
        return HOPPER_CLOCK * (speed.fixed + waves * (steps * speed.step + speed.wave) + HOPPER_SPLIT * (config.split_k > 1))
    card = ARCHITECTURES[like(arch)]
    waves = _cdiv(_cdiv(m, config.bm) * _cdiv(n, config.bn) * config.split_k, sms)
    steps = _cdiv(_cdiv(k, config.bk), config.split_k) * config.bk
    multiplying, loading = config.bm * config.bn / card.macs, (config.bm + config.bn) / card.l2
    one = max(multiplying, loading) + NOT_OVERLAPPED * min(multiplying, loading)
    total = waves * (steps * one + PROGRAM_OVERHEAD)
    if config.split_k > 1:
        total += LAUNCH + 2 * 4 * config.split_k * m * n / (card.l2 * sms)
    return total


@functools.lru_cache(4096)
def configs(arch: int, m: int, n: int, k: int, tma: bool = True, sms: int | None = None, gluon: bool = False) -> tuple[GemmConfig, ...]:
    """At most MAX_CANDIDATES (those of Gluon not counted) for y [m, n] = q [m, k] @ w [n, k].T, the one predicted fastest first.

    arch: compute capability as major * 10 + minor. sms: multiprocessors of the card, the usual number if None. Each tile appears once, with
    the split of K that suits it.
    """
    sms = sms or ARCHITECTURES[like(arch)].sms
    m = max(m, 1)

    def predicted(config: GemmConfig) -> float:
        return cycles(config, arch, m, n, k, sms)

    def split(tile: GemmConfig) -> GemmConfig:
        """tile with the split that suits it: one that spreads what is less than two waves, in parts that pay for their sum."""
        few = 2 * sms // (_cdiv(m, tile.bm) * _cdiv(n, tile.bn))
        return min((tile._replace(split_k=parts) for parts in SPLITS if parts == 1 or parts <= min(few, k // MIN_SPLIT_K)), key=predicted)

    # A tile of many more rows than there are does nothing that a smaller one does not.
    fitting = [split(tile) for tile in tiles(arch, tma, n % VECTOR_N != 0, gluon) if tile.bm < 4 * max(m, 8)]
    found = sorted((config for config in fitting if config.kernel not in GLUON), key=predicted)[:MAX_CANDIDATES]
    more = [config for config in fitting if config.kernel in GLUON and config.split_k == 1]
    # Among equals the first stays first. The last of all is what runs where nothing else can: never one of Gluon.
    return (*sorted(found[:-1] + more, key=predicted), *found[-1:])


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
