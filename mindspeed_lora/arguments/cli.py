"""What all entry points share: parse, log, call the verb, turn errors into one message and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from mindspeed_lora.arguments.flag import CONVERT, EVALUATE, INFER, PREPROCESS, TRAIN
from mindspeed_lora.arguments.parser import parse
from mindspeed_lora.errors import MindSpeedLoraError
from mindspeed_lora.log import configure_logging

VERBS = {
    CONVERT: ("mindspeed_lora.conversion.run", "convert"),
    PREPROCESS: ("mindspeed_lora.data.preprocess", "preprocess"),
    TRAIN: ("mindspeed_lora.training.run", "train"),
    INFER: ("mindspeed_lora.inference.run", "infer"),
    EVALUATE: ("mindspeed_lora.evaluation.run", "evaluate"),
}
"""Module and function of each command; imported after the command line is known to be good."""

INTERRUPTED = 130
OTHER_RANKS_WAIT_S = 3.0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def report_error(error: MindSpeedLoraError) -> None:
    """Print one message for all ranks that found the same.

    Rank 0 prints at once. Another rank waits: if rank 0 failed too, torchrun ends the waiting ones within that time; if only
    this rank failed, its message is the one that matters.
    """
    rank = _rank()
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return
    time.sleep(OTHER_RANKS_WAIT_S)
    print(f"[rank {rank}] error: {error}", file=sys.stderr, flush=True)


def _load_verb(command: str) -> Callable[[Any], object]:
    module, function = VERBS[command]
    verb: Callable[[Any], object] = getattr(importlib.import_module(module), function)
    return verb


def _shutdown() -> None:
    """Leave the process group, where the verb joined one."""
    context = sys.modules.get("mindspeed_lora.parallel.context")
    if context is not None:
        context.shutdown()


def _run(command: str, argv: Sequence[str] | None) -> int:
    config, notes = parse(command, argv)
    logger = configure_logging(_rank())
    for note in notes:
        logger.info(note)
    from mindspeed_lora.device import check_torch_version  # torch: only once the command line is known to be good

    warning = check_torch_version()
    if warning and _rank() == 0:
        logger.warning(warning)
    result = _load_verb(command)(config)
    return result if isinstance(result, int) else 0


def main(command: str, argv: Sequence[str] | None = None) -> int:
    """Run one entry point; returns its exit code.

    0: done; 1: a file, checkpoint or the environment is wrong; 2: the command line is wrong; 130: interrupted. Other exceptions are our
    own mistakes and keep their traceback.
    """
    try:
        return _run(command, argv)
    except MindSpeedLoraError as error:
        report_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        if _rank() == 0:
            print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    except SystemExit as finished:  # --help and --version
        return finished.code if isinstance(finished.code, int) else 0
    finally:
        _shutdown()
