"""What the packing flags of a run and its data say together: refused where they contradict, told where it matters."""

from __future__ import annotations

from typing import Any

import numpy as np

from mindspeed_lora.arguments.configs import DataFlags
from mindspeed_lora.data.packing import IGNORED, NEAT_PACK, without_padding
from mindspeed_lora.data.sft_dataset import DocumentRule, SFTDataset
from mindspeed_lora.data.tokenizer import pad_token_id
from mindspeed_lora.errors import UsageError
from mindspeed_lora.log import get_logger

_LOOKED_AT = 100  # samples


def document_rule(flags: DataFlags, dataset: SFTDataset, tokenizer: Any, notes: list[str]) -> DocumentRule | None:
    """Where the documents of a sample end; None without --reset-attention-mask: a sample is one document.

    Raises:
        UsageError: the flags ask for a packing that the data does not have.
    """
    _check_packing(flags, dataset)
    if not flags.reset_attention_mask:
        if dataset.packing:
            notes.append("the data is packed, and the records of a sample see each other; --reset-attention-mask keeps them apart")
        return None
    rule = DocumentRule(dataset.has_segments(), tokenizer.eos_token_id, pad_token_id(tokenizer))
    if rule.by_segments:
        notes.append("--reset-attention-mask: a document is a record, by the numbers that --neat-pack wrote")
        return rule
    notes.append(f"--reset-attention-mask: a document ends at each {tokenizer.eos_token!r} (MindSpeed-LLM's rule for data without numbers)")
    inside = _untrained_eos(dataset, rule)
    if inside:
        get_logger().warning(
            f"--reset-attention-mask: {inside} of the first {min(len(dataset), _LOOKED_AT)} samples have {tokenizer.eos_token!r} inside a "
            "question or a system text, which ends a document there: answers do not see what stands before it. Data packed with "
            "--pack --neat-pack keeps each record whole"
        )
    return rule


def _check_packing(flags: DataFlags, dataset: SFTDataset) -> None:
    made = dataset.packing or "no packing"
    if dataset.manifest is not None and flags.pack and not dataset.packing:
        raise UsageError(f"--pack, but {dataset.prefix} was made with {made}; leave the flag out, or preprocess again with --pack")
    if flags.neat_pack and (dataset.packing != NEAT_PACK if dataset.manifest is not None else not dataset.has_segments()):
        raise UsageError(
            f"--neat-pack, but {dataset.prefix} holds no record numbers (made with {made}); "
            "leave the flag out, or preprocess again with --pack --neat-pack"
        )


def _untrained_eos(dataset: SFTDataset, rule: DocumentRule) -> int:
    """Of the first samples, those in which an eos token that is not trained stands before the padding."""
    found = 0
    for sample in range(min(len(dataset), _LOOKED_AT)):
        ids, labels = dataset.input_ids[sample], dataset.labels[sample]
        end = without_padding(ids, labels, rule.pad_token_id)
        found += bool(np.any((ids[:end] == rule.eos_token_id) & (labels[:end] == IGNORED)))
    return found
