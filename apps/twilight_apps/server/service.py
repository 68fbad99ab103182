"""What the endpoints share: the engine, its model's name and words, the limits, and the jobs in flight."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from hf_twilight.engine import Engine, EngineClosed, QueueFull, SamplingParams

from .errors import ApiError
from .jobs import Job
from .limits import Limits
from .logits import Bias, Penalties, Processor, chain
from .metrics import Metrics

if TYPE_CHECKING:
    from .grammar import Grammar, Vocabulary
    from .prompts import Prompts
    from .schemas import Sampling

Value = TypeVar("Value")

_LONGEST_RETRY_S = 60


@dataclass(frozen=True)
class Defaults:
    """Sampling where a request says nothing: the model's own, else OpenAI's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass
class Service:
    """One model behind the API.

    Args:
        engine: runs the requests.
        name: what clients call the model.
        prompts: renders and tokenizes.
        vocabulary: tokens as bytes, for grammars and logprobs.
        context: tokens that a prompt and its answer may have together.
        vocabulary_size: rows of the model's output.
        limits: what one client may ask.
        defaults: sampling where a request says nothing.
    """

    engine: Engine
    name: str
    prompts: Prompts
    vocabulary: Vocabulary
    context: int
    vocabulary_size: int
    limits: Limits = field(default_factory=Limits)
    defaults: Defaults = field(default_factory=Defaults)
    metrics: Metrics = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    jobs: set[Job] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine.stats, self.name)

    def check_ready(self, model: str) -> None:
        """Refuse a request that cannot be served at all.

        Raises:
            ApiError: 404 unknown model, 503 engine dead or server stopping.
        """
        if model != self.name:
            raise ApiError(
                404, f"the model {model[:80]!r} does not exist; this server has {self.name!r}",
                param="model", code="model_not_found",
            )  # fmt: skip
        if self.is_draining:
            raise ApiError(503, "the server is stopping; try another one", code="stopping", retry_after=5)
        if not self.engine.is_alive:
            raise ApiError(503, f"the engine stopped: {self.engine.error}; restart the server", code="engine_dead")

    def start(
        self,
        request: Sampling,
        prompts: Sequence[list[int]],
        max_tokens: int,
        logprobs: int | None,
        grammar: Grammar | None,
        request_id: str,
    ) -> Job:
        """Hand every choice of every prompt to the engine, or none.

        Args:
            request: sampling fields.
            prompts: token ids.
            max_tokens: of each answer; see ``token_budget``.
            logprobs: alternatives to report for each token; None for no logprobs at all.
            grammar: what an answer may be; None for any text.
            request_id: of the HTTP request.
        Raises:
            ApiError: 400 what the engine refuses, 429 queue full, 503 engine closed.
        """  # fmt: skip
        count = request.n or 1
        handles = []
        try:
            for index, prompt in enumerate(prompts):
                for choice in range(count):
                    params = self._params(request, choice, max_tokens, logprobs, grammar)
                    name = f"{request_id}-{index * count + choice}"
                    handles.append(self.engine.submit(prompt, params, request_id=name))
        except Exception as error:
            for handle in handles:
                handle.cancel()
            raise self._refusal(error) from error
        job = Job(handles, [len(prompt) for prompt in prompts], count)
        self.jobs.add(job)
        return job

    def finish(self, job: Job) -> None:
        """Note a job's end, however it came."""
        self.jobs.discard(job)
        job.cancel()
        self.metrics.record(job)

    def stop_jobs(self) -> None:
        """Cancel all jobs; their clients get an error."""
        for job in list(self.jobs):
            job.cancel()

    def token_budget(self, prompts: Sequence[list[int]], asked: int | None, default: int | None) -> int:
        """Return how many tokens an answer may have.

        Args:
            prompts: token ids.
            asked: the request's ``max_tokens``.
            default: used where the request says nothing; None for all that is left of the context.
        Raises:
            ApiError: 400, a prompt or the sum of prompt and answer is too long.
        """
        longest = max(len(prompt) for prompt in prompts)
        limit = self.limits.max_prompt_tokens or self.context - 1
        if not all(prompts):
            raise ApiError(400, "the prompt must have at least one token, got an empty one", param="prompt")
        if longest > min(limit, self.context - 1):
            raise ApiError(
                400, f"the prompt must have at most {min(limit, self.context - 1)} tokens, got {longest}; shorten it",
                code="context_length_exceeded",
            )  # fmt: skip
        room = self.context - longest
        if asked is not None and asked > room:
            raise ApiError(
                400, f"prompt and answer must fit {self.context} tokens, got {longest} + max_tokens={asked}; "
                f"ask for at most {room}", param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        most = self.limits.max_new_tokens
        if asked is not None and most is not None and asked > most:
            raise ApiError(400, f"max_tokens must be at most {most} on this server, got {asked}", param="max_tokens")
        return asked or min(room, default or room, most or room)

    def check_tokens(self, request: Sampling, prompts: Sequence[Sequence[int]]) -> None:
        """Refuse token ids that the model does not have, and more choices than one client may ask for.

        Raises:
            ApiError: 400.
        """
        if (request.n or 1) > self.limits.max_choices:
            raise ApiError(400, f"n must be at most {self.limits.max_choices}, got {request.n}", param="n")
        biased = [int(token) for token in request.logit_bias or ()]
        for param, ids in [("logit_bias", biased), *(("prompt", prompt) for prompt in prompts)]:
            if ids and max(ids) >= self.vocabulary_size:
                raise ApiError(
                    400, f"token ids must be below {self.vocabulary_size}, got {max(ids)}", param=param
                )  # fmt: skip

    def _params(
        self, request: Sampling, choice: int, max_tokens: int, logprobs: int | None, grammar: Grammar | None
    ) -> SamplingParams:
        parts: list[Processor] = []
        if request.logit_bias:
            parts.append(Bias({int(token): value for token, value in request.logit_bias.items()}))
        if request.presence_penalty or request.frequency_penalty:
            parts.append(Penalties(request.presence_penalty or 0.0, request.frequency_penalty or 0.0))
        if grammar is not None:
            parts.append(grammar.constraint())  # last: nothing may raise what it forbids
        seed = None if request.seed is None else (request.seed + choice) % 2**63
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_given(request.temperature, self.defaults.temperature),
            top_p=_given(request.top_p, self.defaults.top_p),
            top_k=_given(request.top_k, self.defaults.top_k),
            min_p=_given(request.min_p, 0.0),
            repetition_penalty=_given(request.repetition_penalty, 1.0),
            stop=request.stops,
            seed=seed,
            logprobs=logprobs,
            ignore_eos=request.ignore_eos,
            logits_processor=chain(parts),
        )

    def _refusal(self, error: Exception) -> ApiError:
        if isinstance(error, QueueFull):
            wait = max(1, min(_LONGEST_RETRY_S, math.ceil(error.retry_after_s)))
            return ApiError(429, f"{error}; try again in {wait} s", code="queue_full", retry_after=wait)
        if isinstance(error, EngineClosed):
            return ApiError(503, str(error), code="engine_closed")
        if isinstance(error, ValueError | TypeError):
            return ApiError(400, str(error))
        raise error


def _given(value: Value | None, default: Value) -> Value:
    return default if value is None else value
