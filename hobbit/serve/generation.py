"""What the model is asked for, and what it reports while it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..generate import Sampling
from ..stats import Stats

if TYPE_CHECKING:
    from ..quality import Quality


@dataclass(frozen=True)
class Generation:
    """Tokens in, and how to choose those that come out.

    `logprobs` is the number of alternatives to tell for each token, None for no log-probabilities;
    with `echo` the prompt's tokens are told too, but for the first `n_implied`, which the text that
    was given does not have. `tells_control`: the texts of control tokens are told as well.
    `quality` is another than the server's.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    echo: bool = False
    n_implied: int = 0
    tells_control: bool = False
    quality: Quality | None = None


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability and the likeliest alternatives, best first.

    The first token of all has none: nothing came before it.
    """

    data: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Started:
    """The model has begun with this request."""


@dataclass(frozen=True)
class Progress:
    """So many tokens of the prompt are evaluated, `cached` of them before."""

    done: int
    total: int
    cached: int
    seconds: float


@dataclass(frozen=True)
class Token:
    """Text that came out, and the tokens it is made of where log-probabilities are asked for."""

    text: str
    scored: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Finished:
    """How it ended. `stats` are the model's counters over this request, `decode` after the first
    token; `token_seconds` the time of each token after it.
    """

    reason: str
    n_prompt: int
    n_cached: int
    n_generated: int
    prompt_s: float
    decode_s: float
    ttft_s: float
    stats: Stats
    decode: Stats
    mode: str
    token_seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Failed:
    """It ended with an error."""

    error: BaseException


Event = Started | Progress | Token | Finished | Failed
