"""A model that is fed known tokens and asked for its logits: what evaluation needs of `Llama`.

llama.cpp is called directly: `Llama.eval` keeps books for sampling that nobody reads here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as api

from .errors import UnsupportedModelError
from .rule import Rule
from .stats import Stats

if TYPE_CHECKING:
    from .llama import Llama

Logits = npt.NDArray[np.float32]
_T = TypeVar("_T")

# A cancellation that falls between two decodes has nothing to stop: it is repeated.
_CANCEL_INTERVAL_S = 0.05


class Model(Protocol):
    """What evaluation asks of a model; `Forced` is the real one."""

    @property
    def n_vocab(self) -> int: ...

    @property
    def n_ctx(self) -> int: ...

    def begin(self, rule: Rule) -> None:
        """Start an arm: this rule, an empty cache of experts, no context."""

    def clear(self) -> None:
        """Forget the context; the cache of experts stays."""

    def keep(self, n: int) -> bool:
        """Forget the context after its first n tokens; False where only `clear` is possible."""

    def decode(self, tokens: Sequence[int], *, logits: bool = True) -> Logits:
        """Decode tokens in one batch: their logits, (token, vocabulary), or none of them."""

    def counters(self) -> Stats:
        """Return the model's counters."""


class Forced:
    """A `hobbit.Llama` as a `Model`; its context is this object's alone while it is used."""

    def __init__(self, llm: Llama) -> None:
        self._llm = llm
        self._past = 0

    @property
    def n_vocab(self) -> int:
        """Entries of one row of logits."""
        return int(self._llm.n_vocab())

    @property
    def n_ctx(self) -> int:
        """Tokens that fit the context."""
        return int(self._llm.n_ctx())

    def tokens(self, text: str) -> list[int]:
        """Tokenise a text, in which no word is special, without a token for its beginning.

        Raises UnsupportedModelError for a model without a vocabulary, on which llama.cpp aborts.
        """
        if self._llm.layout.gguf.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
            raise UnsupportedModelError(
                f"{self._llm.model_path}: has no tokenizer, so that no text can be given to it"
            )
        return [*self._llm.tokenize(text.encode(), add_bos=False, special=False)]

    @property
    def bos(self) -> int | None:
        """The token that this model wants at the beginning of every text, or None."""
        model = self._llm._model
        return int(model.token_bos()) if model.add_bos_token() else None

    def begin(self, rule: Rule) -> None:
        """Start an arm: this rule, an empty cache of experts, no context.

        Raises UsageError for a rule that needs a low copy where there is none, and HobbitError for
        any but the exact one on a model whose experts do not stream.
        """
        if self._llm.layout.groups or not rule.is_exact:
            self._llm.rule = rule
            self._llm.forget()
        self.clear()

    def clear(self) -> None:
        """Forget the context; the cache of experts stays."""
        self._llm.reset()  # what it knew of the context is gone as well
        memory = api.llama_get_memory(self._llm._ctx.ctx)
        self._llm.guarded(lambda: api.llama_memory_clear(memory, True))
        self._past = 0

    def keep(self, n: int) -> bool:
        """Forget the context after its first n tokens.

        False, with the context as it was, where the model cannot: a recurrent state has no past.
        """
        if not api.llama_memory_seq_rm(api.llama_get_memory(self._llm._ctx.ctx), 0, n, -1):
            return False
        self._past = n
        return True

    def decode(self, tokens: Sequence[int], *, logits: bool = True, every: int = 0) -> Logits:
        """Decode at most n_batch tokens in one batch: their logits, (token, vocabulary).

        Without `logits` none is returned, and only the last token's are computed, or those of every
        `every`-th: the last layer computes no other token. Raises ReadError and Cancelled.
        """
        context, n = self._llm._ctx.ctx, len(tokens)
        rows = np.empty((n if logits else 0, self.n_vocab), dtype=np.float32)
        batch = api.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(tokens):
                batch.token[i] = token
                batch.pos[i] = self._past + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = logits or i == n - 1 or (every > 0 and i % every == 0)
            with self._llm.translated_errors():
                status = self._llm.decode_batch(context, batch)
                if status != 0:  # in the words that translated_errors knows
                    raise RuntimeError(f"llama_decode returned {status}")
        finally:
            api.llama_batch_free(batch)
        self._past += n
        for i in range(len(rows)):
            rows[i] = self._llm.logits_row(i, context)
        return rows

    def counters(self) -> Stats:
        """Return the model's counters."""
        return self._llm.stats


def stoppable(llm: Llama, call: Callable[[], _T]) -> _T:
    """Call in another thread; what interrupts this one cancels the model, then is raised.

    On return nothing runs on the model any more, whatever happened: it can be closed.
    """
    values: list[_T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            values.append(call())
        except BaseException as error:  # raised again by the thread that waits
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=work, daemon=True).start()
    try:
        done.wait()
    except BaseException:
        while not done.is_set():
            llm.cancel()
            done.wait(_CANCEL_INTERVAL_S)
        llm.cancel(False)
        raise
    if errors:
        raise errors[0]
    return values[0]
