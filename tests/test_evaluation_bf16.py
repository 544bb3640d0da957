"""bf16: how far log-likelihoods lie from fp32 with the same weights, and that rounding alone flips choices.

The second test makes flips on purpose. The head's rows of four choices differ by single roundings of a few of their elements, so that

    logits l_a - l_b = h . (w_a - w_b)   lie about as close together as bf16 numbers of the size of l do

and what each side rounds decides many questions. What it may decide follows from the format, before anything is measured: a logit is
rounded by at most half a spacing, so two of them swap only where fp32 has them within one spacing (and what an inexact h does to
w_a - w_b); where log-probabilities are rounded to bf16 too, as in lm_eval, within one spacing of those more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_helpers import Items, config_for, log_likelihoods, reference_items, run_evaluate, small_benchmarks, written_items
from helpers import shared_data, tiny_qwen3, weights_in
from pool import ProcessPool

CHOICES = ("the", "and", "to", "he")
QUESTIONS = [
    f"{who} {did} {what}."
    for who in ("Tim", "Lily", "Mom", "Sam", "Ben", "Anna", "The dog", "A cat")
    for did in ("saw", "ate", "found")
    for what in ("a ball", "the sun", "a red car", "the big tree", "cake", "a toy", "a bird")
]


def transformers_in(dtype: torch.dtype, folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **weights_in(dtype)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_in_bf16_ours_is_as_near_to_fp32_as_transformers(
    pool: ProcessPool, tmp_path: Path, tp: int, record_property: Callable[[str, object], None]
) -> None:
    folder = tiny_qwen3(tmp_path / "model", vocab_size=512, max_position_embeddings=1024, dtype="bfloat16")
    changes = {"tasks": ("mmlu", "ceval", "boolq", "hellaswag"), "max_eval_samples": 60, "num_fewshot": 0}
    config = config_for(folder, small_benchmarks(tmp_path / "benchmarks"), tmp_path / "scores", tp, **changes)
    exact, theirs = (reference_items(config, transformers_in(dtype, folder))[0] for dtype in (torch.float32, torch.bfloat16))
    code, text = pool.run(run_evaluate, tp, config)[0]
    assert code == 0, text
    ours = written_items(tmp_path / "scores")
    ours_at, theirs_at, exact_at = (log_likelihoods(side, {task for task, _ in exact}) for side in (ours, theirs, exact))
    of_ours, of_theirs = (((side - exact_at) / exact_at.abs().clamp(min=1.0)).abs() for side in (ours_at, theirs_at))
    flips = sum(argmax(ours[item]) != argmax(theirs[item]) for item in exact)
    text = f"relative error, largest and mean: ours {of_ours.max():.4f}, {of_ours.mean():.4f}, transformers {of_theirs.max():.4f}, "
    text += f"{of_theirs.mean():.4f}; largest difference {(ours_at - theirs_at).abs().max():.3f}; {flips} of {len(exact)} choices differ"
    record_property(f"bf16, tp {tp}", text)
    print(text)
    assert of_ours.mean() <= of_theirs.mean() and of_ours.max() <= 2 * of_theirs.max(), "two roundings of 8 bits that differ by one bit"


def nearly_equal_choices(folder: Path, ids: Sequence[int]) -> None:
    """Give the head the same row for all of ``ids``, but for some elements that are the next bf16 number up or down."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    head = tensors["lm_head.weight"]
    generator = torch.Generator().manual_seed(0)
    for number, row in enumerate(ids[1:]):
        bits = head[ids[0]].clone().view(torch.int16)
        places = torch.randperm(len(bits), generator=generator)[: 6 * 3**number]
        bits[places] += torch.randint(2, (len(places),), generator=generator, dtype=torch.int16) * 2 - 1
        head[row] = bits.view(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def exact_logits(folder: Path, tokenizer: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The choices' logits ``[n, 4]`` in fp32; and a bf16 spacing ``[n]`` of the largest of them on either side, and what h's error adds."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = transformers_in(dtype, folder)
        with torch.no_grad():
            hidden = torch.cat([model.model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[:, -1] for text in QUESTIONS])
        found.append((hidden.float(), model.lm_head.weight[ids].detach().float()))
    (exact, rows), (rounded, _) = found
    sizes = torch.cat((exact @ rows.T, rounded @ rows.T), dim=1).abs().amax(dim=1)
    of_hidden = 2 * ((rounded - exact) @ (rows[1:] - rows[:1]).T).abs().max()
    return exact @ rows.T, spacing(sizes) + of_hidden


def spacing(size: torch.Tensor) -> torch.Tensor:
    """Of bf16 numbers: 8 significant bits."""
    return 2.0 ** (size.abs().log2().floor() - 7)


def count_flips(found: Items, logits: torch.Tensor, bounds: torch.Tensor) -> int:
    """How many choices are not those of ``logits``; each must lose by no more than ``bounds``."""
    flips = 0
    for (_, index), values in found.items():
        best, said = argmax(logits[index].tolist()), argmax(values)
        assert logits[index, best] - logits[index, said] <= bounds[index], (index, logits[index], bounds[index], values)
        flips += best != said
    return flips


@pytest.mark.parametrize("tp", [1, 2])
def test_choices_flip_only_where_two_are_closer_than_rounding(
    pool: ProcessPool, tmp_path: Path, tp: int, record_property: Callable[[str, object], None]
) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data() / "stories260k" / "hf")
    ids = [tokenizer.encode(f"{QUESTIONS[0]} {choice}")[-1] for choice in CHOICES]
    folder = tiny_qwen3(tmp_path / "model", vocab_size=512, max_position_embeddings=256, dtype="bfloat16")
    nearly_equal_choices(folder, ids)
    logits, bounds = exact_logits(folder, tokenizer, ids)
    rows = [json.dumps({"query": text, "choices": CHOICES, "gold": 0}) + "\n" for text in QUESTIONS]
    (tmp_path / "hellaswag.jsonl").write_text("".join(rows), encoding="utf-8")
    changes = {"tasks": ("hellaswag",), "num_fewshot": 0, "max_eval_samples": None, "evaluation_batch_size": 32}
    config = config_for(folder, tmp_path, tmp_path / "scores", tp, **changes)
    theirs, _ = reference_items(config, transformers_in(torch.bfloat16, folder))
    code, text = pool.run(run_evaluate, tp, config)[0]
    assert code == 0, text
    ours = written_items(tmp_path / "scores")
    assert len(ours) == len(theirs) == len(QUESTIONS)
    their_bounds = bounds + spacing(torch.tensor([max(map(abs, theirs["hellaswag", index])) for index in range(len(QUESTIONS))]))
    flips = count_flips(ours, logits, bounds), count_flips(theirs, logits, their_bounds)
    top = logits.sort(dim=1).values
    decided = top[:, -1] - top[:, -2] > bounds
    text = f"tp {tp}: not fp32's choice: ours {flips[0]}, lm_eval's {flips[1]} of {len(QUESTIONS)}; above rounding: {int(decided.sum())}"
    record_property("bf16", text)
    print(text)
    assert min(flips) >= 10 and int(decided.sum()) >= 10, "the cell exercises the rule, on both sides of the bound"
    index = int(decided.nonzero()[0])
    wrong = [float(choice == int(logits[index].argmin())) for choice in range(len(CHOICES))]
    with pytest.raises(AssertionError):
        count_flips({**ours, ("hellaswag", index): wrong}, logits, bounds)


def argmax(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
