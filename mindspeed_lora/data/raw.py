"""Raw data given to training: preprocessed once into a cache, by one process of each machine, before any process group is joined.

The cache folder is named by what decides the result: the files' bytes, the tokenizer, the template, the thinking mode,
``--seq-length``, handler, columns and packing. It appears by one rename, so a folder that is there is complete.
The other processes of the machine wait for a file in the machine's temporary folder that says how the work stands.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from mindspeed_lora import __version__
from mindspeed_lora.arguments.configs import DataFlags, PreprocessConfig, TemplateFlags, TokenizerFlags
from mindspeed_lora.data.chat_template import open_template
from mindspeed_lora.data.handlers import ALPACA_HANDLER, SHAREGPT_HANDLER
from mindspeed_lora.data.planning import FlagNames
from mindspeed_lora.data.preprocess import write_dataset
from mindspeed_lora.data.readers import EXTENSIONS, open_records
from mindspeed_lora.data.sft_dataset import data_prefix, has_pair, manifest_name
from mindspeed_lora.data.tokenizer import TOKENIZER_FILES, load_tokenizer, tokenizer_fingerprint
from mindspeed_lora.errors import CheckpointError, DataError, MindSpeedLoraError, UsageError
from mindspeed_lora.files import atomic_directory, write_json
from mindspeed_lora.log import get_logger
from mindspeed_lora.manifest import read_manifest

DEFAULT_CACHE = Path("~/.cache/mindspeed_lora/data")
PAIRWISE_SUFFIX = "PairwiseHandler"  # handlers of preference pairs
_NAME = "data"  # of the output prefix inside a cache folder
_POLL_S = 0.5
_SAY_EVERY_S = 60.0
_ERRORS = {kind.__name__: kind for kind in (UsageError, DataError, CheckpointError, MindSpeedLoraError)}
_CHUNK_BYTES = 1 << 22


def is_raw_data(data_path: str | Path) -> bool:
    """Whether ``data_path`` is a file of records or a folder of them, not what preprocess_data.py wrote."""
    path = Path(data_path)
    if not str(data_path).strip() or has_pair(data_prefix(path)):
        return False
    if path.is_dir():
        return any(file.suffix.lstrip(".").lower() in EXTENSIONS for file in path.iterdir())
    return path.is_file() and path.suffix not in (".bin", ".idx")


def cache_root(flags: DataFlags, save: Path | None) -> Path:
    """``--cache-dir``, else ``data_cache`` beside ``--save``, else a folder in the user's home."""
    if flags.cache_dir is not None:
        return flags.cache_dir
    return save.absolute().parent / "data_cache" if save is not None else DEFAULT_CACHE.expanduser()


def prepare_raw_data(flags: DataFlags, tokenizer: TokenizerFlags, template: TemplateFlags, root: Path) -> Path:
    """The prefix of the preprocessed ``--data-path``, made in ``root`` where it is not there yet. Every process calls it.

    Raises:
        UsageError, DataError: what :func:`write_dataset` refuses, in every process of the machine with the same words; or the
            working process died.
    """
    if flags.handler_name is None:
        raise UsageError(
            f"--data-path {flags.data_path} is raw data, and nothing says what its records are; pass --handler-name {ALPACA_HANDLER} "
            f"(or {SHAREGPT_HANDLER}) with --prompt-type, and this run preprocesses it first, or run preprocess_data.py and give its "
            "--output-prefix"
        )
    config = PreprocessConfig(
        input=Path(flags.data_path),
        output_prefix=root / _NAME,
        tokenizer=tokenizer,
        template=template,
        handler_name=flags.handler_name,
        map_keys=flags.map_keys,
        seq_length=None if flags.handler_name.endswith(PAIRWISE_SUFFIX) else flags.seq_length,  # training cuts pairs, nothing drops them
        workers=flags.workers,
        pack=flags.pack,
        neat_pack=flags.neat_pack,
    )
    if int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))) == 1:
        return _make(config, root)
    board = Board(_board_path(config))
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        return board.work(config, root)
    return board.wait(config.input)


def cache_key(config: PreprocessConfig) -> str:
    """SHA-256 (hex) over everything that decides the preprocessed data, this program's version included."""
    files = open_records(config.input, "--data-path").files
    tokenizer = load_tokenizer(config.tokenizer)
    template = open_template(config.template, tokenizer)
    folder = Path(tokenizer.name_or_path)
    content = {
        "version": __version__,
        "files": [(file.suffix.lower(), _sha256(file)) for file in files],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "tokenizer_files": {name: _sha256(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()},
        "use_fast": config.tokenizer.use_fast,
        "template": template.fingerprint(),
        "thinking": template.check_thinking(config.template.enable_thinking or "none"),
        "seq_length": config.seq_length,
        "handler": config.handler_name,
        "map_keys": config.map_keys,
        "packing": [config.pack, config.neat_pack],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _make(config: PreprocessConfig, root: Path) -> Path:
    """The prefix in the cache, written first where it is not there."""
    folder = root / cache_key(config)[:32]
    prefix, logger = folder / _NAME, get_logger()
    if not _finished(folder):
        logger.info(f"--data-path {config.input}: raw data, preprocessing it into {folder} (other processes wait)")
        try:
            with atomic_directory(folder) as temporary:
                report = write_dataset(replace(config, output_prefix=temporary / _NAME), FlagNames("--data-path", "the data cache"))
        except OSError as error:
            if not _finished(folder):  # else another machine was faster, with the same content
                raise DataError(
                    f"the data cache {root}: cannot write there: {error.strerror or error}; give another folder with --cache-dir"
                ) from error
        else:
            for line in report.lines():
                logger.info(line)
            return prefix
    manifest = read_manifest(folder, manifest_name(prefix))
    counts = manifest.counts if manifest is not None else {}
    logger.info(
        f"--data-path {config.input}: preprocessed before, using {folder} ({counts.get('written')} of {counts.get('records')} records)"
    )
    return prefix


def _finished(folder: Path) -> bool:
    return (folder / manifest_name(folder / _NAME)).is_file()


def _board_path(config: PreprocessConfig) -> Path:
    """A file that the processes of this launch on this machine agree on without talking: launcher, restart, and what is asked for."""
    stats = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in open_records(config.input, "--data-path").files
    ]
    asked = json.dumps([stats, repr(replace(config, workers=1))])
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    name = f"{os.getppid()}-{restart}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
    return Path(tempfile.gettempdir()) / f"mindspeed_lora-{os.getuid()}" / name


@dataclass(frozen=True)
class Board:
    """The file by which one process of a machine tells the others how the work stands."""

    path: Path

    def work(self, config: PreprocessConfig, root: Path) -> Path:
        """Make the data and say so, or say why not."""
        self._write(status="working")
        try:
            prefix = _make(config, root)
        except MindSpeedLoraError as error:
            self._write(status="failed", kind=type(error).__name__, message=str(error))
            raise
        except BaseException as error:  # also an interrupt: whatever ends this process must end those that wait
            self._write(status="failed", kind="DataError", message=f"preprocessing {config.input} ended by {error!r}")
            raise
        self._write(status="ready", prefix=str(prefix))
        return prefix

    def wait(self, source: Path) -> Path:
        """Poll until the data is there; no time limit while the working process lives.

        Raises:
            MindSpeedLoraError: what the working process raised, or that it died.
        """
        logger, start, said = get_logger(), time.monotonic(), 0.0
        logger.info(f"waiting for local rank 0 to preprocess {source} ({self.path})")
        while True:
            found = self._read()
            if found.get("status") == "working" and not _alive(found["pid"]):
                found = self._read()  # its last word may have come in between
                if found.get("status") == "working":
                    raise DataError(f"process {found['pid']}, which preprocessed {source}, died without a result (out of memory?)")
            if found.get("status") == "failed":
                self._fail(found)
            if found.get("status") == "ready" and _finished(Path(found["prefix"]).parent):
                return Path(found["prefix"])
            if time.monotonic() - start - said > _SAY_EVERY_S:
                said = time.monotonic() - start
                logger.info(f"waiting for local rank 0 to preprocess {source}, {said:.0f} s so far")
            time.sleep(_POLL_S)

    def _fail(self, found: dict[str, Any]) -> NoReturn:
        raise _ERRORS.get(found["kind"], DataError)(found["message"])

    def _write(self, **fields: str) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(self.path, {"pid": os.getpid(), **fields})

    def _read(self) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return content


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def unused_raw_flags(flags: DataFlags) -> Sequence[str]:
    """Flags of raw data that were given though the data is prepared."""
    given = {"--handler-name": flags.handler_name, "--map-keys": flags.map_keys, "--cache-dir": flags.cache_dir}
    return [name for name, value in given.items() if value is not None]
