"""What a card can do at most, and from it the least time that a layer can take: the floor that measurements are read against."""
from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """Dense rates in operations a second (an addition and a multiplication are two), memory in bytes a second; vendors' datasheets.
    bf16: with sums in fp32, which GeForce cards do at half the rate that is advertised."""
    arch: int
    bf16: float
    int8: float
    bandwidth: float


CARDS = {
    "NVIDIA H200": Card(90, 989e12, 1979e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": Card(90, 989e12, 1979e12, 3.35e12),
    "NVIDIA H100 NVL": Card(90, 835e12, 1671e12, 3.9e12),
    "NVIDIA H100 PCIe": Card(90, 756e12, 1513e12, 2.0e12),
    "NVIDIA A100-SXM4-80GB": Card(80, 312e12, 624e12, 2.039e12),
    "NVIDIA A100 80GB PCIe": Card(80, 312e12, 624e12, 1.935e12),
    "NVIDIA A100-SXM4-40GB": Card(80, 312e12, 624e12, 1.555e12),
    "NVIDIA A100-PCIE-40GB": Card(80, 312e12, 624e12, 1.555e12),
    "NVIDIA L40S": Card(89, 362.05e12, 733e12, 0.864e12),
    "NVIDIA GeForce RTX 5090": Card(120, 209.5e12, 838e12, 1.792e12),
    "NVIDIA GeForce RTX 4090": Card(89, 165.2e12, 660.6e12, 1.008e12),
    "NVIDIA GeForce RTX 3090": Card(86, 71e12, 284e12, 0.936e12),
}


def quantizer_bytes(m: int, k: int) -> int:
    """bf16 [M, K] in, int8 [M, K] and fp32 [M] out."""
    return 3 * m * k + 4 * m


def floors(card: Card, m: int, k: int, n: int) -> dict[str, float]:
    """Seconds that bf16, fp8 and INT8 take at least for x [M, K] -> y [M, N]: bytes over bandwidth or operations over rate, whichever is
    more; for fp8 and INT8 after a pass that quantizes x. expected_ratio: bf16's over INT8's."""
    operations = 2 * m * k * n
    bf16 = max(operations / card.bf16, 2 * (m * k + n * k + m * n) / card.bandwidth)
    quantizer = quantizer_bytes(m, k) / card.bandwidth
    gemm = max(operations / card.int8, (m * k + n * k + 2 * m * n) / card.bandwidth)
    return {"bf16": bf16, "quantizer": quantizer, "gemm": gemm, "int8": quantizer + gemm, "expected_ratio": bf16 / (quantizer + gemm)}


def predicted_step(card: Card, spec: dict, size: tuple[int, int], text: int, batch: int, frames: int) -> dict[str, float] | None:
    """Milliseconds of a step's Linear layers in bf16 and in INT8 and of its attention, at the card's rates, and the ratio that this gives
    for the whole step; nothing else is in it (norms, modulation, launches). spec: see models.skeleton; None for a UNet. text: tokens of
    the prompt."""
    width = spec.get("hidden")
    pixels = size[0] * size[1] // 256  # tokens of an image: 8x8 pixels a latent, 2x2 latents a token
    if spec["family"] == "flux":
        tokens = pixels + text
        double, single = spec["depth"]
        layers = [(double, tokens, width, 3 * width), (double, tokens, width, width), (double, tokens, width, 4 * width),
                  (double, tokens, 4 * width, width), (single, tokens, width, 7 * width), (single, tokens, 5 * width, width)]
        attention = (double + single) * 4 * tokens ** 2 * width * batch
    elif spec["family"] == "wan":
        tokens, depth, ffn = pixels * ((frames - 1) // 4 + 1), spec["depth"], spec["ffn"]
        layers = [(6 * depth, tokens, width, width), (2 * depth, text, width, width), (depth, tokens, width, ffn),
                  (depth, tokens, ffn, width)]
        attention = depth * 4 * tokens * (tokens + text) * width * batch
    else:
        return None
    found = [(count, floors(card, m * batch, k, n)) for count, m, k, n in layers]
    bf16, int8 = (sum(count * floor[kind] for count, floor in found) for kind in ("bf16", "int8"))
    attended = attention / card.bf16
    return {"bf16_linear": bf16 * 1e3, "int8_linear": int8 * 1e3, "attention": attended * 1e3,
            "expected_ratio": (bf16 + attended) / (int8 + attended)}
