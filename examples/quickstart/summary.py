"""Ends the quickstart: what the run showed, and whether it showed what it should.

    python examples/quickstart/summary.py quickstart_output

Reads the logs of inference.py and evaluation.py, loads the merged model with transformers, asks it the same questions, and
prints everything. Exit code 1 if an answer is not the taught one, the score did not rise, or the merged model differs.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BLOCK = re.compile(r"^You:\n(?P<question>.*?)\n\nMindSpeed-LLM:\n(?P<answer>.*?)\n={20,}$", re.DOTALL | re.MULTILINE)
SCORE = re.compile(r"mmlu acc = (\d+)/(\d+)=")


def read_answers(log: Path) -> dict[str, str]:
    """Question -> answer, from the output of inference.py."""
    return {match["question"].strip(): match["answer"].strip() for match in BLOCK.finditer(log.read_text(encoding="utf-8"))}


def read_score(log: Path) -> tuple[int, int]:
    """Right answers and questions, from the output of evaluation.py."""
    found = SCORE.findall(log.read_text(encoding="utf-8"))
    if not found:
        raise SystemExit(f"{log} has no line 'mmlu acc = n/N=x'")
    return int(found[-1][0]), int(found[-1][1])


def taught_answers() -> dict[str, str]:
    """Question -> the answer in the bundled set."""
    records = json.loads((HERE / "new_facts.json").read_text(encoding="utf-8"))
    return {record["instruction"]: record["output"] for record in records}


def ask_transformers(folder: Path, questions: list[str]) -> dict[str, str]:
    """Greedy answers of the merged model, loaded by transformers alone, through the tokenizer's chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    answers = {}
    for question in questions:
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
        answers[question] = tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    return answers


def main() -> int:
    """Print the summary; 0 if all is as it should be."""
    out = Path(sys.argv[1])
    before, after = read_answers(out / "logs" / "ask_before.log"), read_answers(out / "logs" / "ask_after.log")
    old, new = read_score(out / "logs" / "exam_before.log"), read_score(out / "logs" / "exam_after.log")
    taught, problems = taught_answers(), []
    if not after:
        problems.append("inference.py printed no answers")
    for question, answer in after.items():
        print(f"  {question}\n    before: {before.get(question)}\n    after:  {answer}")
        if answer != taught[question]:
            problems.append(f"{question!r}: the taught answer is {taught[question]!r}")
    print(f"\nExam (mmlu layout, 4 subjects of 25): before {old[0]}/{old[1]}, after {new[0]}/{new[1]}")
    print("  48 questions are on base facts, 52 on the new ones; all were taught in this form, so this shows memory, not reasoning.")
    if new[0] <= old[0]:
        problems.append("the score did not rise")
    merged = out / "merged"
    answers = ask_transformers(merged, list(after))
    same = sum(answers[question] == answer for question, answer in after.items())
    print(f"\nMerged model: {merged.resolve()}")
    print(f"  loaded by transformers alone, it gives the same answer to {same} of {len(after)} questions")
    if same != len(after):
        problems.append("the merged model answers differently")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("Quickstart: " + ("failed" if problems else "everything as it should be"))
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
