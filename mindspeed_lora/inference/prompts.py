"""From a person's text to the ids the model continues: raw, through a template, or through the tokenizer's chat template.

Who decides, in this order: ``--prompt-type`` (``raw`` means no template), ``--hf-chat-template``, the adapter's manifest,
else raw. What is passed must agree with the manifest of the adapter: a model trained on one form answers badly in another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mindspeed_lora.arguments.configs import TemplateFlags
from mindspeed_lora.data.chat_template import HF_CHAT_TEMPLATE, ChatTemplate
from mindspeed_lora.data.templates import DEFAULT_THOUGHT_WORDS, Template, load_template
from mindspeed_lora.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RAW = "raw"


@dataclass(frozen=True)
class PromptFormat:
    """``template`` and ``use_chat_template`` exclude each other; neither: raw. ``source`` says who decided."""

    template: Template | None = None
    use_chat_template: bool = False
    thinking: str = "none"
    source: str = "the default"

    @property
    def name(self) -> str:
        """For messages and result files."""
        if self.use_chat_template:
            return "the tokenizer's chat template"
        return RAW if self.template is None else self.template.name

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        """Ids of one user turn, up to where the answer begins.

        Raw text gets the tokenizer's own special tokens, unless it begins with the beginning-of-sequence token itself.

        Raises:
            UsageError: the prompt is empty, or the tokenizer has no chat template.
        """
        return self.encode_conversation(tokenizer, [{"role": "user", "content": prompt}])

    def encode_conversation(
        self, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], system: str | None = None
    ) -> list[int]:
        """Ids of a conversation, up to where the model answers its last message; raw: its texts behind one another.

        Raises:
            UsageError: the last message is empty, ``system`` has no place in this form, or the tokenizer has no chat template.
        """
        if not messages[-1]["content"].strip():
            raise UsageError("--prompt is empty; give a text to continue or to answer")
        if self.template is not None:
            return self.template.encode_prompt(tokenizer, messages, system, thinking=self.thinking)
        if self.use_chat_template:
            leading = [] if system is None else [{"role": "system", "content": system}]
            return self._encode_chat(tokenizer, [*leading, *messages])
        if system is not None:
            raise UsageError("--system-prompt needs a template, and the prompt is raw here; pass --prompt-type or leave it out")
        prompt = "".join(message["content"] for message in messages)
        has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        ids = tokenizer.encode(prompt, add_special_tokens=not has_bos)
        if not ids:
            raise UsageError(f"--prompt {prompt!r} has no tokens in the tokenizer at {tokenizer.name_or_path}; give another text")
        return ids

    def _encode_chat(self, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
        return tokenizer.encode(self.render_chat(tokenizer, messages), add_special_tokens=False)

    def render_chat(self, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The tokenizer's own template over ``messages``; without a generation prompt the last message is left open.

        Raises:
            UsageError: the tokenizer has no chat template.
        """
        if not tokenizer.chat_template:
            raise UsageError(f"--hf-chat-template: the tokenizer at {tokenizer.name_or_path} has no chat template; use --prompt-type")
        mode: dict[str, Any] = {} if self.thinking == "none" else {"enable_thinking": self.thinking == "true"}
        if not add_generation_prompt:
            mode["continue_final_message"] = True
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt, **mode))

    @property
    def thought_words(self) -> tuple[str, str]:
        """What stands before and behind a thought."""
        start, end = DEFAULT_THOUGHT_WORDS if self.template is None else self.template.thought_words
        return start.strip(), end.strip()

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """Ids that end an answer by this form."""
        if self.template is not None:
            return set(self.template.stop_token_ids(tokenizer))
        return set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, recorded: Mapping[str, Any] | None, where: str) -> None:
        """See that ``tokenizer`` has what this form needs, and the chat template that the adapter was trained with.

        Raises:
            UsageError: the tokenizer lacks the template's tokens, has no chat template, or one without the thinking asked for.
            CheckpointError: its chat template is not the one of the manifest (``recorded``; ``where`` names it).
        """
        if self.template is not None:
            self.template.check_tokenizer(tokenizer)
        if not self.use_chat_template:
            return
        template = ChatTemplate.of(tokenizer)
        template.check_thinking(self.thinking)
        known = recorded or {}
        if known.get("name") == HF_CHAT_TEMPLATE and known.get("fingerprint") not in (None, template.fingerprint()):
            raise CheckpointError(
                f"{where}: the adapter was trained with another chat template than that of the tokenizer at {tokenizer.name_or_path}; "
                "pass the tokenizer folder of training as --tokenizer-name-or-path"
            )


def resolve_prompt_format(flags: TemplateFlags, recorded: Mapping[str, Any] | None, where: str) -> PromptFormat:
    """Bring together the flags and the template that the adapter's manifest records (``recorded``; ``where`` names it).

    Raises:
        UsageError: two sources disagree, or the template or the mode is unknown.
        CheckpointError: the template of that name is not the one the adapter was trained with.
    """
    known = dict(recorded or {})
    if flags.prompt_type not in (None, RAW) and known.get("name") not in (None, flags.prompt_type):
        raise UsageError(
            f"--prompt-type {flags.prompt_type} contradicts {where}, which says the adapter was trained with template {known['name']}; "
            f"leave the flag out, or pass --prompt-type {RAW} for a prompt without template"
        )
    thinking = flags.enable_thinking or "none"
    if flags.prompt_type == RAW:
        if thinking != "none":
            raise UsageError(f"--enable-thinking {thinking} needs a template, but --prompt-type is {RAW}; name a template or leave it out")
        return PromptFormat(None, False, thinking, f"--prompt-type {RAW}")
    name = flags.prompt_type or known.get("name")
    if flags.hf_chat_template or name == HF_CHAT_TEMPLATE:
        mode = known.get("enable_thinking") if name == HF_CHAT_TEMPLATE else None
        _check_mode(flags, mode, where)
        return PromptFormat(None, True, flags.enable_thinking or mode or "none", "--hf-chat-template" if flags.hf_chat_template else where)
    if name is None:
        if thinking != "none":
            raise UsageError(f"--enable-thinking {thinking} needs a template; pass --prompt-type")
        return PromptFormat()
    return _with_template(name, flags, known, where)


def _with_template(name: str, flags: TemplateFlags, known: Mapping[str, Any], where: str) -> PromptFormat:
    template = load_template(name, flags.prompt_type_path)
    if known.get("fingerprint") not in (None, template.fingerprint()):
        raise CheckpointError(
            f"{where}: the adapter was trained with another version of template {name} than the one in "
            f"{flags.prompt_type_path or 'configs/finetune/templates.json'}; pass the file it was trained with as --prompt-type-path"
        )
    recorded = known.get("enable_thinking")
    _check_mode(flags, recorded, where)
    thinking = template.check_thinking(flags.enable_thinking or recorded or "none")
    return PromptFormat(template, False, thinking, "--prompt-type" if flags.prompt_type else where)


def _check_mode(flags: TemplateFlags, recorded: str | None, where: str) -> None:
    if flags.enable_thinking is not None and recorded not in (None, flags.enable_thinking):
        raise UsageError(
            f"--enable-thinking {flags.enable_thinking} contradicts {where}, which says the adapter was trained with {recorded}; "
            "leave the flag out"
        )
