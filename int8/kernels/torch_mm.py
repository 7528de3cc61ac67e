"""CUDA without Triton: torch._int_mm (cuBLASLt), padded to the shapes it takes, in blocks of rows: [M, N] in int32 and twice in fp32
would take gigabytes for a video."""
from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from . import reference
from .kernel import Kernel
from .reference import Added

# cuBLASLt's INT8 path takes more than 16 rows, and K and N in multiples of 8.
MIN_ROWS = 17
BLOCK_ROWS = 32
SIZE_MULTIPLE = 8
BLOCK_BYTES = 256 << 20  # of int32 or fp32


def quant_rows(x: torch.Tensor, group: int = 0, act: str = "none", pre_quant_scale: torch.Tensor | None = None,
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.quant_rows."""
    rows = max(1, BLOCK_BYTES // (4 * x.shape[1]))
    if x.shape[0] <= rows:
        return reference.quant_rows(x, group, act, pre_quant_scale)
    blocks = [reference.quant_rows(block, group, act, pre_quant_scale) for block in x.split(rows)]
    return torch.cat([q for q, _ in blocks]), torch.cat([s for _, s in blocks])


def norm_quant_rows(x: torch.Tensor, normed: reference.Normed, group: int = 0, pre_quant_scale: torch.Tensor | None = None,
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.norm_quant_rows."""
    m, k = x.shape
    rows = max(1, BLOCK_BYTES // (4 * k))
    if m <= rows:
        return reference.norm_quant_rows(x, normed, group, pre_quant_scale)
    parts = [slice(i, i + rows) for i in range(0, m, rows)]
    blocks = [reference.norm_quant_rows(x[part], normed.of_rows(part, m), group, pre_quant_scale) for part in parts]
    return torch.cat([q for q, _ in blocks]), torch.cat([s for _, s in blocks])


def products(q: torch.Tensor, qweight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, q[rows] @ qweight.T in int32 [rows, N]), block by block."""
    m, k = q.shape
    n = qweight.shape[0]
    pad_k, pad_n = -k % SIZE_MULTIPLE, -n % SIZE_MULTIPLE
    qweight = F.pad(qweight, (0, pad_k, 0, pad_n)) if pad_k or pad_n else qweight
    # Whole blocks: what is read of the rows' scales then begins at a multiple of 16 bytes.
    rows = max(1, BLOCK_BYTES // (4 * n * BLOCK_ROWS)) * BLOCK_ROWS
    for i in range(0, m, rows):
        block = q[i:i + rows]
        height = block.shape[0]
        if pad_k or height < MIN_ROWS:
            block = F.pad(block, (0, pad_k, 0, max(0, MIN_ROWS - height)))
        yield i, torch._int_mm(block, qweight.t())[:height, :n]


def int8_gemm(q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor,
              bias: torch.Tensor | None, out_dtype: torch.dtype, added: Added | None = None) -> torch.Tensor:
    """See reference.int8_gemm."""
    m = q.shape[0]
    y = torch.empty((m, qweight.shape[0]), dtype=out_dtype, device=q.device)
    for i, acc in products(q, qweight):
        end = i + acc.shape[0]
        part = None if added is None else added.of_rows(slice(i, end), m)
        y[i:end] = reference.epilogue(acc, s[i:end], weight_scale, bias, out_dtype, part)
    return y


def add(y: torch.Tensor, added: Added) -> torch.Tensor:
    """y [M, N], which becomes residual + gate * y in fp32 and its type, in one pass: after a product whose epilogue cannot add."""
    if added.gate is None:
        return torch.add(added.residual, y, out=y)
    images, n = added.gate.shape
    rows = images, y.shape[0] // images, n
    torch.addcmul(added.residual.reshape(rows), added.gate[:, None], y.view(rows), out=y.view(rows))
    return y


KERNEL = Kernel("torch", __name__, ("cpu", "cuda"), is_option=True, serves=lambda name, device: device.type == "cuda")
