"""Records as the model will see them, for people: special tokens written out, trained text marked, the stop token checked.

record 1: 21 tokens, 5 trained; ends with the stop token <|im_end|>
  <|im_start|>user
  Hi<|im_end|>
  <|im_start|>assistant
  ⟦Hello!<|im_end|>
  ⟧
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mindspeed_lora.arguments.configs import TemplateFlags
from mindspeed_lora.data.chat_template import open_template
from mindspeed_lora.data.indexed_dataset import IndexedDataset
from mindspeed_lora.data.packing import IGNORED, without_padding
from mindspeed_lora.data.sft_dataset import key_stem
from mindspeed_lora.data.tokenizer import pad_token_id
from mindspeed_lora.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"
LEGEND = f"{OPEN}text{CLOSE} is trained, the rest is only read"
LOGGED_TOKENS = 300  # of the sample in the log of a run
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
_INDENT = "  "

Ids = Sequence[int] | npt.NDArray[np.integer]


def preview_lines(
    title: str,
    values: Mapping[str, Ids],
    tokenizer: PreTrainedTokenizerBase,
    stops: Collection[int],
    limit: int | None = None,
    color: bool | None = None,
) -> list[str]:
    """A title and the text of each sequence of a sample.

    Args:
        title: names the sample.
        values: ids and labels by key, such as ``input_ids`` and ``labels``, or with ``chosen_`` and ``rejected_`` before;
            ids without labels are trained whole.
        stops: ids that may end an answer; empty: not checked.
        limit: of tokens that are shown; the middle is left out. None: all.
        color: trained text in green as well; None: where standard output is a terminal.
    """
    color = sys.stdout.isatty() if color is None else color
    lines = []
    for key, ids in values.items():
        if key.endswith("labels") or key == "attention_mask":
            continue
        labels = values.get(key.removesuffix("input_ids") + "labels") if key.endswith("input_ids") else None
        trained = np.asarray(labels) != IGNORED if labels is not None and len(labels) == len(ids) else np.ones(len(ids), np.bool_)
        name = key.removesuffix("_input_ids") if key != "input_ids" else ""
        count = f"{len(ids):,} tokens, {int(trained.sum()):,} trained"
        lines.append(f"{title}{name and f' ({name})'}: {count}{_stop_sentence(ids, trained, tokenizer, stops)}")
        text = "".join(_marked(np.asarray(ids), trained, tokenizer, limit, color))
        lines += [_INDENT + line for line in text.split("\n")]
    return lines


def _stop_sentence(ids: Ids, trained: npt.NDArray[np.bool_], tokenizer: PreTrainedTokenizerBase, stops: Collection[int]) -> str:
    """Whether the last trained text ends in a stop token; blank tokens after it do not count."""
    if not stops or not trained.any():
        return ""
    for index in np.asarray(ids)[trained][::-1]:
        text = str(tokenizer.decode([int(index)]))
        if int(index) in stops:
            return f"; ends with the stop token {text}"
        if text.strip():
            return f"; DOES NOT END with a stop token, but with {text!r}: the model would not learn to stop here"
    return "; has no text to end"


def _marked(
    ids: npt.NDArray[np.integer], trained: npt.NDArray[np.bool_], tokenizer: PreTrainedTokenizerBase, limit: int | None, color: bool
) -> Iterator[str]:
    """Pieces of text, the trained ones in marks."""
    start, end = (f"{OPEN}{_GREEN}", f"{_PLAIN}{CLOSE}") if color else (OPEN, CLOSE)
    head = len(ids) if limit is None or len(ids) <= limit else limit - limit // 3
    tail = len(ids) if head == len(ids) else len(ids) - limit // 3  # type: ignore[operator]
    for first, last in ((0, head), (tail, len(ids))):
        if first == tail and tail != len(ids) and first:
            yield f"\n[... {tail - head:,} tokens ...]\n"
        edges = [first, *(np.flatnonzero(np.diff(trained[first:last])) + first + 1).tolist(), last]
        for begin, stop in itertools.pairwise(edges):
            if stop > begin:
                text = tokenizer.decode(ids[begin:stop].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
                yield f"{start}{text}{end}" if trained[begin] else str(text)


def log_first_sample(prefix: Path, keys: Sequence[str], sample: int, tokenizer: PreTrainedTokenizerBase, flags: TemplateFlags) -> None:
    """Show one sample of prepared data in the log of rank 0, its middle left out where it is long."""
    logger = get_logger()
    if not logger.isEnabledFor(logging.INFO):
        return
    values = {key: IndexedDataset(key_stem(prefix, key))[sample] for key in keys}
    if "input_ids" in values:  # the padding of a pack says nothing
        end = without_padding(values["input_ids"], values["labels"], pad_token_id(tokenizer))
        values = {key: ids[:end] for key, ids in values.items()}
    stops = {int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set()
    if flags.prompt_type is not None or flags.hf_chat_template:
        stops.update(open_template(flags, tokenizer).stop_token_ids(tokenizer))
    logger.info(f"first sample of {prefix}, as the model sees it ({LEGEND}):")
    for line in preview_lines(f"sample {sample}", values, tokenizer, stops, LOGGED_TOKENS):
        logger.info(line)
