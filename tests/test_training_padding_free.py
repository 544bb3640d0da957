"""Padding-free micro-batches: the same losses and gradients as padded ones, at every layout, with nothing padded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_cells import LAYOUTS, assemble, run_cell
from pool import ProcessPool
from test_training_layouts import relative
from training_helpers import change, make_config, make_workspace, run_training

from mindspeed_lora.data.batches import BatchShape, StepBatches, make_batch
from mindspeed_lora.data.packing import IGNORED
from mindspeed_lora.data.sft_dataset import DocumentRule, open_sft_dataset
from mindspeed_lora.data.spreading import deal, spread
from mindspeed_lora.weights.families import model_config_from_hf
from mindspeed_lora.weights.table import WeightTable

NAMED = {layout.name: layout for layout in LAYOUTS}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("padding_free"))


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_record_lies_in_one_row_and_rows_are_even(lengths: list[int], most: int, ranks: int) -> None:
    count = -(-len(lengths) // (most * ranks)) * most * ranks
    lengths = lengths + [0] * (count - len(lengths))
    rows = spread(lengths, count // most, most)
    assert sorted(itertools.chain(*rows)) == list(range(count)) and all(len(row) == most for row in rows)
    hands = deal(rows, lengths, ranks)
    assert sorted(map(tuple, itertools.chain(*hands))) == sorted(map(tuple, rows))
    assert {len(hand) for hand in hands} == {len(rows) // ranks}


def test_rows_of_unlike_records_get_about_as_long() -> None:
    random = np.random.RandomState(0)
    lengths = random.randint(10, 1000, 64).tolist()
    loads = [sum(lengths[number] for number in row) for row in spread(lengths, 8, 8)]
    assert max(loads) < 1.02 * min(loads)


def batch_of(folder: Path, **changes: Any) -> Any:
    shape = BatchShape(**{**dict(micro_batch_size=4, global_batch_size=8, dp_rank=0, dp_size=1), **changes}, **REST)
    return make_batch(open_sft_dataset(folder / "data" / "set"), np.arange(8), shape)


REST: dict[str, Any] = dict(seq_length=32, pad_to_seq_length=True, pad_multiple=1, pad_token_id=0)


def test_a_row_holds_records_behind_one_another(workspace: Path) -> None:
    dataset = open_sft_dataset(workspace / "data" / "set")
    batch = batch_of(workspace, padding_free=True)
    assert batch.input_ids.shape[0] == 2 and batch.micro_batch_size == 1
    assert sum(batch.columns) == batch.num_real_tokens == int(dataset.lengths[:8].sum()), "no position is padding"
    assert batch.input_ids.shape[1] == max(batch.columns)
    seen = []
    for row in range(2):
        start = 0
        for end in sorted(set(batch.document_ends[row].tolist()) - {batch.input_ids.shape[1]} | {batch.columns[row]}):
            ids = batch.input_ids[row, start:end].tolist()
            number = next(number for number in range(8) if dataset.input_ids[number].tolist() == ids)
            assert batch.labels[row, start:end].tolist() == [*dataset.labels[number][1:].tolist(), IGNORED]
            seen.append(number)
            start = end
    assert sorted(seen) == list(range(8))
    padded = batch_of(workspace)
    assert (batch.num_trained_tokens, batch.num_documents) == (padded.num_trained_tokens, padded.num_documents)


@pytest.mark.parametrize("layout", ["tp1", "tp2sp", "pp2", "dp2", "pp2vpp2"])
def test_losses_and_gradients_are_those_of_padded_rows(pool: ProcessPool, workspace: Path, layout: str) -> None:
    found = NAMED[layout]
    config = change(
        make_config(workspace, micro_batch_size=4, global_batch_size=8, optimizer__lr_warmup_iters=0, data__pad_to_seq_length=True),
        parallel__tensor_parallel_size=found.tp,
        parallel__pipeline_parallel_size=found.pp,
        parallel__sequence_parallel=found.sp,
        parallel__layers_per_virtual_stage=found.virtual,
        data__padding_free=True,
    )
    free = pool.run(run_cell, found.world_size, config, 3)
    padded = pool.run(run_cell, 1, make_config(workspace, micro_batch_size=4, optimizer__lr_warmup_iters=0), 3)
    assert free[0].losses == pytest.approx(padded[0].losses, rel=1e-5)
    assert free[0].norms == pytest.approx(padded[0].norms, rel=1e-4)
    table = WeightTable(model_config_from_hf(workspace / "model"))
    assert relative(assemble(free, table, "gradients"), assemble(padded, table, "gradients")) < 1e-5


def test_documents_of_packed_samples_stay_apart(pool: ProcessPool, workspace: Path) -> None:
    """With a rule of its own (here: a token ends a document) a sample may hold several documents, and loses its padding."""
    dataset = open_sft_dataset(workspace / "data" / "set")
    rule = DocumentRule(False, int(dataset.input_ids[0][3]), 0)
    common = dict(indices=range(24), seed=0, shuffle=False, micro_batch_size=4, global_batch_size=8, dp_rank=0, dp_size=1)
    batch = next(iter(StepBatches(dataset, **common, **REST, documents=rule, padding_free=True)))
    plain = next(iter(StepBatches(dataset, **common, **REST, documents=rule)))
    assert batch.num_documents == plain.num_documents > 8 and batch.num_trained_tokens == plain.num_trained_tokens


def test_evaluation_too(workspace: Path) -> None:
    config = make_config(workspace, train_iters=1, eval_interval=1, data__split=(70.0, 30.0, 0.0), micro_batch_size=4)
    lines = [
        [line for line in run_training(change(config, data__padding_free=free)).splitlines() if "validation loss" in line]
        for free in (False, True)
    ]
    losses = [float(line[0].split("value: ")[1].split(" ")[0]) for line in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
