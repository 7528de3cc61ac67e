"""The Triton implementation: quant_rows and int8_gemm as in reference.py."""
from .triton_gemm import candidates, dense, int8_gemm, int_mm, is_broken, ships
from .triton_quant import quant_rows

__all__ = ["candidates", "dense", "int8_gemm", "int_mm", "is_broken", "quant_rows", "ships"]
