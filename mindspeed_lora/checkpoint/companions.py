"""The small files that travel with weights: the model's ``config.json`` and its tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_companions(config_dir: Path | None, tokenizer_dir: Path | None, target: Path) -> list[str]:
    """Copy config and tokenizer into ``target`` (which exists); the names of what was copied."""
    copied = []
    for folder, names in ((config_dir, CONFIG_FILES), (tokenizer_dir or config_dir, TOKENIZER_FILES)):
        for name in names:
            if folder is not None and (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
                copied.append(name)
    return copied
