"""One generation: a prompt and sampling settings in, text and statistics out.

The model runs in a thread of its own, so that the main thread is free to receive a signal and to
cancel the model, which then stops within a layer.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .errors import Cancelled, HobbitError, UsageError
from .grammars import check_counts, check_depth
from .harmony import Tagged
from .stats import Stats

if TYPE_CHECKING:
    from .llama import Llama

_T = TypeVar("_T")

# How often a cancelled model is told again: a cancellation that falls between two of its decodes
# has nothing to stop.
_CANCEL_INTERVAL_S = 0.05

_TICK_S = 0.25

# A logit that no other exceeds.
_FORCED = 1e9


@dataclass(frozen=True)
class Prompt:
    """What to answer; `chat` applies the model's chat template, which it must have.

    `tokens` are the prompt as the model takes it, in place of all else. `channels`: the answer will
    have channels (see harmony.py), and is told with <think> tags in their place.
    """

    text: str = ""
    system: str = ""
    chat: bool = False
    tokens: tuple[int, ...] = ()
    channels: bool = False

    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.text}]


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens: llama.cpp's names and defaults.

    `max_tokens` None is no limit, and 0 evaluates the prompt only. `grammar` is GBNF text.
    """

    max_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    grammar: str = ""


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
    """What the two threads share; the queue carries pieces of text, then None.

    llama-cpp-python samples one token at least: with `prompt_only` it is not taken for an answer.
    """

    prompt_only: bool = False
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
    on_tick: Callable[[], None] | None = None,
) -> Result:
    """Generate an answer; `on_text` gets its pieces, in the calling thread, as they come.

    `on_tick` is called there too, a few times a second as long as nothing else comes.

    A KeyboardInterrupt ends the generation and is returned in the result. Any other exception, of
    the model or of `on_text`, is raised after the model has stopped.
    """
    arguments = _arguments(llm, sampling)
    before, start = llm.stats, time.monotonic()
    run = _Run(prompt_only=sampling.max_tokens == 0)
    worker = threading.Thread(target=_work, args=(run, llm, prompt, arguments), daemon=True)
    text: list[str] = []
    signal = None
    try:
        worker.start()
        while (piece := _next_piece(run, on_tick)) is not None:
            text.append(piece)
            on_text(piece)
    except BaseException as exc:
        run.stop.set()
        while worker.is_alive():
            llm.cancel()
            worker.join(_CANCEL_INTERVAL_S)
        llm.cancel(False)
        if not isinstance(exc, KeyboardInterrupt):
            raise
        signal = exc
    # Not cancelled when it ended by itself: that would stop what the model is asked next.
    worker.join()
    if run.error is not None and not (isinstance(run.error, Cancelled) and signal):
        raise _translated(run.error)
    stats = llm.stats.minus(before)
    decode = llm.stats.minus(run.at_first) if run.first_at else Stats(mode=stats.mode)
    stats = replace(stats, ttft_s=run.first_at - start if run.first_at else 0.0)
    reason = "cancelled" if signal else run.finish_reason
    return Result("".join(text), reason, stats, decode, signal)


def _next_piece(run: _Run, on_tick: Callable[[], None] | None) -> str | None:
    while on_tick is not None:
        try:
            return run.pieces.get(timeout=_TICK_S)
        except queue.Empty:
            on_tick()
    return run.pieces.get()


def _work(run: _Run, llm: Llama, prompt: Prompt, arguments: dict[str, Any]) -> None:
    try:
        pieces = _pieces(llm, prompt, arguments)
        for piece, reason in _tagged(llm, pieces) if prompt.channels else pieces:
            if run.stop.is_set():
                break
            if run.prompt_only:
                continue
            if not run.first_at:
                run.first_at, run.at_first = time.monotonic(), llm.stats
            if piece:
                run.pieces.put(piece)
            run.finish_reason = reason or run.finish_reason
        if run.prompt_only and not run.stop.is_set():
            run.finish_reason = "length"
    except BaseException as exc:  # raised again by the thread that waits
        run.error = exc
    finally:
        run.pieces.put(None)


def _pieces(
    llm: Llama, prompt: Prompt, arguments: dict[str, Any]
) -> Iterator[tuple[str, str | None]]:
    chunks: Any
    chat = prompt.chat and not prompt.tokens
    if chat:
        chunks = llm.create_chat_completion(prompt.messages(), stream=True, **arguments)
    else:
        what = list(prompt.tokens) or prompt.text
        chunks = llm.create_completion(what, stream=True, **arguments)
    for chunk in chunks:
        choice = chunk["choices"][0]
        text = choice["delta"].get("content") if chat else choice["text"]
        yield text or "", choice["finish_reason"]


def _tagged(
    llm: Llama, pieces: Iterator[tuple[str, str | None]]
) -> Iterator[tuple[str, str | None]]:
    told = Tagged()
    with llm.telling_control():
        for piece, reason in pieces:
            yield told.feed(piece) + (told.finish() if reason else ""), reason


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
    if sampling.max_tokens == 0:
        # For llama-cpp-python 0 is no limit, and 1 is several tokens where they make one character.
        return arguments | {"max_tokens": 1, "logit_bias": {llm.token_eos(): _FORCED}}
    if sampling.grammar:
        arguments["grammar"] = compiled_grammar(llm, sampling.grammar)
    return arguments


def compiled_grammar(llm: Llama, text: str) -> Any:
    """Return a LlamaGrammar of GBNF text; raise UsageError for what is none."""
    from llama_cpp.llama_grammar import LlamaGrammar

    _check_grammar(text, llm._model.vocab)
    return LlamaGrammar.from_string(text, verbose=False)


def parsed_grammar(text: str, json_schema: str = "") -> str:
    """Return the GBNF text of a JSON schema, or else `text`; needs no model to find mistakes."""
    if json_schema:
        text = _schema_grammar(json_schema)
    if text:
        _check_grammar(text)
    return text


def _schema_grammar(schema: str) -> str:
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    check_counts(schema)
    try:
        return str(json_schema_to_gbnf(schema))
    except json.JSONDecodeError as exc:
        reason = f"it is not JSON: {exc}"
    except (AssertionError, ValueError) as exc:
        # Upstream's sentence, in which a part of the schema stands as Python writes it.
        reason = str(exc).replace("'", '"') or "llama.cpp has no grammar for it"
    except Exception:  # its converter fails in any way on what is JSON, but no schema
        reason = "it is JSON, but not a schema"
    raise UsageError(f"the JSON schema cannot be used: {reason}")


def _check_grammar(text: str, vocab: Any = None) -> None:
    """Parse it once: the sampler of llama-cpp-python does not say when a grammar is wrong.

    A grammar may name tokens, as in <think>: that cannot be judged without the vocabulary.
    """
    from llama_cpp import llama_cpp
    from llama_cpp._utils import suppress_stdout_stderr

    check_depth(text)
    with suppress_stdout_stderr(disable=False):
        sampler = llama_cpp.llama_sampler_init_grammar(vocab, text.encode(), b"root")
    if sampler:
        llama_cpp.llama_sampler_free(sampler)
    elif vocab is not None or "<" not in text:
        raise UsageError("the grammar cannot be parsed; it must be GBNF with a rule named root")


def _translated(error: BaseException) -> BaseException:
    """Turn what llama-cpp-python raises for a person's mistake into our words."""
    if isinstance(error, HobbitError) or not isinstance(error, ValueError | RuntimeError):
        return error
    if "exceed context window" in str(error):
        return UsageError(f"the prompt does not fit the context ({error}): raise it with -c")
    return HobbitError(f"generation failed: {error}")
