"""Cross-attention from shared latents to packed views of unequal length. Depends on torch alone."""

from __future__ import annotations

from uhd_kernels.dispatch import varlen_cross_attention

__all__ = ["varlen_cross_attention"]
