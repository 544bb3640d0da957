"""``--verify`` in the commands that run a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import tiny_llama

from mindspeed_lora.arguments.configs import LoadFlags
from mindspeed_lora.checkpoint.start import find_start
from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.manifest import Manifest, part_of, write_manifest


def test_verify_reads_every_file_of_a_manifest(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    flags = LoadFlags(load=tmp_path, verify=True)
    assert f"--verify: {tmp_path} has no manifest to compare with" in find_start(flags, lora=False).notes
    weights = tmp_path / "model.safetensors"
    write_manifest(tmp_path, Manifest(kind="merged", parts=[part_of(tmp_path, weights)]))
    assert f"--verify: 1 files of {tmp_path} have their checksums" in find_start(flags, lora=False).notes
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    find_start(LoadFlags(load=tmp_path), lora=False)  # one bit is not looked for without the flag
    with pytest.raises(CheckpointError, match="CRC32 differs"):
        find_start(flags, lora=False)
