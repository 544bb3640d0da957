"""Chat, thoughts, several adapters, the base beside them: what a person at the terminal gets."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, shared_data
from peft_helpers import load_peft, make_adapter
from pool import ProcessPool
from test_inference_engine import LAYOUTS, answers, config_for, run_infer

from mindspeed_lora.arguments.configs import InferenceConfig, LoadFlags, TemplateFlags, TokenizerFlags
from mindspeed_lora.errors import UsageError
from mindspeed_lora.inference.engine import Engine
from mindspeed_lora.inference.printing import typed_lines
from mindspeed_lora.inference.session import lead, open_session
from mindspeed_lora.inference.thinking import ThoughtFilter, opens_thought

QUESTIONS = ("Once upon a time", "What did the dog do?", "Why?")


def chat_config(model: Path, tp: int, pp: int, **changes: Any) -> InferenceConfig:
    tokenizer = TokenizerFlags(shared_data() / "stories260k" / "hf")
    return config_for(model, tp, pp, tokenizer=tokenizer, tasks=("chat",), max_new_tokens=12, **changes)


def conversation_cell(config: InferenceConfig) -> list[tuple[str, list[int], int]] | None:
    """(text, ids of the whole prompt, cached tokens before) of each turn, and whether a fresh cache gives the same."""
    from mindspeed_lora.inference.answering import Answerer
    from mindspeed_lora.inference.chat import Chat
    from mindspeed_lora.inference.generator import Strategy, generate
    from mindspeed_lora.inference.printing import AnswerPrinter

    found: list[tuple[str, list[int], int]] = []

    def work(engine: Engine) -> None:
        answerer = Answerer(config, session, engine)
        out = io.StringIO()
        chat = Chat(answerer, Strategy(), AnswerPrinter(out))
        for question in QUESTIONS:
            ids, cached = chat.prompt(question), engine.cache_length
            text = chat.answer(question)
            assert out.getvalue().endswith(text)
            found.append((text, ids, cached))
        limits = answerer.limits(chat.voice, 0)
        for text, ids, _ in found:
            fresh = generate(answerer.model, [ids], Strategy(), limits)[0]
            assert session.tokenizer.decode(fresh, skip_special_tokens=True) == text

    session = open_session(config, all_replicas=False)
    assert lead(session, work) == 0
    return found or None


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("form", ["raw", "default"])
def test_turns_of_a_chat_equal_the_whole_conversation_at_once(pool: ProcessPool, chat_model: Path, form: str, tp: int, pp: int) -> None:
    import transformers

    from mindspeed_lora.data.templates import load_template

    config = chat_config(chat_model, tp, pp, template=TemplateFlags(prompt_type=form))
    turns = pool.run(conversation_cell, tp * pp, config)[0]
    assert turns is not None and next(cached for *_, cached in turns) == 0 and all(cached > 0 for *_, cached in turns[1:])
    if tp * pp > 1:
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data() / "stories260k" / "hf")
    reference = transformers.AutoModelForCausalLM.from_pretrained(chat_model).eval()
    messages: list[dict[str, str]] = []
    for question, (text, ids, _) in zip(QUESTIONS, turns, strict=True):
        messages.append({"role": "user", "content": question})
        if form == "default":
            assert ids == load_template("default").encode_prompt(tokenizer, messages)
        else:
            assert ids == tokenizer.encode("".join(message["content"] for message in messages))
        output = reference.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True) == text
        messages.append({"role": "assistant", "content": text})


def chat_over(config: InferenceConfig, typed: str) -> str:
    """What is printed when ``typed`` comes in over standard input."""
    before, sys.stdin = sys.stdin, io.StringIO(typed)
    try:
        code, text = run_infer(config)
    finally:
        sys.stdin = before
    assert code == 0, text
    return text


def test_history_is_as_long_as_asked_and_begins_anew(chat_model: Path) -> None:
    seen: list[int] = []
    from mindspeed_lora.inference.chat import Chat

    whole = Chat.messages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chat, "messages", lambda self, question, turns: seen.append(turns) or whole(self, question, turns))
        chat_over(chat_config(chat_model, 1, 1, history_turns=2), "one\ntwo\n\nthree\nfour\nclear\nfive\nnew\nsix\n")
    assert seen == [0, 1, 2, 2, 0, 0]


@pytest.mark.parametrize("end", ["q\n", "quit\n", "exit\n", ""])
def test_a_chat_ends(chat_model: Path, end: str) -> None:
    text = chat_over(chat_config(chat_model, 1, 1), f"hello\n{end}")
    assert text.count("You >> ") == 2 and text.count("MindSpeed-LLM:") == 1


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_is_typed_in_another_encoding_is_refused_with_the_way_out(errors: str) -> None:
    typed = io.TextIOWrapper(io.BytesIO("hello\n你好\n".encode("gbk")), encoding="utf-8", errors=errors)
    with pytest.raises(UsageError, match=r"standard input is not UTF-8 text .*PYTHONIOENCODING=gbk"):
        list(typed_lines(typed))


def test_a_chat_forgets_its_oldest_turns_where_they_do_not_fit_and_refuses_a_question_that_never_will(chat_model: Path) -> None:
    text = chat_over(
        chat_config(chat_model, 1, 1, history_turns=99), "word " * 30 + "\n" + "word " * 30 + "\n" + "word " * 400 + "\nhello\n"
    )
    assert text.count("MindSpeed-LLM:") == 4 and "256 of config.json" in text and "the conversation has" in text


def test_with_a_seed_a_sampled_chat_is_the_same_again(chat_model: Path) -> None:
    config = chat_config(chat_model, 1, 1, temperature=2.0)
    assert chat_over(config, "one\ntwo\n") == chat_over(config, "one\ntwo\n")


def test_five_tasks_on_a_pipe_end_by_themselves_and_print_nothing_else(chat_model: Path, two_adapters: dict[str, Path]) -> None:
    command = [sys.executable, str(ROOT / "inference.py"), "--device", "cpu", "--load", str(chat_model), "--max-new-tokens", "4"]
    command += ["--tokenizer-name-or-path", str(shared_data() / "stories260k" / "hf"), "--lora-load", str(two_adapters["a"])]
    result = subprocess.run(
        command, input="Q\nq\n", capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    titles = ("Greedy Search", "Do Sample", "Beam Search", "Beam Search with sampling", "Chat")
    places = [result.stdout.index(f" {title} =") for title in titles]
    assert places == sorted(places) and result.stdout.count("how are you?") == 4 and result.stdout.count("You >> ") == 2


def lora(folders: dict[str, Path], load: Path) -> dict[str, Any]:
    return {"adapters": tuple(folders.items()), "load": LoadFlags(load=load, lora_load=next(iter(folders.values())))}


def peft_answers(model: Path, adapter: Path | None, ids: list[int]) -> list[int]:
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    tuned = base if adapter is None else peft.PeftModel.from_pretrained(base, adapter).eval()
    return tuned.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)[
        0, len(ids) :
    ].tolist()


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_several_adapters_answer_as_each_alone_and_as_peft(
    pool: ProcessPool, chat_model: Path, two_adapters: dict[str, Path], tp: int, pp: int
) -> None:
    import transformers

    config = replace(chat_config(chat_model, tp, pp), tasks=("greedy",), prompts=("Once upon a time",), compare_base=True)
    together = pool.run(run_infer, tp * pp, replace(config, **lora(two_adapters, chat_model)))
    assert [code for code, _ in together] == [0] * (tp * pp)
    assert all(f"MindSpeed-LLM ({name}):" in together[0][1] for name in ("a", "b", "base"))
    texts = [part.split("\n\nYou:")[0].split("\n====")[0] for part in together[0][1].split("):\n")[1:]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data() / "stories260k" / "hf")
    ids = tokenizer.encode("Once upon a time")
    expected = [
        tokenizer.decode(peft_answers(chat_model, folder, ids), skip_special_tokens=True) for folder in (*two_adapters.values(), None)
    ]
    assert len(set(expected)) == 3, "the adapters must change the answer"
    assert texts == expected
    if tp * pp == 1:
        for name, folder in two_adapters.items():
            alone = run_infer(replace(config, compare_base=False, **lora({"": folder}, chat_model)))
            assert answers(alone[1]) == [expected[list(two_adapters).index(name)]]


IDS = torch.tensor([[1, 5, 9, 200, 31]])


def in_turn_cell(config: InferenceConfig) -> list[torch.Tensor]:
    """Logits of the adapter, then of the base and the adapter in turn, as evaluation compares them."""
    found: list[torch.Tensor] = []

    def work(engine: Engine) -> None:
        assert len(engine.adapters) == 1
        found.append(engine.forward(IDS).cpu())
        for name in (None, engine.adapters[0], None, engine.adapters[0]):
            engine.use_adapter(name)
            found.append(engine.forward(IDS).cpu())

    assert lead(open_session(config, all_replicas=False), work) == 0
    return found


def cropped_cell(config: InferenceConfig) -> tuple[torch.Tensor, ...]:
    """A token's logits with the adapter; without it, though the cache was cropped to nothing and not reset; and the same, all at once."""
    found: list[torch.Tensor] = []

    def work(engine: Engine) -> None:
        for name in (engine.adapters[0], None):
            engine.use_adapter(name)
            engine.forward(IDS, use_cache=True)
            found.append(engine.forward(torch.tensor([[7]]), use_cache=True).cpu())
            engine.crop(0)
        found.append(engine.forward(torch.cat((IDS, torch.tensor([[7]])), dim=1)).cpu())

    assert lead(open_session(config, all_replicas=False), work) == 0
    return tuple(found)


def test_another_adapter_finds_nothing_of_the_last_one(pool: ProcessPool, chat_model: Path, tmp_path: Path) -> None:
    make_adapter(chat_model, tmp_path / "a", target_modules=["q_proj", "down_proj"])
    adapted, base, whole = pool.run(cropped_cell, 1, replace(chat_config(chat_model, 1, 1), **lora({"": tmp_path / "a"}, chat_model)))[0]
    torch.testing.assert_close(base, whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(adapted, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layer", [0, 3])
def test_a_stage_may_hold_no_adapter(pool: ProcessPool, chat_model: Path, tmp_path: Path, layer: int) -> None:
    """Of two stages only one is adapted: once the driver's, once the other."""
    make_adapter(chat_model, tmp_path / "a", target_modules=["q_proj", "down_proj"], layers_to_transform=[layer], layers_pattern="layers")
    config = replace(chat_config(chat_model, 1, 2), **lora({"": tmp_path / "a"}, chat_model))
    logits, _ = pool.run(in_turn_cell, 2, config)
    twin = load_peft(chat_model, tmp_path / "a")
    with torch.no_grad():
        adapted = twin(input_ids=IDS).logits[:, -1:]
        with twin.disable_adapter():
            base = twin(input_ids=IDS).logits[:, -1:]
    assert not torch.allclose(adapted, base, atol=1e-2), "the adapter must change the logits"
    for found, expected in zip(logits, (adapted, base, adapted, base, adapted), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_in_a_chat_the_adapter_is_chosen_by_a_command(chat_model: Path, two_adapters: dict[str, Path]) -> None:
    config = replace(chat_config(chat_model, 1, 1, top_k=1), **lora(two_adapters, chat_model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of peft: a second adapter on one base is what was asked for
        text = chat_over(config, "/adapter\nhello\nnew\n/adapter b\nhello\nnew\n/adapter base\nhello\n/adapter c\n")
    assert "q ends, clear begins a new conversation, /adapter NAME lets another adapter answer" in text
    assert "(a answers; there is a, b, base)" in text and "(b answers" in text and "no adapter is called c; there is a, b, base" in text
    said = [part.split("\n\nYou >>")[0] for part in text.split("MindSpeed-LLM:\n")[1:]]
    assert len(set(said)) == 3
    config = replace(chat_config(chat_model, 1, 1, top_k=1), **lora({"b": two_adapters["b"]}, chat_model))
    assert chat_over(config, "hello\n").split("MindSpeed-LLM:\n")[1].split("\n\nYou >>")[0] == said[1]


def test_thoughts_are_hidden_however_the_text_comes_in_pieces() -> None:
    text = "<think>\nlet me < see\n</think>\n\nyes <b> no<think>again</think> end <thi"
    for size in range(1, len(text)):
        thoughts = ThoughtFilter(("<think>", "</think>"))
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert "".join(map(thoughts.feed, pieces)) + thoughts.end() == "yes <b> no end <thi", size
    inside = ThoughtFilter(("<think>", "</think>"), inside=opens_thought("user <think>\n", ("<think>", "</think>")))
    assert inside.feed("hm</think>\n\nso") + inside.end() == "so"
    never = ThoughtFilter(("<think>", "</think>"))
    assert never.feed("<think> on and on") + never.end() == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_length": 300}, "--max-length 300 is more than the 256 of config.json"),
        (
            {"max_length": 3, "prompts": ("Once upon a time",)},
            "leaves no room for an answer in --max-length 3; shorten the prompt or pass a --max-length of up to 256",
        ),
        ({"max_length": 3, "prompts": ("word " * 300,)}, "leaves no room for an answer in the 256 of config.json"),
        (
            {"prompts": ("word " * 83,)},
            "--max-new-tokens 12 that is more than the 256 of config.json: max_position_embeddings; shorten the "
            "prompt or pass at most --max-new-tokens 5",
        ),
        ({"system_prompt": "Be brief."}, "--system-prompt needs a template"),
        ({"template": TemplateFlags(hf_chat_template=True)}, "no chat template"),
        ({"add_eos_token": ("nosuchtoken",)}, "--add-eos-token nosuchtoken"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_weights_are_read(chat_model: Path, changes: dict[str, Any], words: str) -> None:
    config = replace(chat_config(chat_model, 1, 1), tasks=("greedy",), **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mindspeed_lora.inference.session._build", None)
        code, text = run_infer(config)
    assert code in (1, 2) and words in text


def test_a_system_prompt_stands_in_the_templates_own_form(chat_model: Path) -> None:
    from mindspeed_lora.inference.answering import encode

    config = chat_config(chat_model, 1, 1, template=TemplateFlags(prompt_type="default"), system_prompt="Be brief.")
    session = open_session(config, all_replicas=False)
    ids = encode(config, session, session.voices[0], [{"role": "user", "content": "Why?"}])
    assert session.tokenizer.decode(ids).startswith("Be brief.") or "Be brief." in session.tokenizer.decode(ids)


def test_prompts_may_be_typed(chat_model: Path) -> None:
    text = chat_over(replace(chat_config(chat_model, 1, 1), tasks=("greedy",), prompts=("-",)), "one\n\ntwo\n")
    assert text.count("You:") == 2
    with pytest.raises(AssertionError, match="both read standard input"):
        chat_over(replace(chat_config(chat_model, 1, 1), prompts=("-",)), "one\n")


def test_beams_and_length_are_as_asked(chat_model: Path) -> None:
    """--num-beams 3 and --max-length: the tokens of transformers' own beam search."""
    import transformers

    config = replace(chat_config(chat_model, 1, 1), tasks=("beam_search",), prompts=("Once upon a time",), num_beams=3, max_length=20)
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data() / "stories260k" / "hf")
    reference = transformers.AutoModelForCausalLM.from_pretrained(chat_model).eval()
    ids = tokenizer.encode("Once upon a time")
    output = reference.generate(torch.tensor([ids]), max_length=20, num_beams=3, do_sample=False, eos_token_id=2, pad_token_id=0)
    assert answers(run_infer(config)[1]) == [tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)]


def test_names_of_adapters_are_checked(tmp_path: Path) -> None:
    from mindspeed_lora.arguments.parser import parse

    (tmp_path / "x").mkdir()
    load = ["--load", str(tmp_path)]
    folder = str(tmp_path / "x")
    for values, words in (
        ([folder, folder], "needs a name for each"),
        ([f"a={folder}", f"a={folder}"], "names must differ"),
        ([f"base={folder}"], "base stands for no adapter"),
        ([f"a={folder}/absent"], "there is no such folder"),
        (["a b=x"], "NAME=PATH"),
    ):
        with pytest.raises(UsageError, match=words):
            parse("inference.py", [*load, "--lora-load", *values])
    config = parse("inference.py", [*load, "--lora-load", f"a={folder}", f"b={folder}"])[0]
    assert config.load.lora_load == tmp_path / "x" and [name for name, _ in config.adapters] == ["a", "b"]
