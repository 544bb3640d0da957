"""Which model a preference loss compares with: decided and checked before weights are read.

| --ref-model                                   | reference                                                    |
|-----------------------------------------------|--------------------------------------------------------------|
| not given, first start                        | the model that training starts from, its adapter included    |
| not given, the run is continued               | the same as at its first start: the training state names it  |
| a Hugging Face or Megatron folder             | that model (with the adapter that lies in it)                |
| a folder with an adapter only (ours, or PEFT) | its base (PEFT: that of --load) with this adapter            |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mindspeed_lora.arguments.configs import ArchitectureFlags, PreferenceFlags
from mindspeed_lora.checkpoint.resolve import check_adapter_base, resolve_lora, resolve_model_config
from mindspeed_lora.checkpoint.start import StartPoint, adapter_only_base
from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.weights.adapters import Adapter
from mindspeed_lora.weights.config import Layout, ModelConfig
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.megatron_files import iteration_directory_name
from mindspeed_lora.weights.megatron_folder import is_megatron_folder
from mindspeed_lora.weights.sources import Base, open_adapter, open_base
from mindspeed_lora.weights.table import WeightTable

_PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ReferencePoint:
    """The reference's weights. ``shared``: the LoRA policy's own base serves, so there is no second model."""

    base: Base
    adapter: Adapter | None
    lora: LoraSpec | None
    shared: bool

    @property
    def record(self) -> dict[str, Any]:
        """What a continued run finds it by."""
        return {"base": str(Path(self.base.path).resolve()), "adapter": str(Path(self.adapter.path).resolve()) if self.adapter else None}

    def describe(self) -> str:
        """One line for the start report."""
        adapter = f" with the adapter {self.adapter.path}" if self.adapter is not None else ""
        how = "shared with the policy: no second model in memory" if self.shared else "a frozen copy in memory"
        return f"reference: {self.base.path}{adapter} ({how})"


def find_reference(
    flags: PreferenceFlags,
    start: StartPoint,
    recorded: Mapping[str, Any] | None,
    architecture: ArchitectureFlags,
    model: ModelConfig,
    lora: LoraSpec | None,
    layout: Layout,
) -> ReferencePoint | None:
    """The reference of a run; None for a loss that needs none. ``recorded``: what a continued run's training state says.

    Raises:
        UsageError: ``--ref-model`` is of another architecture.
        CheckpointError: a folder is missing or damaged, or the adapter belongs to another base.
    """
    if not flags.needs_reference:
        return None
    if flags.ref_model is not None:
        base, adapter = _open(flags.ref_model, flags.ref_iteration, start)
    elif recorded is not None:
        base, adapter = _open_recorded(recorded)
    elif flags.ref_iteration is not None:
        base, adapter = _open(Path(start.base.path), flags.ref_iteration, start)
    else:
        base, adapter = start.base, start.adapter
    _check_same_architecture(resolve_model_config(base, architecture, layout), model, base)
    spec = None
    if adapter is not None:
        table = WeightTable(model)
        check_adapter_base(adapter, base)
        adapter.check_coverage(table)
        spec = resolve_lora(None, adapter, table)
    same_base = Path(base.path).resolve() == Path(start.base.path).resolve()
    return ReferencePoint(base, adapter, spec, shared=lora is not None and same_base and spec in (None, lora))


def _open(folder: Path, iteration: int | None, start: StartPoint) -> tuple[Base, Adapter | None]:
    if iteration is not None and is_megatron_folder(folder):
        found = folder / iteration_directory_name(iteration)
        if not found.is_dir():
            raise UsageError(f"--refer-model-iter {iteration}: {found} does not exist; give an iteration that {folder} holds")
        folder = found
    if (known := adapter_only_base(folder, "--ref-model")) is not None:
        return open_base(known), open_adapter(folder)
    if (folder / _PEFT_CONFIG).is_file():
        return start.base, open_adapter(folder)
    base = open_base(folder)
    return base, open_adapter(folder) if base.unified else None


def _open_recorded(recorded: Mapping[str, Any]) -> tuple[Base, Adapter | None]:
    paths = [Path(recorded[key]) for key in ("base", "adapter") if recorded.get(key)]
    for path in paths:
        if not path.is_dir():
            raise CheckpointError(f"the reference model of this run, {path}, is not there any more; say where it is with --ref-model")
    return open_base(paths[0]), open_adapter(paths[1]) if len(paths) > 1 else None


def _check_same_architecture(reference: ModelConfig, policy: ModelConfig, base: Base) -> None:
    differing = [
        f"{field.name} {getattr(reference, field.name)} instead of {getattr(policy, field.name)}"
        for field in fields(ModelConfig)
        if field.name != "padded_vocab_size" and getattr(reference, field.name) != getattr(policy, field.name)
    ]
    if differing:
        raise UsageError(
            f"--ref-model {base.path} is of another architecture than --load: {', '.join(differing)}; "
            "the two must differ in their weights only"
        )
