"""Flags of ``inference.py`` and ``evaluation.py`` alone."""

from __future__ import annotations

from mindspeed_lora.arguments.flag import EVALUATE, INFER, Flag, accepted, active
from mindspeed_lora.arguments.values import COUNT, COUNT_OR_ZERO, NAMED_PATH, PATH, POSITIVE, RAW_TEXT, SHARE, TEXT

NO_NEEDLEBENCH = "lm-evaluation-harness has no such task; its niah_single_1 and ruler ask for needles too, but make their own data"

ASK = "prompts and answers"
TASKS = ("greedy", "do_sample", "beam_search", "beam_search_with_sampling", "chat")

INFERENCE = [
    active(
        "--lora-load",
        (INFER,),
        "files",
        "adapter folder: ours, MindSpeed-LLM's or PEFT's; several with a name each: a=PATH b=PATH",
        NAMED_PATH,
        "adapters",
        many=True,
    ),
    active("--prompt", (INFER,), ASK, "what to ask, one after the other; -: each line of standard input", RAW_TEXT, "prompts", many=True),
    active("--system-prompt", (INFER,), ASK, "stands before the conversation, in a template's own form", TEXT, "system_prompt"),
    active(
        "--input-file",
        (INFER,),
        ASK,
        "jsonl of prompts (field prompt or messages; system, adapter)",
        PATH,
        "input_file",
        must_exist="file",
    ),
    active(
        "--output-file",
        (INFER,),
        ASK,
        "jsonl of the same records with their answers; the same command continues a run that was ended",
        PATH,
        "output_file",
        default_text="<input file>.answers.jsonl",
    ),
    active("--task", (INFER,), ASK, "how to choose tokens", TEXT, "tasks", many=True, choices=TASKS),
    active("--compare-base", (INFER,), ASK, "answer also with the base alone, side by side", None, "compare_base"),
    active("--max-new-tokens", (INFER,), ASK, "longest answer", COUNT, "max_new_tokens", unit="tokens"),
    active(
        "--max-length", (INFER,), ASK, "longest prompt and answer together (without --max-new-tokens)", COUNT, "max_length", unit="tokens"
    ),
    active("--num-beams", (INFER,), ASK, "beam_search: answers that are followed at a time", COUNT, "num_beams"),
    active("--top-p", (INFER,), ASK, "sampling and chat: smallest set of tokens with this probability", SHARE, "top_p"),
    active("--top-k", (INFER,), ASK, "sampling and chat: most likely tokens to choose from; 0: all", COUNT_OR_ZERO, "top_k"),
    active("--temperature", (INFER,), ASK, "sampling and chat: below 1 sharper, above 1 flatter", POSITIVE, "temperature"),
    active("--add-eos-token", (INFER,), ASK, "further tokens that end an answer", TEXT, "add_eos_token", many=True),
    active("--history-turns", (INFER,), ASK, "chat: earlier turns that the model sees; 0: none", COUNT_OR_ZERO, "history_turns"),
    active("--stream", (INFER,), ASK, "print an answer while it grows (the default)", None, "stream"),
    active("--no-stream", (INFER,), ASK, "print an answer when it is ready", None, "stream", const=False),
    active("--show-thinking", (INFER,), ASK, "print the model's thoughts (the default)", None, "show_thinking"),
    active("--hide-thinking", (INFER,), ASK, "leave the model's thoughts out", None, "show_thinking", const=False),
    active("--micro-batch-size", (INFER,), "batch and length", "prompts answered together", COUNT, "micro_batch_size"),
    *accepted("use-kv-cache", (INFER,), "the key-value cache is always on", dest=("use_kv_cache",)),
]

EVALUATION = [
    active(
        "--task",
        (EVALUATE,),
        "score",
        "benchmarks: mmlu, ceval, cmmlu, gsm8k, boolq, hellaswag, bbh, agieval, human_eval, or any task of lm-evaluation-harness",
        TEXT,
        "tasks",
        many=True,
        not_yet={"needlebench": NO_NEEDLEBENCH},
        required=True,
    ),
    active(
        "--task-data-path",
        (EVALUATE,),
        "score",
        "folder with the benchmark's files; for several tasks one each, or one for all",
        PATH,
        "task_data_path",
        many=True,  # whether it exists the benchmark checks, which knows what should be there and where to get it
    ),
    active(
        "--num-fewshot",
        (EVALUATE,),
        "score",
        "solved examples before each question",
        COUNT_OR_ZERO,
        "num_fewshot",
        default_text="the task's own; mmlu: 5",
    ),
    active("--max-eval-samples", (EVALUATE,), "score", "questions per subject", COUNT, "max_eval_samples", default_text="all"),
    active(
        "--evaluation-batch-size",
        (EVALUATE,),
        "score",
        "questions that go through the model together",
        COUNT,
        "evaluation_batch_size",
        default_text="as many as are estimated to fit in memory",
    ),
    active(
        "--max-new-tokens",
        (EVALUATE,),
        "score",
        "longest generated answer; tasks that compare likelihoods generate none",
        COUNT,
        "max_new_tokens",
        unit="tokens",
    ),
    active(
        "--no-chat-template",
        (EVALUATE,),
        "template",
        "ask without a chat template (the default)",
        None,
        "template.hf_chat_template",
        const=False,
    ),
    active(
        "--output-path",
        (EVALUATE,),
        "score",
        "folder for results.json and the answers item by item",
        PATH,
        "output_path",
        default_text="evaluation_results/<checkpoint>-<date and time>",
    ),
    active(
        "--log-samples", (EVALUATE,), "score", "write also samples_<task>.jsonl: each item with its prompt and answers", None, "log_samples"
    ),
    active(
        "--compare-base",
        (EVALUATE,),
        "score",
        "score the base without the adapter as well, and test the difference item by item",
        None,
        "compare_base",
    ),
    active(
        "--confirm-run-unsafe-code",
        (EVALUATE,),
        "score",
        "let human_eval run the programs that the model writes, each in a limited process",
        None,
        "confirm_run_unsafe_code",
    ),
    *accepted(
        "eval-language", (EVALUATE,), "a benchmark's prompts are in its own language", TEXT, only=("en", "zh"), otherwise="use en or zh"
    ),
    *accepted("use-kv-cache", (EVALUATE,), "likelihoods need no cache; where text is generated it is always on"),
    *accepted("broadcast", (EVALUATE,), "all ranks of a replica always work on the same question"),
    *accepted("micro-batch-size", (EVALUATE,), "--evaluation-batch-size says how many questions go together", COUNT),
]

FLAGS: list[Flag] = [*INFERENCE, *EVALUATION]
