"""The command lines of MindSpeed-LLM's ``convert_ckpt_v2.py``, as those of ``convert_ckpt.py``."""

from __future__ import annotations

from collections.abc import Sequence

V2_DEFAULTS = (("--load-model-type", "hf"), ("--save-model-type", "mg"))
"""The flags that the peer's second converter may leave out, and the first may not."""


def v2_arguments(argv: Sequence[str]) -> list[str]:
    """``argv`` with the defaults of the peer's second converter; everything else means the same in both."""
    given = {word.split("=", 1)[0] for word in argv}
    return [*argv, *(word for flag, value in V2_DEFAULTS if flag not in given for word in (flag, value))]
