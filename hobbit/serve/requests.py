"""A request's JSON to a generation; fields that nobody knows are ignored, as every server does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..generate import Sampling
from ..options import MAX_SEED
from .generation import Generation
from .service import MAX_PROMPTS, Service

if TYPE_CHECKING:
    from ..llama import Llama

Body = dict[str, Any]

_MAX_LOGPROBS = 100


@dataclass(frozen=True)
class PromptTokens:
    """A prompt; its first `n_implied` tokens are not of the text that was given."""

    tokens: list[int]
    n_implied: int = 0


def generation(
    service: Service,
    llm: Llama,
    body: Body,
    prompt: list[int],
    limit: int | None,
    grammar: str,
) -> Generation:
    """Return what is asked for. `limit` is the tokens that the request wants, None for no limit."""
    if not prompt:
        bos = llm.token_bos()
        if bos < 0:
            raise UsageError("the prompt is empty")
        prompt = [bos]
    if len(prompt) >= llm.n_ctx():
        raise UsageError(
            f"the prompt has {len(prompt)} tokens and the context {llm.n_ctx()}: "
            "shorten it, or start the server with a larger -c"
        )
    _refuse_several(body)
    return Generation(
        prompt=tuple(prompt),
        sampling=_sampling(service, body, limit, grammar),
        frequency_penalty=number(body, "frequency_penalty", 0.0, -2, 2),
        presence_penalty=number(body, "presence_penalty", 0.0, -2, 2),
        logit_bias=_logit_bias(body.get("logit_bias"), llm.n_vocab()),
        quality=_quality(service, body),
    )


def limit_of(service: Service, body: Body, *names: str, default: int | None = None) -> int | None:
    """Return how many tokens a request wants, at most what the server allows."""
    wanted = next((body[name] for name in names if body.get(name) is not None), default)
    if wanted is not None:
        if not isinstance(wanted, int) or isinstance(wanted, bool):
            raise UsageError(f"{names[0]} must be a whole number")
        wanted = None if wanted < 0 else wanted
    most = service.options.loading.predict
    if most is None or most < 0:
        return wanted
    return most if wanted is None else min(wanted, most)


def prompts_of(llm: Llama, prompt: object) -> list[PromptTokens]:
    """Return the prompts of a completion request: a text, tokens, or a list of them."""
    if isinstance(prompt, str):
        return [text_tokens(llm, prompt)]
    if not isinstance(prompt, list) or not prompt:
        raise UsageError("prompt must be a text, a list of tokens, or a list of those")
    if _is_token(prompt[0]):
        return [PromptTokens(checked_tokens(llm, prompt))]
    if len(prompt) > MAX_PROMPTS:
        raise UsageError(f"at most {MAX_PROMPTS} prompts in one request")
    return [
        PromptTokens(checked_tokens(llm, p)) if isinstance(p, list) else prompts_of(llm, p)[0]
        for p in prompt
    ]


def checked_tokens(llm: Llama, tokens: list[Any]) -> list[int]:
    """Return tokens that a client gave; raises UsageError for what is none."""
    n_vocab = llm.n_vocab()
    if not all(_is_token(token) and 0 <= token < n_vocab for token in tokens):
        raise UsageError(f"tokens are whole numbers from 0 to {n_vocab - 1}")
    return tokens


def text_tokens(llm: Llama, text: str) -> PromptTokens:
    """Tokenise a prompt, with the token that the model wants at a text's beginning."""
    bos = bool(llm._model.add_bos_token())
    tokens = [*llm.tokenize(text.encode(), add_bos=bos, special=True)]
    return PromptTokens(tokens, int(bos or not tokens))  # an empty prompt gets it too


def number(body: Body, name: str, default: float, least: float, most: float) -> float:
    """Return a number of the request, or the default where it has none."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UsageError(f"{name} must be a number from {least:g} to {most:g}")
    return value


def logprobs_of(value: object, name: str) -> int | None:
    """Return how many alternatives to tell; None for no log-probabilities."""
    if value is None or value is False:
        return None
    count = int(value) if isinstance(value, int) else -1
    if not 0 <= count <= _MAX_LOGPROBS:
        raise UsageError(f"{name} must be from 0 to {_MAX_LOGPROBS}")
    return count


def flag(body: Body, name: str) -> bool:
    """Return a yes or no of the request; no where it says nothing."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false")
    return bool(value)


def _sampling(service: Service, body: Body, limit: int | None, grammar: str) -> Sampling:
    own = service.defaults
    seed = body.get("seed")
    if seed is not None and (not isinstance(seed, int) or not -(2**63) <= seed < 2**64):
        raise UsageError("seed must be a whole number")
    return replace(
        own,
        max_tokens=limit,
        temperature=number(body, "temperature", own.temperature, 0, 100),
        top_k=int(number(body, "top_k", own.top_k, -1, 1 << 30)),
        top_p=number(body, "top_p", own.top_p, 0, 1),
        min_p=number(body, "min_p", own.min_p, 0, 1),
        repeat_penalty=number(body, "repeat_penalty", own.repeat_penalty, 0, 100),
        # The largest that 32 bits have means a random one.
        seed=None if seed is None or seed == -1 else seed % (MAX_SEED + 1),
        stop=_stops(body.get("stop")),
        grammar=grammar,
    )


def _stops(stop: object) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise UsageError("stop must be a text or a list of texts")
    return tuple(s for s in stops if s)


def _logit_bias(bias: object, n_vocab: int) -> Mapping[int, float]:
    if not bias:
        return {}
    try:
        pairs = bias.items() if isinstance(bias, dict) else bias
        found = {int(token): float(value) for token, value in pairs}  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError):
        raise UsageError("logit_bias must have a number for each token") from None
    if any(not 0 <= token < n_vocab for token in found):
        raise UsageError(f"logit_bias: tokens are from 0 to {n_vocab - 1}")
    if not all(math.isfinite(value) for value in found.values()):
        raise UsageError("logit_bias must be finite: -100 is enough to rule a token out")
    return found


def _quality(service: Service, body: Body) -> Any:
    own = body.get("hobbit")
    if own is None:
        return None
    if not isinstance(own, dict) or not isinstance(own.get("quality", ""), str | float | int):
        raise UsageError('hobbit must be an object, as {"quality": "exact"}')
    return service.qualities(str(own["quality"])) if "quality" in own else None


def _refuse_several(body: Body) -> None:
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            raise UsageError(f"{name} must be 1: answers are made one at a time")


def _is_token(token: object) -> bool:
    return isinstance(token, int) and not isinstance(token, bool)
