"""Handlers by the peer's names: which columns a record has, and the form of dataset it goes to."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from mindspeed_lora.data.forms import Form, InstructionForm, PairwiseForm
from mindspeed_lora.data.records import AlpacaColumns, Columns, SharegptColumns
from mindspeed_lora.errors import UsageError

ALPACA_HANDLER = "AlpacaStyleInstructionHandler"
SHAREGPT_HANDLER = "SharegptStyleInstructionHandler"


@dataclass(frozen=True)
class Handler:
    """One value of ``--handler-name``; ``used``: the keys of ``--map-keys`` that it reads."""

    columns: type[Columns]
    form: type[Form]
    used: tuple[str, ...]


_ALPACA = ("prompt", "query", "history", "system")
_SHAREGPT = ("messages", "system", "tools")
_PAIR = ("chosen", "rejected")

HANDLERS: dict[str, Handler] = {
    ALPACA_HANDLER: Handler(AlpacaColumns, InstructionForm, (*_ALPACA, "response")),
    SHAREGPT_HANDLER: Handler(SharegptColumns, InstructionForm, _SHAREGPT),
    "AlpacaStylePairwiseHandler": Handler(AlpacaColumns, PairwiseForm, (*_ALPACA, *_PAIR)),
    "SharegptStylePairwiseHandler": Handler(SharegptColumns, PairwiseForm, (*_SHAREGPT, *_PAIR)),
}


def handler_of(name: str) -> Handler:
    """The handler of a name.

    Raises:
        UsageError: there is none.
    """
    if name in HANDLERS:
        return HANDLERS[name]
    near = difflib.get_close_matches(name, HANDLERS, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UsageError(f"--handler-name {name}: there is no such handler{hint} (known are {', '.join(HANDLERS)})")
