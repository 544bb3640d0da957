"""Reading ``.pt`` files: every pickle protocol, nothing of them run, nothing of the process changed."""

from __future__ import annotations

import argparse
import collections
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_file_helpers import Runs, save_rank

from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.weights.inert import InertObject
from mindspeed_lora.weights.sources import open_base
from mindspeed_lora.weights.torch_files import load_torch_file


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "it_ran"
    path = save_rank(tmp_path / "mg", {"args": Runs(f"touch {proof}"), "model": {}})
    with pytest.raises(CheckpointError, match=r"(posix|nt)\.system.*refused, nothing of it was run"):
        load_torch_file(path)
    with pytest.raises(CheckpointError, match="refused"):
        open_base(tmp_path / "mg")
    assert not proof.exists()


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_pickle_protocol_is_read_and_none_runs_code(protocol: int, tmp_path: Path) -> None:
    proof = tmp_path / "it_ran"
    path = tmp_path / "file.pt"
    tensor = torch.arange(24, dtype=torch.bfloat16).view(4, 6)
    torch.save({"model": collections.OrderedDict(a=tensor[1:3, ::2], b=tensor), "n": {1, 2}}, path, pickle_protocol=protocol)
    read = load_torch_file(path)
    assert torch.equal(read["model"]["a"], tensor[1:3, ::2]) and torch.equal(read["model"]["b"], tensor)
    torch.save({"args": Runs(f"touch {proof}"), "model": {}}, path, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match="refused, nothing of it was run"):
        load_torch_file(path)
    assert not proof.exists()


class _Reduced:
    """Pickles as a call of ``function`` with ``arguments``, and then as BUILD with ``state``."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], state: Any = None) -> None:
        self.parts = (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (_Reduced(eval, ("1",)), "refers to builtins.eval"),
        (_Reduced(getattr, ("a", "b")), "refers to builtins.getattr"),
        (_Reduced(__import__, ("os",)), "refers to builtins.__import__"),
        (_Reduced(shutil.rmtree, ("/nowhere",)), "refers to shutil.rmtree"),
        (_Reduced(torch._utils._rebuild_tensor_v2, ("x", 0, (2,), (1,), False, None)), "not of a storage"),
    ],
)
def test_names_that_no_checkpoint_needs_are_refused(what: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"args": what, "model": {}}, path, pickle_protocol=4)
    with pytest.raises(CheckpointError, match=message):
        load_torch_file(path)


def test_calls_of_expected_modules_make_inert_objects(tmp_path: Path) -> None:
    proof = tmp_path / "it_ran"
    path = tmp_path / "file.pt"
    torch.save({"args": _Reduced(torch.save, ({}, str(proof))), "more": _Reduced(torch.hub.load, ("a/b", "c")), "model": {}}, path)
    read = load_torch_file(path)
    assert isinstance(read["args"], InertObject) and isinstance(read["more"], InertObject) and not proof.exists()


def test_functions_and_storages_cannot_be_changed(tmp_path: Path) -> None:
    before = torch._utils._rebuild_tensor_v2.__dict__.copy()
    for head in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n"):
        path = tmp_path / "file.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", b"\x80\x02" + head + b"}X\x01\x00\x00\x00aK\x01sb.")
        with pytest.raises(CheckpointError, match="damaged"):
            load_torch_file(path)
    assert torch._utils._rebuild_tensor_v2.__dict__ == before


def test_tensors_saved_on_an_npu_are_read(tmp_path: Path) -> None:
    """torch_npu saves ``_rebuild_npu_tensor(storage, offset, size, stride, requires_grad, hooks, format)`` at location npu:0."""
    path, tensor = tmp_path / "file.pt", torch.arange(6.0).view(2, 3)
    torch.save({"model": {"a": tensor}}, path, pickle_protocol=2)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            data = data.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch_npu.utils.storage\n_rebuild_npu_tensor\n")
            archive.writestr(name, data.replace(b"X\x03\x00\x00\x00cpu", b"X\x05\x00\x00\x00npu:0"))
    assert torch.equal(load_torch_file(path)["model"]["a"], tensor)


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"model": {"a": torch.ones(4, 4)}}, path, pickle_protocol=2)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data.replace(b"K\x04K\x04\x86", b"K\x04K\x09\x86", 1))
    with pytest.raises(CheckpointError, match="reaches beyond its storage of 64 bytes"):
        load_torch_file(path)


def test_containers_and_namespaces_are_read_without_their_classes(tmp_path: Path) -> None:
    counts: collections.defaultdict[str, Any] = collections.defaultdict(list)
    counts["a"] = torch.ones(2)
    content = {
        "args": argparse.Namespace(num_layers=3, params_dtype=torch.bfloat16, spec=["x", "y"]),
        "model": collections.OrderedDict(a=torch.zeros(1)),
        "model1": counts,
    }
    path = save_rank(tmp_path, content)
    read = load_torch_file(path)
    assert vars(read["args"])["num_layers"] == 3 and vars(read["args"])["params_dtype"] is torch.bfloat16
    assert not isinstance(read["args"], argparse.Namespace), "nothing but an inert stand-in"
    assert isinstance(read["model1"], dict) and torch.equal(read["model1"]["a"], torch.ones(2))
