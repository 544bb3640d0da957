"""Loading a tokenizer from a local folder, and naming it so that two steps can see whether they use the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_lora.arguments.configs import TokenizerFlags
from mindspeed_lora.errors import UsageError
from mindspeed_lora.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt", "qwen.tiktoken", "tokenizer_config.json")


def load_tokenizer(flags: TokenizerFlags, fallback_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of ``--tokenizer-name-or-path``, else the one that travels in ``fallback_dir``; nothing is downloaded.

    Raises:
        UsageError: no folder was given, it does not exist, holds no tokenizer, or one that transformers cannot load.
    """
    folder = flags.name_or_path or fallback_dir
    flag = "--tokenizer-name-or-path" if flags.name_or_path else "the tokenizer beside --load"
    if folder is None:
        raise UsageError("--tokenizer-name-or-path is missing and no tokenizer travels with --load; give a folder with tokenizer.json")
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{flag}: {folder} is not a folder; give a local Hugging Face folder with tokenizer.json (nothing is downloaded)")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES) and not flags.trust_remote_code:
        raise UsageError(
            f"{flag}: {folder} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the model's tokenizer files there"
        )
    tokenizer = _from_folder(folder, flag, flags, flags.use_fast)
    if not tokenizer:  # transformers 4 answers False where the slow tokenizer's own files are missing
        get_logger().warning(f"--tokenizer-not-use-fast: {folder} has only the files of the fast tokenizer; that one is used")
        tokenizer = _from_folder(folder, flag, flags, True)
    # "will result in indexing errors": each command checks lengths itself, or cuts what is too long and says so
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _from_folder(folder: Path, flag: str, flags: TokenizerFlags, use_fast: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, use_fast=use_fast, trust_remote_code=flags.trust_remote_code
        )
    except Exception as error:  # transformers raises anything from OSError to plain Exception, all of them about this folder
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{flag}: transformers cannot load a tokenizer from {folder}: {reason}") from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) over the vocabulary sorted by token (added tokens included) and the eos id; not over merges or the chat template."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    digest.update(f"eos {tokenizer.eos_token_id}".encode())
    return digest.hexdigest()


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills up a row: the pad token, else eos, else 0. Any id does: it lies right of the text and is not trained."""
    return next((int(value) for value in (tokenizer.pad_token_id, tokenizer.eos_token_id) if value is not None), 0)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special_tokens: bool = False) -> list[list[int]]:
    """Token ids of each text by itself, in one call. ``special_tokens``: with those that the tokenizer adds, such as a bos."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.truncation is None and backend.padding is None and not backend.encode_special_tokens:
        # what the call below does, without its Python objects for every text (a fifth of the time)
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=special_tokens)]
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(list(texts), add_special_tokens=special_tokens, **options)["input_ids"]
