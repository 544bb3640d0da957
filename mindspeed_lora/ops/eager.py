"""The reference of each kernel in plain torch; every faster one is tested against these."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last dim; statistics in fp32, result in x's dtype.

    weight ``[size]``, or one for each of the last dims but one, ``[m, size]``.
    """
    if not torch.is_grad_enabled():  # torch's own: the same numbers in one call, but its graph keeps more than the formula below
        return weight * torch.rms_norm(x, x.shape[-1:], None, epsilon)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + bias``: x ``[..., in]``, weight ``[out, in]`` -> ``[..., out]``."""
    return F.linear(x, weight, bias)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, half layout: x ``[s, b, heads, d]``, tables ``[s, b or 1, 1, d]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def exp_(x: torch.Tensor) -> torch.Tensor:
    """``e^x`` in place."""
    return x.exp_()


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """``[..., 2f] = [gate | up] -> silu(gate) * up``."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention with grouped queries.

    Args:
        query: ``[b, n, s, d]``; key: ``[b, g, s_k, d]`` with g dividing n; value: ``[b, g, s_k, d_v]``.
        mask: bool ``[b, 1, s, s_k]``, True = may attend; None: causal (``is_causal``) or everything.
        scale: of the scores; None: ``1 / sqrt(d)``.

    Returns:
        ``[b, n, s, d_v]``.
    """
    causal, grouped = is_causal and mask is None, query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def band_mask(length: int, seen: int, window: int, device: torch.device) -> torch.Tensor:
    """bool ``[length, seen + length]``: each of ``length`` new positions may attend to the last ``window`` up to itself."""
    ones = torch.ones(length, seen + length, dtype=torch.bool, device=device)
    return ones.tril(seen) & ones.triu(seen - window + 1)


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: Sequence[Sequence[int]],
    window: int | None = None,
    scale: float | None = None,
    attend: Callable[..., torch.Tensor] = attention,
) -> torch.Tensor:
    """Causal attention inside each document of a packed row; documents never see each other.

    Args:
        query, key, value, scale: as for :func:`attention`, all of one length s.
        ends: for each row the cumulative ends of its documents, the last one s; empty documents are skipped.
        window: positions a position may attend to, itself included; None: all before it.
        attend: what computes one document, as :func:`attention`.

    Returns:
        ``[b, n, s, d_v]``.
    """
    rows = []
    for row, row_ends in enumerate(ends):
        bounds = sorted({0, *row_ends})
        pieces = [(slice(row, row + 1), slice(None), slice(start, end)) for start, end in itertools.pairwise(bounds)]
        masks = [_document_mask(end - start, window, query.device) for start, end in itertools.pairwise(bounds)]
        parts = [attend(query[p], key[p], value[p], mask, scale=scale) for p, mask in zip(pieces, masks, strict=True)]
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)


def _document_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    return None if window is None or length <= window else band_mask(length, 0, window, device)
