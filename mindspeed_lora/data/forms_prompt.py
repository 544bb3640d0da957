"""Prompts for reinforcement learning, which the peer's PPO and R1 handlers write, and the form of Hunyuan's chat template.

Source: formats.md 3.2 (MindSpeed-LLM v26.0.0).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mindspeed_lora.data.cutting import cut_turns
from mindspeed_lora.data.forms import DEFAULT_CUTOFF, Form, Part, Recipe, Row, conversation_columns
from mindspeed_lora.data.packing import IGNORED
from mindspeed_lora.data.records import required_text
from mindspeed_lora.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptForm(Form):
    """A conversation up to its last answer, which is left out; other columns (``--dataset-additional-keys``) beside it.

    The additional key ``labels`` is the answer that is left out.
    """

    name = "prompt"
    values = ("input_ids",)

    @classmethod
    def keys(cls, recipe: Recipe) -> tuple[str, ...]:
        """The prompt and the additional keys."""
        return (*cls.values, *recipe.additional_keys)

    def parts(self, record: Mapping[str, Any], notes: Counter[str]) -> list[Part]:
        """The additional texts, then source and target of each turn."""
        conversation = conversation_columns(self.recipe).conversation(record)
        answer = conversation.messages[-1]["content"]
        beside = [answer if key == "labels" else required_text(record, key) for key in self.recipe.additional_keys]
        turns = self.recipe.template.render(conversation.messages, conversation.system, self.recipe.thinking, conversation.tools)
        return [*((text,) for text in beside), *(side for turn in turns for side in turn)]

    def rows(self, ids: Sequence[list[int]], notes: Counter[str]) -> list[Row]:
        """The prompt, cut as instruction data is, and the texts beside it."""
        beside, turns = ids[: len(self.recipe.additional_keys)], ids[len(self.recipe.additional_keys) :]
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        *earlier, last = cut_turns(pairs, self.recipe.seq_length or DEFAULT_CUTOFF, self.recipe.template.cut_rule)
        prompt = [index for source, target in earlier for index in (*source, *target)]
        return [([*prompt, *last[0]], *beside)]

    def refusal(self, row: Row) -> str:
        """A prompt too long, or empty."""
        return "the prompt is empty" if not row[0] else self.too_long(row)


class HunyuanForm(Form):
    """Hunyuan-Large: the tokenizer's own chat template; what stands from ``<|extra_0|>`` to ``<|eos|>`` is trained."""

    name = "instruction"
    values = ("input_ids", "labels")
    prompt_type = "ignored"
    begin, end = "<|extra_0|>", "<|eos|>"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        super().__init__(tokenizer, recipe)
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (self.begin, self.end) if token not in vocabulary]
        if missing or not tokenizer.chat_template:
            lacks = f"the tokens {' and '.join(missing)}" if missing else "a chat template"
            raise UsageError(f"HunyuanInstructionHandler needs Hunyuan's tokenizer; the one at {tokenizer.name_or_path} lacks {lacks}")
        self._begin, self._end = vocabulary[self.begin], vocabulary[self.end]

    def parts(self, record: Mapping[str, Any], notes: Counter[str]) -> list[Part]:
        """The whole conversation as the chat template writes it."""
        conversation = conversation_columns(self.recipe).conversation(record)
        chat = [{"role": "system", "content": conversation.system}] if conversation.system else []
        chat += map(dict, conversation.messages)
        return [(str(self.tokenizer.apply_chat_template(chat, tokenize=False)),)]

    def rows(self, ids: Sequence[list[int]], notes: Counter[str]) -> list[Row]:
        """Ids, and labels from each begin to the end after it."""
        input_ids = [*ids[0], *self.eod]
        labels = [IGNORED] * len(input_ids)
        begins = [place for place, index in enumerate(input_ids) if index == self._begin]
        ends = [place for place, index in enumerate(input_ids) if index == self._end]
        for begin, end in zip(begins, ends, strict=False):
            labels[begin : end + 1] = input_ids[begin : end + 1]
        return [(input_ids, labels)]
