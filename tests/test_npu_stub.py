"""The NPU code path without an NPU: the published torch_npu wheel on stub CANN libraries (``../shared/npu_stub``)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import ROOT
from packaging.version import Version

STUB = Path(os.environ.get("MINDSPEED_LORA_TEST_NPU_STUB", ROOT.parent / "shared" / "npu_stub"))
# Looked up at run time by one torch_npu or another (2.7.1, 2.13.0), and not in the stub's own list.
MORE_FUNCTIONS = ("aclrtSetOpExecuteTimeOut", "aclrtDestroyStreamForce", "aclrtSetStreamOverflowSwitch", "aclSetCompileopt")
VERSION = torch.__version__.split("+")[0]


def _site_with_torch_npu(folder: Path) -> Path:
    """A folder that holds torch_npu and a link to this environment's torch; skips where the wheel cannot be had."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), f"torch_npu=={VERSION}"]
    if subprocess.run(command, capture_output=True, timeout=300).returncode != 0:
        pytest.skip(f"torch_npu=={VERSION} cannot be installed here")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    (folder / "torch").symlink_to(Path(spec.origin).parent)
    return folder


def _build_more_functions(libraries: Path) -> None:
    """Put them into the libraries that they are looked up in; an empty libopapi is asked for as well."""
    stub = (libraries / "acl_stub.c").read_text()
    for library, source, present in (("ascendcl", "acl_stub.c", stub), ("acl_op_compiler", "empty.c", ""), ("opapi", "empty.c", "")):
        more = libraries / f"more_{library}.c"
        more.write_text("".join(f"long {name}(){{return 0;}}\n" for name in MORE_FUNCTIONS if f" {name}(" not in present))
        output = libraries / f"lib{library}.so"
        command = ["gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{output.name}", "-o", str(output), str(libraries / source), str(more)]
        subprocess.run(command, check=True)


def test_decoder_layer_on_fake_npu_tensors(tmp_path: Path) -> None:
    if not (STUB / "build.sh").is_file():
        pytest.skip(f"{STUB} is absent (set MINDSPEED_LORA_TEST_NPU_STUB)")
    if sys.platform != "linux" or shutil.which("gcc") is None or shutil.which("nm") is None:
        pytest.skip("the stub needs Linux, gcc and nm")
    if importlib.metadata.version("torch").split("+")[0] != VERSION:
        pytest.skip("torch's version is ambiguous")
    if Version(transformers.__version__) < Version("5"):
        pytest.importorskip("einops", reason="transformers 4 imports einops where there is an NPU")
    site, libraries = _site_with_torch_npu(tmp_path / "site"), tmp_path / "stub"
    built = subprocess.run(["bash", str(STUB / "build.sh"), str(site), str(libraries)], capture_output=True, text=True, timeout=300)
    if built.returncode != 0:
        pytest.skip(f"the stub cannot be built: {built.stderr[-300:]}")
    _build_more_functions(libraries)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{site}:{ROOT}",
        "LD_LIBRARY_PATH": str(libraries),
        "LD_PRELOAD": str(libraries / "libascendcl.so"),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
    }
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "npu_layer.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "backend cpu:gloo,npu:hccl" in result.stdout
    for sp, layer, pair in ((True, "4 + 4", "2 + 2"), (False, "2 + 2", "1 + 1")):
        assert f"fused LoRA pair at TP4, SP {sp}: {pair} collectives" in result.stdout
        assert f"layer at TP4, SP {sp}: {layer} collectives, 8 LoRA gradients" in result.stdout
    experts = "forward alone" if Version(VERSION) < Version("2.8") else "4 LoRA gradients"
    assert f"experts: npu_grouped_matmul, {experts}" in result.stdout
    for trained in (True, False):
        assert f"loss head at TP4, trained {trained}: 2 collectives" in result.stdout
