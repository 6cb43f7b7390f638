"""One generation on the model, in the thread that owns it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llama_cpp import llama_cpp as api

from ..errors import Cancelled
from ..generate import compiled_grammar
from ..stats import Stats
from .generation import Event, Finished, Generation, Progress, Scored, Token
from .scoring import score_last, score_prompt
from .text import TextStream

if TYPE_CHECKING:
    from ..llama import Llama


def answer(
    llm: Llama,
    wanted: Generation,
    emit: Callable[[Event], None],
    stopped: Callable[[], bool],
) -> Finished:
    """Generate; `emit` gets progress and tokens as they come, not the end, which is returned.

    Raises Cancelled soon after `stopped` says so, and the errors of hobbit.errors.
    """
    at_quality: AbstractContextManager[None] = nullcontext()
    if wanted.quality is not None:
        at_quality = llm.using(wanted.quality)
    with at_quality:
        return _Answer(llm, wanted, emit, stopped).run()


class _Answer:
    def __init__(
        self,
        llm: Llama,
        wanted: Generation,
        emit: Callable[[Event], None],
        stopped: Callable[[], bool],
    ) -> None:
        self._llm, self._wanted, self._emit, self._stopped = llm, wanted, emit, stopped
        self._text = TextStream(wanted.sampling.stop)
        self._pending: list[Scored] = []
        self._start = time.perf_counter()
        self._before = llm.stats
        self._times: list[float] = []  # of each token, the first one included
        self._at_first: Stats | None = None

    def run(self) -> Finished:
        with self._watched():
            if self._wanted.echo:
                self._echo()
            reason = self._generate()
        self._say(self._text.finish())
        return self._finished(reason)

    def _echo(self) -> None:
        prompt, n_top = self._wanted.prompt, self._wanted.logprobs
        if n_top is None:
            data = b"".join(self._llm.detokenize([token]) for token in prompt)
            self._emit(Token(data.decode(errors="replace")))
            return
        scored = score_prompt(self._llm, prompt, n_top, self._progress)[self._wanted.n_implied :]
        text = b"".join(entry.data for entry in scored).decode(errors="replace")
        self._emit(Token(text, tuple(scored)))

    def _generate(self) -> str:
        llm, wanted = self._llm, self._wanted
        room = llm.n_ctx() - len(wanted.prompt)
        asked = wanted.sampling.max_tokens
        limit = room if asked is None else min(asked, room)
        for token in llm.generate([*wanted.prompt], **self._arguments()):
            if self._stopped():
                raise Cancelled("cancelled")
            if self._at_first is None:
                self._at_first = llm.stats
            if limit == 0:
                return "length"
            if api.llama_vocab_is_eog(llm._model.vocab, token):
                return "stop"
            self._times.append(time.perf_counter())
            self._take(token)
            if self._text.stopped:
                return "stop"
            if len(self._times) >= limit:
                return "length"
        return "stop"

    def _take(self, token: int) -> None:
        if self._wanted.logprobs is not None:
            self._pending.append(score_last(self._llm, token, self._wanted.logprobs))
        data = self._llm.detokenize([token], special=self._wanted.tells_control)
        self._say(self._text.feed(data))

    def _say(self, text: str) -> None:
        """Hand over text with the tokens it is made of; those of a stop sequence are not told."""
        if not text:
            return
        self._emit(Token(text, tuple(self._pending)))
        self._pending = []

    def _arguments(self) -> dict[str, Any]:
        wanted, sampling = self._wanted, self._wanted.sampling
        seed = sampling.seed
        self._llm.set_seed(random.getrandbits(31) if seed is None else seed)
        arguments: dict[str, Any] = {
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "temp": sampling.temperature,
            "repeat_penalty": sampling.repeat_penalty,
            "frequency_penalty": wanted.frequency_penalty,
            "presence_penalty": wanted.presence_penalty,
        }
        if sampling.grammar:
            arguments["grammar"] = compiled_grammar(self._llm, sampling.grammar)
        if wanted.logit_bias:
            arguments["logits_processor"] = [_biased(wanted.logit_bias)]
        return arguments

    @contextmanager
    def _watched(self) -> Iterator[None]:
        self._llm.on_progress = self._progress
        try:
            yield
        finally:
            self._llm.on_progress = None

    def _progress(self, done: int, total: int) -> None:
        """Told by the model before each ubatch of the prompt; `total` is what is not cached."""
        if self._stopped():
            raise Cancelled("cancelled")
        whole = len(self._wanted.prompt)
        seconds = time.perf_counter() - self._start
        self._emit(Progress(whole - total + done, whole, whole - total, seconds))

    def _finished(self, reason: str) -> Finished:
        end, stats = time.perf_counter(), self._llm.stats
        prompt_s = (self._times[0] if self._times else end) - self._start
        at_first = self._at_first or stats
        evaluated = at_first.tokens_prompt + at_first.tokens_generated
        evaluated -= self._before.tokens_prompt + self._before.tokens_generated
        gaps = tuple(b - a for a, b in zip(self._times, self._times[1:], strict=False))
        return Finished(
            reason=reason,
            n_prompt=len(self._wanted.prompt),
            n_cached=max(len(self._wanted.prompt) - evaluated, 0),
            n_generated=len(self._times),
            prompt_s=prompt_s,
            decode_s=sum(gaps),
            ttft_s=prompt_s,
            stats=replace(stats.minus(self._before), ttft_s=prompt_s),
            decode=stats.minus(at_first),
            mode=self._llm.quality.name,
            token_seconds=gaps,
        )


def _biased(bias: Any) -> Callable[[Any, Any], Any]:
    def add(_: Any, scores: Any) -> Any:
        new = scores.copy()
        for token, value in bias.items():
            new[token] += value
        return new

    return add
