"""Handlers by the peer's names: which columns a record has, and the form of dataset it goes to."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from mindspeed_lora.data.forms import Form, InstructionForm, PairwiseForm
from mindspeed_lora.data.forms_prompt import HunyuanForm, PromptForm
from mindspeed_lora.data.forms_text import (
    AlpacaTextForm,
    BelleForm,
    ColumnsTextForm,
    LeetcodeForm,
    MessagesTextForm,
    MossForm,
    MossMultiTurnForm,
    OldAlpacaForm,
    StackOverflowTextForm,
)
from mindspeed_lora.data.records import AlpacaColumns, ChatColumns, Columns, SharegptColumns, TextColumns, used_columns
from mindspeed_lora.errors import UsageError

ALPACA_HANDLER = "AlpacaStyleInstructionHandler"
SHAREGPT_HANDLER = "SharegptStyleInstructionHandler"
TEXT_HANDLER = "GeneralPretrainHandler"


@dataclass(frozen=True)
class Handler:
    """One value of ``--handler-name``.

    ``columns``: the default ones; ``used``: the keys of ``--map-keys`` that it reads; ``optional``: those of them whose default
    column a file may lack.
    """

    form: type[Form]
    columns: Columns
    used: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def wanted(self, columns: Columns, map_keys: Mapping[str, object] | None) -> dict[str, str]:
        """The columns that an input must have, by key."""
        named = map_keys or {}
        return {key: column for key, column in used_columns(columns, self.used).items() if key in named or key not in self.optional}


_PROMPT = ("prompt", "query", "history", "system")
_SHAREGPT = ("messages", "system", "tools")
_PAIR = ("chosen", "rejected")
_TEXTS = ("prompt", "query", "response")
_QUERY = ("query",)

HANDLERS: dict[str, Handler] = {
    ALPACA_HANDLER: Handler(InstructionForm, AlpacaColumns(), (*_PROMPT, "response"), _QUERY),
    SHAREGPT_HANDLER: Handler(InstructionForm, SharegptColumns(), _SHAREGPT),
    "AlpacaStylePairwiseHandler": Handler(PairwiseForm, AlpacaColumns(), (*_PROMPT, *_PAIR), _QUERY),
    "SharegptStylePairwiseHandler": Handler(PairwiseForm, SharegptColumns(), (*_SHAREGPT, *_PAIR)),
    "PPOAlpacaStyleInstructionHandler": Handler(PromptForm, AlpacaColumns(), (*_PROMPT, "response"), _QUERY),
    "R1AlpacaStyleInstructionHandler": Handler(PromptForm, AlpacaColumns(), (*_PROMPT, "response"), _QUERY),
    "R1SharegptStyleInstructionHandler": Handler(PromptForm, SharegptColumns(), _SHAREGPT),
    "HunyuanInstructionHandler": Handler(HunyuanForm, SharegptColumns(), _SHAREGPT),
    "GeneralInstructionHandler": Handler(OldAlpacaForm, AlpacaColumns(), _TEXTS, _QUERY),
    "BelleMultiTurnInstructionHandler": Handler(BelleForm, AlpacaColumns(query=None), ("prompt", "response")),
    "MOSSInstructionHandler": Handler(MossForm, ChatColumns(), ("chat",)),
    "MOSSMultiTurnHandler": Handler(MossMultiTurnForm, ChatColumns(), ("chat",)),
    "LeetcodePythonInstructionHandler": Handler(LeetcodeForm, AlpacaColumns("code_with_problem", "code_only", "explanation_only"), _TEXTS),
    TEXT_HANDLER: Handler(ColumnsTextForm, TextColumns()),
    "AlpacaPretrainHandler": Handler(AlpacaTextForm, AlpacaColumns(), _TEXTS, _QUERY),
    "SharegptPretrainHandler": Handler(MessagesTextForm, TextColumns(("conversations",))),
    "StackOverflowPythonPretrainHandler": Handler(StackOverflowTextForm, AlpacaColumns("title", "question_body", "answer_body"), _TEXTS),
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
