"""transformers' ``generate`` on the driver, with the parallel model behind it.

:class:`ParallelCausalLM` is a shell: no parameters, only a ``forward`` that asks the engine for the logits of the last
position, and a cache whose tensors live on the ranks. Greedy, sampling and beams are the library's own code, so their
results are those of ``AutoModelForCausalLM.generate`` on the merged model. Works on transformers 4.51 to 5.x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from mindspeed_lora.inference.engine import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EngineCache(Cache):
    """Stands for the keys and values that the engine's stages hold."""

    is_compileable = False

    def __init__(self, engine: Engine) -> None:  # the base's would allocate layers of its own
        self._engine = engine
        self.layers: list[Any] = []

    def get_seq_length(self, layer_idx: int = 0, cache_position: Any = None) -> int:
        """Cached positions."""
        return self._engine.cache_length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No limit of its own."""
        return -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Called by beam search."""
        self._engine.reorder(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As :meth:`reorder_cache`, also for fewer or more rows."""
        self._engine.reorder(indices)

    def reset(self) -> None:
        """Forget everything."""
        self._engine.reset()


class EngineConfig(PretrainedConfig):
    """The little that ``generate`` reads of a model's configuration."""

    model_type = "mindspeed_lora_engine"


class ParallelCausalLM(PreTrainedModel, GenerationMixin):
    """What ``generate`` takes for the model."""

    config_class = EngineConfig
    main_input_name = "input_ids"
    _supports_cache_class = True

    def __init__(self, engine: Engine) -> None:
        super().__init__(EngineConfig(vocab_size=engine.vocab_size, is_encoder_decoder=False))  # type: ignore[call-arg]
        self.engine = engine

    @property
    def device(self) -> torch.device:
        """Where logits arrive."""
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        past_key_values: EngineCache | None = None,
        attention_mask: torch.Tensor | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """Only the tokens that the cache has not seen; padding stands before those alone that come first."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = None if seen else attention_mask
        return {"input_ids": input_ids[:, seen:], "attention_mask": mask, "past_key_values": past_key_values}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: EngineCache | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits float32 ``[b, 1, v]`` of the last of ``input_ids`` ``[b, s]``; ``attention_mask`` ``[b, s]``, 0 on padding."""
        real = None if attention_mask is None else attention_mask.bool()
        logits = self.engine.forward(input_ids, real, use_cache=past_key_values is not None)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


@dataclass(frozen=True)
class Strategy:
    """How the next token is chosen; values as transformers' ``GenerationConfig`` names them."""

    do_sample: bool = False
    num_beams: int = 1
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """For ``GenerationConfig``; sampling values only where something is sampled (the library warns otherwise)."""
        sampling = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p} if self.do_sample else {}
        return {"do_sample": self.do_sample, "num_beams": self.num_beams, **sampling}


@dataclass(frozen=True)
class Limits:
    """Where an answer ends: at ``max_new_tokens``, or at one of ``stop_ids`` (which is not part of the answer)."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int = 0


class AnswerStreamer(TextStreamer):
    """Hands on the answer's text as it grows: no prompt, no special tokens, no stop token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stop_ids, self._write = frozenset(stop_ids), write

    def put(self, value: torch.Tensor) -> None:
        """One new token, or first the whole prompt."""
        if self.next_tokens_are_prompt or int(value.reshape(-1)[0]) not in self._stop_ids:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with text that later tokens cannot change."""
        if text:
            self._write(text)


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 ``[b, s]`` and attention mask ``[b, s]`` (0 on padding)."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, length - len(prompt) :] = 1
    return ids, mask


@torch.no_grad()
def generate(
    model: ParallelCausalLM,
    prompts: Sequence[Sequence[int]],
    strategy: Strategy,
    limits: Limits,
    seed: int | None = None,
    use_cache: bool = True,
    streamer: AnswerStreamer | None = None,
    criteria: Sequence[StoppingCriteria] = (),
    kept: int | None = None,
) -> list[list[int]]:
    """Continue each prompt (token ids); several at once are padded on the left.

    ``seed`` starts torch's generators of this process; nothing random happens on other ranks. ``streamer`` takes one
    prompt and no beams. ``criteria`` end a row early. ``kept``: the cache holds at least that many first
    tokens of the one prompt already, and keeps this answer's too; None: it begins and ends empty.

    Returns:
        The new tokens of each prompt, up to and without its stop token.
    """
    if kept:
        model.engine.crop(kept)
    else:
        model.engine.reset()
    if seed is not None:
        torch.manual_seed(seed)
    ids, mask = pad_left(prompts, limits.pad_id)
    config = GenerationConfig(
        max_new_tokens=limits.max_new_tokens,
        eos_token_id=list(limits.stop_ids) or None,
        pad_token_id=limits.pad_id,
        use_cache=use_cache,
        **strategy.arguments(),
    )
    inputs: dict[str, Any] = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    if criteria:
        inputs["stopping_criteria"] = StoppingCriteriaList(criteria)
    if use_cache:
        inputs["past_key_values"] = EngineCache(model.engine)
    output = model.generate(generation_config=config, streamer=streamer, **inputs)  # type: ignore[misc]
    if kept is None:
        model.engine.reset()
    return [_answer(row, limits.stop_ids) for row in output[:, ids.shape[1] :].tolist()]


def _answer(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((index for index, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:end]
