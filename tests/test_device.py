"""What a CPU and its C library are told and asked."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from mindspeed_lora import device

_FAULTS = """
import resource, sys, torch
from mindspeed_lora.parallel.context import initialize
if sys.argv[1] == "kept":
    initialize("cpu", 1, 1, False, 1)
def work():
    six = [torch.empty(4 << 20).fill_(1.0) for _ in range(6)]
for _ in range(5):  # until the heap has its place for them
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps freed memory as it likes")
def test_memory_that_a_step_frees_is_not_faulted_in_again() -> None:
    """Six tensors of 16 MiB, ten times: 24,576 pages each time where glibc gives large blocks back at once, as it is told to here."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    faults = {}
    for kept in ("kept", "as it is"):
        command = [sys.executable, "-c", _FAULTS, kept]
        faults[kept] = int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert faults["kept"] < 5000 < 100_000 < faults["as it is"], faults


@pytest.mark.parametrize(
    ("fields", "idle", "fast"),
    [
        ({"vendor_id": "AuthenticAMD", "cpu family": "26", "flags": "avx2 avx512f avx512_bf16"}, True, {torch.bfloat16}),
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "flags": "avx2 avx512f avx512_bf16"}, True, {torch.bfloat16}),
        ({"vendor_id": "AuthenticAMD", "cpu family": "26", "flags": "avx2"}, False, set()),
        ({"vendor_id": "GenuineIntel", "cpu family": "6", "flags": "avx512f avx512_bf16"}, False, set()),
        ({"vendor_id": "GenuineIntel", "cpu family": "26", "flags": "avx512f avx512_bf16 amx_bf16"}, False, {torch.bfloat16}),
        ({"vendor_id": "GenuineIntel", "flags": "amx_bf16 amx_fp16"}, False, {torch.bfloat16, torch.float16}),
        ({}, False, set()),
    ],
)
def test_what_a_cpu_multiplies_fast_is_read_from_what_it_says(
    fields: dict[str, str], idle: bool, fast: set[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_cpu_fields", lambda: fields)
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    assert device.mkl_leaves_units_idle.__wrapped__() == (idle and torch.backends.mkldnn.is_available())
    assert {dtype for dtype in (torch.bfloat16, torch.float16) if device.cpu_multiplies_fast.__wrapped__(dtype)} == fast
