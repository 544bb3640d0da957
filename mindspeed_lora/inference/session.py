"""Start-up shared by inference and evaluation: grid, checkpoints, tokenizer, prompt format, and who leads.

```
every rank:  open_session -> lead(session, work)
             driver of each active replica: work(engine)     workers: follow     idle replicas: wait
```
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mindspeed_lora.arguments.configs import EvaluationConfig, InferenceConfig
from mindspeed_lora.checkpoint.load import load_adapter, load_base
from mindspeed_lora.checkpoint.resolve import check_adapter_base, resolve_lora, resolve_model_config, router_notes, run_layout
from mindspeed_lora.checkpoint.start import find_start
from mindspeed_lora.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from mindspeed_lora.errors import CheckpointError, MindSpeedLoraError, UsageError
from mindspeed_lora.inference.channel import Channels, RankDied, StoppedElsewhere, agree, open_channels
from mindspeed_lora.inference.engine import Engine, serve
from mindspeed_lora.inference.interrupt import Interrupted, interruptible, left_to_the_driver
from mindspeed_lora.inference.prompts import PromptFormat, resolve_prompt_format
from mindspeed_lora.inference.voices import DEFAULT_NAME, LoadedAdapter, Voice, internal_name, voices_of
from mindspeed_lora.log import get_logger
from mindspeed_lora.model.stage import GPTStage
from mindspeed_lora.ops.nf4 import Nf4, check_nf4
from mindspeed_lora.parallel.context import ParallelContext, initialize
from mindspeed_lora.parallel.grouped import choose_products
from mindspeed_lora.parallel.on_demand import BaseStorage
from mindspeed_lora.weights.adapters import Adapter
from mindspeed_lora.weights.config import ModelConfig
from mindspeed_lora.weights.sources import Base, open_adapter
from mindspeed_lora.weights.table import WeightTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CRASH = -1  # exit code sent to workers when the driver fails by our own mistake
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Session:
    """Everything a verb needs. ``stage`` is None on replicas that hold no weights.

    ``max_length``: tokens of prompt and answer together; ``max_length_source``: the flag or file that says so;
    ``scored``: what was loaded, for result files.
    """

    context: ParallelContext
    channels: Channels
    model: ModelConfig
    stage: GPTStage | None
    tokenizer: PreTrainedTokenizerBase
    prompt_format: PromptFormat
    stop_ids: tuple[int, ...]
    max_length: int
    max_length_source: str
    scored: dict[str, Any]
    voices: tuple[Voice, ...] = ()  # the adapters in the order of --lora-load, and the base

    @property
    def is_driver(self) -> bool:
        """First rank of its replica."""
        return self.context.speaks and self.context.is_first_stage

    @property
    def adapters(self) -> tuple[str, ...]:
        """The engine's names of the adapters, the same on every rank."""
        return tuple(voice.adapter for voice in self.voices if voice.adapter is not None)

    @property
    def pad_id(self) -> int:
        """Any id does: padding is masked."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None and pad < self.model.vocab_size else 0


def open_session(
    config: InferenceConfig | EvaluationConfig,
    all_replicas: bool,
    prepare: Callable[[], None] | None = None,
    examine: Callable[[Session], None] | None = None,
) -> Session:
    """Load the model at the run's layout. Collective: every rank calls it, and all go on or none.

    ``all_replicas`` False leaves every data-parallel replica but the first without weights. ``prepare`` is called on the
    first rank before anything heavy, for checks of the verb's own; ``examine`` likewise, before weights are read, with a session
    that lacks only those.

    Raises:
        MindSpeedLoraError: on the lowest rank with an error; StoppedElsewhere on the others.
    """
    parallel = config.parallel
    context = initialize(
        config.runtime.device,
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        sequence_parallel=False,
        timeout_minutes=config.runtime.distributed_timeout_minutes,
        expert_parallel_size=parallel.expert_grid[0],
        expert_tensor_parallel_size=parallel.expert_grid[1],
        same_tokens=True,
    )
    channels = open_channels(context)
    error: MindSpeedLoraError | None = None
    session: Session | None = None
    try:
        if prepare is not None and context.rank == 0:
            prepare()
        _note_ignored(config)
        session = _load(config, context, channels, all_replicas or context.replica_rank == 0, examine)
    except MindSpeedLoraError as caught:
        error = caught
    agree(error, channels.world)
    assert session is not None
    return session


def _note_ignored(config: InferenceConfig | EvaluationConfig) -> None:
    if config.parallel.sequence_parallel:
        get_logger().info("note: --sequence-parallel has no effect here: one token at a time cannot be cut along the sequence")
    if config.parallel.layers_per_virtual_stage is not None:
        get_logger().info(
            "note: --num-layers-per-virtual-pipeline-stage has no effect here: without a backward pass there is no bubble to fill"
        )


def _load(
    config: InferenceConfig | EvaluationConfig,
    context: ParallelContext,
    channels: Channels,
    with_weights: bool,
    examine: Callable[[Session], None] | None,
) -> Session:
    start = find_start(replace(config.load, finetune=True), config.lora is not None)
    base, adapter = start.base, start.adapter
    for note in start.notes:
        get_logger().info(f"note: {note}")
    if adapter is None and config.lora is not None:
        raise UsageError(
            "LoRA flags without an adapter: --lora-load is missing, and --load holds none; pass --lora-load or leave the flags out"
        )
    model = resolve_model_config(base, config.architecture, run_layout(config.parallel))
    adapters = [] if adapter is None else _open_adapters(config, adapter, base, WeightTable(model))
    dtype = resolve_dtype(config.runtime.params_dtype, base)
    for note in router_notes(base, WeightTable(model), dtype):
        get_logger().info(f"note: {note}")
    tokenizer = load_tokenizer(config.tokenizer, base.config_dir)
    stops = _generation_config_stops(base.config_dir or config.tokenizer.name_or_path)
    formats = []
    sources: list[Adapter | Base] = [each.source for each in adapters] or [base]
    for source in sources:
        recorded = source.manifest
        _check_tokenizer(tokenizer, None if recorded is None else recorded.tokenizer, str(source.path))
        found = _prompt_format(config, tokenizer, None if recorded is None else recorded.template, str(source.path))
        formats.append((found, tuple(sorted(found.stop_token_ids(tokenizer) | stops))))
    max_length, length_source = _max_length(config, model)
    session = Session(
        context=context,
        channels=channels,
        model=model,
        stage=None,
        tokenizer=tokenizer,
        prompt_format=formats[0][0],
        stop_ids=formats[0][1],
        max_length=max_length,
        max_length_source=length_source,
        scored=_describe(config, context, dtype, base, adapters, WeightTable(model)),
        voices=voices_of(adapters, formats),
    )
    if examine is not None and context.rank == 0:
        examine(session)
    return replace(session, stage=_build(config, context, model, dtype, base, adapters) if with_weights else None)


def _open_adapters(config: InferenceConfig | EvaluationConfig, first: Adapter, base: Base, table: WeightTable) -> list[LoadedAdapter]:
    """``first`` and the further ones of ``--lora-load a=DIR b=DIR``, each checked against the base."""
    named = config.adapters if isinstance(config, InferenceConfig) else ()
    names = [name for name, _ in named] or [""]
    opened = [first, *(open_adapter(folder) for _, folder in named[1:])]
    for adapter in opened:
        check_adapter_base(adapter, base)
        adapter.check_coverage(table)
    return [
        LoadedAdapter(name or DEFAULT_NAME, internal_name(number), adapter, spec)
        for number, (name, adapter) in enumerate(zip(names, opened, strict=True))
        if (spec := resolve_lora(config.lora, adapter, table)) is not None
    ]


def _prompt_format(
    config: InferenceConfig | EvaluationConfig, tokenizer: PreTrainedTokenizerBase, recorded: dict[str, Any] | None, where: str
) -> PromptFormat:
    """Inference follows the adapter's manifest; evaluation scores plain text unless a flag asks for a template."""
    if isinstance(config, EvaluationConfig) and config.template.prompt_type is None:
        recorded = None
    found = resolve_prompt_format(config.template, recorded, where)
    found.check_tokenizer(tokenizer, recorded, where)
    return found


def resolve_dtype(flag: str | None, base: Base) -> torch.dtype:
    """``--bf16``, ``--fp16`` or ``--params-dtype`` as passed, else the checkpoint's own."""
    return base.dtype if flag is None else _DTYPES[flag]


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, recorded: dict[str, Any] | None, where: str) -> None:
    expected = (recorded or {}).get("fingerprint")
    if expected is not None and expected != tokenizer_fingerprint(tokenizer):
        raise CheckpointError(
            f"--tokenizer-name-or-path {tokenizer.name_or_path} is not the tokenizer that {where} was trained with "
            f"({(recorded or {}).get('path')}, fingerprint {expected}); pass that one"
        )


def _generation_config_stops(folder: Path | None) -> set[int]:
    """End tokens of ``generation_config.json``; its sampling values are not taken, the flags decide those."""
    path = None if folder is None else Path(folder) / "generation_config.json"
    if path is None or not path.is_file():
        return set()
    try:
        stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a JSON object ({error}); restore the file or remove it") from error
    return set(stops) if isinstance(stops, list) else set() if stops is None else {int(stops)}


def _max_length(config: InferenceConfig | EvaluationConfig, model: ModelConfig) -> tuple[int, str]:
    flags = config.architecture
    limits = [
        (model.max_position_embeddings, "config.json: max_position_embeddings"),
        (flags.max_position_embeddings, "--max-position-embeddings"),
        (flags.seq_length, "--seq-length"),
    ]
    known = [(limit, source) for limit, source in limits if limit is not None]
    if not known:
        raise UsageError("--max-position-embeddings is missing: no config.json says how long a sequence may be")
    return min(known)


def _build(
    config: InferenceConfig | EvaluationConfig,
    context: ParallelContext,
    model: ModelConfig,
    dtype: torch.dtype,
    base: Base,
    adapters: list[LoadedAdapter],
) -> GPTStage:
    from mindspeed_lora.lora.inject import inject_lora, select_adapter

    table = WeightTable(model)
    table.check_tensor_parallel(context.tp_size)
    layers = spread_layers(model.num_layers, context.pp_size)[context.pp_rank]
    storage = None
    if config.runtime.qlora:
        check_nf4(context.device.type)
        storage = BaseStorage(context, Nf4(), sharded=False)
    stage = GPTStage(model, layers, context.is_first_stage, context.is_last_stage, context, dtype, storage=storage)
    for adapter in adapters:
        inject_lora(stage, table, adapter.spec, context, config.lora is not None and config.lora.fusion, adapter_name=adapter.internal)
    products = choose_products([stage], model, config.runtime.moe_grouped_gemm)
    loaded = load_base([stage], base, table, context).base
    adapted = sum(load_adapter([stage], adapter.source, table, context, adapter.internal).adapter for adapter in adapters)
    if adapters:
        select_adapter(stage, adapters[0].internal)
    stage.eval().requires_grad_(False)
    count = f"{loaded} base tensors, {adapted} adapter tensors, 0 missing"
    words = "" if products is None else f"; experts: {products}"
    get_logger().info(f"loaded on rank 0: {count}; {str(dtype).removeprefix('torch.')}, {context.device}{words}")
    return stage


def spread_layers(num_layers: int, pp_size: int) -> list[range]:
    """Global layers of each stage, as even as can be, the first stages one more: no file is written here, so any count will do.

    Raises:
        UsageError: fewer layers than stages.
    """
    if pp_size > num_layers:
        raise UsageError(f"--pipeline-model-parallel-size {pp_size}: the model has only {num_layers} layers; use at most that many stages")
    size, extra = divmod(num_layers, pp_size)
    starts = [stage * size + min(stage, extra) for stage in range(pp_size + 1)]
    if extra:
        get_logger().info(
            f"note: {num_layers} layers on {pp_size} stages: {extra} of them hold one layer more (training needs an even split)"
        )
    return [range(start, end) for start, end in itertools.pairwise(starts)]


def _describe(
    config: InferenceConfig | EvaluationConfig,
    context: ParallelContext,
    dtype: torch.dtype,
    base: Base,
    adapters: list[LoadedAdapter],
    table: WeightTable,
) -> dict[str, Any]:
    layout = {name: getattr(context, name) for name in ("tp_size", "pp_size", "dp_size")}
    if context.expert_grid is not None:
        layout |= {"ep_size": context.experts.ep_size, "expert_tp_size": context.experts.tp_size}
    first = adapters[0] if adapters else None
    manifest = base.manifest if first is None else first.source.manifest
    prints = {each.name: each.source.fingerprint(table, each.spec) for each in adapters} if context.rank == 0 else {}
    return {
        "load": str(config.load.load),
        "lora_load": None if config.load.lora_load is None else str(config.load.lora_load),
        "lora": None if first is None else first.spec.entry(),
        "lora_iteration": None if first is None else first.source.iteration,
        "lora_fingerprints": prints,
        "base_fingerprint": base.fingerprint() if context.rank == 0 else None,
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
        "manifest": None if manifest is None else {key: value for key, value in asdict(manifest).items() if value and key != "parts"},
    }


def lead(session: Session, work: Callable[[Engine], None]) -> int:
    """Run ``work`` on the driver of every replica that holds weights; the other ranks follow it. Collective.

    Returns:
        0; or on ranks other than the failing one, the exit code of the error met there.

    Raises:
        MindSpeedLoraError: what ``work`` raised, on its rank.
        KeyboardInterrupt: the user ended the run, on its rank.
        RankDied: another rank is gone; the ranks that are left do not wait for one another.
    """
    error: MindSpeedLoraError | None = None
    if session.stage is not None and session.is_driver:
        engine = Engine(session.stage, session.context, session.channels, session.adapters)
        code = _CRASH
        try:
            with interruptible(engine):
                work(engine)
            code = 0
        except RankDied:
            raise
        except KeyboardInterrupt:
            if engine.amid_order:
                raise  # the workers are inside an order: they end with this process
            error = Interrupted()
            code = error.exit_code
        except StoppedElsewhere as stopped:
            code = stopped.exit_code
        except MindSpeedLoraError as caught:
            error, code = caught, caught.exit_code
        finally:
            engine.stop(code)
    else:
        with left_to_the_driver():
            stage = session.stage
            if stage is not None and serve(stage, session.context, session.channels, session.adapters) == _CRASH:
                return 1
            return _ending(None, session)
    return _ending(error, session)


def _ending(error: MindSpeedLoraError | None, session: Session) -> int:
    try:
        agree(error, session.channels.world)
    except StoppedElsewhere as stopped:
        return stopped.exit_code
    except Interrupted:
        raise KeyboardInterrupt from None
    return 0
