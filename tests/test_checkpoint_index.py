"""The index of training state is read without executing what it names; damage is one message."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from mindspeed_lora.checkpoint.resume import _load
from mindspeed_lora.checkpoint.resume_reader import INDEX_FILE, read_index
from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.parallel.context import single_process_context

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the fixture saves in one process
TENSORS = {"exp_avg.weight": torch.arange(6.0).view(2, 3), "rng.cpu.0": torch.arange(5, dtype=torch.uint8)}


class Payload:
    """What a stranger could put into an index."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save(dict(TENSORS), storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    return tmp_path


def empty() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in TENSORS.items()}


def test_state_is_read_back(folder: Path) -> None:
    wanted = empty()
    _load(folder, wanted, single_process_context())
    assert all(torch.equal(wanted[name], value) for name, value in TENSORS.items())
    assert {name: tuple(entry.size) for name, entry in read_index(folder).state_dict_metadata.items()} == {  # type: ignore[union-attr]
        "exp_avg.weight": (2, 3),
        "rng.cpu.0": (5,),
    }


@pytest.mark.parametrize("function", [os.mkdir, exec, torch.load], ids=lambda function: function.__name__)
def test_nothing_that_an_index_names_is_called(folder: Path, function: Any) -> None:
    mark = folder / "executed"
    argument = f"open({str(mark)!r}, 'w')" if function is exec else str(mark)
    (folder / INDEX_FILE).write_bytes(pickle.dumps(Payload(function, argument)))
    for read in (lambda: read_index(folder), lambda: _load(folder, empty(), single_process_context())):
        with pytest.raises(CheckpointError, match="which no index needs"):
            read()
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04garbage", pickle.dumps({"a": 1}), pickle.dumps(OrderedDict(a=1))])
def test_a_damaged_index_is_one_message(folder: Path, content: bytes) -> None:
    (folder / INDEX_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: not a readable index .*--finetune"):
        read_index(folder)


def test_a_cut_index_is_one_message(folder: Path) -> None:
    path = folder / INDEX_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a readable index"):
        read_index(folder)


def test_cut_tensors_are_one_message_without_traceback(folder: Path) -> None:
    (data,) = folder.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"cannot be read .*--no-load-optim") as caught:
        _load(folder, empty(), single_process_context())
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
