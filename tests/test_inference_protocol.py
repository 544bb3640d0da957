"""What needs no model: messages, masks, prompt formats, prompts of the wrong kind, printed blocks."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mindspeed_lora.arguments.configs import InferenceConfig, LoadFlags, ParallelFlags, RuntimeFlags, TemplateFlags, TokenizerFlags
from mindspeed_lora.data.templates import load_template
from mindspeed_lora.errors import CheckpointError, UsageError
from mindspeed_lora.inference.channel import RankDied, other_ranks
from mindspeed_lora.inference.executor import positions_and_mask, score
from mindspeed_lora.inference.printing import AnswerPrinter
from mindspeed_lora.inference.prompts import PromptFormat, resolve_prompt_format
from mindspeed_lora.inference.protocol import HEADER_SIZE, Message, Operation, Output, decode, encode
from mindspeed_lora.inference.run import infer

CONFIG = InferenceConfig(ParallelFlags(), RuntimeFlags(device="cpu"), LoadFlags(load=Path("/nowhere")), TokenizerFlags(), TemplateFlags())
RECORDED = {"name": "qwen3", "fingerprint": None, "enable_thinking": "none"}


def _same(first: Message, second: Message) -> bool:
    for name in Message.__dataclass_fields__:
        a, b = getattr(first, name), getattr(second, name)
        if (
            isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor)
            or (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) is False
        ):
            return False
    return True


@pytest.mark.parametrize("length", [1, 7, 200])
def test_messages_survive_the_wire_inside_and_outside_the_header(length: int) -> None:
    ids = torch.arange(3 * length).view(3, length)
    real = torch.rand(3, length) > 0.3
    wanted, targets = torch.randint(0, length, (3, 2)), torch.randint(0, 99, (3, 2, 4))
    messages = [
        Message(Operation.FORWARD, ids, None, True, Output.LOGITS, 1),
        Message(Operation.FORWARD, ids, real, False, Output.LOGITS, length),
        Message(Operation.FORWARD, ids, None, True, Output.NONE),
        Message(Operation.FORWARD, ids, real, True, Output.SCORES, 0, wanted, targets),
        Message(Operation.FORWARD, ids, None, False, Output.SCORES, 0, wanted, targets, behind_prefix=True),
        Message(Operation.REORDER, rows=torch.tensor([2, 2, 0])),
        Message(Operation.CROP, value=5),
        Message(Operation.RESET),
        Message(Operation.STOP, value=2),
    ]
    for message in messages:
        header, body = encode(message)
        assert header.shape == (HEADER_SIZE,)
        assert _same(decode(header, body), message), message


def test_a_rank_that_died_is_one_sentence_without_guesses_at_causes() -> None:
    text = "[../gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:2. This may indicate that another rank crashed. GLHF!\nmore"
    with pytest.raises(RankDied) as caught, other_ranks("a worker"):
        raise RuntimeError(text)
    assert str(caught.value).startswith("a worker of this run has died") and "GLHF" not in str(caught.value)
    with pytest.raises(RuntimeError, match="something else"), other_ranks("a worker"):
        raise RuntimeError("something else")


def test_a_decoded_token_fits_in_the_header() -> None:
    assert encode(Message(Operation.FORWARD, torch.ones(16, 1, dtype=torch.int64), None, True, Output.LOGITS, 1))[1] is None


def test_masks_hide_padding_and_the_future_and_leave_no_row_empty() -> None:
    real = torch.tensor([[False, False, True, True], [True, True, True, True]])
    positions, mask = positions_and_mask(real, 2, 2, 2)
    assert positions.tolist() == [[0, 1], [2, 3]]
    assert mask is not None and mask.shape == (2, 1, 2, 4)
    assert mask[0, 0].tolist() == [[False, False, True, False], [False, False, True, True]]
    assert mask[1, 0].tolist() == [[True, True, True, False], [True, True, True, True]]
    first = positions_and_mask(real, 2, 0, 4)[1]
    assert first is not None and first.any(-1).all()
    assert positions_and_mask(None, 2, 0, 4)[1] is None and positions_and_mask(None, 2, 4, 1)[1] is None
    behind = positions_and_mask(None, 2, 3, 2)[1]
    assert behind is not None and behind[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]


def test_scores_are_log_probabilities() -> None:
    """To a few roundings of a number of the size of the log-sum, 20; torch's fp32 ``log_softmax`` is 2e-5 off."""
    logits = torch.randn(2, 3, 150_000) * 4
    targets = torch.randint(0, 150_000, (2, 3, 4))
    result = score(logits, targets)
    exact = logits.double().log_softmax(-1).gather(-1, targets)
    assert (result.log_probs - exact).abs().max() < 4 * 20 * 2.0**-24
    assert torch.equal(result.best, logits.argmax(-1))


def test_the_format_comes_from_the_manifest_unless_a_flag_says_so() -> None:
    chosen = resolve_prompt_format(TemplateFlags(), RECORDED, "adapter")
    assert (chosen.name, chosen.thinking, chosen.source) == ("qwen3", "none", "adapter")
    assert resolve_prompt_format(TemplateFlags(prompt_type="raw"), RECORDED, "adapter").name == "raw"
    assert resolve_prompt_format(TemplateFlags(prompt_type="llama2"), None, "adapter").name == "llama2"
    assert resolve_prompt_format(TemplateFlags(), None, "adapter").name == "raw"
    assert resolve_prompt_format(TemplateFlags(hf_chat_template=True), None, "adapter").use_chat_template


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (TemplateFlags(prompt_type="llama2"), ("--prompt-type llama2", "ADAPTER", "qwen3")),
        (TemplateFlags(enable_thinking="true"), ("--enable-thinking true", "ADAPTER", "none")),
        (TemplateFlags(prompt_type="raw", enable_thinking="true"), ("--enable-thinking true", "raw")),
        (TemplateFlags(prompt_type="no_such"), ("--prompt-type no_such",)),
    ],
)
def test_flags_that_contradict_the_adapter_are_refused_with_both_sources(flags: TemplateFlags, words: tuple[str, ...]) -> None:
    recorded = {} if flags.prompt_type == "no_such" else RECORDED
    with pytest.raises(UsageError) as caught:
        resolve_prompt_format(flags, recorded, "ADAPTER")
    assert all(word in str(caught.value) for word in words), caught.value


def test_another_version_of_the_template_is_refused() -> None:
    recorded = {**RECORDED, "fingerprint": "0" * 64}
    with pytest.raises(CheckpointError, match="another version of template qwen3"):
        resolve_prompt_format(TemplateFlags(), recorded, "ADAPTER")
    recorded["fingerprint"] = load_template("qwen3").fingerprint()
    assert resolve_prompt_format(TemplateFlags(), recorded, "ADAPTER").name == "qwen3"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": ("  ",)}, "--prompt is empty"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"tasks": ("no_such",)}, "--task no_such"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"top_k": -1}, "--top-k -1"),
        ({"load": LoadFlags(lora_load=Path("/nowhere"))}, "--load"),
    ],
)
def test_bad_values_are_refused_before_anything_is_read(change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        infer(replace(CONFIG, **change))  # type: ignore[arg-type]


def test_an_empty_prompt_is_refused_in_every_format() -> None:
    with pytest.raises(UsageError, match="--prompt is empty"):
        PromptFormat().encode(None, " \n")  # type: ignore[arg-type]


def test_blocks_look_like_the_peers() -> None:
    out = io.StringIO()
    printer = AnswerPrinter(out)
    printer.heading("Greedy Search")
    printer.question("how are you?")
    printer.write("fine")
    printer.end()
    lines = out.getvalue().splitlines()
    assert "=============== Greedy Search ================" in lines
    assert lines[lines.index("You:") + 1] == "how are you?" and lines[lines.index("MindSpeed-LLM:") + 1] == "fine"
    assert lines[-1].startswith("Elapsed: ") and lines[-1].endswith("s")
