"""LoRA of a fused linear whose HF parts (q, k, v; gate, up) each have their own A, r and alpha, held exactly.

    A = [A_q]    B = [B_q  0   0 ]    y += B (s * (A x)),  s: each part's scale on its own columns of B
        [A_k]        [ 0  B_k  0 ]
        [A_v]        [ 0   0  B_v]

B stays zero outside its blocks in training, so that the adapter can be given back part by part. Parts with one A have one block.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from mindspeed_lora.weights.lora_spec import LoraSpec, ModuleLora
from mindspeed_lora.weights.table import Row, WeightTable

LoraParts = tuple[torch.Tensor, list[torch.Tensor]]
"""A ``[width, in]`` and, per HF part, B ``[out_part, width]``."""
Pair = tuple[torch.Tensor, torch.Tensor]
"""One HF part's own A ``[r, in]`` and B ``[out_part, r]``."""


def module_of(lora: LoraSpec, row: Row, layer: int | None) -> ModuleLora | None:
    """Ranks of one weight's adapter; None: it is not adapted."""
    return lora.module(row.name(layer)) if row.module in lora.targets else None


def adapted_entries(table: WeightTable, lora: LoraSpec) -> list[tuple[Row, int | None, ModuleLora]]:
    """Every base weight that is adapted, in the table's order."""
    found = ((row, layer, module_of(lora, row, layer)) for row, layer in table.target_entries(lora.targets))
    return [(row, layer, module) for row, layer, module in found if module is not None]


def columns(module: ModuleLora, num_parts: int) -> list[slice]:
    """Each HF part's columns of B, which are its rows of A."""
    if len(module.ranks) == 1:
        return [slice(0, module.width)] * num_parts
    ends = list(itertools.accumulate(module.ranks))
    return [slice(end - r, end) for end, r in zip(ends, module.ranks, strict=True)]


def part_scales(lora: LoraSpec, module: ModuleLora, num_parts: int) -> list[float]:
    """Factor of each HF part's contribution; 0 where it is not adapted."""
    scales = lora.scales(module)
    return list(scales) if len(scales) == num_parts else list(scales) * num_parts


def column_scales(lora: LoraSpec, module: ModuleLora) -> float | list[float]:
    """The linear's one scale, or that of each column of B."""
    scales = [scale for r, scale in zip(module.ranks, lora.scales(module), strict=True) for _ in range(r)]
    return scales[0] if len(set(scales)) == 1 else scales


def split_pairs(module: ModuleLora, parts: LoraParts) -> list[Pair | None]:
    """Fused form -> each HF part's own A and B (views), None where it is not adapted."""
    matrix_a, matrices_b = parts
    spans = columns(module, len(matrices_b))
    return [(matrix_a[span], b[:, span]) if span.stop > span.start else None for span, b in zip(spans, matrices_b, strict=True)]


def join_pairs(row: Row, module: ModuleLora, pairs: Sequence[Pair | None]) -> LoraParts:
    """Inverse of :func:`split_pairs`."""
    present = [pair for pair in pairs if pair is not None]
    if len(module.ranks) == 1:
        return present[0][0], [b for _, b in present]
    stacked, placed = torch.cat([a for a, _ in present]), []
    for pair, span, shape in zip(pairs, columns(module, len(pairs)), row.part_shapes, strict=True):
        wide = stacked.new_zeros(shape[0], module.width)
        if pair is not None:
            wide[:, span] = pair[1]
        placed.append(wide)
    return stacked, placed


def block_masks(row: Row, module: ModuleLora) -> list[torch.Tensor] | None:
    """Per HF part, bool ``[out_part, width]``: where its B may differ from zero; None: everywhere."""
    if len(module.ranks) == 1:
        return None
    masks = []
    for span, shape in zip(columns(module, len(row.hf)), row.part_shapes, strict=True):
        mask = torch.zeros(shape[0], module.width, dtype=torch.bool)
        mask[:, span] = True
        masks.append(mask)
    return masks


def is_block_sparse(row: Row, module: ModuleLora, matrices_b: Sequence[torch.Tensor]) -> bool:
    """Whether B is zero outside its blocks."""
    masks = block_masks(row, module)
    return masks is None or not any(bool((b.ne(0) & ~mask).any()) for b, mask in zip(matrices_b, masks, strict=True))


def trained_elements(row: Row, module: ModuleLora) -> int:
    """Elements of A and, inside its blocks, B."""
    spans = columns(module, len(row.hf))
    in_b = sum(shape[0] * (span.stop - span.start) for shape, span in zip(row.part_shapes, spans, strict=True))
    return module.width * int(row.part_shapes[0][1]) + in_b
