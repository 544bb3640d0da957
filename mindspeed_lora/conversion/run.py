"""``convert_ckpt.py``: Hugging Face <-> Megatron V1, re-cutting, merging an adapter, exporting it to PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from mindspeed_lora.arguments.configs import ConvertConfig, InspectConfig
from mindspeed_lora.conversion.adapter_to_megatron import import_adapter, is_adapter_folder
from mindspeed_lora.conversion.dry_run import ShapeStream, forecast, peak_memory, report, resident_bytes
from mindspeed_lora.conversion.hf_to_megatron import write_megatron
from mindspeed_lora.conversion.inspect import inspect
from mindspeed_lora.conversion.megatron_to_hf import write_hugging_face
from mindspeed_lora.conversion.merge import RoundingReport
from mindspeed_lora.conversion.output import copy_model_files, hf_target, megatron_target, staged_folder
from mindspeed_lora.conversion.plan import Plan, adapter_values, check_flags, config_candidates, make_plan
from mindspeed_lora.conversion.stream import WeightStream
from mindspeed_lora.errors import CheckpointError
from mindspeed_lora.log import get_logger
from mindspeed_lora.manifest import Manifest, part_of, write_manifest
from mindspeed_lora.weights.block_writer import one_thread_per_operation
from mindspeed_lora.weights.families import check_model_type, model_config_from_hf
from mindspeed_lora.weights.lora_blocks import adapted_entries
from mindspeed_lora.weights.peft_files import peft_gap, write_peft_adapter
from mindspeed_lora.weights.sources import open_adapter, open_base
from mindspeed_lora.weights.table import WeightTable


def convert(config: ConvertConfig | InspectConfig) -> int:
    """Run one conversion, or inspect a folder, and return the exit code 0; the result appears whole or not at all.

    Raises:
        UsageError: the flags are wrong or contradict the files.
        CheckpointError: an input is missing, damaged, or of another model; or the target is occupied.
    """
    if isinstance(config, InspectConfig):
        return inspect(config)
    check_flags(config)
    if config.save_lora_to_hf:
        return export_adapter(config)
    if config.save_model_type == "mg" and config.load_model_type == "hf" and is_adapter_folder(config.load_dir):
        return import_adapter(config)
    target = hf_target(config.save_dir) if config.save_model_type == "hf" else megatron_target(config.save_dir)
    plan = make_plan(config)
    stream = WeightStream(plan.base, plan.adapter, plan.lora, plan.dtype)
    if config.dry_run:
        shapes = ShapeStream(plan.base, plan.adapter, plan.lora, plan.dtype)

        def write(folder: Path) -> None:
            _write_model(folder, config, plan, shapes)
            _copy_files(folder, plan)

        return report(forecast(target, write, peak_memory(shapes, plan.table, plan.layout)))
    with staged_folder(target) as staging, one_thread_per_operation():
        checksums = _write_model(staging, config, plan, stream)
        copied = _copy_files(staging, plan)
        fingerprint = _write_manifest(staging, config, plan, checksums)
    _report(target, plan, stream.report, copied, fingerprint)
    return 0


def _write_model(staging: Path, config: ConvertConfig, plan: Plan, stream: WeightStream) -> dict[Path, int]:
    """Write the weights; returns the CRC32 of each file."""
    if config.save_model_type == "mg":
        return write_megatron(staging, stream, plan.table, plan.layout, plan.dtype or plan.base.dtype)
    return write_hugging_face(staging, stream, plan.table)


def _copy_files(staging: Path, plan: Plan) -> list[str]:
    """Copy configuration and tokenizer; returns the names of the copied files."""
    changed = plan.dtype is not None and plan.dtype != plan.base.dtype
    return copy_model_files(plan.config_dir, staging, _name(plan.dtype) if changed and plan.dtype else None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_manifest(staging: Path, config: ConvertConfig, plan: Plan, checksums: Mapping[Path, int]) -> str:
    """Open what was just written as any reader would, and describe it; returns its fingerprint."""
    written = open_base(staging, config.save_model_type)
    written.check_coverage(plan.table)
    fingerprint = written.fingerprint(plan.table)
    base = None
    if plan.adapter is not None:
        base = {"path": str(plan.base.path.resolve()), "fingerprint": plan.base.fingerprint(), "adapter": str(plan.adapter.path.resolve())}
    manifest = Manifest(
        kind="base" if plan.adapter is None else "merged",
        model=asdict(plan.model),
        layout=asdict(plan.layout) if config.save_model_type == "mg" else None,
        dtype=_name(written.dtype),
        lora=plan.lora.entry() if plan.lora else None,
        base=base,
        fingerprint=fingerprint,
        parts=[part_of(staging, file, crc32) for file, crc32 in sorted(checksums.items())],
        counts={"tensors": len(list(plan.table.entries()))},
    )
    write_manifest(staging, manifest)
    return fingerprint


def _report(target: Path, plan: Plan, rounding: RoundingReport, copied: list[str], fingerprint: str) -> None:
    logger = get_logger()
    if plan.adapter is not None and plan.lora is not None:
        logger.info("merged %s (%s) into %s", plan.adapter.path, plan.lora.describe(), plan.base.path)
        for name, share in rounding.shares().items():
            logger.info("  %s: the cast rounded away %.3g%% of the adapter's change", name, 100 * share)
        if rounding.changes_nothing:
            logger.warning("%s changes nothing: every B A is zero; was it trained?", plan.adapter.path)
    logger.info("wrote %s: %d tensors, fingerprint %s", target, len(list(plan.table.entries())), fingerprint)
    if plan.model.left_out_layers:
        logger.warning(
            "config.json names %d multi-token-prediction layers behind the model's own; they are not converted", plan.model.left_out_layers
        )
    logger.info("copied from %s: %s", plan.config_dir, ", ".join(copied))
    if not any(name.startswith("tokenizer") for name in copied):
        logger.warning("%s has no tokenizer files, so none travel with %s", plan.config_dir, target)


def export_adapter(config: ConvertConfig) -> int:
    """``--save-lora-to-hf``: write the adapter of --lora-load (or --load-dir) as a PEFT folder."""
    adapter = open_adapter(config.lora_load or config.load_dir)
    candidates = config_candidates(config, config.load_dir)
    if not candidates:
        raise CheckpointError(
            f"{config.load_dir}: has no config.json; name the base model's Hugging Face folder with --hf-cfg-dir (or --save-dir)"
        )
    flag, folder = candidates[0]
    model = model_config_from_hf(folder)
    check_model_type(config.model_type_hf, model)
    table = WeightTable(model)
    lora = adapter_values(config, adapter, table)
    target = hf_target(config.save_dir)
    tensors = {(row, layer): adapter.lora_parts(row, layer) for row, layer, _ in adapted_entries(table, lora)}
    base_path = (adapter.base_reference or {}).get("path") or str(folder.resolve())
    if config.dry_run:
        return report(forecast(target, lambda staging: write_peft_adapter(staging, table, lora, tensors, base_path), resident_bytes()))
    with staged_folder(target) as staging:
        write_peft_adapter(staging, table, lora, tensors, base_path)
        files = sorted(staging.glob("adapter_*"))
        write_manifest(
            staging,
            Manifest(
                kind="adapter",
                model=asdict(model),
                lora=lora.entry(),
                base=dict(adapter.base_reference) if adapter.base_reference else None,
                iteration=adapter.iteration,
                parts=[part_of(staging, file) for file in files],
            ),
        )
    get_logger().info("wrote %s: PEFT adapter, %s; %d modules (config from %s)", target, lora.describe(), len(tensors), flag)
    if gap := peft_gap(table, lora):
        get_logger().warning(gap)
    return 0
