"""MMLU with five solved examples: ours against lm_eval's transformers backend, in one run of one CPU process, same model and questions.

    python benchmarks/evaluate_speed.py

Both sides are lm_eval's own evaluation of the same tasks, from reading the rows to the scores, in fp32 on a Qwen3 with Qwen's tokenizer and
its whole vocabulary. Theirs takes the fastest of ``--batches``, found first; ours chooses its own. Log-likelihoods must agree to 1e-4.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT, add_root_to_path, alternate, markdown, medians, parser, ratio, seconds, write_results

add_root_to_path()
DATA = ROOT.parent / "shared" / "data"
TITLE = "MMLU, five examples: lm_eval's transformers backend (CPU)"
BAR = 1.5
SUBJECTS = ("abstract_algebra", "global_facts", "high_school_biology", "management")
SHAPE = dict(
    vocab_size=151936,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)
TINY = dict(SHAPE, hidden_size=32, intermediate_size=64, num_hidden_layers=2)


def copy_subjects(target: Path, data: Path) -> None:
    """Some subjects of the published files."""
    for split, subject in itertools.product(("test", "dev"), SUBJECTS):
        (target / split).mkdir(parents=True, exist_ok=True)
        shutil.copy(data / "mmlu" / "data" / split / f"{subject}_{split}.csv", target / split)


def evaluation(lm: Any, job: Any, items: int, found: dict[str, Any], name: str) -> Callable[[], None]:
    """One whole evaluation; keeps every item's log-likelihoods."""
    from mindspeed_lora.evaluation.jobs import run_job

    def work() -> None:
        result = run_job(lm, job, items)
        found[name] = [response[0][0] for own in result.samples.values() for sample in own for response in sample["resps"]]

    return work


def our_lm(folder: Path, tokenizer: Any) -> Any:
    """This project's model behind lm_eval's interface, batches by its own estimate."""
    import torch

    from mindspeed_lora.arguments.configs import ArchitectureFlags
    from mindspeed_lora.checkpoint.load import load_base
    from mindspeed_lora.checkpoint.resolve import resolve_model_config
    from mindspeed_lora.evaluation.batching import BatchRule, measure_room
    from mindspeed_lora.evaluation.lm import ParallelLM, work_handlers
    from mindspeed_lora.evaluation.replicas import Replicas
    from mindspeed_lora.inference.channel import Channels
    from mindspeed_lora.inference.engine import Engine
    from mindspeed_lora.inference.prompts import PromptFormat
    from mindspeed_lora.model.stage import build_stage_modules
    from mindspeed_lora.parallel.context import single_process_context
    from mindspeed_lora.weights.sources import open_base
    from mindspeed_lora.weights.table import WeightTable

    base, context = open_base(folder), single_process_context()
    config = resolve_model_config(base, ArchitectureFlags())
    stages = build_stage_modules(config, context, base.dtype)
    load_base(stages, base, WeightTable(config), context)
    engine = Engine(stages[0].eval().requires_grad_(False), context, Channels())
    rule = BatchRule(None, measure_room(config, config.num_layers, context, torch.float32, 1))
    replicas = Replicas(work_handlers(engine, tokenizer), None, 0, 1)
    return ParallelLM(replicas, tokenizer, PromptFormat(), (), SHAPE["max_position_embeddings"], rule, io.StringIO())


def main() -> None:
    """Measure, print, write."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    from mindspeed_lora.evaluation.benchmarks import BENCHMARKS
    from mindspeed_lora.evaluation.jobs import Job, from_settings

    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=DATA, help="folder with mmlu/ and qwen3-tokenizer/")
    options.add_argument("--items", type=int, default=6, help="questions of each of the four subjects")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="batch sizes of the other side to choose from")
    chosen = options.parse_args()
    rounds, items, shape = (1, 1, TINY) if chosen.dry_run else (chosen.rounds, chosen.items, SHAPE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.data / "qwen3-tokenizer")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name)
        copy_subjects(folder / "mmlu", chosen.data)
        torch.manual_seed(0)
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape)).eval()
        model.save_pretrained(folder / "model")
        settings = BENCHMARKS["mmlu"].tasks(folder / "mmlu", 5)
        job = Job("mmlu", lambda: from_settings(settings), "acc", "none")
        theirs = {
            size: evaluation(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size), job, items, found, "lm_eval")
            for size in chosen.batches
        }
        tried = {size: seconds(work)() for size, work in theirs.items()}
        best = min(tried, key=tried.__getitem__)
        ours = evaluation(our_lm(folder / "model", tokenizer), job, items, found, "ours")
        values = alternate({"ours": seconds(ours), "lm_eval": seconds(theirs[best])}, rounds, warm_up=0 if chosen.dry_run else 1)
    largest = max(abs(a - b) for a, b in zip(found["ours"], found["lm_eval"], strict=True))
    middle, count = medians(values), items * len(SUBJECTS)
    result = {
        "model": {**shape, "parameters": sum(parameter.numel() for parameter in model.parameters()), "dtype": "float32"},
        "questions": count,
        "lm_eval batch sizes tried, s": tried,
        "lm_eval batch size": best,
        "largest difference of log-likelihoods": largest,
        "bar": BAR,
        "ratio": ratio(values, "lm_eval", "ours"),
        "seconds": values,
    }
    rows = [[side, middle[side], count / middle[side]] for side in values]
    body = (
        f"{markdown(['side', 's', 'questions/s'], rows)}\n\n{result['ratio']:.2f} x (bar {BAR}); {count} questions, five examples each; "
        f"Qwen3, hidden 512, 8 layers, vocabulary 151,936 (tied), {result['model']['parameters'] / 1e6:.0f}M parameters, fp32; lm_eval at "
        f"its fastest batch size of {', '.join(map(str, tried))}: {best}; largest difference of log-likelihoods {largest:.1e}."
    )
    write_results("evaluate_speed", TITLE, result, body, chosen.output or (Path("evaluate_speed.json") if chosen.dry_run else None))


if __name__ == "__main__":
    main()
