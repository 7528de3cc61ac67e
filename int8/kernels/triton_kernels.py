"""The Triton implementation: quant_rows and int8_gemm as in reference.py."""
from .triton_gemm import candidates, int8_gemm, takes_tma
from .triton_quant import quant_rows

__all__ = ["candidates", "int8_gemm", "quant_rows", "takes_tma"]
