"""The verb: what it prints and writes, the base beside the adapter, templates, several tasks, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_helpers import config_for, peft_adapter, reference_items, run_evaluate, small_benchmarks, written_items
from helpers import shared_data, tiny_qwen3
from pool import ProcessPool

from mindspeed_lora.arguments.cli import main
from mindspeed_lora.arguments.configs import ArchitectureFlags, LoadFlags, LoraFlags, TemplateFlags, TokenizerFlags
from mindspeed_lora.arguments.flag import EVALUATE
from mindspeed_lora.errors import DataError, UsageError
from mindspeed_lora.evaluation import jobs
from mindspeed_lora.evaluation.run import evaluate
from mindspeed_lora.log import get_logger

TOKENIZER = "stories260k/hf"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """Base folder, adapter folder, merged model."""
    base = tiny_qwen3(tmp_path_factory.mktemp("base"), vocab_size=512, max_position_embeddings=2048)
    adapter = tmp_path_factory.mktemp("adapter")
    return base, adapter, peft_adapter(base, adapter)


@pytest.mark.parametrize(("world", "tp"), [(1, 1), (2, 2), (2, 1)])
def test_base_and_adapter_are_compared_in_one_run(
    pool: ProcessPool, tmp_path: Path, data: Path, model: tuple[Path, Path, Any], world: int, tp: int
) -> None:
    import transformers

    base, adapter, merged = model
    tasks = {"tasks": ("mmlu", "boolq"), "load": LoadFlags(load=base, lora_load=adapter), "compare_base": True}
    config = config_for(base, data, tmp_path, tp, num_fewshot=None, **tasks)
    results = pool.run(run_evaluate, world, config)
    assert [code for code, _ in results] == [0] * world, results[0][1]
    for found, reference in (
        (written_items(tmp_path), merged),
        (written_items(tmp_path, "samples_base_"), transformers.AutoModelForCausalLM.from_pretrained(base)),
    ):
        expected, _ = reference_items(config, reference)
        assert found.keys() == expected.keys()
        assert all(found[item] == pytest.approx(values, abs=1e-4) for item, values in expected.items())
    content, without = (json.loads((tmp_path / f"results{name}.json").read_text()) for name in ("", "_base"))
    own = content["mindspeed_lora"]
    assert own["lora"]["r"] == 4 and own["layout"]["tp_size"] == tp and own["manifest"] is None, "a PEFT folder has none"
    assert without["mindspeed_lora"]["lora"] is None and without["mindspeed_lora"]["manifest"] is None
    for name in ("mmlu", "boolq"):
        found = own["comparison"][name]
        scores = content["groups"][name]["acc,none"], without["groups"][name]["acc,none"]
        assert found["difference"]["value"] == pytest.approx(scores[0] - scores[1])
        assert found["gained"] - found["lost"] == round((scores[0] - scores[1]) * found["first"]["count"])
        assert f"{name}: base {scores[1]:.4f}" in results[0][1] and "McNemar's exact test" in results[0][1]
    assert content["n-shot"]["mmlu_anatomy"] == 5 and content["config"]["limit"] == 3
    assert f"mmlu acc = {own['scores']['mmlu']['value'] * 6:g}/6={own['scores']['mmlu']['value']}" in results[0][1].splitlines()


def test_the_adapter_changes_the_scores(pool: ProcessPool, tmp_path: Path, data: Path, model: tuple[Path, Path, Any]) -> None:
    base, adapter, _ = model
    outputs = []
    for name, load in (("base", LoadFlags(load=base)), ("adapter", LoadFlags(load=base, lora_load=adapter))):
        assert pool.run(run_evaluate, 1, config_for(base, data, tmp_path / name, load=load))[0][0] == 0
        outputs.append(written_items(tmp_path / name))
    assert all(outputs[0][item] != pytest.approx(outputs[1][item], abs=1e-2) for item in outputs[0])


def test_items_are_written_only_on_request(pool: ProcessPool, tmp_path: Path, data: Path, model: tuple[Path, Path, Any]) -> None:
    assert pool.run(run_evaluate, 1, config_for(model[0], data, tmp_path, log_samples=False))[0][0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_template_wraps_the_question(pool: ProcessPool, tmp_path: Path, data: Path, model: tuple[Path, Path, Any]) -> None:
    config = config_for(model[0], data, tmp_path, template=TemplateFlags(prompt_type="default"))
    assert pool.run(run_evaluate, 1, config)[0][0] == 0
    assert json.loads((tmp_path / "results.json").read_text())["mindspeed_lora"]["prompt_format"] == "default"


def test_the_tokenizers_chat_template_is_applied_as_lm_eval_does(
    pool: ProcessPool, tmp_path: Path, data: Path, model: tuple[Path, Path, Any]
) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data() / TOKENIZER)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    changes = {
        "tasks": ("mmlu", "gsm8k"),
        "template": TemplateFlags(hf_chat_template=True),
        "tokenizer": TokenizerFlags(tmp_path / "tokenizer"),
    }
    config = config_for(model[0], data, tmp_path / "scores", max_new_tokens=4, **changes)
    code, text = pool.run(run_evaluate, 1, config)[0]
    assert code == 0, text
    expected, _ = reference_items(config, transformers.AutoModelForCausalLM.from_pretrained(model[0]))
    found = written_items(tmp_path / "scores")
    for item, values in expected.items():
        assert found[item] == (values if isinstance(values[0], str) else pytest.approx(values, abs=1e-4)), item


@pytest.mark.parametrize(
    ("lora", "with_adapter", "words"),
    [
        (LoraFlags(r=8), True, "--lora-r 8"),
        (LoraFlags(alpha=4.0), True, "--lora-alpha 4"),
        (LoraFlags(targets=("linear_qkv",)), True, "--lora-target-modules linear_qkv"),
        (LoraFlags(r=8), False, "--lora-load is missing"),
    ],
)
def test_lora_flags_unlike_the_adapter_are_refused(
    data: Path, model: tuple[Path, Path, Any], lora: LoraFlags, with_adapter: bool, words: str
) -> None:
    base, adapter, _ = model
    with pytest.raises(UsageError, match=words):
        evaluate(config_for(base, data, load=LoadFlags(load=base, lora_load=adapter if with_adapter else None), lora=lora))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ("human_eval",)}, "--confirm-run-unsafe-code"),
        ({"tasks": ("gsm8k",), "task_data_path": ()}, "--task-data-path is missing: --task gsm8k needs a folder with test.jsonl"),
        ({"tasks": ("mmlu", "mmlu_ppl")}, "named twice"),
        ({"tasks": ("mmlu", "boolq", "bbh"), "task_data_path": (Path("a"), Path("b"))}, "2 folders for 3 tasks"),
        ({"tasks": ("mmul",)}, r"--task mmul: neither a benchmark .* did you mean .*mmlu"),
        ({"tasks": ("agieval",)}, "--num-fewshot 1: agieval .*has no solved examples"),
        ({"num_fewshot": -1}, "--num-fewshot -1 must be at least 0"),
        ({"max_eval_samples": 0}, "--max-eval-samples 0 must be at least 1"),
        ({"compare_base": True}, "--compare-base: there is no adapter"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_the_flag_and_the_way_out(
    data: Path, model: tuple[Path, Path, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        evaluate(config_for(model[0], data, **changes))


def test_missing_files_end_every_rank_with_one_message(pool: ProcessPool, tmp_path: Path, model: tuple[Path, Path, Any]) -> None:
    (empty := tmp_path / "empty").mkdir()
    results = pool.run(run_evaluate, 2, config_for(model[0], empty))
    assert [code for code, _ in results] == [1, 1]
    assert "--task-data-path" in results[0][1] and "https://github.com/hendrycks/test" in results[0][1] and results[1][1] == ""


def test_a_folder_that_is_not_there_says_where_to_get_the_files(
    tmp_path: Path, model: tuple[Path, Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also on the command line, where other folders are checked right after parsing."""
    command = ["--device", "cpu", "--load", str(model[0]), "--task", "mmlu", "--task-data-path", str(tmp_path / "mmlu")]
    assert main(EVALUATE, command) == 2
    assert "mmlu: no such folder; --task mmlu needs" in (said := capsys.readouterr().err) and "https://github.com/hendrycks/test" in said
    command[command.index("mmlu")] = "arc_easy"  # whose rows lm_eval would else look for in its own cache
    assert main(EVALUATE, command) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_task_of_lm_evals_reads_a_local_data_set_or_says_what_it_expected(
    pool: ProcessPool, tmp_path: Path, model: tuple[Path, Path, Any]
) -> None:
    folder = tmp_path / "data" / "openbookqa"
    folder.mkdir(parents=True)
    rows = [
        {
            "id": str(index),
            "question_stem": f"Tim has {index}",
            "answerKey": "B",
            "choices": {"label": [*"ABCD"], "text": ["a", "b", "c", "dog"]},
        }
        for index in range(3)
    ]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_for(model[0], tmp_path / "data", tmp_path / "scores", tasks=("openbookqa",), num_fewshot=0)
    code, text = pool.run(run_evaluate, 1, config)[0]
    assert code == 0, text
    assert text.splitlines()[-1].startswith("openbookqa acc = ") and len(written_items(tmp_path / "scores")) == 3
    code, text = pool.run(run_evaluate, 1, config_for(model[0], tmp_path / "scores", tasks=("openbookqa",)))[0]
    assert code == 1 and "needs the data set allenai/openbookqa" in text and f"Expected {tmp_path / 'scores' / 'openbookqa'}/" in text


def test_questions_that_are_cut_are_said_once_though_the_base_is_asked_them_too(
    tmp_path: Path, data: Path, model: tuple[Path, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(get_logger(), "warning", said.append)
    few = {"tasks": ("hellaswag", "boolq"), "num_fewshot": None, "compare_base": True, "architecture": ArchitectureFlags(seq_length=32)}
    code, text = run_evaluate(config_for(model[0], data, tmp_path, load=LoadFlags(load=model[0], lora_load=model[1]), **few))
    assert code == 0, text
    assert [line.split(" are longer than ")[1].split(";")[0] for line in said] == ["32 tokens and lose their beginning"] * 2, said
    assert said[0].startswith("12 of 12 requests") and said[1].startswith("6 of 6 requests"), "of each benchmark"


def test_lm_evals_own_hints_and_bars_are_left_out(
    tmp_path: Path,
    data: Path,
    model: tuple[Path, Path, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They name flags of lm_eval's that are not ours. Its errors still arrive."""
    hints = []
    for number, quiet in enumerate((jobs.only_our_output, contextlib.nullcontext)):
        monkeypatch.setattr(jobs, "only_our_output", quiet)
        caplog.clear()
        assert evaluate(config_for(model[0], data, tmp_path / str(number), tasks=("hellaswag",), num_fewshot=0)) == 0
        bars = capsys.readouterr().err
        hints.append(([record.name for record in caplog.records if record.name.startswith("lm_eval")], "it/s" in bars))
        assert "scoring" in bars
    assert hints[0] == ([], False) and hints[1][0] and hints[1][1], "without it there are both"


def test_other_request_kinds_equal_lm_evals_transformers_backend(model: tuple[Path, Path, Any]) -> None:
    """Rolling log-likelihoods, empty contexts, long continuations, generation with stop texts."""
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from mindspeed_lora.evaluation.batching import BatchRule, Room
    from mindspeed_lora.evaluation.lm import ParallelLM, work_handlers
    from mindspeed_lora.evaluation.replicas import Replicas
    from mindspeed_lora.inference.engine import Engine
    from mindspeed_lora.inference.prompts import PromptFormat
    from mindspeed_lora.inference.session import open_session

    folder = shared_data() / TOKENIZER
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    session = open_session(config_for(folder, folder), all_replicas=True)
    assert session.stage is not None
    engine = Engine(session.stage, session.context, session.channels)
    replicas = Replicas(work_handlers(engine, tokenizer), None, 0, 1)
    ours = ParallelLM(replicas, tokenizer, PromptFormat(), (2,), 64, BatchRule(2, Room(0, 0, 0, 0, 0, 0)), io.StringIO())
    theirs = HFLM(pretrained=transformers.AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer, batch_size=2, max_length=64)

    def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
        return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]

    long_text = "Once upon a time, there was a little dog who liked to run and jump in the park with Tim. " * 4
    asked = requests(
        "loglikelihood", ("Once upon", " a time"), ("Once upon", " a time, there"), ("", "Tim"), ("The dog ", "ran"), (long_text, "x")
    )
    for (value, greedy), (expected, expected_greedy) in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert value == pytest.approx(expected, abs=1e-4) and greedy == expected_greedy
    asked = requests("loglikelihood_rolling", (long_text,), ("Tim",))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked), abs=1e-3)
    settings = {"until": ["."], "max_gen_toks": 20, "do_sample": False}
    asked = requests("generate_until", ("Once upon a time", settings), ("Tim and", settings), ("One day", {**settings, "until": ["the"]}))
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def write_splits(folder: Path, **row: Any) -> None:
    """A data set of plain files, one row each."""
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps(row), encoding="utf-8")


@pytest.mark.slow  # lm_eval reads its 14,000 configurations once for each name
def test_groups_and_tags_of_lm_evals_read_each_tasks_own_rows(tmp_path: Path) -> None:
    """A tag (ai2_arc), a group of tasks (wmdp), a group of a tag (mmlu_stem); one set of files is not taken for two."""
    from lm_eval.tasks import TaskManager

    from mindspeed_lora.evaluation.tasks_named import _specs, load_named

    arc = {"id": "1", "question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    for config in ("ARC-Easy", "ARC-Challenge"):
        write_splits(tmp_path / "ai2_arc" / config, of=config, **arc)
    for config in ("wmdp-bio", "wmdp-chem", "wmdp-cyber"):
        write_splits(tmp_path / "wmdp" / config, of=config, question="Why?", choices=list("abcd"), answer=1)
    tag, group = load_named("ai2_arc", tmp_path, ())["tasks"], load_named("wmdp", tmp_path, ())["tasks"]
    found = {name: [row["of"] for row in task.test_docs()] for name, task in (*tag.items(), *group.items())}
    assert found == {
        "arc_easy": ["ARC-Easy"],
        "arc_challenge": ["ARC-Challenge"],
        "wmdp_bio": ["wmdp-bio"],
        "wmdp_chem": ["wmdp-chem"],
        "wmdp_cyber": ["wmdp-cyber"],
    }
    stem = [spec["task"] for spec in _specs(TaskManager().task_index, "mmlu_stem")]
    assert len(stem) == len(set(stem)) == 19 and {"mmlu_abstract_algebra", "mmlu_machine_learning"} <= set(stem)
    write_splits(tmp_path / "plain" / "ai2_arc", **arc)
    with pytest.raises(DataError, match=r"configuration ARC-Challenge and .* configuration ARC-Easy, and the files in .* do not say"):
        load_named("ai2_arc", tmp_path / "plain", ())
