"""Puts LoRA layers into a stage through peft's injection, and gives them values that no layout changes."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from mindspeed_lora.errors import UsageError
from mindspeed_lora.model.stage import GPTStage
from mindspeed_lora.parallel.context import ParallelContext
from mindspeed_lora.parallel.grouped import GroupedLinear
from mindspeed_lora.parallel.layers import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from mindspeed_lora.weights.lora_blocks import block_masks, column_scales
from mindspeed_lora.weights.lora_spec import LoraSpec, ModuleLora
from mindspeed_lora.weights.table import WeightTable, is_shared, named_slices, unstacked_name

ADAPTER_NAME = "default"


def inject_lora(
    stage: GPTStage,
    table: WeightTable,
    spec: LoraSpec,
    context: ParallelContext,
    fusion: bool = False,
    seed: int | None = None,
    adapter_name: str = ADAPTER_NAME,
) -> int:
    """Wrap every target linear of ``stage`` and leave only A and B trainable.

    ``seed`` None leaves A uninitialised, for a stage that an adapter is loaded into; otherwise A is kaiming-uniform
    (a = sqrt 5) drawn from the seed and the parameter's global name, and B is zero. An adapter trained elsewhere may adapt
    some linears only, none of a stage perhaps, and the parts of one with their own A (:mod:`mindspeed_lora.weights.lora_blocks`).

    ``adapter_name``: of a further adapter of the same base; forward passes use the one that :func:`select_adapter` chose last.

    Returns:
        Number of wrapped layers.

    Raises:
        UsageError: a target matches no module.
    """
    from mindspeed_lora.lora.experts import GroupedLoraLinear
    from mindspeed_lora.lora.layers import ParallelLoraLinear

    linears = [
        name.removesuffix(".base_layer")
        for name, module in stage.named_modules()
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear, GroupedLinear))
    ]
    present = {name.rpartition(".")[2] for name in linears} - {"output_layer"}
    unmatched = [target for target in spec.targets if target not in present]
    if unmatched:
        raise UsageError(f"--lora-target-modules {' '.join(unmatched)} matches no module of the model; it has {', '.join(sorted(present))}")
    adapted = {
        name: module
        for name in linears
        if name.rpartition(".")[2] in spec.targets and (module := _module_of(spec, name, table)) is not None
    }
    stage.requires_grad_(False)
    if adapted:
        _inject(stage, spec, adapted, adapter_name)
    for name, module in adapted.items():
        layer = stage.get_submodule(name)
        assert isinstance(layer, ParallelLoraLinear)
        layer.fusion = fusion
        if spec.shared_experts and isinstance(layer, GroupedLoraLinear):
            layer.share(adapter_name)
        row, _ = table.parse(f"{name}.weight")
        masks, b_row = block_masks(row, module), table.lora_pair(row)[1]
        mask = table.shard(b_row, masks, *context.cut(row.expert is not None)) if masks else None
        layer.set_blocks(adapter_name, column_scales(spec, module), mask)
    if seed is not None:
        initialize_lora(stage, table, context, seed)
    return len(adapted)


def _module_of(spec: LoraSpec, name: str, table: WeightTable) -> ModuleLora | None:
    """Ranks of a linear; of stacked experts, which lie in one tensor, what all of them have.

    Raises:
        UsageError: they differ.
    """
    experts = table.config.experts
    if experts is None or unstacked_name(name, 0) == name:
        return spec.module(name)
    found = {spec.module(unstacked_name(name, expert)) for expert in range(experts.count)}
    if len(found) > 1:
        raise UsageError(
            f"the adapter's experts in {name} differ in their r or alpha, or only some are adapted; it can be merged "
            "(convert_ckpt.py --lora-load), not trained or run beside its base"
        )
    return found.pop()


def _inject(stage: nn.Module, spec: LoraSpec, adapted: Mapping[str, ModuleLora], adapter_name: str) -> None:
    """Let peft wrap the named linears; scales are set afterwards."""
    from peft import LoraConfig, inject_adapter_in_model

    from mindspeed_lora.lora.experts import GroupedLoraLinear
    from mindspeed_lora.lora.layers import ParallelLoraLinear, ReplicatedLoraLinear

    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        target_modules=list(adapted),
        rank_pattern={re.escape(name): module.width for name, module in adapted.items() if module.width != spec.r},
        lora_dropout=0.0,
        bias="none",
    )
    config._register_custom_module(
        {
            ColumnParallelLinear: ParallelLoraLinear,
            RowParallelLinear: ParallelLoraLinear,
            ReplicatedLinear: ReplicatedLoraLinear,
            GroupedLinear: GroupedLoraLinear,
        }
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters on one base are meant
        inject_adapter_in_model(config, stage, adapter_name)


def select_adapter(stage: nn.Module, name: str | None) -> None:
    """Let forward passes use the adapter ``name``; None: the base alone. For a stage that is not trained; it may hold none."""
    from peft.tuners.lora import LoraLayer

    for module in stage.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(name is not None)
            if name is not None:
                module.set_adapter([name])
    stage.requires_grad_(False)  # peft makes a selected adapter trainable


@torch.no_grad()
def initialize_lora(stage: GPTStage, table: WeightTable, context: ParallelContext, seed: int) -> None:
    """Fill A with this rank's part of the whole matrix that (seed, name) defines; B stays zero."""
    shared = {name for name, parameter in stage.named_parameters() if is_shared(name, parameter)}
    own = named_slices(((name, parameter) for name, parameter in stage.named_parameters() if name not in shared), stage.experts)
    for name, parameter in (*own, *((unstacked_name(name, 0), stage.get_parameter(name)) for name in shared)):
        if ".lora_A." not in name:
            continue
        row = table.lora_row(name)
        rank, size = context.cut(row.expert is not None)
        whole = kaiming_uniform(name, seed, parameter.shape[0], parameter.shape[1] * (size if row.axis == 1 else 1))
        if row.axis == 1:
            whole = whole.chunk(size, dim=1)[rank]
        parameter.copy_(whole)


def kaiming_uniform(name: str, seed: int, rows: int, columns: int) -> torch.Tensor:
    """``[rows, columns]`` float32, uniform in +-1/sqrt(columns), drawn from a generator of its own."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    bound = 1.0 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
