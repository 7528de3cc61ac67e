"""The Triton implementation: quant_rows, norm_quant_rows and int8_gemm as in reference.py."""
from .triton_gemm import candidates, dense, int8_gemm, int_mm, is_broken, ships
from .triton_quant import norm_quant_rows, quant_rows

__all__ = ["candidates", "dense", "int8_gemm", "int_mm", "is_broken", "norm_quant_rows", "quant_rows", "ships"]
