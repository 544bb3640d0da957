"""``convert_ckpt.py --inspect``: what a folder is, as far as it says so itself; what is damaged is an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mindspeed_lora.arguments.configs import InspectConfig
from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.log import get_logger
from mindspeed_lora.manifest import MANIFEST_NAME, Manifest, read_manifest, verify_parts
from mindspeed_lora.weights.adapters import Adapter, MegatronAdapter
from mindspeed_lora.weights.families import model_config_from_hf
from mindspeed_lora.weights.hf_files import read_safetensors_header
from mindspeed_lora.weights.megatron_folder import MegatronFolder, is_megatron_folder
from mindspeed_lora.weights.peft_files import ADAPTER_FILE_NAME
from mindspeed_lora.weights.sources import Base, MegatronBase, open_adapter, open_base
from mindspeed_lora.weights.table import WeightTable

Line = tuple[str, str]
_LABEL_WIDTH = 14
_DATA_SUFFIX = ".idx"


def inspect(config: InspectConfig) -> int:
    """Print what ``config.folder`` is, line by line as it becomes known, and return the exit code 0.

    Raises:
        CheckpointError: the folder is nothing known, or damaged; what was found out before has been printed.
    """
    logger = get_logger()
    for label, value in describe(config.folder, config.verify):
        logger.info("%s%s", f"{label + ':':<{_LABEL_WIDTH}}" if label else "", value)
    return 0


def describe(folder: Path, verify: bool = False) -> Iterator[Line]:
    """(label, value) of everything known about a folder; the weight table comes last, without a label.

    ``verify``: also compare the checksums that a manifest lists.

    Raises:
        CheckpointError: as :func:`inspect`.
    """
    yield "folder", str(folder.resolve())
    if (folder / "adapter_config.json").is_file() and not is_megatron_folder(folder):
        yield from _describe_adapter(folder, verify)
    elif is_megatron_folder(folder):
        names = MegatronFolder(folder).index()
        only_lora = bool(names) and all("lora_" in name for name in names)
        yield from _describe_adapter(folder, verify) if only_lora else _describe_base(folder, verify)
    elif data := _data_files(folder):
        yield from _describe_data(folder, data, verify)
    else:
        yield from _describe_base(folder, verify)


def _size(folder: Path) -> str:
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return f"{human_bytes(sum(sizes))} in {len(sizes)} files"


def human_bytes(count: int) -> str:
    """``1,503,300,120 bytes (1.40 GiB)``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count:,} bytes ({count / size:.2f} {unit})"
    return f"{count:,} bytes"


def _describe_base(folder: Path, verify: bool) -> Iterator[Line]:
    base = open_base(folder)
    megatron = base if isinstance(base, MegatronBase) else None
    merged = base.manifest is not None and base.manifest.kind == "merged"
    holds = (
        "base and adapter in one" if megatron and megatron.unified else "a base model" if not merged else "a model with an adapter merged"
    )
    yield "format", f"{'Megatron V1' if megatron else 'Hugging Face safetensors'}, {holds}"
    yield "size", _size(folder)
    if megatron:
        yield from _layout_lines(megatron.folder)
        yield "tensors", f"{len(megatron.folder.index())} (each counted once over all ranks)"
    else:
        yield "tensors", str(len(getattr(base, "tensors", ())))
    yield "dtype", _name(base.dtype)
    if megatron and megatron.unified:
        yield "lora", _lora(open_adapter(folder))
    yield from _manifest_lines(_manifest_folder(folder, megatron.folder if megatron else None), base.manifest, verify)
    yield from _model_lines(base)
    table = WeightTable(base.model_config)
    base.check_coverage(table)
    yield "coverage", "every tensor of the weight table is there, with its shape, and no other"
    yield "", "\n" + table.describe()


def _describe_adapter(folder: Path, verify: bool) -> Iterator[Line]:
    adapter = open_adapter(folder)
    megatron = adapter if isinstance(adapter, MegatronAdapter) else None
    yield "format", "Megatron V1, LoRA tensors only" if megatron else "PEFT adapter"
    yield "size", _size(folder)
    if megatron:
        index = megatron.folder.index()
        yield from _layout_lines(megatron.folder)
        yield "tensors", f"{len(index)} (each counted once over all ranks)"
        yield "dtype", _name(megatron.folder.shards(next(iter(index.values()))[0])[0].dtype)
    else:
        tensors = read_safetensors_header(folder / ADAPTER_FILE_NAME)
        yield "tensors", str(len(tensors))
        yield "dtype", ", ".join(sorted({_name(tensor.dtype) for tensor in tensors.values()}))
    yield "lora", _lora(adapter)
    yield "layers", str(adapter.num_layers)
    reference = adapter.base_reference or {}
    if path := reference.get("path"):
        yield (
            "base",
            f"{path} ({'is there' if Path(path).is_dir() else 'no such folder here'}), {reference.get('fingerprint') or 'no fingerprint'}",
        )
    else:
        yield "base", "nothing says which"
    yield from _manifest_lines(_manifest_folder(folder, megatron.folder if megatron else None), adapter.manifest, verify)
    table = _table_of(folder, reference.get("path"))
    if table is None:
        yield "weights", "the base model's config.json is not here, so there is no weight table to compare with"
        return
    adapter.check_coverage(table)
    if (spec := adapter.spec(table)) is not None and spec.modules:
        yield "linears", spec.describe()
    yield "coverage", "every targeted module of the weight table has its A and B, and there is no other"
    yield "", "\n" + table.describe()


def _describe_data(folder: Path, files: list[Path], verify: bool) -> Iterator[Line]:
    yield "format", f"preprocessed data (memory maps): {', '.join(file.stem for file in files)}"
    yield "size", _size(folder)
    manifests = sorted(folder.glob(f"*{MANIFEST_NAME}"))
    if not manifests:
        yield "manifest", "none: not written by this program"
    for path in manifests:
        manifest = read_manifest(folder, path.name)
        yield from _manifest_lines(folder, manifest, verify)
        if manifest is not None:
            for label, values in (("data", manifest.data), ("tokenizer", manifest.tokenizer), ("template", manifest.template)):
                if values:
                    yield label, _pairs(values)


def _data_files(folder: Path) -> list[Path]:
    """Indexes of memory-mapped data; a folder with weights is none of data."""
    if any(folder.glob("*.safetensors")) or (folder / "config.json").is_file():
        return []
    return sorted(file for file in folder.glob(f"*{_DATA_SUFFIX}") if file.with_suffix(".bin").is_file())


def _layout_lines(folder: MegatronFolder) -> Iterator[Line]:
    layout = folder.layout
    stages = [sum(1 for place in folder.places if place[0] == stage) for stage in range(folder.pp_size)]
    yield (
        "layout",
        f"tensor parallel {folder.tp_size}, pipeline parallel {folder.pp_size}, virtual stages {folder.num_chunks}, "
        f"expert parallel {layout.expert_parallel_size}{', grouped gemm' if layout.grouped_gemm else ''}; "
        f"layers of each stage: {', '.join(map(str, stages))}",
    )
    yield "iteration", f"{folder.iteration} ({folder.iteration_dir.name})"


def _model_lines(base: Base) -> Iterator[Line]:
    config = base.model_config
    source = f"{base.config_dir}/config.json" if base.config is not None else "the stored args"
    yield "family", f"{config.family} ({source})"
    yield (
        "model",
        f"{config.num_layers} layers, hidden {config.hidden_size}, ffn {config.ffn_hidden_size}, {config.num_attention_heads} heads in "
        f"{config.num_query_groups} query groups of {config.kv_channels}, vocabulary {config.vocab_size}, "
        f"{'tied' if config.tied_embeddings else 'untied'} embeddings",
    )
    if config.rotary_base is None:
        yield "rotary base", "unknown: a Megatron checkpoint's args do not hold it; put the model's config.json beside it"


def _manifest_folder(folder: Path, megatron: MegatronFolder | None) -> Path:
    """The folder that a manifest's parts are relative to."""
    if megatron is not None and (megatron.iteration_dir / MANIFEST_NAME).is_file():
        return megatron.iteration_dir
    return folder


def _manifest_lines(folder: Path, manifest: Manifest | None, verify: bool) -> Iterator[Line]:
    if manifest is None:
        yield "manifest", "none: not written by this program"
        return
    yield "manifest", f"{manifest.kind}, written by {manifest.producer}"
    if manifest.fingerprint:
        yield "fingerprint", manifest.fingerprint
    if manifest.base and manifest.kind != "adapter":
        yield "base", _pairs(manifest.base)
    if manifest.counts:
        yield "counts", _pairs(manifest.counts)
    yield "files", _checked(folder, manifest, verify)
    for place in sorted(folder.iterdir()):
        if place.is_dir() and (inner := read_manifest(place)) is not None and inner.kind == "resume":
            yield "training", f"can be continued from iteration {inner.iteration} ({place.name}/); {_checked(place, inner, verify)}"


def _checked(folder: Path, manifest: Manifest, verify: bool) -> str:
    _check_sizes(folder, manifest)
    if verify:
        verify_parts(folder, manifest)
    return f"{len(manifest.parts)} files have the {'checksum' if verify else 'size'} that the manifest lists"


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for part in manifest.parts:
        path = folder / part.file
        found = path.stat().st_size if path.is_file() else None
        if found != part.bytes:
            state = "missing" if found is None else f"{found} bytes"
            raise CheckpointError(f"{path}: {state}, but {MANIFEST_NAME} says {part.bytes} bytes; the file was cut off or changed")


def _table_of(folder: Path, base_path: str | None) -> WeightTable | None:
    """The table of an adapter's base, where its config.json is in the adapter's folder or in the base it names."""
    places = [folder, *([Path(base_path)] if base_path else [])]
    place = next((place for place in places if (place / "config.json").is_file()), None)
    return WeightTable(model_config_from_hf(place)) if place is not None else None


def _lora(adapter: Adapter) -> str:
    if adapter.lora is not None:
        return adapter.lora.describe()
    return f"r {adapter.found_r} on {' '.join(adapter.found_targets)} (from the tensors); alpha: nothing says it, pass --lora-alpha"


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
