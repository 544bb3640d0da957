"""Makes the quickstart's tokenizer and its untrained base model; nothing is downloaded.

    python examples/quickstart/make_model.py FOLDER

The tokenizer is a byte-level BPE trained on the base instructions, with the special tokens of Qwen3. It is small, so that new
names fall into pieces which the base has learnt to write: LoRA leaves embeddings and head as they are. The model has Qwen3's
architecture (query/key norms, grouped queries, a head size of its own, an untied head) and random weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 640
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK = ("<think>", "</think>")
# The qwen3 template of configs/finetune/templates.json without thinking, as transformers writes it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


def bundled_texts() -> list[str]:
    """Questions and answers of the base instructions, with the template's words around them."""
    records = json.loads((HERE / "base_instructions.json").read_text(encoding="utf-8"))
    return [text for record in records for text in (record["instruction"], record["output"], "user\n", "assistant\n", "\n\n")]


def make_tokenizer(folder: Path) -> None:
    """Train and save the tokenizer; exactly ``VOCAB_SIZE`` entries, special tokens last."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = [END_OF_TEXT, START, END, *THINK]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - len(specials), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(bundled_texts(), trainer)
    tokenizer.add_special_tokens(specials)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the bundled text gives {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}: add text or lower VOCAB_SIZE")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def make_model(folder: Path) -> int:
    """Save the untrained model, fp32; returns the number of its parameters."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(1234)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=48,
            max_position_embeddings=1024,
            rope_theta=10000.0,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Write both into the folder named on the command line."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: make_model.py FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    print(f"{folder}: Qwen3 architecture, {make_model(folder) / 1e6:.1f} million parameters, vocabulary {VOCAB_SIZE}, untrained")


if __name__ == "__main__":
    main()
