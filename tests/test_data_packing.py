"""Packs: what goes into a bag, how it is written, where its documents end."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import alpaca_records, tiny_tokenizer, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import ProcessPool
from training_helpers import change, losses, make_config, make_workspace, run_training

from mindspeed_lora.arguments.configs import DataFlags, ParallelFlags, PreprocessConfig, TemplateFlags, TokenizerFlags, TrainConfig
from mindspeed_lora.data.batches import BatchShape, EvalBatches, StepBatches
from mindspeed_lora.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from mindspeed_lora.data.packing import IGNORED, ends_after_token, ends_of_segments, fill_bags, packed_samples
from mindspeed_lora.data.preprocess import write_dataset
from mindspeed_lora.data.sft_dataset import KEYS, DocumentRule, SFTDataset, key_stem, open_sft_dataset
from mindspeed_lora.errors import UsageError
from mindspeed_lora.manifest import Manifest
from mindspeed_lora.parallel.context import single_process_context
from mindspeed_lora.training.documents import document_rule
from mindspeed_lora.training.loop import Trainer
from mindspeed_lora.training.parameters import trained_parameters
from mindspeed_lora.training.preflight import plan_training
from mindspeed_lora.training.run import build_machinery, build_model, training_batches

LENGTH = 96


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def written(folder: Path, tokenizer_dir: Path, records: list[dict[str, Any]] | None = None, **flags: Any) -> tuple[Any, Path]:
    source = write_json(folder / "in.json", records or alpaca_records(20))
    config = PreprocessConfig(
        source, folder / "out", TokenizerFlags(tokenizer_dir), TemplateFlags("qwen3"), seq_length=flags.pop("seq_length", LENGTH), **flags
    )
    return write_dataset(config), config.output_prefix


def rows(prefix: Path, key: str) -> list[list[int]]:
    return [row.tolist() for row in IndexedDataset(key_stem(prefix, key))]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
@settings(max_examples=60, deadline=None)
def test_bags_hold_every_record_once_and_no_more_than_fits(lengths: list[int], capacity: int) -> None:
    bags = fill_bags(lengths, capacity)
    assert sorted(number for bag in bags for number in bag) == list(range(len(lengths)))
    for index, bag in enumerate(bags):
        room = capacity - sum(lengths[number] for number in bag)
        assert room >= 0
        assert all(lengths[number] > room for later in bags[index + 1 :] for number in later)  # none that was left would have fitted


def test_the_longest_that_fits_first_and_the_last_of_equal_ones_first() -> None:
    assert fill_bags([5, 3, 5, 2, 3, 9], 10) == [[5], [2, 0], [4, 1, 3]]
    with pytest.raises(ValueError, match="do not fit"):
        fill_bags([11], 10)


@given(st.lists(st.integers(1, 15), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_no_token_is_lost_and_segments_name_the_records(lengths: list[int]) -> None:
    ids = [np.arange(length) + 100 * (number + 1) for number, length in enumerate(lengths)]
    labels = [np.where(row % 2, row, IGNORED) for row in ids]
    bags = fill_bags(lengths, 15)
    for bag, sample in zip(bags, packed_samples(ids, labels, bags, 16, 7, neat=True), strict=True):
        ends = ends_of_segments(sample["attention_mask"])
        assert ends.tolist() == [*np.cumsum([lengths[number] for number in bag]), 16]
        starts = [0, *ends[:-1]]
        for number, start, end in zip(bag, starts, ends, strict=False):
            assert np.array_equal(sample["input_ids"][start:end], ids[number])
            assert np.array_equal(sample["labels"][start:end], labels[number])
        assert set(sample["input_ids"][ends[-2] :]) == {7} and set(sample["labels"][ends[-2] :]) == {IGNORED}


@pytest.mark.parametrize("neat", [False, True])
def test_packed_files_hold_the_records_of_the_unpacked_ones(neat: bool, tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "single").mkdir()
    (tmp_path / "packed").mkdir()
    _, single = written(tmp_path / "single", tokenizer_dir)
    report, packed = written(tmp_path / "packed", tokenizer_dir, pack=True, neat_pack=neat)
    lengths = [len(row) for row in rows(single, "input_ids")]
    bags = fill_bags(lengths, LENGTH - 1)
    assert report.num_packs == len(bags) < len(lengths)
    assert any(line.startswith(f"packed into {len(bags)} samples of {LENGTH} tokens") for line in report.lines())
    for key in ("input_ids", "labels"):
        records = rows(single, key)
        for bag, row in zip(bags, rows(packed, key), strict=True):
            together = [value for number in bag for value in records[number]]
            assert len(row) == LENGTH and row[: len(together)] == together
    masks = rows(packed, "attention_mask")
    numbers = [[segment for segment, record in enumerate(bag, 1) for _ in range(lengths[record])] for bag in bags]
    assert masks == ([row + [0] * (LENGTH - len(row)) for row in numbers] if neat else [[1] * LENGTH] * len(bags))
    manifest = open_sft_dataset(packed).manifest
    assert manifest is not None and manifest.data is not None
    assert manifest.data["packing"] == ("neat-pack" if neat else "pack") and manifest.counts["packs"] == len(bags)
    assert sorted(path.name for path in packed.parent.iterdir()) == sorted(
        ["in.json", "out_mindspeed_lora.json", *(f"out_packed_{key}_document.{end}" for key in KEYS for end in ("bin", "idx"))]
    )


def test_a_record_that_fills_a_pack_is_kept(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A template that cuts to exactly --seq-length: the peer drops such a record with --pack, and takes its last token with --neat-pack."""
    templates = write_json(tmp_path / "templates.json", [{"name": "mine", "format_user": {"slots": ["Q: {{content}}\nA: "]}}])
    source = write_json(tmp_path / "in.json", [{"instruction": "again " * 40, "input": "", "output": "word " * 40}, *alpaca_records(4)])

    def run(name: str, neat: bool) -> tuple[Any, Path]:
        config = PreprocessConfig(
            source,
            tmp_path / name,
            TokenizerFlags(tokenizer_dir),
            TemplateFlags("mine", templates),
            seq_length=64,
            pack=True,
            neat_pack=neat,
        )
        return write_dataset(config), config.output_prefix

    report, prefix = run("pack", False)
    assert not report.num_skipped and report.notes["records cut to --seq-length"] == 1
    ids, labels = (rows(prefix, key)[0] for key in ("input_ids", "labels"))
    assert len(ids) == 64 and labels[63] == -100 != labels[62]
    report, prefix = run("neat", True)
    assert not report.num_skipped and report.notes["records cut to --seq-length"] == 1
    assert rows(prefix, "attention_mask")[0] == [1] * 63 + [0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"pack": True, "seq_length": None}, "--pack needs --seq-length"), ({"neat_pack": True}, "--neat-pack .* needs --pack")],
)
def test_pack_flags_that_lack_another(flags: dict[str, Any], message: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        written(tmp_path, tokenizer_dir, **flags)


def test_ends_after_each_eos_token_and_before_the_padding() -> None:
    ids, labels = np.array([5, 2, 6, 2, 2, 0, 0]), np.array([-100, -100, 6, 2, -100, -100, -100])
    assert ends_after_token(ids, labels, 2, 0).tolist() == [2, 4, 5, 7]
    assert ends_after_token(ids, labels, None, 0).tolist() == [5, 7]
    assert ends_after_token(ids[:4], labels[:4], 2, 0).tolist() == [2, 4]
    same = np.array([5, 2, 6, 2, 2, 2, 2])  # padding is eos as well: the trained eos is the last that is meant
    assert ends_after_token(same, labels, 2, 2).tolist() == [2, 4, 7]


def opened(folder: Path, samples: list[tuple[list[int], list[int], list[int]]]) -> SFTDataset:
    """A data set of (ids, labels, attention mask) as another program writes it."""
    for position, key in enumerate(("input_ids", "labels", "attention_mask")):
        with IndexedDatasetBuilder(key_stem(folder / "set", key)) as builder:
            for sample in samples:
                builder.add_document(sample[position])
            builder.finish()
    return open_sft_dataset(folder / "set")


SAMPLES = [
    ([5, 6, 7, 8, 2, 9, 9, 2, 0, 0], [-100, -100, 7, 8, 2, -100, 9, 2, -100, -100], [1, 1, 1, 1, 1, 2, 2, 2, 0, 0]),
    ([5, 2, 0], [-100, 2, -100], [1, 1, 0]),
    ([4, 5, 6, 7], [4, 5, 6, 7], [1, 1, 2, 2]),
]


@pytest.mark.parametrize(("by_segments", "third"), [(True, [2, 4]), (False, [4])])
def test_document_ends_of_a_batch(by_segments: bool, third: list[int], tmp_path: Path) -> None:
    dataset = opened(tmp_path, SAMPLES)
    assert dataset.has_segments()
    rule = DocumentRule(by_segments, eos_token_id=2, pad_token_id=0)
    batches = StepBatches(dataset, range(3), 1, False, 1, 3, 0, 1, 64, False, 4, 0, documents=rule)
    batch = next(iter(batches))
    assert batch.input_ids.shape == (3, 12) and batch.document_ends is not None
    assert batch.document_ends.dtype == torch.int32 and batch.document_ends.device.type == "cpu"
    ends = [[5, 8, 12], [2, 12], [*third, 12]]
    assert batch.document_ends.tolist() == [row + [12] * (3 - len(row)) for row in ends]
    assert batch.num_real_tokens == 8 + 2 + 4 and batch.num_documents == 2 + 1 + len(third)
    # the first token of a document is nobody's target
    assert batch.labels[2, :4].tolist() == [5, -100 if by_segments else 6, 7, -100]
    assert batch.num_trained_tokens == int((batch.labels != IGNORED).sum()) == sum(batch.micro_batch_trained_tokens)


def test_documents_of_a_sample_that_is_cut_and_of_rows_that_fill_up(tmp_path: Path) -> None:
    dataset = opened(tmp_path, SAMPLES)
    shape = BatchShape(1, 4, 0, 1, 6, True, 4, 0, DocumentRule(True, 2, 0))
    batch = next(iter(EvalBatches(dataset, range(3), shape)))
    assert batch.document_ends is not None
    assert batch.document_ends.tolist() == [[5, 6, 6], [2, 6, 6], [2, 4, 6], [6, 6, 6]]
    assert batch.num_documents == 2 + 1 + 2 and batch.cut_samples == 1


def test_without_reset_attention_mask_a_sample_is_one_document(tmp_path: Path) -> None:
    dataset = opened(tmp_path, SAMPLES)
    batch = next(iter(StepBatches(dataset, range(3), 1, False, 1, 3, 0, 1, 64, False, 4, 0)))
    assert batch.document_ends is None and batch.num_documents == 3 and batch.num_real_tokens == 10 + 3 + 4


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, 24 samples, and the same samples in packs of 63 tokens (``packs``) with their numbers."""
    folder = make_workspace(tmp_path_factory.mktemp("packs"))
    single = open_sft_dataset(folder / "data" / "set")
    ids, labels = [single[i][0] for i in range(len(single))], [single[i][1] for i in range(len(single))]
    bags = fill_bags(single.lengths, 63)
    samples = list(packed_samples(ids, labels, bags, 64, 0, neat=True))
    for key in KEYS:
        with IndexedDatasetBuilder(key_stem(folder / "data" / "packs", key)) as builder:
            for sample in samples:
                builder.add_document(sample[key])
            builder.finish()
    assert 1 < len(bags) < len(single) / 3
    return folder


def one_step(config: TrainConfig) -> tuple[float, torch.Tensor, float]:
    """Loss, all gradients and validation loss of one global batch, on one process."""
    plan = plan_training(config, 1)
    context = single_process_context()
    stages, _ = build_model(plan, context)
    parts = build_machinery(plan, context, stages, trained_parameters(stages, plan.table, context))
    trainer = Trainer(config, context, parts, plan.state, None, plan.global_batch_size, None, None)
    batch = next(iter(training_batches(plan, context)))
    seen = EvalBatches(plan.dataset, plan.splits[0], BatchShape(1, 2, 0, 1, 64, False, 4, 0, plan.documents))
    validation, _ = trainer.evaluate(seen)
    result = trainer.step(batch)
    assert result.loss is not None
    return result.loss, parts.gradients.parts[0].buffer.clone(), validation


def test_packed_equals_unpacked(workspace: Path) -> None:
    """Loss, gradients and validation loss of the same records, one a sample and packed; and not so when they see each other."""
    common: dict[str, Any] = {"lora": None, "micro_batch_size": 1, "data__seq_length": 64, "optimizer__clip_grad": 0.0}
    packs = str(workspace / "data" / "packs")
    count = len(open_sft_dataset(packs))
    loss, gradients, validation = one_step(make_config(workspace, **common, global_batch_size=24))
    common |= {"data__data_path": packs, "global_batch_size": count}
    packed = one_step(make_config(workspace, **common, data__reset_attention_mask=True, data__neat_pack=True))
    assert packed[0] == pytest.approx(loss, rel=1e-5) and packed[2] == pytest.approx(validation, rel=1e-5)
    assert float((packed[1] - gradients).norm() / gradients.norm()) <= 1e-5
    seeing = one_step(make_config(workspace, **common))
    assert abs(seeing[0] - loss) > 1e-3 * loss and abs(seeing[2] - validation) > 1e-3 * validation


def test_packed_training_does_not_depend_on_the_layout(pool: ProcessPool, workspace: Path, tmp_path: Path) -> None:
    def config(name: str) -> TrainConfig:
        return make_config(
            workspace,
            data__data_path=str(workspace / "data" / "packs"),
            data__reset_attention_mask=True,
            data__seq_length=64,
            micro_batch_size=1,
            global_batch_size=4,
            train_iters=3,
            save__save=tmp_path / name,
        )

    pool.run(run_training, 1, config("one"))
    pool.run(run_training, 2, change(config("two"), parallel=ParallelFlags(1, 2)))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def rule_of(folder: Path, samples: list[Any], manifest: Manifest | None = None, **flags: bool) -> tuple[DocumentRule | None, list[str]]:
    dataset = opened(folder, samples)
    dataset.manifest = manifest
    notes: list[str] = []
    tokenizer = SimpleNamespace(eos_token="</s>", eos_token_id=2, pad_token_id=0)
    return document_rule(DataFlags(**flags), dataset, tokenizer, notes), notes  # type: ignore[arg-type]


def test_what_flags_and_data_say_together(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("mindspeed_lora"), "propagate", True)
    plain = [(ids, labels, [1] * len(ids)) for ids, labels, _ in SAMPLES]
    assert rule_of(tmp_path, plain) == (None, [])
    rule, notes = rule_of(tmp_path, SAMPLES, reset_attention_mask=True, neat_pack=True)
    assert rule == DocumentRule(True, 2, 0) and "a document is a record" in notes[0]
    rule, notes = rule_of(tmp_path, plain[:1], reset_attention_mask=True)
    assert rule == DocumentRule(False, 2, 0) and "ends at each '</s>'" in notes[0] and not caplog.records
    rule_of(tmp_path, [([5, 2, 6, 7, 2], [-100, -100, -100, 7, 2], [1] * 5)], reset_attention_mask=True)
    assert "answers do not see what stands before it" in caplog.text
    _, notes = rule_of(tmp_path, SAMPLES, Manifest(kind="data", data={"packing": "neat-pack"}))
    assert "see each other" in notes[0]
    with pytest.raises(UsageError, match=r"--neat-pack, but .* holds no record numbers"):
        rule_of(tmp_path, plain, reset_attention_mask=True, neat_pack=True)
    with pytest.raises(UsageError, match=r"--pack, but .* made with no packing"):
        rule_of(tmp_path, plain, Manifest(kind="data", data={"packing": None}), pack=True)
