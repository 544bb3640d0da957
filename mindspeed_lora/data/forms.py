"""Forms of a dataset: which files it has, and how a record becomes rows of them.

A form first names the *parts* of a record (each a tuple of template elements), so that all texts of many records go to
the tokenizer in one call; then it makes the record's rows from the ids of the parts.

    record -- parts() --> [elements, ...] -- tokenizer --> [ids, ...] -- rows() --> [(input_ids, labels), ...]

Source: formats.md 3.4 (MindSpeed-LLM v26.0.0).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mindspeed_lora.data.cutting import Pair, cut_turns
from mindspeed_lora.data.packing import IGNORED
from mindspeed_lora.data.records import AlpacaColumns, Columns, Conversation, ConversationColumns, SharegptColumns
from mindspeed_lora.data.rendering import ConversationTemplate, Element, ElementEncoder
from mindspeed_lora.data.sft_dataset import PAIR_KEYS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CUTOFF = 100_000  # tokens, where --seq-length is not given (the peer's)

Part = tuple[Element, ...]
PromptTypeUse = Literal["needed", "ignored", "refused"]
Row = tuple[list[int], ...]
"""One list of ids for each of the form's values."""


@dataclass(frozen=True)
class Recipe:
    """Everything but the tokenizer that decides what a record becomes."""

    form: type[Form]
    columns: Columns
    template: ConversationTemplate
    thinking: str
    seq_length: int | None
    append_eod: bool = False
    cut_rest: bool = False  # --neat-pack: cut at the right what is still too long, instead of dropping it
    additional_keys: tuple[str, ...] = ()  # columns that go beside prompts
    pad_to_multiple_of: int = 1  # tokens; of plain text


class Form(ABC):
    """One form of dataset. Made once in each process that encodes."""

    name: ClassVar[str]  # in the manifest
    packed: ClassVar[bool] = True  # whether the files' names say "packed", as those of all but plain text do
    values: tuple[str, ...] = ()  # keys of a row's ids; those that end in "labels" hold -100 where nothing is trained
    masked: ClassVar[bool] = True  # whether there is an attention_mask of ones beside input_ids
    drops_empty: ClassVar[bool] = False  # whether empty ids have neither sequence nor document
    prompt_type: ClassVar[PromptTypeUse] = "needed"
    special_tokens: ClassVar[bool] = False  # whether the tokenizer adds its own to each text

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.values = self.keys(recipe)
        self.eos: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eod = self.eos if recipe.append_eod else []

    @classmethod
    def keys(cls, recipe: Recipe) -> tuple[str, ...]:
        """Keys of a row's ids."""
        return cls.values

    @classmethod
    def file_keys(cls, recipe: Recipe) -> tuple[str, ...]:
        """Keys of the file pairs."""
        return (*cls.keys(recipe), "attention_mask") if cls.masked else cls.keys(recipe)

    @abstractmethod
    def parts(self, record: Mapping[str, Any], notes: Counter[str]) -> list[Part]:
        """What of a record is to be encoded.

        Raises:
            SkippedRecord: the record is none.
        """

    @abstractmethod
    def rows(self, ids: Sequence[list[int]], notes: Counter[str]) -> list[Row]:
        """The rows of a record from the ids of its parts."""

    def refusal(self, row: Row) -> str:
        """Why a row is not written, or nothing."""
        if any(_hides_all(ids) for key, ids in zip(self.values, row, strict=True) if key.endswith("labels")):
            return "no token to train"
        return self.too_long(row)

    def too_long(self, row: Row) -> str:
        """What is said of a row that does not fit, or nothing."""
        limit = self.recipe.seq_length
        if limit is None or all(len(ids) < limit for ids in row):
            return ""
        return f"{limit} tokens or more (--seq-length)"


def _hides_all(labels: list[int]) -> bool:
    """Whether no label but the first, which nothing predicts, is trained."""
    return labels.count(IGNORED) == len(labels) - (labels[:1] != [IGNORED])


class InstructionForm(Form):
    """One conversation a row; the answers of all its turns are trained."""

    name = "instruction"
    values = ("input_ids", "labels")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        super().__init__(tokenizer, recipe)
        self.template = recipe.template
        self._stops = StopCheck(tokenizer, recipe.template)

    def parts(self, record: Mapping[str, Any], notes: Counter[str]) -> list[Part]:
        """Source and target of each turn."""
        conversation = conversation_columns(self.recipe).conversation(record)
        note_empty_texts(conversation, notes)
        turns = self.template.render(conversation.messages, conversation.system, self.recipe.thinking, conversation.tools)
        notes["answers not trained, for the chat template writes them in another way once a turn follows"] += max(
            len(conversation.messages) // 2 - len(turns), 0
        )
        return [side for turn in turns for side in turn]

    def rows(self, ids: Sequence[list[int]], notes: Counter[str]) -> list[Row]:
        """Input ids and labels of the conversation, cut to the length."""
        pairs = list(zip(ids[::2], ids[1::2], strict=True))
        efficient_eos = self.eos if self.template.efficient_eos else []
        end = [*efficient_eos, *self.eod]
        cut = self._cut(pairs, len(end))
        input_ids: list[int] = []
        labels: list[int] = []
        for number, (source, target) in enumerate(cut):
            input_ids += source
            input_ids += target
            hidden = [IGNORED] * len(source)
            if efficient_eos and number and hidden:
                hidden[:1] = efficient_eos
            labels += hidden
            labels += target
            notes["turns without a stop token at the end"] += bool(target) and not efficient_eos and not self._stops.ends(target)
        input_ids += end
        labels += end
        longest = self.recipe.seq_length - 1 if self.recipe.seq_length and self.recipe.cut_rest else len(input_ids)
        notes["records cut to --seq-length"] += _count(cut) != _count(pairs) or len(input_ids) > longest
        return [(input_ids[:longest], labels[:longest])]

    def _cut(self, pairs: list[Pair], num_end: int) -> list[Pair]:
        """Cut by the peer's rule; where that leaves what the peer drops (``--seq-length`` tokens with the end), cut to one fewer.

        With ``--neat-pack`` the peer drops nothing but cuts the rest at the right, and so do we.
        """
        limit, rule = self.recipe.seq_length or DEFAULT_CUTOFF, self.template.cut_rule
        cut = cut_turns(pairs, limit, rule)
        room = limit - 1 - num_end
        if _count(cut) <= room or self.recipe.seq_length is None or self.recipe.cut_rest:
            return cut
        return cut_turns(pairs, room + (rule == "halves"), rule)


class PairwiseForm(Form):
    """A chosen and a rejected answer a row, each after the prompt; neither is cut, and earlier answers are not trained."""

    name = "pairwise"
    values = PAIR_KEYS
    masked = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        super().__init__(tokenizer, recipe)
        self.template = recipe.template
        self._stops = StopCheck(tokenizer, recipe.template)

    def parts(self, record: Mapping[str, Any], notes: Counter[str]) -> list[Part]:
        """The prompt, the chosen and the rejected answer; an empty thought in the prompt is the chosen answer's."""
        preference = conversation_columns(self.recipe).preference(record)
        notes["records whose answers are equal"] += preference.chosen["content"] == preference.rejected["content"]
        (prompt, chosen), (_, rejected) = (
            self.template.render_last([*preference.prompt, answer], preference.system, self.recipe.thinking, preference.tools)
            for answer in (preference.chosen, preference.rejected)
        )
        return [prompt, chosen, rejected]

    def rows(self, ids: Sequence[list[int]], notes: Counter[str]) -> list[Row]:
        """Ids and labels of both conversations."""
        prompt, *answers = ids
        hidden = [IGNORED] * len(prompt)
        end = self.eos if self.template.efficient_eos else []
        row: list[list[int]] = []
        for answer in answers:
            notes["answers without a stop token at the end"] += not end and not self._stops.ends(answer)
            row += [[*prompt, *answer, *end], [*hidden, *answer, *end]]
        return [tuple(row)]


class StopCheck:
    """Whether an answer ends with a stop token of the template, blanks after it aside."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ConversationTemplate) -> None:
        self._stops = set(template.stop_token_ids(tokenizer))
        blank = ElementEncoder(tokenizer, template.name)
        blank.add(("\n", " ", "\n\n"))
        self._blank = {index for text in ("\n", " ", "\n\n") for index in blank.ids((text,))}

    def ends(self, answer: Sequence[int]) -> bool:
        """Whether ``answer`` ends with one."""
        return next((index in self._stops for index in reversed(answer) if index not in self._blank), False)


def conversation_columns(recipe: Recipe) -> ConversationColumns:
    """The columns of a recipe whose handler reads conversations."""
    assert isinstance(recipe.columns, AlpacaColumns | SharegptColumns)
    return recipe.columns


def note_empty_texts(conversation: Conversation, notes: Counter[str]) -> None:
    """Count a conversation whose last question or answer is empty."""
    notes["records with an empty prompt"] += not conversation.messages[-2]["content"]
    notes["records with an empty answer"] += not conversation.messages[-1]["content"]


def _count(pairs: Iterable[Pair]) -> int:
    return sum(len(source) + len(target) for source, target in pairs)
