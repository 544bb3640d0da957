"""Global batches: order, resume, padding, and independence of the layout."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from mindspeed_lora.data.batches import BatchShape, EvalBatches, StepBatch, StepBatches
from mindspeed_lora.data.indexed_dataset import IndexedDatasetBuilder
from mindspeed_lora.data.sft_dataset import IGNORED, KEYS, SFTDataset, key_stem, open_sft_dataset
from mindspeed_lora.errors import UsageError

PAD = 7
NUM_SAMPLES = 11


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SFTDataset:
    """Sample i has 5 + 3 i ids 100 i, 100 i + 1, ...; the second half is trained; sample 4 is not trained at all."""
    prefix = tmp_path_factory.mktemp("data") / "d"
    builders = {key: IndexedDatasetBuilder(key_stem(prefix, key)) for key in KEYS}
    for sample in range(NUM_SAMPLES):
        ids = 100 * sample + np.arange(5 + 3 * sample)
        labels = np.where(np.arange(len(ids)) < (len(ids) if sample == 4 else len(ids) // 2), IGNORED, ids)
        for key, values in (("input_ids", ids), ("labels", labels), ("attention_mask", np.ones_like(ids))):
            builders[key].add_document(values)
    for builder in builders.values():
        builder.finish()
    return open_sft_dataset(prefix)


def batches(dataset: SFTDataset, count: int = 4, **overrides: Any) -> list[StepBatch]:
    options: dict[str, Any] = dict(
        indices=range(NUM_SAMPLES),
        seed=1234,
        shuffle=True,
        micro_batch_size=1,
        global_batch_size=4,
        dp_rank=0,
        dp_size=1,
        seq_length=64,
        pad_to_seq_length=False,
        pad_multiple=8,
        pad_token_id=PAD,
    )
    return list(itertools.islice(StepBatches(dataset, **{**options, **overrides}), count))


def test_order_is_one_random_state_through_the_epochs(dataset: SFTDataset) -> None:
    random = np.random.RandomState(1234)
    stream: list[int] = []
    for _ in range(3):
        epoch = np.arange(2, 9)
        random.shuffle(epoch)
        stream += epoch.tolist()
    got = batches(dataset, 5, indices=range(2, 9))
    assert [sample for batch in got for sample in batch.sample_ids] == stream[:20]
    assert stream[:7] != stream[7:14]


def test_no_shuffle_is_sequential_and_epochs_join(dataset: SFTDataset) -> None:
    got = batches(dataset, 3, shuffle=False, indices=range(5))
    assert [batch.sample_ids for batch in got] == [(0, 1, 2, 3), (4, 0, 1, 2), (3, 4, 0, 1)]


def test_rows_labels_and_padding(dataset: SFTDataset) -> None:
    (batch,) = batches(dataset, 1, shuffle=False)
    assert batch.input_ids.shape == batch.labels.shape == (4, 16)  # longest is 14, rounded up to 8
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.input_ids[1].tolist() == [100, 101, 102, 103, 104, 105, 106, 107] + [PAD] * 8
    assert batch.labels[1].tolist() == [IGNORED] * 3 + [104, 105, 106, 107] + [IGNORED] * 9  # label i is the target of i
    assert batch.num_real_tokens == 5 + 8 + 11 + 14
    assert batch.num_trained_tokens == int((batch.labels != IGNORED).sum()) == 3 + 4 + 6 + 7
    assert batch.micro_batch_trained_tokens == (3, 4, 6, 7)


@pytest.mark.parametrize(("pad_to_seq_length", "multiple", "columns"), [(True, 8, 64), (False, 8, 16), (False, 6, 18), (False, 1, 14)])
def test_padded_length(dataset: SFTDataset, pad_to_seq_length: bool, multiple: int, columns: int) -> None:
    (batch,) = batches(dataset, 1, shuffle=False, pad_to_seq_length=pad_to_seq_length, pad_multiple=multiple)
    assert batch.input_ids.shape[1] == columns


def test_long_samples_are_cut_at_the_right_and_counted(dataset: SFTDataset) -> None:
    (batch,) = batches(dataset, 1, shuffle=False, seq_length=8)
    assert batch.input_ids.shape[1] == 8
    assert batch.cut_samples == 2
    assert batch.input_ids[3].tolist() == [300, 301, 302, 303, 304, 305, 306, 307]
    assert batch.labels[3].tolist() == [IGNORED] * 6 + [307, IGNORED]
    assert batch.num_trained_tokens == int((batch.labels != IGNORED).sum())


def test_masked_samples_are_counted(dataset: SFTDataset) -> None:
    stream = StepBatches(dataset, range(NUM_SAMPLES), 1, False, 1, 4, 0, 1, 64, False, 8, PAD)
    first, second = itertools.islice(stream, 2)
    assert (first.skipped_samples, second.skipped_samples, stream.num_skipped_samples) == (0, 1, 1)
    assert (second.labels[0] == IGNORED).all()


@pytest.mark.parametrize(("micro", "dp"), [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 4), (2, 4), (1, 8)])
def test_ranks_together_have_the_whole_batch(dataset: SFTDataset, micro: int, dp: int) -> None:
    (whole,) = batches(dataset, 1, global_batch_size=8, micro_batch_size=8)
    ranks = [batches(dataset, 1, global_batch_size=8, micro_batch_size=micro, dp_rank=rank, dp_size=dp)[0] for rank in range(dp)]
    for rank in ranks:
        assert rank.sample_ids == whole.sample_ids
        assert rank.num_trained_tokens == whole.num_trained_tokens
        assert rank.input_ids.shape == (8 // dp, whole.input_ids.shape[1])
        counts = (rank.labels != IGNORED).reshape(8 // dp // micro, -1).sum(1)
        assert rank.micro_batch_trained_tokens == tuple(counts.tolist())
    # micro-batch m of all ranks, one after the other, are rows m * micro * dp .. of the whole
    pieces = [rank.input_ids.split(micro)[m] for m in range(8 // dp // micro) for rank in ranks]
    assert torch.equal(torch.cat(pieces), whole.input_ids)


@pytest.mark.parametrize("prefetch", [True, False])
def test_resume_continues_the_stream(dataset: SFTDataset, prefetch: bool) -> None:
    every = batches(dataset, 9, prefetch=prefetch)
    resumed = batches(dataset, 4, start_sample=5 * 4, prefetch=prefetch)
    for expected, got in zip(every[5:], resumed, strict=True):
        assert expected.sample_ids == got.sample_ids
        assert torch.equal(expected.labels, got.labels)


def test_next_sample_counts_what_was_handed_out(dataset: SFTDataset) -> None:
    stream = StepBatches(dataset, range(NUM_SAMPLES), 1, True, 1, 4, 0, 1, 64, False, 8, PAD, start_sample=8)
    iterator = iter(stream)
    next(iterator), next(iterator)
    assert stream.next_sample == 16


def test_global_batch_must_be_a_multiple() -> None:
    with pytest.raises(UsageError, match=r"--global-batch-size 6 is no multiple of --micro-batch-size 2 x data parallel size 2 = 4; use 4"):
        BatchShape(2, 6, 0, 2, 64, False, 8, PAD)


def test_evaluation_reads_each_sample_once_and_fills_up(dataset: SFTDataset) -> None:
    shape = BatchShape(2, 4, 1, 2, 64, False, 8, PAD)
    got = list(EvalBatches(dataset, range(3, 9), shape))
    assert [batch.sample_ids for batch in got] == [(3, 4, 5, 6), (7, 8, -1, -1)]
    assert (got[1].labels == IGNORED).all()
    assert (got[1].input_ids == PAD).all()
    assert got[1].num_trained_tokens == sum(int((dataset[i][1][1:] != IGNORED).sum()) for i in (7, 8))
    assert len(list(EvalBatches(dataset, range(3, 9), shape, max_batches=1))) == 1
    assert list(EvalBatches(dataset, range(0), shape)) == []
