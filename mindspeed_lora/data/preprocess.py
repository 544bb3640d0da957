"""``preprocess_data.py``: a file of records becomes ``<prefix>_packed_{input_ids,labels,attention_mask}_document.{bin,idx}``.

The files are written beside their final place and renamed when all are complete; the manifest comes last. Running again
replaces them the same way.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mindspeed_lora.arguments.configs import PreprocessConfig, TokenizerFlags
from mindspeed_lora.data.chat_template import open_template
from mindspeed_lora.data.encoding import EncodedChunk, encode_chunks
from mindspeed_lora.data.forms import Form, InstructionForm, Recipe
from mindspeed_lora.data.handlers import handler_of
from mindspeed_lora.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, bin_path, idx_path
from mindspeed_lora.data.packing import IGNORED, NEAT_PACK, PACK, fill_bags, packed_samples
from mindspeed_lora.data.readers import RecordSource, open_records
from mindspeed_lora.data.records import check_columns, columns_of, used_columns
from mindspeed_lora.data.sft_dataset import KEYS, key_stem, manifest_name
from mindspeed_lora.data.templates import Template, load_template
from mindspeed_lora.data.tokenizer import load_tokenizer, pad_token_id, tokenizer_fingerprint
from mindspeed_lora.errors import DataError, UsageError
from mindspeed_lora.files import fsync_path, temporary_name
from mindspeed_lora.log import get_logger
from mindspeed_lora.manifest import Manifest, part_of, write_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_RECORDS = 500
_NUMBERS_SHOWN = 10


@dataclass(frozen=True)
class FlagNames:
    """What messages call the input and the output."""

    input: str = "--input"
    output: str = "--output-prefix"


@dataclass
class PreprocessReport:
    """What became of the input. Record numbers count from 1."""

    num_records: int = 0
    num_written: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    longest: int = 0
    num_packs: int | None = None  # samples of several records; None: not packed
    pack_length: int = 0
    skipped: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # reason: first record numbers
    num_skipped: Counter[str] = field(default_factory=Counter)  # by reason
    notes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, chunk: EncodedChunk) -> None:
        """Count one chunk."""
        for number, reason in chunk.skipped:
            self.num_skipped[reason] += 1
            if len(self.skipped[reason]) < _NUMBERS_SHOWN:
                self.skipped[reason].append(self.num_records + number + 1)
        self.num_records += chunk.num_records
        self.num_written += chunk.num_written
        for key, sequences in chunk.sequences.items():
            if key.endswith("labels"):
                self.num_trained_tokens += int(np.count_nonzero(sequences.ids != IGNORED))
            else:
                self.num_tokens += len(sequences.ids)
            self.longest = max(self.longest, int(sequences.lengths.max(initial=0)))
        self.notes.update(chunk.notes)

    def counts(self) -> dict[str, object]:
        """For the manifest."""
        return {
            "records": self.num_records,
            "written": self.num_written,
            "skipped": dict(self.num_skipped),
            "tokens": self.num_tokens,
            "trained_tokens": self.num_trained_tokens,
            "longest": self.longest,
            **({} if self.num_packs is None else {"packs": self.num_packs}),
            "notes": {note: count for note, count in self.notes.items() if count},
        }

    def lines(self) -> list[str]:
        """For people: one line a fact."""
        lines = [f"{self.num_records:,} records read, {self.num_written:,} written, {sum(self.num_skipped.values()):,} skipped"]
        lines += self.skipped_lines()
        lines += [f"  note: {count:,} {note}" for note, count in self.notes.items() if count]
        share = self.num_trained_tokens / max(self.num_tokens, 1)
        lines.append(f"{self.num_tokens:,} tokens, {share:.1%} of them trained; the longest record has {self.longest:,}")
        if self.num_packs is not None:
            filled = self.num_tokens / max(self.num_packs * self.pack_length, 1)
            lines.append(f"packed into {self.num_packs:,} samples of {self.pack_length:,} tokens, {filled:.1%} of them filled")
        lines.append(f"{self.seconds:.1f} s, {self.num_records / max(self.seconds, 1e-9):,.0f} records/s")
        return lines

    def skipped_lines(self) -> list[str]:
        """One line for each reason: how many, and the first record numbers."""
        lines = []
        for reason, count in self.num_skipped.most_common():
            numbers = ", ".join(map(str, self.skipped[reason])) + (", ..." if count > len(self.skipped[reason]) else "")
            lines.append(f"  skipped {count:,}: {reason} (record {numbers})")
        return lines


def preprocess(config: PreprocessConfig) -> int:
    """Write the dataset, log the report, return the exit code 0."""
    report = write_dataset(config)
    logger = get_logger()
    for line in report.lines():
        logger.info(line)
    files = ", ".join(f"{stem.name}.{{bin,idx}}" for stem in _stems(config.output_prefix, handler_of(config.handler_name).form).values())
    logger.info(f"wrote in {config.output_prefix.parent}: {files} and {manifest_name(config.output_prefix)}")
    logger.info(f"next: posttrain_gpt.py ... --data-path {config.output_prefix}")
    return 0


def write_dataset(config: PreprocessConfig, flags: FlagNames = FlagNames()) -> PreprocessReport:
    """Read, encode and write; on any error nothing is left behind, and files of an earlier run stay as they were.

    ``flags``: what the messages call the input and the output.

    Raises:
        UsageError: a flag, a column or a template that does not fit.
        DataError: the input is damaged or empty, or no record of it could be used.
    """
    start = time.monotonic()
    _check_numbers(config)
    handler = handler_of(config.handler_name)
    columns = columns_of(handler.columns, config.map_keys)
    if config.pack and handler.form is not InstructionForm:
        raise UsageError(f"--pack packs instruction data, which --handler-name {config.handler_name} does not make; leave it out")
    if not config.template.hf_chat_template:  # before anything is read
        load_template(config.template.prompt_type, config.template.prompt_type_path).check_thinking(
            config.template.enable_thinking or "none"
        )
    source = open_records(config.input, flags.input)
    found = source.columns(set(used_columns(columns, handler.used).values()))
    if not found:
        raise DataError(f"{flags.input} {config.input}: no records in it")
    check_columns(columns, handler.used, config.map_keys, found)
    tokenizer = load_tokenizer(config.tokenizer)
    template = open_template(config.template, tokenizer)
    thinking = template.check_thinking(config.template.enable_thinking or "none")
    recipe = Recipe(handler.form, columns, template, thinking, config.seq_length, config.append_eod, config.neat_pack)
    _warn_about(recipe, tokenizer)
    report = PreprocessReport()
    with _staged(config.output_prefix, flags.output) as staging:
        written = staging / ("unpacked" if config.pack else config.output_prefix.name)
        _write_files(config, source, tokenizer, recipe, written, report)
        if not report.num_written:
            reasons = "\n".join(report.skipped_lines())
            raise DataError(
                f"{flags.input} {config.input}: none of {report.num_records} records could be used, nothing is written\n{reasons}"
            )
        if config.pack:
            _pack_files(config, written, staging / config.output_prefix.name, pad_token_id(tokenizer), report)
        _publish(config.output_prefix, staging, handler.form, _manifest(config, source, tokenizer, recipe, report))
    report.seconds = time.monotonic() - start
    return report


def _check_numbers(config: PreprocessConfig) -> None:
    if config.workers < 1:
        raise UsageError(f"--workers {config.workers}: give the number of processes, 1 or more")
    if config.seq_length is not None and config.seq_length < 2:
        raise UsageError(f"--seq-length {config.seq_length}: give a number of tokens, 2 or more")
    if config.neat_pack and not config.pack:
        raise UsageError("--neat-pack numbers the records of a pack and needs --pack; add --pack")
    if config.pack and config.seq_length is None:
        raise UsageError("--pack needs --seq-length, the tokens of a pack; give the one of training, such as --seq-length 4096")


def _warn_about(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    template = recipe.template
    if not template.has_stop:
        get_logger().warning(f"template {template.name!r} ends no answer with a stop token: a model trained on it does not learn to stop")
    if isinstance(template, Template) and template.replace_eos and template.stop_words[:1] != (tokenizer.eos_token,):
        get_logger().warning(
            f"the chat models of template {template.name!r} end an answer with {template.stop_words[0]}, but the tokenizer at "
            f"{tokenizer.name_or_path} has the eos token {tokenizer.eos_token}, which is what the template's eos becomes"
        )


def _write_files(
    config: PreprocessConfig,
    source: RecordSource,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    prefix: Path,
    report: PreprocessReport,
) -> None:
    from tqdm import tqdm

    # the workers load what the parent loaded, whichever flag it came from
    flags = TokenizerFlags(Path(tokenizer.name_or_path), config.tokenizer.use_fast, config.tokenizer.trust_remote_code)
    size = max(1, min(CHUNK_RECORDS, (source.count() or CHUNK_RECORDS * config.workers) // config.workers))
    chunks = encode_chunks(source.batches(size), tokenizer, flags, recipe, config.workers)
    with ExitStack() as stack:
        builders = {key: stack.enter_context(IndexedDatasetBuilder(stem)) for key, stem in _stems(prefix, recipe.form).items()}
        bar = stack.enter_context(tqdm(total=source.count(), unit="record", desc="preprocess", miniters=config.log_interval))
        for chunk in chunks:
            for key, builder in builders.items():
                added = chunk.sequences["input_ids" if key == "attention_mask" else key]
                ids = np.ones_like(added.ids) if key == "attention_mask" else added.ids
                builder.add_documents(ids, added.lengths, added.sequences_per_document)
            report.add(chunk)
            bar.update(chunk.num_records)
        for builder in builders.values():
            builder.finish()


def _stems(prefix: Path, form: type[Form]) -> dict[str, Path]:
    """Path without extension of each file pair of a form of dataset, by key."""
    keys = [*form.values, *(["attention_mask"] if form.masked else [])]
    return {key: key_stem(prefix, key) if form.packed else prefix.with_name(f"{prefix.name}_{key}_document") for key in keys}


def _pack_files(config: PreprocessConfig, source: Path, target: Path, pad_token_id: int, report: PreprocessReport) -> None:
    """Read the records at the prefix ``source`` back from the disk and write their bags at the prefix ``target``."""
    assert config.seq_length is not None
    ids, labels = (IndexedDataset(key_stem(source, key)) for key in ("input_ids", "labels"))
    bags = fill_bags(ids.lengths, config.seq_length - 1)
    with ExitStack() as stack:
        builders = {key: stack.enter_context(IndexedDatasetBuilder(key_stem(target, key))) for key in KEYS}
        for sample in packed_samples(ids, labels, bags, config.seq_length, pad_token_id, config.neat_pack):
            for key, builder in builders.items():
                builder.add_document(sample[key])
        for builder in builders.values():
            builder.finish()
    report.num_packs, report.pack_length = len(bags), config.seq_length


def _manifest(
    config: PreprocessConfig, source: RecordSource, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, report: PreprocessReport
) -> Manifest:
    return Manifest(
        kind="data",
        dtype="int32",
        tokenizer={"path": tokenizer.name_or_path, "fingerprint": tokenizer_fingerprint(tokenizer)},
        template={"name": recipe.template.name, "fingerprint": recipe.template.fingerprint(), "enable_thinking": recipe.thinking},
        data={
            "form": recipe.form.name,
            "input": [str(path) for path in source.files],
            "handler": config.handler_name,
            "map_keys": config.map_keys,
            "seq_length": config.seq_length,
            "append_eod": config.append_eod,
            "packing": NEAT_PACK if config.neat_pack else PACK if config.pack else None,
        },
        counts=report.counts(),
    )


def _publish(prefix: Path, staging: Path, form: type[Form], manifest: Manifest) -> None:
    """Move the finished files to their names; the manifest goes first when it is old and comes last when it is new."""
    names = [path(stem).name for stem in _stems(prefix, form).values() for path in (bin_path, idx_path)]
    manifest = replace(manifest, parts=[part_of(staging, staging / name) for name in names])
    write_manifest(staging, manifest, manifest_name(prefix))
    if any((prefix.parent / name).exists() for name in names):
        get_logger().info(f"replacing {prefix}_packed_*_document.bin and .idx of an earlier run")
    (prefix.parent / manifest_name(prefix)).unlink(missing_ok=True)
    for name in [*names, manifest_name(prefix)]:
        fsync_path(staging / name)
        (staging / name).replace(prefix.parent / name)
    fsync_path(prefix.parent)


@contextmanager
def _staged(prefix: Path, flag: str) -> Iterator[Path]:
    """Yield a hidden folder beside ``prefix`` that vanishes afterwards; folders made for it vanish too unless something was put there."""
    if not prefix.name:
        raise UsageError(f"{flag} {prefix}: give a folder and the beginning of a file name, such as dataset/alpaca")
    made = [folder for folder in (prefix.parent, *prefix.parent.parents) if not folder.exists()]
    staging = temporary_name(prefix)
    try:
        staging.mkdir(parents=True)
        yield staging
    except OSError as error:
        raise DataError(f"{flag} {prefix}: cannot write there: {error.strerror or error} ({error.filename or staging})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
