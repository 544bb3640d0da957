"""A tokenizer made on the spot, and Alpaca records, for tests that need no shared data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
TINY_VOCAB_SIZE = 312  # fits the tiny models of helpers.py (320)
_CORPUS = (
    "Give three tips for staying healthy. Eat a balanced diet and get enough sleep.",
    "user assistant system Human: Assistant: the capital of the country is the city",
    "What is the answer to the question? The answer is in the text.\n\n",
)
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(path: Path) -> Path:
    """Save a byte-level BPE tokenizer of 312 tokens with Qwen's special tokens (eos ``<|im_end|>``, pad ``<|endoftext|>``, no bos)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS[:3]])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in SPECIAL_TOKENS[3:]])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(path)
    return Path(path)


def alpaca_records(count: int = 12) -> list[dict[str, Any]]:
    """Alpaca records of different lengths; every third has an input."""
    return [
        {
            "instruction": f"Say number {index} " + "again " * (index % 5),
            "input": f"slowly {index}" if index % 3 == 0 else "",
            "output": "word " * (index % 4 + 1) + str(index),
        }
        for index in range(count)
    ]


def write_json(path: Path, value: Any) -> Path:
    """Write ``value`` as JSON and return the path."""
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path
