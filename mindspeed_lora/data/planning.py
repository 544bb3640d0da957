"""From the flags of ``preprocess_data.py`` to a plan: what is read, and by which recipe.

Everything is checked here, before the first record is encoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_lora.arguments.configs import PreprocessConfig
from mindspeed_lora.data.chat_template import open_template
from mindspeed_lora.data.forms import InstructionForm, Recipe
from mindspeed_lora.data.handlers import ALPACA_HANDLER, TEXT_HANDLER, Handler, handler_of
from mindspeed_lora.data.mixing import Mixture, open_inputs
from mindspeed_lora.data.records import check_columns, check_mapping, columns_of
from mindspeed_lora.data.rendering import ConversationTemplate
from mindspeed_lora.data.sft_dataset import key_stem
from mindspeed_lora.data.templates import Template, load_template
from mindspeed_lora.data.tokenizer import load_tokenizer
from mindspeed_lora.errors import DataError, UsageError
from mindspeed_lora.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NO_TEMPLATE = Template("none")  # of handlers that write texts as they are


@dataclass(frozen=True)
class FlagNames:
    """What messages call the input and the output."""

    input: str = "--input"
    output: str = "--output-prefix"


COMMAND_LINE = FlagNames()


@dataclass(frozen=True)
class Plan:
    """A run of preprocessing whose flags fit each other and the input."""

    handler_name: str
    source: Mixture
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe

    def stems(self, prefix: Path) -> dict[str, Path]:
        """Path without extension of each file pair, by key."""
        keys, packed = self.recipe.form.file_keys(self.recipe), self.recipe.form.packed
        return {key: key_stem(prefix, key) if packed else prefix.with_name(f"{prefix.name}_{key}_document") for key in keys}


def make_plan(config: PreprocessConfig, flags: FlagNames = COMMAND_LINE) -> Plan:
    """Check the flags, find the input and its columns, load the tokenizer.

    Raises:
        UsageError: a flag, a column or a template that does not fit.
        DataError: the input is damaged or empty.
    """
    _check_numbers(config)
    name, handler = chosen_handler(config)
    columns = columns_of(handler.columns, config.map_keys, config.json_keys)
    check_mapping(columns, handler.used)
    _check_use(config, name, handler)
    source = open_inputs(config.input, config.mix, flags.input)
    wanted = handler.wanted(columns, config.map_keys)
    wanted |= {key: key for key in config.additional_keys if key != "labels"}
    chat = name == TEXT_HANDLER and config.handler_name is None
    hint = f", or, where these are conversations, say --handler-name (such as {ALPACA_HANDLER}) and --prompt-type" if chat else ""
    for part in source.sources:
        found = part.columns(set(wanted.values()))
        if not found:
            raise DataError(f"{flags.input} {part.files[0] if len(part.files) == 1 else part.files[0].parent}: no records in it")
        check_columns(columns, wanted, found, "the input" if len(source.sources) == 1 else str(part.files[0]), hint)
    tokenizer = load_tokenizer(config.tokenizer)
    template = NO_TEMPLATE if handler.form.prompt_type != "needed" else open_template(config.template, tokenizer)
    recipe = Recipe(
        form=handler.form,
        columns=columns,
        template=template,
        thinking=template.check_thinking(config.template.enable_thinking or "none"),
        seq_length=config.seq_length,
        append_eod=config.append_eod,
        cut_rest=config.neat_pack,
        additional_keys=config.additional_keys,
        pad_to_multiple_of=config.pad_to_multiple_of,
    )
    if handler.form.prompt_type == "needed":
        _warn_about(template, tokenizer)
    return Plan(name, source, tokenizer, recipe)


def chosen_handler(config: PreprocessConfig) -> tuple[str, Handler]:
    """``--handler-name``, or what stands in for it: with a template Alpaca's instructions, else plain text (the peer's default).

    Raises:
        UsageError: there is no such handler.
    """
    has_template = config.template.prompt_type is not None or config.template.hf_chat_template
    name = config.handler_name or (ALPACA_HANDLER if has_template else TEXT_HANDLER)
    return name, handler_of(name)


def _check_numbers(config: PreprocessConfig) -> None:
    if config.workers < 1:
        raise UsageError(f"--workers {config.workers}: give the number of processes, 1 or more")
    if config.seq_length is not None and config.seq_length < 2:
        raise UsageError(f"--seq-length {config.seq_length}: give a number of tokens, 2 or more")
    if config.neat_pack and not config.pack:
        raise UsageError("--neat-pack numbers the records of a pack and needs --pack; add --pack")
    if config.pack and config.seq_length is None:
        raise UsageError("--pack needs --seq-length, the tokens of a pack; give the one of training, such as --seq-length 4096")


def _check_use(config: PreprocessConfig, name: str, handler: Handler) -> None:
    """Flags that the handler has no use for, and a template before anything is read."""
    form, template = handler.form, config.template
    if config.pack and form is not InstructionForm:
        raise UsageError(f"--pack packs instruction data, which --handler-name {name} does not make; leave it out")
    if config.additional_keys and form.name != "prompt":
        raise UsageError(f"--dataset-additional-keys go beside prompts, which --handler-name {name} does not make; leave it out")
    if config.pad_to_multiple_of > 1 and form.packed:
        raise UsageError(
            f"--pad-to-multiple-of pads plain text; --handler-name {name} makes none, and training pads by itself; leave it out"
        )
    if form.prompt_type == "refused" and (template.prompt_type or template.hf_chat_template or template.enable_thinking):
        given = "--prompt-type" if template.prompt_type else "--hf-chat-template" if template.hf_chat_template else "--enable-thinking"
        raise UsageError(f"{given} means nothing to --handler-name {name}, which writes its texts without a template; leave it out")
    if form.prompt_type == "needed" and not template.hf_chat_template:
        load_template(template.prompt_type, template.prompt_type_path).check_thinking(template.enable_thinking or "none")


def _warn_about(template: ConversationTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
    if not template.has_stop:
        get_logger().warning(f"template {template.name!r} ends no answer with a stop token: a model trained on it does not learn to stop")
    if isinstance(template, Template) and template.eos_stands_for not in (None, tokenizer.eos_token):
        get_logger().warning(
            f"the chat models of template {template.name!r} end an answer with {template.eos_stands_for}, but the tokenizer at "
            f"{tokenizer.name_or_path} has the eos token {tokenizer.eos_token}, which is what the template's eos becomes"
        )
