"""What a card can do at most, and from it the least time that a layer can take: the floor that measurements are read against."""
from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """Dense rates in operations a second (an addition and a multiplication are two), memory in bytes a second; vendors' datasheets."""
    arch: int
    bf16: float
    int8: float
    bandwidth: float


CARDS = {
    "NVIDIA H200": Card(90, 989e12, 1979e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": Card(90, 989e12, 1979e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": Card(80, 312e12, 624e12, 2.039e12),
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
