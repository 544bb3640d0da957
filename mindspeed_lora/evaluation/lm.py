"""The parallel model as lm_eval sees it: three methods, on the first driver only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import StoppingCriteria

from mindspeed_lora.errors import UsageError
from mindspeed_lora.evaluation.batching import BatchRule
from mindspeed_lora.evaluation.replicas import Replicas
from mindspeed_lora.evaluation.scoring import RowScores, answers_of, make_batches, plan_rows, score_batches
from mindspeed_lora.inference.channel import RankDied
from mindspeed_lora.inference.generator import Limits, ParallelCausalLM, Strategy, generate
from mindspeed_lora.inference.interrupt import ignore_signals
from mindspeed_lora.inference.prompts import PromptFormat
from mindspeed_lora.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mindspeed_lora.inference.engine import Engine

RequestKey = tuple[str, str, int, int]
DEFAULT_MAX_NEW_TOKENS = 256  # of a generation task that does not say


@dataclass(frozen=True)
class GenerateBatch:
    """Prompts (ids) that are continued together, up to one of the texts ``until``."""

    prompts: list[list[int]]
    strategy: Strategy
    limits: Limits
    until: tuple[str, ...] = ()


class StopTexts(StoppingCriteria):
    """Ends a row once its answer holds one of ``until``; the answer may end anywhere behind it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, until: Sequence[str], prompt_length: int) -> None:
        self._tokenizer, self._until, self._prompt_length = tokenizer, until, prompt_length
        self._window = max(len(tokenizer.encode(text, add_special_tokens=False)) for text in until) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:
        """bool ``[b]``."""
        answers = input_ids[:, self._prompt_length :][:, -self._window :].tolist()
        texts = [str(self._tokenizer.decode(answer)) for answer in answers]
        return torch.tensor([any(stop in text for stop in self._until) for text in texts], device=input_ids.device)


def work_handlers(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> dict[str, Callable[[Sequence[Any]], Iterator[Any]]]:
    """What a driver can be asked to do, for :class:`Replicas`."""
    model = ParallelCausalLM(engine)

    def continue_batches(batches: Sequence[GenerateBatch]) -> Iterator[list[list[int]]]:
        for batch in batches:
            criteria = [StopTexts(tokenizer, batch.until, max(map(len, batch.prompts)))] if batch.until else []
            yield generate(model, batch.prompts, batch.strategy, batch.limits, criteria=criteria)

    def use_adapter(choices: Sequence[bool]) -> Iterator[None]:
        for choice in choices:
            engine.use_adapter(engine.adapters[0] if choice else None)
            yield

    return {"score": lambda batches: score_batches(engine, batches), "generate": continue_batches, "adapter": use_adapter}


class ParallelLM(TemplateLM):
    """Tokenises as lm_eval's own transformers backend does, so that scores agree with it item by item.

    ``answers`` holds what has been answered so far, by :func:`request_key`. An interruption, or the death of a rank, ends no method: it
    is kept in ``stopped_by``, and what was not answered is filled in so that lm_eval can count what was.
    """

    def __init__(
        self,
        replicas: Replicas,
        tokenizer: PreTrainedTokenizerBase,
        prompt_format: PromptFormat,
        stop_ids: tuple[int, ...],
        max_length: int,
        rule: BatchRule,
        progress_out: TextIO,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.answers: dict[RequestKey, Any] = {}
        self.stopped_by: BaseException | None = None
        self._replicas, self._prompt_format, self._stop_ids = replicas, prompt_format, stop_ids
        self._rule, self._progress_out, self._max_new_tokens = rule, progress_out, max_new_tokens
        self._last_context: tuple[str, list[int]] = ("", [])
        self._asked_before = False  # the base is asked what the adapter was asked just before

    @property
    def interrupted(self) -> bool:
        """Whether answers are missing."""
        return self.stopped_by is not None

    def use_adapter(self, choice: bool) -> None:
        """On every replica: with the adapter, or the base alone."""
        self._asked_before = not choice
        self._replicas.map("adapter", [choice] * self._replicas.size, lambda index, result: None)

    def _map(self, kind: str, batches: Sequence[Any], take: Callable[[int, Any], None]) -> None:
        if self.interrupted:
            return
        try:
            self._replicas.map(kind, batches, take)
        except (KeyboardInterrupt, RankDied) as error:
            ignore_signals()  # torchrun ends the other ranks as soon as it sees that one died
            self.stopped_by = error

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

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The tokenizer's own template over lm_eval's turns (``--hf-chat-template``)."""
        return self._prompt_format.render_chat(self.tokenizer, chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """For result files."""
        return str(self.tokenizer.chat_template)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Through a template of ``--prompt-type`` the text is one user turn; else as the base class, but a context that stays the same
        is encoded once.
        """
        if self._prompt_format.template is not None:
            if self._last_context[0] != context:
                self._last_context = (context, self._prompt_format.encode(self.tokenizer, context))
            return self._last_context[1], self.tokenizer.encode(continuation.strip(), add_special_tokens=False)
        text = context.rstrip()
        if self._last_context[0] != text:
            self._last_context = (text, self.tok_encode(text))
        whole = self.tok_encode(context + continuation)
        return self._last_context[1], whole[len(self._last_context[1]) :]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each (context, continuation)."""
        pairs = []
        for request in requests:
            context, continuation = request.args
            pairs.append(self._encode_pair(context, continuation) if context else self._without_context(continuation))
        return self._score(pairs, [request_key(request) for request in requests])

    def _without_context(self, continuation: str) -> tuple[list[int], list[int]]:
        """The prefix token stands for the context, unless the text begins with it."""
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], keys: Sequence[RequestKey] = ()) -> list[tuple[float, bool]]:
        rows, num_cut = plan_rows(pairs, self.max_length)
        self._warn_of_cut(num_cut, len(pairs))
        batches = make_batches(rows, self._rule.scoring)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with self._progress(len(rows), "scoring") as bar:

            def take(index: int, scores: list[RowScores]) -> None:
                for request, answer in answers_of(batches[index], scores):
                    answers[request] = answer
                    if keys:
                        self.answers[keys[request]] = answer
                bar.update(len(scores))

            self._map("score", batches, take)
        return answers

    def _warn_of_cut(self, num_cut: int, count: int) -> None:
        if num_cut and not self._asked_before:
            get_logger().warning(
                f"{num_cut} of {count} requests are longer than {self.max_length} tokens and lose their beginning; "
                "where the task has examples, fewer of them (--num-fewshot) would help"
            )

    def _progress(self, total: int, description: str) -> tqdm[Any]:
        return tqdm(total=total, desc=description, unit="item", file=self._progress_out)

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
        if not self.interrupted:  # a window may be missing anywhere
            self.answers.update({request_key(request): total for request, total in zip(requests, totals, strict=True)})
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the task's stop texts."""
        prepared = [(index, self._prompt_ids(request), *self._settings(request.args[1])) for index, request in enumerate(requests)]
        self._warn_of_cut(sum(len(ids) > self.max_length - limits.max_new_tokens for _, ids, _, limits, _ in prepared), len(requests))
        prepared.sort(key=lambda item: (repr(item[2:]), -len(item[1])))
        batches: list[GenerateBatch] = []
        members: list[list[int]] = []
        for index, ids, strategy, limits, until in prepared:
            kept = ids[-(self.max_length - limits.max_new_tokens) :]
            if not (batches and self._goes_with(batches[-1], GenerateBatch([], strategy, limits, until))):
                batches.append(GenerateBatch([], strategy, limits, until))
                members.append([])
            batches[-1].prompts.append(kept)
            members[-1].append(index)
        texts = [""] * len(requests)
        with self._progress(len(requests), "generating") as bar:

            def take(batch: int, answers: list[list[int]]) -> None:
                for index, answer in zip(members[batch], answers, strict=True):
                    texts[index] = cut_at(str(self.tokenizer.decode(answer, skip_special_tokens=True)), batches[batch].until)
                    self.answers[request_key(requests[index])] = texts[index]
                bar.update(len(answers))

            self._map("generate", batches, take)
        return texts

    def _goes_with(self, batch: GenerateBatch, other: GenerateBatch) -> bool:
        alike = (batch.strategy, batch.limits, batch.until) == (other.strategy, other.limits, other.until)
        rows = (len(batch.prompts) + 1) * batch.strategy.num_beams
        return alike and self._rule.generating(rows, len(batch.prompts[0]), batch.limits.max_new_tokens)

    def _prompt_ids(self, request: Instance) -> list[int]:
        text = request.args[0]
        if self._prompt_format.template is None:
            return self.tok_encode(text)
        return self._prompt_format.encode(self.tokenizer, text)

    def _settings(self, arguments: dict[str, Any]) -> tuple[Strategy, Limits, tuple[str, ...]]:
        until = arguments.get("until") or []
        max_new_tokens = int(self._max_new_tokens or arguments.get("max_gen_toks") or DEFAULT_MAX_NEW_TOKENS)
        if max_new_tokens >= self.max_length:
            raise UsageError(
                f"--max-new-tokens {max_new_tokens} leaves no room for the question in {self.max_length} tokens; pass a smaller value"
            )
        do_sample = bool(arguments.get("do_sample", False))
        values = {key: arguments[key] for key in ("temperature", "top_k", "top_p") if key in arguments} if do_sample else {}
        strategy = Strategy(do_sample=do_sample, num_beams=int(arguments.get("num_beams", 1)), **values)
        return strategy, Limits(max_new_tokens, self._stop_ids), tuple([until] if isinstance(until, str) else until)


def request_key(request: Instance) -> RequestKey:
    """Which request this is, over several calls of lm_eval."""
    return str(request.request_type), str(request.task_name), int(request.doc_id or 0), request.idx


def cut_at(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of ``stops``."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text
