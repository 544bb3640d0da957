"""Answers and logits at every layout equal transformers' own."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import shared_data, tiny_qwen3
from pool import ProcessPool, RankError

from mindspeed_lora.arguments.configs import InferenceConfig, LoadFlags, ParallelFlags, RuntimeFlags, TemplateFlags, TokenizerFlags
from mindspeed_lora.errors import MindSpeedLoraError
from mindspeed_lora.inference.channel import RankDied
from mindspeed_lora.inference.engine import Engine, ScoreBatch
from mindspeed_lora.inference.run import infer
from mindspeed_lora.inference.session import lead, open_session

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
PREFIX = (60, 61, 62, 63, 64)
PROMPTS = [[5, 9, 200, 31, 77, 8], [3], [12, 13, 14]]


def config_for(folder: Path, tp: int, pp: int, **changes: object) -> InferenceConfig:
    config = InferenceConfig(
        ParallelFlags(tp, pp), RuntimeFlags(device="cpu"), LoadFlags(load=folder), TokenizerFlags(), TemplateFlags(), tasks=("greedy",)
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def run_infer(config: InferenceConfig) -> tuple[int, str]:
    """Exit code and printed text of this rank; a user error counts as its exit code, its message as text."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = infer(config)
        except MindSpeedLoraError as error:
            code = error.exit_code
            out.write(f"ERROR {error}")
    return code, out.getvalue()


def answers(text: str) -> list[str]:
    return re.findall(r"MindSpeed-LLM:\n(.*?)\n={46}\n", text, flags=re.DOTALL)


def story() -> str:
    return (shared_data() / "stories260k" / "stories260K.md").read_text().split("-t 0.0\n")[1].split("\n```")[0]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_the_published_story_is_told_at_every_layout(pool: ProcessPool, tp: int, pp: int) -> None:
    folder = shared_data() / "stories260k" / "hf"
    results = pool.run(run_infer, tp * pp, config_for(folder, tp, pp, prompts=("<s>",), max_new_tokens=256))
    expected = story()
    assert len(expected) == 565
    assert [code for code, _ in results] == [0] * (tp * pp)
    assert answers(results[0][1]) == [expected]
    assert all(text == "" for _, text in results[1:]), "only the driver prints"


def logits_cell(
    folder: Path, tp: int, pp: int, ep: int = 1, etp: int | None = None, tokenizer: Path | None = None
) -> dict[str, torch.Tensor] | None:
    """Prefill of a left-padded batch, a step, rows reordered, a step, cropped, a step; without cache; and scores."""
    from mindspeed_lora.inference.generator import Limits, ParallelCausalLM, Strategy, generate, pad_left

    found: dict[str, torch.Tensor] = {}

    def work(engine: Engine) -> None:
        ids, mask = pad_left(PROMPTS, 0)
        found["prefill"] = engine.forward(ids, mask.bool(), use_cache=True, keep_last=ids.shape[1])
        found["step"] = engine.forward(torch.tensor([[1], [2], [3]]), use_cache=True)
        engine.reorder(torch.tensor([2, 2, 0]))
        found["reordered"] = engine.forward(torch.tensor([[4], [5], [6]]), use_cache=True)
        engine.crop(ids.shape[1])
        found["cropped"] = engine.forward(torch.tensor([[7, 8], [9, 10], [11, 12]]), use_cache=True, keep_last=2)
        engine.reorder(torch.tensor([0]))
        found["shrunk"] = engine.forward(torch.tensor([[13]]), use_cache=True)
        engine.reset()
        found["plain"] = engine.forward(ids, mask.bool(), keep_last=2)
        right = torch.tensor([[5, 9, 200, 31], [3, 8, 0, 0]])
        batch = ScoreBatch(right, torch.tensor([[2, 3], [1, 0]]), torch.tensor([[[31, 31], [7, 8]], [[1, 2], [0, 0]]]))
        found["scores"] = torch.stack([scores.log_probs for scores in engine.score([batch] * 5)])
        behind = [replace(batch, prefix=prefix) for prefix in (PREFIX, PREFIX, (), PREFIX[:2])]
        found["scores behind prefixes"] = torch.stack([scores.log_probs for scores in engine.score(behind)])
        model = ParallelCausalLM(engine)
        for name, strategy in (("greedy", Strategy()), ("beams", Strategy(num_beams=3)), ("sampled", Strategy(True, 1, 0.8, 20, 0.9))):
            for use_cache in (True, False):
                texts = generate(model, PROMPTS, strategy, Limits(12, (2,)), 7, use_cache)
                found[f"{name} {use_cache}"] = torch.tensor([text + [-1] * (12 - len(text)) for text in texts])

    parallel = ParallelFlags(tp, pp, expert_parallel_size=ep, expert_tensor_parallel_size=etp)
    words = TokenizerFlags(tokenizer or shared_data() / "stories260k" / "hf")
    session = open_session(config_for(folder, tp, pp, tokenizer=words, parallel=parallel), all_replicas=False)
    assert lead(session, work) == 0
    return found or None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(tiny: Path) -> dict[str, torch.Tensor]:
    return by_transformers(tiny)


def by_transformers(folder: Path) -> dict[str, torch.Tensor]:
    """The same questions, asked of transformers, without any cache."""
    import transformers

    from mindspeed_lora.inference.generator import pad_left

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    @torch.no_grad()
    def last(rows: list[list[int]], count: int = 1) -> torch.Tensor:
        return torch.stack([model(torch.tensor([row])).logits[0, -count:] for row in rows])

    first, second, third = PROMPTS
    ids, mask = pad_left(PROMPTS, 0)
    found = {
        "step": last([[*first, 1], [*second, 2], [*third, 3]]),
        "reordered": last([[*third, 3, 4], [*third, 3, 5], [*first, 1, 6]]),
        "cropped": last([[*third, 7, 8], [*third, 9, 10], [*first, 11, 12]], 2),
        "shrunk": last([[*third, 7, 8, 13]]),
        "prefill": last(PROMPTS),
    }
    for name, arguments in (
        ("greedy", {"do_sample": False}),
        ("beams", {"do_sample": False, "num_beams": 3}),
        ("sampled", {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}),
    ):
        torch.manual_seed(7)
        output = model.generate(ids, attention_mask=mask, max_new_tokens=12, eos_token_id=[2], pad_token_id=0, **arguments)
        texts = [row[: row.index(2)] if 2 in row else row for row in output[:, ids.shape[1] :].tolist()]
        found[name] = torch.tensor([text + [-1] * (12 - len(text)) for text in texts])
    for prefix in (PREFIX, PREFIX[:2], ()):
        log_probs = last([[*prefix, 5, 9, 200, 31], [*prefix, 3, 8, 0, 0]], 4).double().log_softmax(-1)
        scores = torch.stack([log_probs[0, 2, [31, 31]], log_probs[0, 3, [7, 8]], log_probs[1, 1, [1, 2]]])
        found[f"scores {len(prefix)}"] = scores
    return found


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_logits_scores_and_tokens_equal_transformers(
    pool: ProcessPool, tiny: Path, reference: dict[str, torch.Tensor], tp: int, pp: int
) -> None:
    compare(pool.run(logits_cell, tp * pp, tiny, tp, pp)[0], reference)


def compare(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    for name in ("step", "reordered", "cropped", "shrunk"):
        torch.testing.assert_close(found[name], reference[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["prefill"][:, -1:], reference["prefill"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["plain"][:, -1:], reference["prefill"], atol=1e-5, rtol=1e-5)
    behind = zip(found["scores behind prefixes"], (len(PREFIX), len(PREFIX), 0, 2), strict=True)
    for scores, prefix in [*((scores, 0) for scores in found["scores"]), *behind]:
        expected = reference[f"scores {prefix}"]
        torch.testing.assert_close(torch.stack([scores[0, 0], scores[0, 1], scores[1, 0]]), expected, atol=1e-5, rtol=1e-5)
    for name in ("greedy", "beams", "sampled"):
        for use_cache in (True, False):
            assert torch.equal(found[f"{name} {use_cache}"], reference[name]), (name, use_cache)


def test_an_error_of_the_user_ends_every_rank_with_its_code_and_one_message(pool: ProcessPool) -> None:
    folder = shared_data() / "stories260k" / "hf"
    results = pool.run(run_infer, 4, config_for(folder, 1, 2, prompts=("word " * 600,)))
    assert [code for code, _ in results] == [2] * 4
    assert "has 1802 tokens" in results[0][1] and "512 of config.json" in results[0][1]
    assert all(text == "" for _, text in results[1:])


def test_with_two_replicas_the_answer_is_printed_once(pool: ProcessPool) -> None:
    folder = shared_data() / "stories260k" / "hf"
    config = config_for(folder, 1, 1, prompts=("<s>", "Once upon a time"), max_new_tokens=20, micro_batch_size=2)
    results = pool.run(run_infer, 2, config)
    assert [code for code, _ in results] == [0, 0] and results[1][1] == ""
    text = results[0][1]
    assert text.count("You:") == 2 and story()[:60] in text and text.count("Elapsed: ") == 1


def crash_cell(folder: Path) -> tuple[int, str]:
    def work(engine: Engine) -> None:
        engine.forward(torch.tensor([[1, 2, 3]]), use_cache=True)
        raise RuntimeError("our own mistake")

    session = open_session(config_for(folder, 1, 2), all_replicas=False)
    try:
        return lead(session, work), ""
    except RuntimeError as error:
        return -1, str(error)


def test_a_driver_that_crashes_releases_its_workers(pool: ProcessPool) -> None:
    assert pool.run(crash_cell, 2, shared_data() / "stories260k" / "hf") == [(-1, "our own mistake"), (1, "")]


def crash_inside_an_order_cell(folder: Path) -> int:
    """As out of memory on the driver: its worker is in a collective of the model, and would read no message."""
    from mindspeed_lora.inference.executor import Executor

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    def work(engine: Engine) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Executor, "_forward", fail)
            engine.forward(torch.tensor([[1, 2, 3]]))

    return lead(open_session(config_for(folder, 2, 1), all_replicas=False), work)


def test_a_driver_that_crashes_inside_an_order_does_not_wait_for_its_workers(pool: ProcessPool) -> None:
    with pytest.raises(RankError, match="out of memory"):
        pool.run(crash_inside_an_order_cell, 2, shared_data() / "stories260k" / "hf", timeout=30)


def missing_cell(folder: Path) -> tuple[int, str]:
    import os

    path = folder if os.environ["RANK"] == "0" else folder / "absent"
    return run_infer(config_for(path, 1, 2, prompts=("<s>",)))


def test_a_rank_that_cannot_load_stops_the_others(pool: ProcessPool) -> None:
    results = pool.run(missing_cell, 2, shared_data() / "stories260k" / "hf")
    assert [code for code, _ in results] == [1, 1]
    assert results[0][1] == "" and "no such folder" in results[1][1]


def dead_worker_cell(folder: Path) -> None:
    """The worker leaves after two passes; the driver must not wait for it."""
    import time

    from mindspeed_lora.inference.executor import Executor
    from mindspeed_lora.inference.protocol import receive_message

    session = open_session(config_for(folder, 1, 2), all_replicas=False)
    assert session.stage is not None
    if not session.is_driver:
        executor = Executor(session.stage, session.context, session.channels)
        for _ in range(2):
            executor.execute(receive_message(session.channels.replica))
        raise ValueError("the worker left")
    engine = Engine(session.stage, session.context, session.channels)
    start = time.perf_counter()
    try:
        for _ in range(5):
            engine.forward(torch.tensor([[1, 2, 3]]))
    except RankDied as error:
        engine.stop()
        raise ValueError(f"the driver noticed after {time.perf_counter() - start:.0f} s") from error


def test_a_worker_that_dies_does_not_hang_the_driver(pool: ProcessPool) -> None:
    with pytest.raises(RankError, match=r"the driver noticed after 1?\d s") as caught:
        pool.run(dead_worker_cell, 2, shared_data() / "stories260k" / "hf", timeout=60)
    assert "the worker left" in str(caught.value)
