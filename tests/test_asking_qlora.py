"""inference.py and evaluation.py with ``--qlora``: what the model with the decoded weights says. Skips without bitsandbytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import build_engine
from evaluation_helpers import config_for as evaluation_config
from evaluation_helpers import peft_adapter, run_evaluate, small_benchmarks, written_items
from helpers import make_model, shared_data
from pool import ProcessPool
from test_inference_engine import answers, config_for, run_infer

from mindspeed_lora.arguments.configs import LoadFlags, ParallelFlags, TokenizerFlags
from mindspeed_lora.ops.nf4 import Nf4
from mindspeed_lora.parallel.context import single_process_context
from mindspeed_lora.parallel.on_demand import BaseStorage


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The base, a base with the values that its 4 bits stand for, an adapter. A rank's rows are whole blocks of 64, at TP 2 too."""
    pytest.importorskip("bitsandbytes")
    import transformers

    base, decoded, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "decoded", "adapter"))
    make_model(base, "qwen3", vocab_size=512, intermediate_size=128, max_position_embeddings=2048)
    peft_adapter(base, adapter)
    engine = build_engine(base, make_storage=lambda: BaseStorage(single_process_context(), Nf4(), False))
    (stage,), values = engine.stages, {}
    assert stage.storage is not None
    for layer in stage.storage.layers:
        layer.fill()
    for name, parameter in stage.named_parameters():
        row, number = engine.table.parse(name)
        values.update(zip(row.hf_names(number), engine.table.unshard(row, [parameter.data]), strict=True))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not missing and not unexpected
    model.save_pretrained(decoded)
    return base, decoded, adapter


def in_4_bits(config: Any) -> Any:
    return replace(config, runtime=replace(config.runtime, qlora=True))


@pytest.mark.parametrize("tp", [1, 2])
def test_answers_are_those_of_the_decoded_weights(pool: ProcessPool, models: tuple[Path, Path, Path], tp: int) -> None:
    base, decoded, adapter = models
    more = {"tokenizer": TokenizerFlags(shared_data() / "stories260k" / "hf"), "prompts": ("Once upon a time",), "max_new_tokens": 12}
    config = config_for(base, tp, 1, load=LoadFlags(load=base, lora_load=adapter), **more)
    found = pool.run(run_infer, tp, in_4_bits(config))[0]
    alone = {"parallel": ParallelFlags(), "load": LoadFlags(load=decoded, lora_load=adapter)}
    expected = run_infer(replace(config, **alone))
    assert found[0] == expected[0] == 0, found[1] + expected[1]
    assert answers(found[1]) == answers(expected[1]) != answers(pool.run(run_infer, tp, config)[0][1])


def test_scores_are_those_of_the_decoded_weights(tmp_path: Path, models: tuple[Path, Path, Path]) -> None:
    base, decoded, adapter = models
    data, items = small_benchmarks(tmp_path / "data"), []
    for folder in (base, decoded):
        config = evaluation_config(folder, data, tmp_path / folder.name, load=LoadFlags(load=folder, lora_load=adapter))
        code, text = run_evaluate(in_4_bits(config) if folder == base else config)
        assert code == 0, text
        items.append(written_items(tmp_path / folder.name))
    assert items[0] == items[1] and len(items[0]) > 2
