"""The parallel model as lm_eval sees it: three methods, on the first driver only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mindspeed_lora.errors import UsageError
from mindspeed_lora.evaluation.replicas import Replicas
from mindspeed_lora.evaluation.scoring import RowScores, collect_answers, plan_rows, score_batches
from mindspeed_lora.inference.generator import Limits, ParallelCausalLM, Strategy, generate
from mindspeed_lora.inference.prompts import PromptFormat
from mindspeed_lora.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mindspeed_lora.inference.engine import Engine

DEFAULT_MAX_NEW_TOKENS = 256  # of a generation task that does not say


@dataclass(frozen=True)
class GenerateBatch:
    """Prompts (ids) that are continued together."""

    prompts: list[list[int]]
    strategy: Strategy
    limits: Limits


def work_handlers(engine: Engine) -> dict[str, Callable[[Sequence[Any]], Iterator[Any]]]:
    """What a driver can be asked to do, for :class:`Replicas`."""
    model = ParallelCausalLM(engine)

    def continue_batches(batches: Sequence[GenerateBatch]) -> Iterator[list[list[int]]]:
        for batch in batches:
            yield generate(model, batch.prompts, batch.strategy, batch.limits)

    return {"score": lambda batches: score_batches(engine, batches), "generate": continue_batches}


class ParallelLM(TemplateLM):
    """Tokenises as lm_eval's own transformers backend does, so that scores agree with it item by item."""

    def __init__(
        self,
        replicas: Replicas,
        tokenizer: PreTrainedTokenizerBase,
        prompt_format: PromptFormat,
        stop_ids: tuple[int, ...],
        max_length: int,
        batch_size: int,
        progress_out: TextIO,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self._replicas, self._prompt_format, self._stop_ids = replicas, prompt_format, stop_ids
        self._progress_out, self._max_new_tokens = progress_out, max_new_tokens
        self._last_context: tuple[str, list[int]] = ("", [])

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token."""
        if self.tokenizer.eos_token_id is None:
            raise UsageError(
                f"the tokenizer at {self.tokenizer.name_or_path} has no eos token, which evaluation needs; set it in tokenizer_config.json"
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For result files."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Ids, with the tokenizer's own special tokens unless told otherwise or the text begins with them."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self._prompt_format.template is None and not self._prompt_format.use_chat_template:
            return self._encode_text_pair(context, continuation)
        if self._last_context[0] != context:
            self._last_context = (context, self._prompt_format.encode(self.tokenizer, context))
        return self._last_context[1], self.tokenizer.encode(continuation.strip(), add_special_tokens=False)

    def _encode_text_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the base class, but a context that stays the same is encoded once."""
        text = context.rstrip()
        if self._last_context[0] != text:
            self._last_context = (text, self.tok_encode(text))
        whole = self.tok_encode(context + continuation)
        return self._last_context[1], whole[len(self._last_context[1]) :]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        plan, num_cut = plan_rows(pairs, self.max_length)
        self._warn_of_cut(num_cut, len(pairs))
        batches = [plan.rows[start : start + self.batch_size] for start in range(0, len(plan.rows), self.batch_size)]
        results: list[list[RowScores]] = self._map("score", batches, len(plan.rows), "scoring")
        return collect_answers(plan, [score for batch in results for score in batch], len(pairs))

    def _warn_of_cut(self, num_cut: int, count: int) -> None:
        if num_cut:
            get_logger().warning(
                f"{num_cut} of {count} requests are longer than {self.max_length} tokens and lose their beginning; "
                "fewer examples (--num-fewshot) would help"
            )

    def _map(self, kind: str, batches: Sequence[Any], total: int, description: str) -> list[Any]:
        with tqdm(total=total, desc=description, unit="item", file=self._progress_out) as bar:
            return self._replicas.map(kind, batches, lambda done: bar.update(min(done * self.batch_size, total - bar.n)) and None)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of the maximal length."""
        owners: list[int] = []
        pairs: list[tuple[list[int], list[int]]] = []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1)
            for window in map(make_disjoint_window, windows):
                owners.append(index)
                pairs.append((list(window[0]), list(window[1])))
        totals = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._score(pairs), strict=True):
            totals[owner] += log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the task's stop texts."""
        prepared = [(index, self._prompt_ids(request), *self._settings(request.args[1])) for index, request in enumerate(requests)]
        self._warn_of_cut(sum(len(ids) > self.max_length - limits.max_new_tokens for _, ids, _, limits, _ in prepared), len(requests))
        prepared.sort(key=lambda item: (repr(item[2:4]), -len(item[1])))
        batches: list[GenerateBatch] = []
        members: list[list[tuple[int, list[str]]]] = []
        for index, ids, strategy, limits, until in prepared:
            kept = ids[-(self.max_length - limits.max_new_tokens) :]
            if not batches or (batches[-1].strategy, batches[-1].limits) != (strategy, limits) or len(members[-1]) == self.batch_size:
                batches.append(GenerateBatch([], strategy, limits))
                members.append([])
            batches[-1].prompts.append(kept)
            members[-1].append((index, until))
        texts = [""] * len(requests)
        for batch, answers in zip(members, self._map("generate", batches, len(requests), "generating"), strict=True):
            for (index, until), answer in zip(batch, answers, strict=True):
                texts[index] = cut_at(str(self.tokenizer.decode(answer, skip_special_tokens=True)), until)
        return texts

    def _prompt_ids(self, request: Instance) -> list[int]:
        text = request.args[0]
        if self._prompt_format.template is None and not self._prompt_format.use_chat_template:
            return self.tok_encode(text)
        return self._prompt_format.encode(self.tokenizer, text)

    def _settings(self, arguments: dict[str, Any]) -> tuple[Strategy, Limits, list[str]]:
        until = arguments.get("until") or []
        max_new_tokens = int(self._max_new_tokens or arguments.get("max_gen_toks") or DEFAULT_MAX_NEW_TOKENS)
        if max_new_tokens >= self.max_length:
            raise UsageError(
                f"--max-new-tokens {max_new_tokens} leaves no room for the question in {self.max_length} tokens; pass a smaller value"
            )
        do_sample = bool(arguments.get("do_sample", False))
        values = {key: arguments[key] for key in ("temperature", "top_k", "top_p") if key in arguments} if do_sample else {}
        strategy = Strategy(do_sample=do_sample, num_beams=int(arguments.get("num_beams", 1)), **values)
        return strategy, Limits(max_new_tokens, self._stop_ids), [until] if isinstance(until, str) else list(until)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of ``stops``."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text
