"""The scripts of examples/mcore: their defaults parse, exit codes and logs are the program's, and all steps run with a small model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from mindspeed_lora.arguments.cli import main
from mindspeed_lora.arguments.parser import parse

FOLDER = ROOT / "examples" / "mcore"
QUICKSTART = ROOT / "examples" / "quickstart"
MODELS = {  # folder: model, as in the names of its scripts
    "qwen3": "qwen3_8b",
    "qwen25": "qwen25_7b",
    "llama3": "llama3_8b",
    "mistral": "mistral_7b",
    "mixtral": "mixtral_8x7b",
    "qwen2_moe": "qwen2_57b_a14b",
    "qwen3_moe": "qwen3_30b_a3b",
    "deepseek2_lite": "deepseek2_lite_16b",
    "deepseek3": "deepseek3_671b",
}
STEPS = (
    *("ckpt_convert_{family}_hf2mcore", "data_convert_{family}_instruction", "tune_{model}_4K_lora_ptd", "tune_{model}_4K_full_ptd"),
    *("generate_{model}_ptd", "generate_{model}_lora_ptd", "chat_{model}_ptd", "evaluate_{model}_ptd", "evaluate_{model}_lora_ptd"),
    "ckpt_convert_{family}_mcore2hf_lora",
)
MORE = {"qwen3": ("data_convert_qwen3_pairwise", "dpo_qwen3_8b_4K_lora_ptd")}
LEFT_OUT = {"deepseek3": ("tune_deepseek3_671b_4K_full_ptd",)}  # what one asks for that in earnest has a script of his own
VARIABLES = (
    *("CKPT_LOAD_DIR", "CKPT_SAVE_DIR", "DATA_PATH", "OUTPUT_PREFIX", "TOKENIZER_PATH", "CHECKPOINT", "CHECKPOINT_LORA", "TASK", "WORKERS"),
    *(
        "TP",
        "PP",
        "EP",
        "ETP",
        "NPUS_PER_NODE",
        "NNODES",
        "NODE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "SMOKE",
        "SMOKE_TP",
        "SMOKE_PP",
        "SMOKE_EP",
    ),
)


def names(family: str) -> list[str]:
    """The scripts that a family has."""
    found = [name.format(family=family, model=MODELS[family]) for name in STEPS]
    return [name for name in [*found, *MORE.get(family, ())] if name not in LEFT_OUT.get(family, ())]


EVERY = [(family, name) for family in MODELS for name in names(family)]


def run_bash(script: Path, cwd: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script from ``cwd`` with only ``variables`` of VARIABLES set."""
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    environment.update({"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables})
    return subprocess.run(
        ["bash", str(script), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="session")
def fake_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that prints its arguments one a line and exits with $FAKE_EXIT."""
    path = tmp_path_factory.mktemp("bin") / "fake_python"
    path.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit "${FAKE_EXIT:-0}"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


def words_of(family: str, name: str, cwd: Path, python: Path, *arguments: str, exit_code: int = 0, **variables: str) -> list[str]:
    """What a script gives its interpreter, from its log; its exit code is the interpreter's."""
    result = run_bash(FOLDER / family / f"{name}.sh", cwd, *arguments, PYTHON=str(python), FAKE_EXIT=str(exit_code), **variables)
    assert result.returncode == exit_code, result.stderr
    return (cwd / "logs" / f"{name}.log").read_text(encoding="utf-8").splitlines()


def command_of(words: list[str]) -> tuple[str, list[str]]:
    """The program of the five, and its arguments."""
    place = next(index for index, word in enumerate(words) if word.startswith(str(ROOT)))
    return Path(words[place]).name, words[place + 1 :]


def test_all_are_there() -> None:
    found = {path.parent.name: {script.stem for script in path.parent.glob("*.sh")} for path in FOLDER.glob("*/common.sh")}
    assert found == {family: {*names(family), "common"} for family in MODELS}


@pytest.mark.parametrize(("family", "name"), EVERY, ids=[name for _, name in EVERY])
def test_defaults_parse_and_the_exit_code_is_the_programs(
    family: str, name: str, tmp_path: Path, fake_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = f"ckpt/{MODELS[family].replace('_', '-')}-lora"
    for folder in (f"model_from_hf/{family}_hf", f"model_weights/{family}_mcore", adapter, "mmlu/test", "dataset"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "dataset/train-00000-of-00001-a09b74b3ef9c3b56.parquet").write_bytes(b"")
    (tmp_path / "dataset/pairs.json").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    words = words_of(family, name, tmp_path, fake_python, "--seed", "4711", exit_code=3, TASK="mmlu" if "evaluate" in name else "")
    assert words[-2:] == ["--seed", "4711"], "arguments given to a script come last"
    program, arguments = command_of(words[:-2])
    config = parse(program, arguments)[0]
    if name.startswith("generate"):
        assert config.tasks == ("greedy", "do_sample")
    if name.startswith("chat"):
        assert config.tasks == ("chat",)


@pytest.mark.parametrize("family", MODELS)
def test_the_real_model_fits_at_the_scripts_layout(
    family: str,
    tmp_path: Path,
    fake_python: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The sizes that the script gives are config.json's, and 64 GB devices are enough: 8, of DeepSeek-V3 64."""
    model = tmp_path / "model_from_hf" / f"{family}_hf"
    model.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "fixtures" / "configs" / f"{family}.json", model / "config.json")
    monkeypatch.chdir(tmp_path)
    words = words_of(family, f"tune_{MODELS[family]}_4K_lora_ptd", tmp_path, fake_python, CKPT_LOAD_DIR=str(model))
    devices = 8 * int(words[words.index("--nnodes") + 1])
    assert main(*append(command_of(words), "--dry-run", "--dry-run-machine", "atlas-900-a2", "--dry-run-devices", str(devices))) == 0
    output = capsys.readouterr().out + caplog.text  # where the log goes depends on who set it up first
    assert "\nfits: " in output, output


def append(command: tuple[str, list[str]], *words: str) -> tuple[str, list[str]]:
    """The same command with more arguments."""
    return command[0], [*command[1], *words]


def test_environment_reaches_torchrun_and_the_program(tmp_path: Path, fake_python: Path) -> None:
    places = dict(CKPT_LOAD_DIR="base", CKPT_SAVE_DIR="adapter", DATA_PATH="tokens", TOKENIZER_PATH="tok")
    machines = dict(NPUS_PER_NODE="4", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.1.2.3", MASTER_PORT="6123")
    words = words_of("qwen3", "tune_qwen3_8b_4K_lora_ptd", tmp_path, fake_python, TP="4", PP="1", **places, **machines)
    for pair in (
        "--nproc_per_node 4",
        "--nnodes 2",
        "--node_rank 1",
        "--master_addr 10.1.2.3",
        "--master_port 6123",
        "--tensor-model-parallel-size 4",
        "--pipeline-model-parallel-size 1",
        "--sequence-parallel",
        "--load base",
        "--save adapter",
        "--data-path tokens",
        "--tokenizer-name-or-path tok",
        "--lora-fusion",
    ):
        assert pair in " ".join(words), pair


def test_several_tasks_and_an_adapter_to_talk_with(tmp_path: Path, fake_python: Path) -> None:
    words = words_of("llama3", "evaluate_llama3_8b_ptd", tmp_path, fake_python, TASK="mmlu gsm8k")
    assert "--task mmlu gsm8k --task-data-path" in " ".join(words)
    words = words_of("llama3", "chat_llama3_8b_ptd", tmp_path, fake_python, CHECKPOINT_LORA="mine")
    assert "--lora-load mine --lora-fusion" in " ".join(words)


def test_a_failing_program_fails_the_script_with_its_message(tmp_path: Path) -> None:
    name = "ckpt_convert_qwen3_hf2mcore"
    result = run_bash(FOLDER / "qwen3" / f"{name}.sh", tmp_path, CKPT_LOAD_DIR="no-such-folder")
    assert result.returncode == 2
    assert "no-such-folder" in result.stdout and "Traceback" not in result.stdout
    assert "no-such-folder" in (tmp_path / "logs" / f"{name}.log").read_text(encoding="utf-8")
    assert not (tmp_path / "model_weights").exists()


def test_smoke_names_the_families_and_overwrites_nothing(tmp_path: Path) -> None:
    result = run_bash(FOLDER / "smoke.sh", tmp_path, "qwen4")
    assert result.returncode == 2 and all(family in result.stderr for family in MODELS)
    (tmp_path / "there").mkdir()
    result = run_bash(FOLDER / "smoke.sh", tmp_path, "qwen3", "there")
    assert result.returncode == 2 and "there is there already" in result.stderr


def test_smoke_is_of_one_machine(tmp_path: Path, fake_python: Path) -> None:
    """torchrun would wait for DeepSeek-V3's other seven."""
    words = words_of("deepseek3", "tune_deepseek3_671b_4K_lora_ptd", tmp_path, fake_python, SMOKE="1")
    assert "--nnodes 1 " in " ".join(words)


ONE_PROCESS = {"SMOKE": "1", "SMOKE_PP": "1", "SMOKE_EP": "1", "NPUS_PER_NODE": "1"}


@dataclass(frozen=True)
class Steps:
    """A family's small model in a folder, where its scripts look for the real one; their commands run in this process."""

    family: str
    folder: Path
    python: Path

    def run(self, name: str, *arguments: str, **variables: str) -> str:
        """What the command of a script prints at SMOKE=1 in one process; exit code 0 required."""
        name = name.format(family=self.family, model=MODELS[self.family])
        words = words_of(self.family, name, self.folder, self.python, *arguments, **ONE_PROCESS, **variables)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(*command_of(words))
        assert code == 0, f"{' '.join(words)}\n{out.getvalue()}{err.getvalue()}"
        return out.getvalue()

    def latest(self, kind: str) -> Path:
        """Folder of the last checkpoint of ./ckpt/MODEL-kind."""
        return self.folder / "ckpt" / f"{MODELS[self.family].replace('_', '-')}-{kind}" / "iter_0000003"


@pytest.fixture
def steps(request: pytest.FixtureRequest, tmp_path: Path, fake_python: Path, monkeypatch: pytest.MonkeyPatch) -> Steps:
    """The family that the test names, with data."""
    try:
        runpy.run_path(str(FOLDER / "smoke_model.py"))["make_model"](request.param, tmp_path / "model_from_hf" / f"{request.param}_hf")
    except SystemExit as error:
        pytest.skip(str(error))
    (tmp_path / "mmlu").symlink_to(QUICKSTART / "mmlu")
    monkeypatch.chdir(tmp_path)
    return Steps(request.param, tmp_path, fake_python)


def test_a_family_that_transformers_lacks_is_a_message(tmp_path: Path) -> None:
    made = runpy.run_path(str(FOLDER / "smoke_model.py"))
    made["FAMILIES"]["qwen3"] = ("NoConfig", {})
    with pytest.raises(SystemExit, match="has no NoConfig: the smoke mode of qwen3 needs a newer one"):
        made["make_model"]("qwen3", tmp_path)


FAST = ("mixtral", "qwen2_moe", "deepseek2_lite", "deepseek3")
BASH = "qwen3_moe"  # in processes of its own, with experts dealt out over them


def slow_but(fast: tuple[str, ...]) -> list[Any]:
    """All families, those that are not ``fast`` marked slow."""
    return [family if family in fast else pytest.param(family, marks=pytest.mark.slow) for family in MODELS]


@pytest.mark.parametrize("steps", slow_but(FAST), indirect=True)
def test_the_steps_of_a_family(steps: Steps) -> None:
    from transformers import AutoModelForCausalLM

    steps.run("ckpt_convert_{family}_hf2mcore")
    steps.run("data_convert_{family}_instruction", DATA_PATH=str(QUICKSTART / "new_facts.json"))
    steps.run("tune_{model}_4K_lora_ptd")
    assert (steps.latest("lora") / "peft" / "adapter_model.safetensors").is_file()
    assert "MindSpeed-LLM:" in steps.run("generate_{model}_lora_ptd", TASK="greedy")
    assert "/8=" in steps.run("evaluate_{model}_lora_ptd")
    steps.run("ckpt_convert_{family}_mcore2hf_lora")
    AutoModelForCausalLM.from_pretrained(steps.folder / "model_from_hf" / f"{steps.family}_hf" / "mg2hg")


@pytest.mark.parametrize("steps", ["qwen3"], indirect=True)
def test_preference_pairs(steps: Steps) -> None:
    records = json.loads((QUICKSTART / "new_facts.json").read_text(encoding="utf-8"))[:8]
    pairs = [{"instruction": record["instruction"], "chosen": record["output"], "rejected": "I do not know."} for record in records]
    Path("pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    steps.run("data_convert_qwen3_pairwise", DATA_PATH="pairs.json")
    steps.run("dpo_qwen3_8b_4K_lora_ptd", CKPT_LOAD_DIR="model_from_hf/qwen3_hf")
    assert "rewards_accuracies" in (steps.latest("dpo").parent / "metrics.jsonl").read_text(encoding="utf-8")
    assert (steps.latest("dpo") / "peft" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("family", slow_but((BASH,)))
def test_smoke_runs_all_scripts_in_processes_of_their_own(family: str, tmp_path: Path) -> None:
    port = str(20000 + os.getpid() % 20000)
    result = run_bash(FOLDER / "smoke.sh", tmp_path, family, "made", MASTER_PORT=port)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert f"all steps of {family} are done" in result.stdout
    logs = {path.stem for path in (tmp_path / "made" / "logs").glob("*.log")}
    assert logs == {name for name in names(family) if "pairwise" not in name and "dpo" not in name} - {
        f"{kind}_{MODELS[family]}_ptd" for kind in ("generate", "evaluate")
    }
    shutil.rmtree(tmp_path / "made")
