"""Small models, data and configurations for training tests, and runs of ``train`` on a rank of the pool."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import make_model

from mindspeed_lora.arguments.configs import (
    DataFlags,
    LoadFlags,
    LoraFlags,
    OptimizerFlags,
    ParallelFlags,
    RecomputeFlags,
    RuntimeFlags,
    SaveFlags,
    TemplateFlags,
    TokenizerFlags,
    TrainConfig,
)

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
VOCAB, SAMPLES = 320, 24


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of the tiny models' vocabulary."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{index}": index for index in range(4, VOCAB)}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "truncation": None,
        "padding": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": "<s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_data(prefix: Path, samples: int = SAMPLES, seed: int = 5, masked: tuple[int, ...] = ()) -> Path:
    """Samples of 6 to 19 tokens whose first third is a prompt; ``masked`` samples train nothing."""
    from mindspeed_lora.data.indexed_dataset import IndexedDatasetBuilder
    from mindspeed_lora.data.sft_dataset import KEYS, key_stem

    random = np.random.RandomState(seed)
    rows = [random.randint(4, VOCAB, random.randint(6, 20)) for _ in range(samples)]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for key in KEYS:
        with IndexedDatasetBuilder(key_stem(prefix, key)) as builder:
            for number, ids in enumerate(rows):
                values = ids if key == "input_ids" else np.ones_like(ids)
                if key == "labels":
                    values = ids.copy()
                    values[: len(ids) if number in masked else len(ids) // 3] = -100
                builder.add_document(values)
            builder.finish()
    return prefix


def write_pairs(prefix: Path, pairs: int = SAMPLES, seed: int = 6, empty: tuple[int, ...] = (), equal: tuple[int, ...] = ()) -> Path:
    """Prompts of 3 to 8 tokens with two answers of 2 to 9; in ``empty`` nothing of the rejected one is trained, in ``equal`` both agree."""
    from mindspeed_lora.data.indexed_dataset import IndexedDatasetBuilder
    from mindspeed_lora.data.sft_dataset import key_stem

    random = np.random.RandomState(seed)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[np.ndarray]] = {}
    for number in range(pairs):
        prompt, chosen, rejected = (random.randint(4, VOCAB, random.randint(*bounds)) for bounds in ((3, 9), (2, 10), (2, 10)))
        for side, answer in (("chosen", chosen), ("rejected", chosen if number in equal else rejected)):
            trained = np.full_like(answer, -100) if number in empty and side == "rejected" else answer
            columns.setdefault(f"{side}_input_ids", []).append(np.concatenate([prompt, answer]))
            columns.setdefault(f"{side}_labels", []).append(np.concatenate([np.full_like(prompt, -100), trained]))
    for key, rows in columns.items():
        with IndexedDatasetBuilder(key_stem(prefix, key)) as builder:
            for row in rows:
                builder.add_document(row)
            builder.finish()
    return prefix


def make_workspace(folder: Path, family: str = "qwen3", tied: bool = False) -> Path:
    """``folder/model`` with tokenizer, ``folder/data/set``."""
    make_model(folder / "model", family, tie_word_embeddings=tied)
    write_tokenizer(folder / "model")
    write_data(folder / "data" / "set")
    return folder


def make_config(folder: Path, **changes: Any) -> TrainConfig:
    """A LoRA run of 4 iterations with global batch 8 on one process; ``changes`` by ``field`` or ``group__field``."""
    config = TrainConfig(
        parallel=ParallelFlags(),
        runtime=RuntimeFlags(device="cpu", params_dtype="fp32"),
        load=LoadFlags(load=folder / "model"),
        tokenizer=TokenizerFlags(),
        template=TemplateFlags(),
        data=DataFlags(
            data_path=str(folder / "data" / "set"), split=(100.0, 0.0, 0.0), seq_length=32, pad_to_seq_length=False, pad_to_multiple_of=4
        ),
        optimizer=OptimizerFlags(lr=1e-3, min_lr=1e-4, lr_decay_style="cosine", lr_decay_iters=20, lr_warmup_iters=2),
        recompute=RecomputeFlags(),
        save=SaveFlags(),
        lora=LoraFlags(r=4, alpha=8.0, targets=TARGETS, fusion=True),
        micro_batch_size=2,
        global_batch_size=8,
        train_iters=4,
    )
    return change(config, **changes)


def change(config: TrainConfig, **changes: Any) -> TrainConfig:
    """``config`` with ``field`` or ``group__field`` replaced."""
    for key, value in changes.items():
        group, _, name = key.partition("__")
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value}) if name else value})
    return config


def run_training(config: TrainConfig) -> str:
    """``train`` on this rank; what the logger said (rank 0: all)."""
    import io
    import logging

    from mindspeed_lora.log import LOGGER_NAME
    from mindspeed_lora.training.run import train

    stream = io.StringIO()
    logger = logging.getLogger(LOGGER_NAME)
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        train(config)
    finally:
        logger.removeHandler(handler)
    return stream.getvalue()


def metrics(save: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that are iterations."""
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "lm_loss" in record]


def losses(save: Path) -> list[float]:
    return [record["lm_loss"] for record in metrics(save)]


def saved_parameters(save: Path, lora: bool = True, folder: Path | None = None) -> dict[str, torch.Tensor]:
    """All trained tensors of the newest checkpoint, whole, in HF order, by name; ``folder``: another one that holds the adapter."""
    from mindspeed_lora.weights.sources import open_adapter, open_base
    from mindspeed_lora.weights.table import WeightTable

    found: dict[str, torch.Tensor] = {}
    if lora:
        adapter = open_adapter(folder or save)
        from mindspeed_lora.weights.families import model_config_from_hf

        table = WeightTable(model_config_from_hf(save))
        spec = adapter.spec(table)
        assert spec is not None
        for row, layer in table.target_entries(spec.targets):
            a, b = adapter.lora_parts(row, layer)
            found[f"{row.name(layer)} A"] = a.clone()
            found |= {f"{row.name(layer)} B{index}": part.clone() for index, part in enumerate(b)}
        return found
    base = open_base(save)
    table = WeightTable(base.model_config)
    for row, layer in table.entries():
        for name, part in zip(row.hf_names(layer), base.parts(row, layer), strict=True):
            found[name] = part.clone()
    return found
