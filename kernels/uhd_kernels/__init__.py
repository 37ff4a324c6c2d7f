"""Cross-attention from shared latents to packed views of unequal length. Needs torch; uses Triton if it is there."""

from __future__ import annotations

from uhd_kernels.decomposed import decompositions
from uhd_kernels.dispatch import varlen_cross_attention
from uhd_kernels.op import calls

__all__ = ["calls", "decompositions", "varlen_cross_attention"]
