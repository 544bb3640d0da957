"""Every shipped template, on two turns with a system text, as text: what is trained stands in « »."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from mindspeed_lora.data.rendering import Element, Token
from mindspeed_lora.data.templates import TEMPLATES_PATH, load_template

TALK = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
R1 = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first thinks about "
    "the reasoning process in the mind and then provides the user with the answer. The reasoning process and answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think><answer> answer here "
    "</answer>Put your final answer within \\\\boxed{}. "
)
PINNED = {
    "empty, hunyuan": "SQ1«A1»Q2«A2»",
    "trl": "⟨bos⟩SQ1«A1»Q2«A2»",
    "default": "S\nHuman: Q1\nAssistant:«A1⟨eos⟩»\nHuman: Q2\nAssistant:«A2⟨eos⟩»",
    "alpaca": "S### Instruction:\nQ1\n\n### Response:\n«A1⟨eos⟩»\n\n### Instruction:\nQ2\n\n### Response:\n«A2⟨eos⟩»",
    "chatml, chatml_de, qwen, qwen_math_r1": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«A1⟨eos⟩»"
        "\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n«A2⟨eos⟩»"
    ),
    "qwen_r1": (
        f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{R1}Q1<|im_end|>\n<|im_start|>assistant\n«A1⟨eos⟩»"
        f"\n<|im_start|>user\n{R1}Q2<|im_end|>\n<|im_start|>assistant\n«A2⟨eos⟩»"
    ),
    "qwen_lf, plm": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>\n»"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n«A2<|im_end|>\n»"
    ),
    "qwen3": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n«A1<|im_end|>\n»"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n«A2<|im_end|>\n»"
    ),
    "intern2": (
        "⟨bos⟩<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>\n»"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n«A2<|im_end|>\n»"
    ),
    "llama2": "⟨bos⟩[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST]«A1⟨eos⟩»⟨bos⟩[INST] Q2 [/INST]«A2⟨eos⟩»",
    "llama3": (
        "⟨bos⟩<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«A1⟨eos⟩»"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«A2⟨eos⟩»"
    ),
    "mistral, mixtral": "⟨bos⟩S[INST] Q1 [/INST]«A1⟨eos⟩»[INST] Q2 [/INST]«A2⟨eos⟩»",
    "magistral": (
        "⟨bos⟩[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]Q1[/INST]<think>\n\n</think>\n\n«A1⟨eos⟩»"
        "[INST]Q2[/INST]<think>\n\n</think>\n\n«A2⟨eos⟩»"
    ),
    "deepseek2, deepseek2-lite, minicpm3": "⟨bos⟩S\n\nUser: Q1\n\nAssistant:«A1⟨eos⟩»User: Q2\n\nAssistant:«A2⟨eos⟩»",
    "deepseek3": "⟨bos⟩S<｜User｜>Q1<｜Assistant｜>«A1⟨eos⟩»<｜User｜>Q2<｜Assistant｜>«A2⟨eos⟩»",
    "cpm": "⟨bos⟩S<用户>Q1<AI>«A1⟨eos⟩»<用户>Q2<AI>«A2⟨eos⟩»",
    "chatglm2": "⟨[gMASK]⟩⟨sop⟩S[Round 0]\n\n问：Q1\n\n答：«A1»\n\n[Round 1]\n\n问：Q2\n\n答：«A2»",
    "chatglm3, chatglm3_system": ("⟨[gMASK]⟩⟨sop⟩⟨<|system|>⟩\nS⟨<|user|>⟩\nQ1⟨<|assistant|>⟩«\nA1»⟨<|user|>⟩\nQ2⟨<|assistant|>⟩«\nA2»"),
    "glm4": "[gMASK]<sop><|system|>\nS<|user|>\nQ1<|assistant|>«\nA1»<|user|>\nQ2<|assistant|>«\nA2»",
    "glm4_moe": (
        "[gMASK]<sop><|system|>\nS<|user|>\nQ1<|assistant|><think>\n\n</think>\n\n«\nA1»"
        "<|user|>\nQ2<|assistant|><think>\n\n</think>\n\n«\nA2»"
    ),
    "gemma": (
        "⟨bos⟩S<start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\n«A1»"
        "<end_of_turn>\n<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n«A2»"
    ),
    "baichuan2": "S<reserved_106>Q1<reserved_107>«A1»<reserved_106>Q2<reserved_107>«A2»",
    "bailing_mini": (
        "<role>SYSTEM</role>S<|role_end|><role>HUMAN</role>Q1<|role_end|><role>ASSISTANT</role>«A1<|role_end|>»"
        "<role>HUMAN</role>Q2<|role_end|><role>ASSISTANT</role>«A2<|role_end|>»"
    ),
    "gpt_oss": (
        "<|start|>system<|message|>S<|end|><|start|>user<|message|>Q1<|end|><|start|>assistant"
        "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>«A1<|end|>»"
        "<|start|>user<|message|>Q2<|end|><|start|>assistant"
        "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>«A2<|end|>»"
    ),
}
BY_NAME = {name: text for names, text in PINNED.items() for name in names.split(", ")}
# system text where a record has none; the rest have none
DEFAULT_SYSTEM = {
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
    "chatglm3_system": "You are ChatGLM3, a large language model trained by Zhipu.AI. Follow the user's instructions carefully. "
    "Respond using markdown.",
    "chatml_de": "Du bist ein freundlicher und hilfsbereiter KI-Assistent.",
    "gpt_oss": "You are ChatGPT, a large language model trained by OpenAI.",
    "hunyuan": "You are a helpful assistant.",
    "plm": "You are a helpful assistant.",
    "qwen": "You are a helpful assistant.",
    "qwen_lf": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "qwen_math_r1": "Please reason step by step, and put your final answer within \\boxed{}.",
    "qwen_r1": "You are a helpful assistant.",
}
ONE_EOS = {"chatglm2", "chatglm3", "chatglm3_system", "glm4", "glm4_moe", "gemma", "baichuan2", "bailing_mini", "gpt_oss"}
THINKING = {"qwen3", "magistral", "glm4_moe", "gpt_oss"}
WITHOUT_STOP = {"empty", "trl", "hunyuan", "plm"}  # plm: <|im_end|> after the answer, <|endoftext|> as stop word


def text(elements: tuple[Element, ...]) -> str:
    """Elements as text, tokens by name in ⟨ ⟩."""
    parts = []
    for element in elements:
        assert not isinstance(element, tuple)
        name = "" if isinstance(element, str) else element.token if isinstance(element, Token) else element.name.removesuffix("_token")
        parts.append(element if isinstance(element, str) else f"⟨{name}⟩")
    return "".join(parts)


def test_the_table_has_every_shipped_template() -> None:
    names = [entry["name"] for entry in json.loads(TEMPLATES_PATH.read_text(encoding="utf-8"))]
    assert sorted(names) == sorted(BY_NAME) and len(names) == 33


@pytest.mark.parametrize("name", BY_NAME)
def test_two_turns_with_a_system_text(name: str) -> None:
    turns = load_template(name).render(TALK, "S")
    assert "".join(f"{text(source)}«{text(target)}»" for source, target in turns) == BY_NAME[name]


def test_the_file_travels_with_the_package_and_lies_at_the_peers_path(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    assert (ROOT / "configs" / "finetune" / "templates.json").read_bytes() == TEMPLATES_PATH.read_bytes()
    built = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build_py",
        "--build-lib",
        str(tmp_path / "lib"),
        "egg_info",
        "--egg-base",
        str(tmp_path),
    ]
    subprocess.run(built, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "lib" / "mindspeed_lora" / "data" / "templates.json").read_bytes() == TEMPLATES_PATH.read_bytes()


@pytest.mark.parametrize("name", BY_NAME)
def test_other_properties(name: str) -> None:
    template = load_template(name)
    if name == "magistral":
        assert template.default_system.startswith("system_prompt\n\nA user will ask you") and len(template.default_system) == 899
    else:
        assert template.default_system == DEFAULT_SYSTEM.get(name, "")
    assert template.efficient_eos == (name in ONE_EOS)
    assert template.has_thinking == (name in THINKING)
    assert template.has_stop == (name not in WITHOUT_STOP)
    assert template.cut_rule == ("halves" if name in THINKING | {"qwen_lf"} else "proportional")
