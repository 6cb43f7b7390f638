"""One generation: a prompt and sampling settings in, text and statistics out.

The model runs in a thread of its own, so that the main thread is free to receive a signal and to
cancel the model, which then stops within a layer.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .errors import Cancelled, HobbitError, UsageError
from .stats import Stats

if TYPE_CHECKING:
    from .llama import Llama

_T = TypeVar("_T")

# How often a cancelled model is told again: a cancellation that falls between two of its decodes
# has nothing to stop.
_CANCEL_INTERVAL_S = 0.05


@dataclass(frozen=True)
class Prompt:
    """What to answer; `chat` applies the model's chat template, which it must have."""

    text: str
    system: str = ""
    chat: bool = False

    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.text}]


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens: llama.cpp's names and defaults. `max_tokens` None is no limit."""

    max_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    grammar: str = ""
    json_schema: str = ""


@dataclass(frozen=True)
class Result:
    """What came of it. `decode` counts from the first token on, `stats` the whole run.

    `finish_reason` is `stop`, `length` or `cancelled`; `signal` is what interrupted it.
    """

    text: str
    finish_reason: str
    stats: Stats
    decode: Stats
    signal: KeyboardInterrupt | None = None

    @property
    def tokens(self) -> int:
        """Tokens that were sampled: the first comes with the prompt, without its own decode."""
        return self.stats.tokens_generated + (1 if self.stats.ttft_s else 0)


@dataclass
class _Run:
    """What the two threads share; the queue carries pieces of text, then None."""

    pieces: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)
    first_at: float = 0.0
    at_first: Stats = field(default_factory=Stats)
    finish_reason: str = "cancelled"
    error: BaseException | None = None


def interruptible(call: Callable[[], _T]) -> _T:
    """Call in another thread and wait, so that this one can be interrupted."""
    outcome: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((call(), None))
        except BaseException as exc:  # raised again by the thread that waits
            outcome.put((None, exc))

    threading.Thread(target=work, daemon=True).start()
    value, error = outcome.get()
    if error is not None:
        raise error
    return cast(_T, value)


def has_chat_template(llm: Llama) -> bool:
    return "tokenizer.chat_template" in llm.metadata


def generate(
    llm: Llama,
    prompt: Prompt,
    sampling: Sampling,
    on_text: Callable[[str], None] = lambda text: None,
) -> Result:
    """Generate an answer; `on_text` gets its pieces, in the calling thread, as they come.

    A KeyboardInterrupt ends the generation and is returned in the result. Any other exception, of
    the model or of `on_text`, is raised after the model has stopped.
    """
    arguments = _arguments(llm, sampling)
    before, start = llm.stats, time.monotonic()
    run = _Run()
    worker = threading.Thread(target=_work, args=(run, llm, prompt, arguments), daemon=True)
    worker.start()
    text: list[str] = []
    signal = None
    try:
        while (piece := run.pieces.get()) is not None:
            text.append(piece)
            on_text(piece)
    except KeyboardInterrupt as exc:
        signal = exc
    finally:
        run.stop.set()
        while worker.is_alive():
            llm.cancel()
            worker.join(_CANCEL_INTERVAL_S)
    if run.error is not None and not (isinstance(run.error, Cancelled) and signal):
        raise _translated(run.error)
    stats = llm.stats.minus(before)
    decode = llm.stats.minus(run.at_first) if run.first_at else Stats(mode=stats.mode)
    stats = replace(stats, ttft_s=run.first_at - start if run.first_at else 0.0)
    reason = "cancelled" if signal else run.finish_reason
    return Result("".join(text), reason, stats, decode, signal)


def _work(run: _Run, llm: Llama, prompt: Prompt, arguments: dict[str, Any]) -> None:
    try:
        for piece, reason in _pieces(llm, prompt, arguments):
            if run.stop.is_set():
                break
            if not run.first_at:
                run.first_at, run.at_first = time.monotonic(), llm.stats
            if piece:
                run.pieces.put(piece)
            run.finish_reason = reason or run.finish_reason
    except BaseException as exc:  # raised again by the thread that waits
        run.error = exc
    finally:
        run.pieces.put(None)


def _pieces(
    llm: Llama, prompt: Prompt, arguments: dict[str, Any]
) -> Iterator[tuple[str, str | None]]:
    chunks: Any
    if prompt.chat:
        chunks = llm.create_chat_completion(prompt.messages(), stream=True, **arguments)
    else:
        chunks = llm.create_completion(prompt.text, stream=True, **arguments)
    for chunk in chunks:
        choice = chunk["choices"][0]
        text = choice["delta"].get("content") if prompt.chat else choice["text"]
        yield text or "", choice["finish_reason"]


def _arguments(llm: Llama, sampling: Sampling) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "max_tokens": -1 if sampling.max_tokens is None else sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repeat_penalty,
        "seed": sampling.seed,
        "stop": list(sampling.stop),
    }
    if sampling.grammar or sampling.json_schema:
        arguments["grammar"] = _grammar(llm, sampling)
    return arguments


def _grammar(llm: Llama, sampling: Sampling) -> Any:
    """Make the grammar, parsed once here: the sampler of llama-cpp-python does not check it."""
    from llama_cpp import llama_cpp
    from llama_cpp._utils import suppress_stdout_stderr
    from llama_cpp.llama_grammar import LlamaGrammar

    if sampling.json_schema:
        try:
            grammar = LlamaGrammar.from_json_schema(sampling.json_schema, verbose=False)
        except Exception as exc:  # upstream raises whatever its converter stumbles over
            raise UsageError(f"the JSON schema cannot be used: {exc!r}") from exc
    else:
        grammar = LlamaGrammar.from_string(sampling.grammar, verbose=False)
    vocab = llm._model.vocab
    assert vocab is not None
    text = grammar._grammar.encode()
    with suppress_stdout_stderr(disable=False):
        sampler = llama_cpp.llama_sampler_init_grammar(vocab, text, grammar._root.encode())
    if not sampler:
        raise UsageError("the grammar cannot be parsed; it must be GBNF with a rule named root")
    llama_cpp.llama_sampler_free(sampler)
    return grammar


def _translated(error: BaseException) -> BaseException:
    """Turn what llama-cpp-python raises for a person's mistake into our words."""
    if isinstance(error, HobbitError) or not isinstance(error, ValueError | RuntimeError):
        return error
    if "exceed context window" in str(error):
        return UsageError(f"the prompt does not fit the context ({error}): raise it with -c")
    return HobbitError(f"generation failed: {error}")
