"""``mindspeed_lora.json``: what a step wrote, so that the next step can check it instead of being told again.

A manifest lies beside every artefact of ours. A reader refuses an unknown major version and ignores an unknown
minor one. Artefacts of other programs have none, which is fine: :func:`read_manifest` returns ``None``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_lora import __version__
from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.files import crc32_of, write_json

MANIFEST_NAME = "mindspeed_lora.json"
SCHEMA = "1.0"
KINDS = ("base", "data", "adapter", "merged", "resume")


@dataclass(frozen=True)
class Part:
    """One file of an artefact: path relative to the manifest's folder, size, checksum."""

    file: str
    bytes: int
    crc32: str


@dataclass(frozen=True)
class Manifest:
    """The contents of ``mindspeed_lora.json``; fields that a kind does not have are ``None`` or empty.

    ``layout``: tensor_parallel_size, pipeline_parallel_size, ...; ``lora``: r, alpha, targets, per_module;
    ``base``: path, fingerprint; ``template``: name, fingerprint, enable_thinking;
    ``data``: form, input, handler, map_keys, seq_length; ``tokenizer``: path, fingerprint; ``counts``: records, tokens, parameters, ...
    """

    kind: str
    model: dict[str, Any] | None = None
    layout: dict[str, Any] | None = None
    dtype: str | None = None
    lora: dict[str, Any] | None = None
    tokenizer: dict[str, Any] | None = None
    template: dict[str, Any] | None = None
    base: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    fingerprint: str | None = None
    iteration: int | None = None
    parts: list[Part] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    producer: str = f"mindspeed-lora {__version__}"
    schema: str = SCHEMA

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"manifest kind {self.kind!r} is none of {KINDS}")


def part_of(folder: Path, file: Path, crc32: int | None = None) -> Part:
    """Describe ``file`` (inside ``folder``); it is read once where its CRC32 is not known from writing it."""
    checksum = crc32_of(file) if crc32 is None else f"{crc32:08x}"
    return Part(str(Path(file).relative_to(folder)), file.stat().st_size, checksum)


def write_manifest(folder: Path, manifest: Manifest, name: str = MANIFEST_NAME) -> None:
    """Write ``manifest`` into ``folder`` (fields that are None are left out)."""
    fields = {key: value for key, value in asdict(manifest).items() if value is not None}
    write_json(Path(folder) / name, {"schema": fields.pop("schema"), **fields})


def read_manifest(folder: Path, name: str = MANIFEST_NAME) -> Manifest | None:
    """Read ``folder``'s manifest, or None where there is none.

    Raises:
        CheckpointError: the file is no JSON, lacks a field, or is of an unknown major version.
    """
    path = Path(folder) / name
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        major = str(fields["schema"]).split(".")[0]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable manifest ({error}); restore the file or write the artefact again") from error
    if major != SCHEMA.split(".")[0]:
        raise CheckpointError(f"{path}: schema {fields['schema']} is unknown, this program reads {SCHEMA}; use a newer mindspeed-lora")
    known = Manifest.__dataclass_fields__
    fields["parts"] = [Part(**part) for part in fields.get("parts", [])]
    return Manifest(**{key: value for key, value in fields.items() if key in known})


def verify_parts(folder: Path, manifest: Manifest) -> None:
    """Read every part whole and compare size and checksum.

    Raises:
        CheckpointError: a part is missing, has another size, or other bytes.
    """
    for part in manifest.parts:
        path = Path(folder) / part.file
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though {MANIFEST_NAME} lists it")
        if path.stat().st_size != part.bytes:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes, but {MANIFEST_NAME} says {part.bytes}; the file is truncated or another one"
            )
        if crc32_of(path) != part.crc32:
            raise CheckpointError(f"{path}: its CRC32 differs from the one in {MANIFEST_NAME}; the file was changed or is damaged")
