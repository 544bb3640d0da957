"""Plain text (pre-training data) and the old instruction handlers, which know no template: whole texts go to the tokenizer.

A text gets the tokenizer's own special tokens (a beginning of text, where it has one). Of the old Alpaca prompt the
words up to the last answer are not trained.
Source: formats.md 3.2 and 3.4 (MindSpeed-LLM v26.0.0).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mindspeed_lora.data.forms import Form, Part, Recipe, Row
from mindspeed_lora.data.packing import IGNORED
from mindspeed_lora.data.records import AlpacaColumns, ChatColumns, SkippedRecord, TextColumns, required_text
from mindspeed_lora.data.tokenizer import pad_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextForm(Form):
    """Texts as they are, one file pair for each column; an empty text has neither sequence nor document."""

    name = "pretrain"
    packed = False
    masked = False
    drops_empty = True
    prompt_type = "refused"
    special_tokens = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        super().__init__(tokenizer, recipe)
        self._pad = [pad_token_id(tokenizer)]

    @classmethod
    def keys(cls, recipe: Recipe) -> tuple[str, ...]:
        """The columns."""
        return recipe.columns.keys if isinstance(recipe.columns, TextColumns) else ("text",)

    @abstractmethod
    def texts(self, record: Mapping[str, Any]) -> list[str]:
        """The text of each key.

        Raises:
            SkippedRecord: the record has none.
        """

    def parts(self, record: Mapping[str, Any], notes: Counter[str]) -> list[Part]:
        """One text a part."""
        texts = self.texts(record)
        if not any(texts):
            raise SkippedRecord("the text is empty")
        return [(text,) if text else () for text in texts]

    def rows(self, ids: Sequence[list[int]], notes: Counter[str]) -> list[Row]:
        """Each text with its padding (``--pad-to-multiple-of``) and end (``--append-eod``)."""
        return [tuple([*text, *self._padding(len(text)), *self.eod] if text else [] for text in ids)]

    def _padding(self, length: int) -> list[int]:
        """As many pad tokens as make a whole multiple, end included; a text that is one already gets another, as with the peer."""
        multiple = self.recipe.pad_to_multiple_of
        return self._pad * (multiple - length % multiple - len(self.eod)) if multiple > 1 else []


class ColumnsTextForm(TextForm):
    """The columns of ``--json-keys``."""

    def texts(self, record: Mapping[str, Any]) -> list[str]:
        """The columns' texts."""
        return [required_text(record, key) for key in self.values]


class MessagesTextForm(TextForm):
    """Lists of messages in the columns of ``--json-keys``: what was said, one after the other, without roles."""

    def texts(self, record: Mapping[str, Any]) -> list[str]:
        """The messages' texts joined."""
        return ["".join(self._said(message, key) for message in _list_of(record, key)) for key in self.values]

    def _said(self, message: Any, key: str) -> str:
        said = message.get("value", message.get("content")) if isinstance(message, dict) else None
        if not isinstance(said, str):
            raise SkippedRecord(f"column {key}: a message has no text in value or content")
        return said


class AlpacaTextForm(TextForm):
    """Alpaca records as one text each, after Vicuna's and Alpaca's prompts."""

    def texts(self, record: Mapping[str, Any]) -> list[str]:
        """The one text of a record."""
        assert isinstance(self.recipe.columns, AlpacaColumns)
        instruction, query, response = self.recipe.columns.texts(record)
        request = f"### Instruction:\n{instruction}" + (f"\n\n### Input:\n{query}" if query else "")
        return [
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
            "USER: Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            f"{request}\n\n### Response: ASSISTANT: {response}"
        ]


class StackOverflowTextForm(TextForm):
    """A question's title and body and its answer as one text."""

    def texts(self, record: Mapping[str, Any]) -> list[str]:
        """The one text of a record."""
        assert isinstance(self.recipe.columns, AlpacaColumns)
        title, question, answer = self.recipe.columns.texts(record)
        return [f"In python, {title}\n### Question:\n{question}\n### Response:\n{answer}\n"]


USER, ASSISTANT = "### Instruction:", "### Response:"
SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. "
    "Please note that you need to think through your response logically and step by step."
)
Turns = list[tuple[str, str]]  # question, answer


class OldAlpacaForm(Form):
    """Conversations in the Alpaca prompt as one text each; the last answer is trained, and it has no stop token of its own."""

    name = "instruction"
    values = ("input_ids", "labels")
    prompt_type = "refused"
    special_tokens = True

    def turns(self, record: Mapping[str, Any]) -> Turns:
        """Questions and answers of a record.

        Raises:
            SkippedRecord: it has none.
        """
        assert isinstance(self.recipe.columns, AlpacaColumns)
        instruction, query, response = self.recipe.columns.texts(record)
        return [(f"{instruction}\n{query}", response)]

    def parts(self, record: Mapping[str, Any], notes: Counter[str]) -> list[Part]:
        """The whole text, and what of it comes before the last answer."""
        return [(text,) for text in _old_prompt(self.turns(record))]

    def rows(self, ids: Sequence[list[int]], notes: Counter[str]) -> list[Row]:
        """Rows from pairs of parts."""
        notes["turns without a stop token at the end"] += 0 if self.eod else len(ids) // 2
        return [self._row(whole, question) for whole, question in zip(ids[::2], ids[1::2], strict=True)]

    def _row(self, whole: list[int], question: list[int]) -> Row:
        ids = [*whole, *self.eod]
        return ids, [*[IGNORED] * len(question), *ids[len(question) :]]


def _old_prompt(turns: Turns) -> tuple[str, str]:
    """A conversation in the Alpaca prompt, and its beginning up to the last answer."""
    *earlier, (question, answer) = turns
    start = f"\n{SYSTEM}\n" + "".join(f"{USER}\n{said}\n{ASSISTANT}\n{reply}\n" for said, reply in earlier)
    start += f"{USER}\n{question}\n{ASSISTANT}\n"
    return f"{start}{answer}\n", start


class LeetcodeForm(OldAlpacaForm):
    """A problem up to its first code block; the answer is the code and its explanation."""

    def turns(self, record: Mapping[str, Any]) -> Turns:
        """The one turn of a record."""
        assert isinstance(self.recipe.columns, AlpacaColumns)
        problem, code, explanation = self.recipe.columns.texts(record)
        return [(problem.split("```", maxsplit=1)[0].strip(), f"{code}\n{explanation}")]


class BelleForm(OldAlpacaForm):
    """A conversation in one text, with ``Human:`` and ``Assistant:`` before each turn, the last of them open."""

    def turns(self, record: Mapping[str, Any]) -> Turns:
        """The turns in the text, and the answer to the last."""
        assert isinstance(self.recipe.columns, AlpacaColumns)
        conversation, _, answer = self.recipe.columns.texts(record)
        said = [turn.split("Assistant:", maxsplit=1) for turn in conversation.split("Human:") if turn.strip()]
        if not said or any(len(turn) != 2 for turn in said) or said[-1][1].strip():
            raise SkippedRecord(f"column {self.recipe.columns.prompt} does not alternate Human: and Assistant: up to an open Assistant:")
        turns = [(question.strip(), reply.strip()) for question, reply in said]
        return [*turns[:-1], (turns[-1][0], answer.strip())]


class MossForm(OldAlpacaForm):
    """MOSS conversations in the Alpaca prompt: a row for each turn, with the turns before it."""

    def turns(self, record: Mapping[str, Any]) -> Turns:
        """The turns of a conversation."""
        return moss_turns(record, self.recipe.columns)

    def parts(self, record: Mapping[str, Any], notes: Counter[str]) -> list[Part]:
        """The conversation up to each answer, with it and without it."""
        turns = self.turns(record)
        return [(text,) for number in range(len(turns)) for text in _old_prompt(turns[: number + 1])]


class MossMultiTurnForm(OldAlpacaForm):
    """MOSS conversations as Baichuan's chat models read them: the tokens 195 and 196 before what user and assistant say."""

    user_token, assistant_token = 195, 196

    def parts(self, record: Mapping[str, Any], notes: Counter[str]) -> list[Part]:
        """Questions and answers in turn."""
        return [(text,) for turn in moss_turns(record, self.recipe.columns) for text in turn]

    def rows(self, ids: Sequence[list[int]], notes: Counter[str]) -> list[Row]:
        """One row: every answer is trained, and so is the eos before each question and at the end."""
        input_ids: list[int] = []
        labels: list[int] = []
        for question, answer in zip(ids[::2], ids[1::2], strict=True):
            input_ids += [self.user_token, *question, self.assistant_token, *answer]
            labels += [*(self.eos or [IGNORED]), *[IGNORED] * (len(question) + 1), *answer]
        return [([*input_ids, *self.eos], [*labels, *self.eos])]


def moss_turns(record: Mapping[str, Any], columns: object) -> Turns:
    """The turns of a MOSS record, without its role and end marks.

    Raises:
        SkippedRecord: it is no MOSS conversation.
    """
    assert isinstance(columns, ChatColumns)
    chat = record.get(columns.chat or "")
    said = [turn for turn in chat.values() if turn] if isinstance(chat, dict) else []
    if not said or not all(isinstance(turn, dict) and isinstance(turn.get(who), str) for turn in said for who in ("Human", "MOSS")):
        raise SkippedRecord(f"column {columns.chat} is no object of turns with Human and MOSS")
    return [
        (
            turn["Human"].replace("<eoh>", "").replace("<|Human|>: ", "").strip(),
            turn["MOSS"].replace("<|MOSS|>:", "").replace("<eom>", "").strip(),
        )
        for turn in said
    ]


def _list_of(record: Mapping[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list):
        raise SkippedRecord(f"column {key} is no list of messages")
    return value
