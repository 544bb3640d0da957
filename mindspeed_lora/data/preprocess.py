"""``preprocess_data.py``: records become ``<prefix>_packed_{input_ids,labels,attention_mask}_document.{bin,idx}`` (or their like).

The files are written beside their final place and moved there when all are complete; the manifest comes last. Running again
replaces them the same way. Memory does not grow with the input: records come and go in chunks (packing keeps their lengths).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from mindspeed_lora.arguments.configs import PreprocessConfig
from mindspeed_lora.data.encoding import EncodedChunk, RecordEncoder, encode_chunks
from mindspeed_lora.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, bin_path, idx_path
from mindspeed_lora.data.merging import merge_pairs
from mindspeed_lora.data.packing import NEAT_PACK, PACK, fill_bags, packed_samples
from mindspeed_lora.data.planning import COMMAND_LINE, FlagNames, Plan, chosen_handler, make_plan
from mindspeed_lora.data.preview import LEGEND, preview_lines
from mindspeed_lora.data.report import PreprocessReport
from mindspeed_lora.data.sft_dataset import manifest_name
from mindspeed_lora.data.staging import publish, staged
from mindspeed_lora.data.tokenizer import pad_token_id, tokenizer_fingerprint
from mindspeed_lora.errors import DataError
from mindspeed_lora.log import get_logger
from mindspeed_lora.manifest import Manifest, part_of, write_manifest

CHUNK_RECORDS = 500
TRAINED_FORMS = ("instruction", "pairwise")  # what posttrain_gpt.py reads


def preprocess(config: PreprocessConfig) -> int:
    """Write the dataset and log the report, or only show records, or join files; return the exit code 0."""
    if config.merge_group_keys:
        merge_pairs(config.input, _prefix(config), config.merge_group_keys)
    elif config.preview:
        print("\n".join(preview(config, config.preview)))
    else:
        logger = get_logger()
        for line in write_dataset(config).lines():
            logger.info(line)
        if chosen_handler(config)[1].form.name in TRAINED_FORMS:
            logger.info(f"next: posttrain_gpt.py ... --data-path {config.output_prefix}")
    return 0


def preview(config: PreprocessConfig, count: int, limit: int | None = None) -> Iterator[str]:
    """Lines that show the first ``count`` records as the model will see them; nothing is written. ``limit``: of tokens shown of each.

    Raises:
        UsageError, DataError: as :func:`write_dataset`.
    """
    plan = make_plan(config)
    encoder = RecordEncoder(plan.tokenizer, plan.recipe)
    stops = set(plan.recipe.template.stop_token_ids(plan.tokenizer)) if plan.recipe.form.prompt_type == "needed" else set()
    yield f"{LEGEND}; {config.input}, {plan.handler_name}, template {plan.recipe.template.name}"
    for number, record in enumerate(islice(plan.source.records(), count), 1):
        chunk = encoder.encode([record])
        for _, reason, where in chunk.skipped:
            yield f"record {number}{where and f' ({where})'}: skipped: {reason}"
        for row in range(len(chunk.sequences[plan.recipe.form.keys(plan.recipe)[0]].lengths)):
            values = {key: sequences.row(row) for key, sequences in chunk.sequences.items() if row < len(sequences.lengths)}
            yield from preview_lines(f"record {number}", values, plan.tokenizer, stops, limit)


def write_dataset(config: PreprocessConfig, flags: FlagNames = COMMAND_LINE) -> PreprocessReport:
    """Read, encode and write; on any error nothing is left behind, and files of an earlier run stay as they were.

    ``flags``: what the messages call the input and the output.

    Raises:
        UsageError: a flag, a column or a template that does not fit.
        DataError: the input is damaged or empty, or no record of it could be used.
    """
    start = time.monotonic()
    prefix, plan, report = _prefix(config), make_plan(config, flags), PreprocessReport()
    report.start_seconds = time.monotonic() - start
    with staged(prefix, flags.output) as staging:
        written = staging / ("unpacked" if config.pack else prefix.name)
        _write_files(config, plan, written, report)
        if not report.num_written:
            reasons = "\n".join(report.skipped_lines())
            raise DataError(
                f"{flags.input} {config.input}: none of {report.num_records} records could be used, nothing is written\n{reasons}"
            )
        if config.pack:
            _pack_files(config, plan, written, staging / prefix.name, report)
        report.loop_seconds = time.monotonic() - start - report.start_seconds
        names = [path(stem).name for stem in plan.stems(prefix).values() for path in (bin_path, idx_path)]
        parts = [part_of(staging, staging / name) for name in names]
        write_manifest(staging, replace(_manifest(config, plan, report), parts=parts), manifest_name(prefix))
        publish(staging, prefix, names, manifest_name(prefix))
    report.seconds = time.monotonic() - start
    get_logger().info(f"wrote in {prefix.parent}: {', '.join(names)} and {manifest_name(prefix)}")
    return report


def _prefix(config: PreprocessConfig) -> Path:
    assert config.output_prefix is not None  # the parser asks for it
    return config.output_prefix


def _write_files(config: PreprocessConfig, plan: Plan, prefix: Path, report: PreprocessReport) -> None:
    from tqdm import tqdm

    count = plan.source.count()
    size = max(1, min(CHUNK_RECORDS, (CHUNK_RECORDS * config.workers if count is None else count) // config.workers))
    with ExitStack() as stack:
        builders = {key: stack.enter_context(IndexedDatasetBuilder(stem)) for key, stem in plan.stems(prefix).items()}
        bar = stack.enter_context(tqdm(total=count, unit="record", desc="preprocess", miniters=config.log_interval))
        for chunk in encode_chunks(plan.source.batches(size), plan.tokenizer, plan.recipe, config.workers):
            _add(chunk, builders)
            report.add(chunk)
            bar.update(chunk.num_records)
        for builder in builders.values():
            builder.finish()


def _add(chunk: EncodedChunk, builders: dict[str, IndexedDatasetBuilder]) -> None:
    for key, builder in builders.items():
        added = chunk.sequences["input_ids" if key == "attention_mask" else key]
        ids = np.ones_like(added.ids) if key == "attention_mask" else added.ids
        builder.add_documents(ids, added.lengths, added.sequences_per_document)


def _pack_files(config: PreprocessConfig, plan: Plan, source: Path, target: Path, report: PreprocessReport) -> None:
    """Read the records at the prefix ``source`` back from the disk and write their bags at the prefix ``target``."""
    assert config.seq_length is not None
    stems = plan.stems(source)
    ids, labels = (IndexedDataset(stems[key]) for key in ("input_ids", "labels"))
    bags = fill_bags(ids.lengths, config.seq_length - 1)
    with ExitStack() as stack:
        builders = {key: stack.enter_context(IndexedDatasetBuilder(stem)) for key, stem in plan.stems(target).items()}
        for sample in packed_samples(ids, labels, bags, config.seq_length, pad_token_id(plan.tokenizer), config.neat_pack):
            for key, builder in builders.items():
                builder.add_document(sample[key])
        for builder in builders.values():
            builder.finish()
    report.num_packs, report.pack_length = len(bags), config.seq_length


def _manifest(config: PreprocessConfig, plan: Plan, report: PreprocessReport) -> Manifest:
    recipe, tokenizer = plan.recipe, plan.tokenizer
    template = {"name": recipe.template.name, "fingerprint": recipe.template.fingerprint(), "enable_thinking": recipe.thinking}
    return Manifest(
        kind="data",
        dtype="int32",
        tokenizer={"path": tokenizer.name_or_path, "fingerprint": tokenizer_fingerprint(tokenizer)},
        template=template if recipe.form.prompt_type == "needed" else None,
        data={
            "form": recipe.form.name,
            "input": [str(path) for path in plan.source.files],
            "handler": plan.handler_name,
            "map_keys": config.map_keys,
            "seq_length": config.seq_length,
            "append_eod": config.append_eod,
            "packing": NEAT_PACK if config.neat_pack else PACK if config.pack else None,
        },
        counts=report.counts(),
    )
