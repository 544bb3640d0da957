"""Public instruction, tool-call, preference and ShareGPT files through the templates qwen3 and llama3: counts, and some previews.

    python benchmarks/real_data.py            # writes docs/real_data.md
    python benchmarks/real_data.py --check    # compares with it

Needs ../shared/data (or MINDSPEED_LORA_TEST_DATA). Previews are of files under Apache-2.0 only.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ROOT, add_root_to_path, markdown, parser

PAGE = ROOT / "docs" / "real_data.md"
TOKENIZERS = {"qwen3": "qwen3-tokenizer", "llama3": "llama3-tokenizer"}
SHAREGPT, SHAREGPT_PAIRS = "SharegptStyleInstructionHandler", "SharegptStylePairwiseHandler"
FACTORY = "llamafactory-data/data/"
PREVIEW_TOKENS = 260


@dataclass(frozen=True)
class Case:
    """A file and how it is read."""

    file: str
    handler: str = "AlpacaStyleInstructionHandler"
    map_keys: dict[str, Any] = field(default_factory=dict)
    preview: bool = False


CASES = (
    Case(FACTORY + "alpaca_en_demo.json"),
    Case(FACTORY + "alpaca_zh_demo.json"),
    Case(FACTORY + "identity.json", preview=True),
    Case(FACTORY + "oaast_sft_zh.json", map_keys={"history": "history"}),
    Case(FACTORY + "glaive_toolcall_en_demo.json", SHAREGPT, {"tools": "tools"}, preview=True),
    Case(FACTORY + "glaive_toolcall_zh_demo.json", SHAREGPT, {"tools": "tools"}),
    Case("fastchat/data/dummy_conversation.json", SHAREGPT, preview=True),
    Case(FACTORY + "dpo_en_demo.json", SHAREGPT_PAIRS),
    Case(FACTORY + "dpo_zh_demo.json", SHAREGPT_PAIRS),
    Case(FACTORY + "oaast_rm_zh.json", "AlpacaStylePairwiseHandler", {"chosen": "output", "rejected": "output", "history": "history"}),
)


def config_of(case: Case, template: str, data: Path, output: Path | None) -> Any:
    """The flags of one run."""
    from mindspeed_lora.arguments.configs import PreprocessConfig, TemplateFlags, TokenizerFlags

    return PreprocessConfig(
        data / case.file,
        output,
        TokenizerFlags(data / TOKENIZERS[template]),
        TemplateFlags(template),
        handler_name=case.handler,
        map_keys=case.map_keys,
        log_interval=10**9,
    )


def row_of(case: Case, template: str, data: Path) -> list[object]:
    """Counts of one run."""
    from mindspeed_lora.data.preprocess import write_dataset

    with tempfile.TemporaryDirectory() as folder:
        report = write_dataset(config_of(case, template, data, Path(folder) / "out" / "x"))
    told = [f"skipped {count}: {reason}" for reason, count in report.num_skipped.items()]
    told += [f"{count} {note}" for note, count in report.notes.items() if count]
    share = f"{report.num_trained_tokens / report.num_tokens:.1%}"
    counts = [f"{value:,}" for value in (report.num_records, report.num_written, report.num_tokens)]
    return [Path(case.file).name, template, *counts, share, f"{report.longest:,}", "; ".join(told)]


def preview_of(case: Case, template: str, data: Path) -> str:
    """The first record of a file, clipped."""
    from mindspeed_lora.data.preprocess import preview

    lines = list(preview(config_of(case, template, data, None), 1, PREVIEW_TOKENS))
    return f"`{Path(case.file).name}`, template {template}:\n\n~~~text\n" + "\n".join(line.rstrip() for line in lines[1:]) + "\n~~~"


def page(data: Path) -> str:
    """The whole page."""
    rows = [row_of(case, template, data) for case in CASES for template in TOKENIZERS]
    previews = [preview_of(case, template, data) for case in CASES if case.preview for template in TOKENIZERS]
    head = ["file", "template", "records", "written", "tokens", "trained", "longest", "told"]
    return (
        "# Public files, preprocessed\n\n"
        "LLaMA-Factory's demo files (two of a fork) and FastChat's dummy conversations, with Qwen3's and Llama 3's tokenizers; written by\n"
        "`benchmarks/real_data.py`, which `--check` compares again.\n\n"
        f"{markdown(head, rows)}\n\n"
        "First records, as the model sees them; what stands in ⟦ ⟧ is trained. Files under Apache-2.0 only.\n\n"
        + "\n\n".join(previews)
        + "\n"
    )


def main() -> int:
    """Write the page, or compare it."""
    add_root_to_path()
    made = parser(__doc__)
    made.add_argument("--check", action="store_true", help="compare with docs/real_data.md, write nothing")
    options = made.parse_args()
    data = Path(os.environ.get("MINDSPEED_LORA_TEST_DATA", ROOT.parent / "shared" / "data"))
    found = page(data)
    if options.check:
        return int(found != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(found, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
