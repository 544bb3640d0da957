"""Latent attention behind a cache: what is kept, both ways to attend to it, and answers that equal transformers' at every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_helpers import tiny_tokenizer
from engine_helpers import batch, build_engine
from helpers import ModelFolders
from pool import ProcessPool
from test_inference_engine import by_transformers, compare, logits_cell
from test_latent_parity import FAMILIES, LITE, V2, V3, spec_of

from mindspeed_lora.model import latent_attention
from mindspeed_lora.model.decode import DecodeState, KVCache, SharedPrefix
from mindspeed_lora.weights.config import LatentShape
from mindspeed_lora.weights.families import model_config_from_hf

PIECES = ((0, 10), (10, 11), (11, 14), (14, 16), (16, 32))  # the last one is long enough to expand the latents before it
LITE_SHAPE = LatentShape(None, 512, 128, 64, 128)  # DeepSeek-V2-Lite's


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return ModelFolders(tmp_path_factory.mktemp("latent"), num_hidden_layers=2)


@torch.no_grad()
@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_the_whole_pass(folders: dict[str, Path], family: str, fusion: bool) -> None:
    """With an adapter on every linear, that of the absorbed up projection too; rows behind one prefix too."""
    shape = model_config_from_hf(folders[family]).latent
    assert shape is not None
    ways = [latent_attention.absorbing_is_cheaper(shape, end - start, end) for start, end in PIECES[1:]]
    assert ways == [True, True, True, False]
    stage = build_engine(folders[family], lora=spec_of(family), fusion=fusion).stages[0]
    ids = batch(rows=2, length=32)[0]
    whole = stage(ids)
    cache, pieces = KVCache(), []
    for start, end in PIECES:
        positions = torch.arange(start, end).unsqueeze(0)
        pieces.append(stage(ids[:, start:end], decode=DecodeState(positions, cache=cache)))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)
    prefix = KVCache()
    stage(ids[:1, :10], decode=DecodeState(torch.arange(10).unsqueeze(0), cache=prefix))
    rows = torch.cat((ids[:1, :10].expand(3, -1), ids[:1, 10:16].expand(3, -1)), dim=1)
    behind = stage(rows[:, 10:], decode=DecodeState(torch.arange(10, 16).unsqueeze(0), cache=SharedPrefix(prefix)))
    torch.testing.assert_close(behind, stage(rows)[:, 10:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_cache_holds_the_latent_and_one_key_per_position(folders: dict[str, Path]) -> None:
    config = model_config_from_hf(folders[V3])
    cache = KVCache()
    build_engine(folders[V3]).stages[0](batch(rows=2, length=10)[0], decode=DecodeState(torch.arange(10).unsqueeze(0), cache=cache))
    held = [tuple(store.shape) for layer in range(config.num_layers) for store in cache.held(layer)]
    assert held == [(2, 1, 10, 16 + 8)] * config.num_layers and config.cached_per_token == 24
    lite = replace(config, latent=LITE_SHAPE, num_attention_heads=16, num_query_groups=16, kv_channels=192)
    assert lite.cached_per_token == 576, "against 16 x (192 + 128) = 5120 expanded"


def test_when_absorbing_costs_less() -> None:
    cheaper = latent_attention.absorbing_is_cheaper
    assert cheaper(LITE_SHAPE, 1, 2) and cheaper(LITE_SHAPE, 1, 4096) and cheaper(LITE_SHAPE, 128, 4096)
    assert not cheaper(LITE_SHAPE, 256, 4096) and not cheaper(LITE_SHAPE, 512, 512)


@pytest.mark.parametrize(
    ("family", "tp", "pp"),
    [
        (LITE, 1, 1),
        (LITE, 2, 1),
        (V2, 1, 1),
        (V2, 2, 2),
        (V3, 2, 1),
        pytest.param(V3, 1, 2, marks=pytest.mark.slow),
        pytest.param(LITE, 2, 2, marks=pytest.mark.slow),
    ],
)
def test_logits_scores_and_tokens_equal_transformers(
    pool: ProcessPool, folders: dict[str, Path], tmp_path: Path, family: str, tp: int, pp: int
) -> None:
    found = pool.run(logits_cell, tp * pp, folders[family], tp, pp, 1, None, tiny_tokenizer(tmp_path))[0]
    compare(found, by_transformers(folders[family]))
