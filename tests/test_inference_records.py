"""--input-file: batches, replicas, going on after an end, bad lines; and Ctrl-C. Sampling has transformers' distribution."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shared_data, tiny_qwen3
from pool import ProcessPool
from test_inference_chat import lora
from test_inference_engine import config_for, run_infer

from mindspeed_lora.arguments.configs import InferenceConfig, TokenizerFlags
from mindspeed_lora.errors import UsageError
from mindspeed_lora.inference.engine import Engine
from mindspeed_lora.inference.records import AnswerFile, read_requests
from mindspeed_lora.inference.session import lead, open_session
from mindspeed_lora.log import get_logger

CELLS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2)]
RECORDS = [
    {"prompt": "Once upon a time", "id": 7},
    {"prompt": "The dog"},
    {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": " cat"}, {"role": "user", "content": " sat"}]},
    {"prompt": "One day, a girl named Lily found a needle in her room."},
    {"prompt": "She"},
]
TEXTS = ["Once upon a time", "The dog", "A cat sat", "One day, a girl named Lily found a needle in her room.", "She"]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return path


def file_config(model: Path, questions: Path, tp: int = 1, pp: int = 1, **changes: Any) -> InferenceConfig:
    tokenizer = TokenizerFlags(shared_data() / "stories260k" / "hf")
    output = questions.with_suffix(".answers.jsonl")
    return config_for(
        model, tp, pp, tokenizer=tokenizer, input_file=questions, output_file=output, max_new_tokens=10, micro_batch_size=2, **changes
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def expected(chat_model: Path) -> list[str]:
    """transformers' greedy answers, one prompt at a time."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data() / "stories260k" / "hf")
    reference = transformers.AutoModelForCausalLM.from_pretrained(chat_model).eval()
    found = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text)])
        output = reference.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=2, pad_token_id=0)
        found.append(str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)))
    return found


@pytest.mark.parametrize(("tp", "pp", "dp"), CELLS)
def test_answers_of_a_file_are_transformers_in_its_order(
    pool: ProcessPool,
    chat_model: Path,
    questions: Path,
    expected: list[str],
    tp: int,
    pp: int,
    dp: int,
) -> None:
    config = file_config(chat_model, questions, tp, pp)
    assert [code for code, _ in pool.run(run_infer, tp * pp * dp, config)] == [0] * (tp * pp * dp)
    rows = read(questions.with_suffix(".answers.jsonl"))
    assert [row["answer"] for row in rows] == expected
    assert rows[0]["id"] == 7 and rows[0]["finish_reason"] in ("stop", "length") and rows[1]["prompt_tokens"] < rows[3]["prompt_tokens"]
    assert not questions.with_suffix(".answers.jsonl.partial").exists()


def ended_cell(config: InferenceConfig) -> tuple[int, str]:
    """As :func:`run_infer`, and SIGINT to every rank once the first batches are answered."""
    whole = AnswerFile.add

    def add(self: AnswerFile, answered: dict[int, dict[str, Any]]) -> None:
        whole(self, answered)
        os.kill(os.getpid(), signal.SIGINT)

    from mindspeed_lora.inference import executor

    execute = executor.Executor.execute

    def interrupted(self: Any, message: Any) -> Any:
        if os.environ["RANK"] != "0":
            os.kill(os.getpid(), signal.SIGINT)  # the terminal's reaches all of them
        return execute(self, message)

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnswerFile, "add", add)
        patch.setattr(executor.Executor, "execute", interrupted)
        patch.setattr(get_logger(), "info", said.append)
        try:
            return run_infer(config)
        except KeyboardInterrupt:
            return 130, said[-1]


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_ctrl_c_ends_every_rank_and_the_same_command_goes_on(
    pool: ProcessPool,
    chat_model: Path,
    questions: Path,
    expected: list[str],
    tp: int,
    pp: int,
    dp: int,
) -> None:
    config = replace(file_config(chat_model, questions, tp, pp), micro_batch_size=1)
    results = pool.run(ended_cell, tp * pp * dp, config)
    assert [code for code, _ in results] == [130] * (tp * pp * dp)
    partial = questions.with_suffix(".answers.jsonl.partial")
    kept = len(read(partial)) - 1
    assert 0 < kept < len(RECORDS) and not questions.with_suffix(".answers.jsonl").exists()
    assert results[0][1] == f"{kept} of {len(RECORDS)} answers are in {partial}; the same command, given again, goes on from there"
    with partial.open("ab") as file:
        file.write('{"line": 5, "record": {"answer": "岛'.encode()[:-1])  # a kill amid a write, and amid a character
    answered: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        whole = AnswerFile.add
        patch.setattr(AnswerFile, "add", lambda self, found: answered.extend(found) or whole(self, found))
        assert run_infer(replace(config, parallel=file_config(chat_model, questions).parallel))[0] == 0
    assert len(answered) == len(RECORDS) - kept
    assert [row["answer"] for row in read(questions.with_suffix(".answers.jsonl"))] == expected


def test_a_file_of_other_questions_or_settings_is_not_gone_on_with(chat_model: Path, questions: Path) -> None:
    config = file_config(chat_model, questions)
    partial = questions.with_suffix(".answers.jsonl.partial")
    partial.write_text('{"asked": "other"}\n', encoding="utf-8")
    assert "begun with other questions" in run_infer(config)[1]
    partial.write_text("somebody's notes\n", encoding="utf-8")
    assert "begun with other questions" in run_infer(config)[1]
    partial.unlink()
    questions.with_suffix(".answers.jsonl").touch()
    assert "exists already" in run_infer(config)[1]
    assert "there is no folder" in run_infer(replace(config, output_file=questions.parent / "absent" / "x.jsonl"))[1]


def test_a_file_begun_with_other_weights_in_the_same_folders_is_not_gone_on_with(
    chat_model: Path, two_adapters: dict[str, Path], questions: Path, tmp_path: Path
) -> None:
    """An adapter trained again under its old name, say. Another batch size is no other question."""
    base, folder = (Path(shutil.copytree(source, tmp_path / source.name)) for source in (chat_model, two_adapters["a"]))
    config = replace(file_config(base, questions), **lora({"": folder}, base))

    def run(config: InferenceConfig) -> tuple[int, str, int]:
        answered: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            whole = AnswerFile.add
            patch.setattr(AnswerFile, "add", lambda self, found: answered.extend(found) or whole(self, found))
            patch.setattr(AnswerFile, "finish", lambda self: None)  # as if it had ended just before
            return *run_infer(config), len(answered)

    assert run(config)[::2] == (0, len(RECORDS))
    assert run(replace(config, micro_batch_size=3))[::2] == (0, 0)
    for file in (folder / "adapter_model.safetensors", base / "model.safetensors"):
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 64]))  # of the last tensor the last value
        code, text, _ = run(config)
        assert code == 2 and "begun with other questions, settings or weights" in text, file
        file.write_bytes(before)
    assert run(config)[::2] == (0, 0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "no object"),
        ('{"text": "x"}', "needs either prompt or messages; its fields are text"),
        ('{"prompt": "x", "messages": []}', "needs either"),
        ('{"prompt": 3}', "prompt must be a text"),
        ('{"messages": []}', "messages a list"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "message 1 has role 'assistant' where 'user' must stand"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}', "it asks nothing"),
        ('{"prompt": "  "}', "it asks nothing"),
        ('{"prompt": "x", "adapter": 3}', "adapter is 3"),
        ("", "is empty"),
        ('{"prompt": "你好"}'.encode("gbk"), "line 1: not UTF-8 text"),
        ('{"prompt": "\\ud83d"}', "line 1: not UTF-8 text"),
    ],
)
def test_bad_lines_are_refused_with_file_and_line(tmp_path: Path, line: str | bytes, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes((line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(UsageError) as caught:
        read_requests(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "word " * 300}, "in the 256 of config.json: max_position_embeddings; shorten the prompt"),
        ({"prompt": "x", "adapter": "c"}, "no adapter is called c; there is base"),
    ],
)
def test_what_the_model_cannot_answer_is_refused_before_weights_are_read(
    chat_model: Path,
    questions: Path,
    record: dict[str, str],
    words: str,
) -> None:
    with questions.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mindspeed_lora.inference.session._build", None)
        code, text = run_infer(file_config(chat_model, questions))
    assert code == 2 and words in text and f"{questions}, line 6" in text


def test_each_line_chooses_its_adapter_and_the_base_stands_beside_it(
    chat_model: Path,
    two_adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    def ask(records: list[dict[str, Any]], folders: dict[str, Path], **changes: Any) -> list[dict[str, Any]]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        config = replace(file_config(chat_model, path), **(lora(folders, chat_model) if folders else {}), **changes)
        assert run_infer(config)[0] == 0
        return read(path.with_suffix(".answers.jsonl"))

    text = "Once upon a time"
    alone = {name: ask([{"prompt": text}], {"": folder})[0]["answer"] for name, folder in two_adapters.items()}
    alone["base"] = ask([{"prompt": text}], {})[0]["answer"]
    assert len(set(alone.values())) == 3
    order = ["b", "a", "base", "b", None]
    records = [{"prompt": text} if name is None else {"prompt": text, "adapter": name} for name in order]
    rows = ask(records, two_adapters, compare_base=True)
    assert [row["answer"] for row in rows] == [alone[name or "a"] for name in order]
    assert [row.get("answer_base") for row in rows] == [None if name == "base" else alone["base"] for name in order]


def test_sampled_tokens_have_the_distribution_of_transformers(tmp_path: Path) -> None:
    """Chi-square of 6000 first tokens against the probabilities that transformers' own warpers leave."""
    import transformers

    from mindspeed_lora.inference.generator import Limits, ParallelCausalLM, Strategy, generate

    folder = tiny_qwen3(tmp_path / "model")
    ids, draws = [5, 9, 200], 6000
    found: list[int] = []

    def work(engine: Engine) -> None:
        strategy = Strategy(True, 1, temperature=1.5, top_k=12, top_p=0.9)
        found.extend(tokens[0] for tokens in generate(ParallelCausalLM(engine), [ids] * draws, strategy, Limits(1, ()), seed=3))

    config = config_for(folder, 1, 1, tokenizer=TokenizerFlags(shared_data() / "stories260k" / "hf"))
    assert lead(open_session(config, all_replicas=False), work) == 0
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        scores = reference(torch.tensor([ids])).logits[:, -1]
    for warper in (transformers.TemperatureLogitsWarper(1.5), transformers.TopKLogitsWarper(12), transformers.TopPLogitsWarper(0.9)):
        scores = warper(torch.tensor([ids]), scores)
    expected = scores.softmax(-1)[0] * draws
    counts = torch.bincount(torch.tensor(found), minlength=len(expected)).float()
    possible = expected > 0
    assert counts[~possible].sum() == 0 and int(possible.sum()) >= 5
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    assert chi_square < 40, (chi_square, int(possible.sum()))  # 11 degrees of freedom at most: above 40 once in 30000 runs
