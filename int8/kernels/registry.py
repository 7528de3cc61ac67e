"""The implementations of the two operations. A new one is a module with a KERNEL, and its line here."""
from __future__ import annotations

from . import comfy_kitchen_gemm, cpu, reference, torch_mm, with_triton

# In the order in which they are asked, and shown to users.
KERNELS = (cpu.KERNEL, with_triton.KERNEL, comfy_kitchen_gemm.KERNEL, torch_mm.KERNEL, reference.KERNEL)
BY_NAME = {kernel.name: kernel for kernel in KERNELS}
