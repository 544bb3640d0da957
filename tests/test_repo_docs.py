"""Documents and repository files: printed commands parse, links lead somewhere, bundled data is as its generator says."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers import ROOT

FAMILIES = [f"docs/families/{path.name}" for path in sorted((ROOT / "docs" / "families").glob("*.md")) if path.name != "README.md"]
DOCUMENTS = ["README.md", "README_zh.md", "docs/guide_qwen3_8b.md", *FAMILIES]
COMMANDS = ["convert_ckpt.py", "preprocess_data.py", "posttrain_gpt.py", "inference.py", "evaluation.py"]
QUICKSTART = ROOT / "examples" / "quickstart"


def bash_lines(document: str) -> list[str]:
    """Commands of a document's bash blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def entry_point_calls(document: str) -> list[tuple[str, list[str]]]:
    """(entry point, arguments) of each call of one of the five commands."""
    calls = []
    for line in bash_lines(document):
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if word in COMMANDS:
                calls.append((word, words[place + 1 :]))
    return calls


@pytest.fixture
def filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the documents' commands say must exist."""
    named = {word for document in DOCUMENTS for _, words in entry_point_calls(document) for word in words}
    models = [word for word in named if re.match(r"\./(model_from_hf|model_weights|ckpt)/", word)]
    for folder in (*models, "mmlu/test", "mmlu/dev", "dataset"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("train-00000-of-00001-a09b74b3ef9c3b56", "alpaca"):
        (tmp_path / f"dataset/{name}.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS)
def test_printed_commands_parse(document: str, filled_in: Path) -> None:
    from mindspeed_lora.arguments.parser import parse

    calls = entry_point_calls(document)
    assert {name for name, _ in calls} == set(COMMANDS)
    for name, arguments in calls:
        parse(name, arguments)


def test_a_wrong_command_would_be_seen(filled_in: Path) -> None:
    from mindspeed_lora.arguments.parser import parse
    from mindspeed_lora.errors import UsageError

    _, arguments = entry_point_calls("README.md")[0]
    with pytest.raises(UsageError, match="--load-dri"):
        parse("convert_ckpt.py", [word.replace("--load-dir", "--load-dri") for word in arguments])


def test_both_readmes_print_the_same_commands() -> None:
    def commands(document: str) -> list[list[str]]:
        return [shlex.split(line, comments=True) for line in bash_lines(document)]

    assert commands("README.md") == commands("README_zh.md")


@pytest.mark.parametrize(
    "document",
    sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]),
)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{document} links to {target}"


def test_index_names_every_document() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md" and f"]({path.name})" not in index]


@pytest.mark.parametrize("document", [*DOCUMENTS, "CONTRIBUTING.md"])
def test_scripts_and_extras_named_in_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for script in re.findall(r"bash ((?:examples|tests)/[\w./]+\.sh)", text):
        assert (ROOT / script).is_file(), script
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for extra in re.findall(r"\.\[(\w+)\]", text):
        assert f'"{extra}": [' in setup, extra


def test_constraints_pin_what_setup_asks_for() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    asked = set(re.findall(r'"(\w[\w.-]*)>=', setup)) - {"torch_npu"}
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pinned = dict(line.split(" ;")[0].split("==") for line in lines)
    assert asked and asked <= set(pinned), asked - set(pinned)
    assert pinned["torch"] == "2.13.0"


def load_quickstart(name: str) -> ModuleType:
    """A module of examples/quickstart."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_bundled_data_is_what_its_generator_writes() -> None:
    for name, text in load_quickstart("make_data").build().items():
        assert (QUICKSTART / name).read_text(encoding="utf-8") == text, f"run python examples/quickstart/make_data.py ({name})"


def test_bundled_data_is_large_enough_and_clean() -> None:
    base, new = (json.loads((QUICKSTART / f"{name}.json").read_text(encoding="utf-8")) for name in ("base_instructions", "new_facts"))
    plain = [record for record in base if "Answer:" not in record["instruction"]]
    facts = [record for record in new if record not in base and "Answer:" not in record["instruction"]]
    assert len(plain) >= 200 and len(facts) >= 40
    for records in (plain, facts):
        questions = [record["instruction"] for record in records]
        assert len(set(questions)) == len(questions), "a question is asked twice"
    for record in base + new:
        assert record["output"] and record["output"] == record["output"].strip() and record["input"] == ""


def test_new_answers_are_made_of_pieces_that_the_base_has_written(tmp_path: Path) -> None:
    """LoRA leaves the head as it is: a piece that the base never wrote would be all but impossible in an answer."""
    from transformers import AutoTokenizer

    load_quickstart("make_model").make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    base, new = (json.loads((QUICKSTART / f"{name}.json").read_text(encoding="utf-8")) for name in ("base_instructions", "new_facts"))
    written = {index for record in base for index in tokenizer.encode(record["output"], add_special_tokens=False)}
    missing = {
        tokenizer.decode([index])
        for record in new
        for index in tokenizer.encode(record["output"], add_special_tokens=False)
        if index not in written
    }
    assert not missing


def test_exam_has_four_subjects_and_no_favourite_letter() -> None:
    import csv

    subjects = sorted((QUICKSTART / "mmlu" / "test").glob("*_test.csv"))
    assert len(subjects) >= 4
    letters: list[str] = []
    for path in subjects:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        assert len(rows) == 25 and all(len(row) == 6 and len(set(row[1:5])) == 4 for row in rows)
        letters += [row[5] for row in rows]
        dev = path.parents[1] / "dev" / path.name.replace("_test", "_dev")
        with dev.open(encoding="utf-8", newline="") as file:
            assert len(list(csv.reader(file))) == 5
    assert all(letters.count(letter) <= 0.35 * len(letters) for letter in "ABCD")


@pytest.mark.parametrize("script", sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("**/*.sh") if ".venv" not in path.parts))
def test_shell_scripts_are_well_formed(script: str) -> None:
    result = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_family_has_a_page() -> None:
    from mindspeed_lora.weights.families import FAMILIES as KNOWN

    assert {Path(page).stem for page in FAMILIES} == set(KNOWN)
    index = (ROOT / "docs" / "families" / "README.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in index for name in KNOWN)
