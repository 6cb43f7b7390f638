"""What `hobbit bench` was asked to do, checked, and turned into arms and cases."""

from __future__ import annotations

import itertools
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .attempt import check_graph
from .bench import Arm, Case, Setup, Test, file_bytes
from .bench_rows import FORMATS
from .calibration import BUDGETS, budget_of
from .errors import UsageError
from .layout import Layout
from .memory import resolve_cap
from .options import KV_TYPES, MAX_THREADS, Options, device_arguments
from .policy import DEFAULT, parse_policy
from .prediction import Prediction, parse_prediction
from .quality import EXACT_NAME, choose
from .sizes import parse_size
from .texts import SAMPLE, path_of, read

RANDOM = "random"
_STOCK: tuple[Literal["stock-mmap", "stock"], ...] = ("stock-mmap", "stock")
_OF_MODEL = "%model"
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?")


@dataclass(frozen=True)
class BenchOptions:
    """One value for each flag of `hobbit bench`, by the name of its parameter."""

    words: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    n_prompt: str = "512"
    n_gen: str = "128"
    pg: tuple[str, ...] = ()
    n_depth: str = "0"
    batch_size: str = "2048"
    ubatch_size: str = "512"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    threads: str = ""
    repetitions: int = 5
    output: str = "md"
    delay: float = 0.0
    arm: tuple[str, ...] = ()
    memory: str = "none"
    policy: tuple[str, ...] = ()
    predictor: tuple[str, ...] = ()
    device: str | None = None
    vram: str = "auto"
    rpc: str | None = None
    dispatch: tuple[str, ...] = ()
    n_expert_used: int | None = None
    read_bps: str = ""
    text: str = ""
    warm: bool = True
    roofline: bool = True
    interference: bool = False
    breakdown: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.output not in FORMATS:
            raise UsageError(f"-o {self.output}: must be one of {', '.join(FORMATS)}")
        if self.interference and not self.roofline:
            raise UsageError("--interference is a second roofline: without --no-roofline")
        for name in self.arm_names:
            _check_arm(name)
        cap_bytes(self.memory, 1 << 40)
        self.engines()
        self.read_limit()
        self.cases()
        if self.text not in ("", RANDOM):
            read(Path(self.text).expanduser())

    @property
    def names(self) -> tuple[str | None, ...]:
        """The models as they were named; None is the demo."""
        given = (*self.words, *self.model)
        found = [part for name in given for part in ([name] if _is_file(name) else _split(name))]
        return tuple(found) or (None,)

    @property
    def arm_names(self) -> list[str]:
        return list(dict.fromkeys(n for text in self.arm for n in _split(text))) or [EXACT_NAME]

    def devices(self) -> list[dict[str, str]]:
        """Return the arguments of hobbit.Llama for each amount of the device's memory.

        And for each way to use it; what is usual is left out.
        """
        found: list[dict[str, str]] = []
        for vram, dispatch in itertools.product(_split(self.vram), self.dispatch or ("auto",)):
            asked = device_arguments(self.device, vram, self.rpc, dispatch)
            if dispatch == "auto":
                asked.pop("dispatch", None)
            given = {name: value for name, value in asked.items() if value is not None}
            own = {} if vram == "0" else given
            found += [own] if own not in found else []
        if not found:
            raise UsageError("--vram: say how much, as 4G, or auto")
        return found

    def engines(self) -> list[dict[str, str]]:
        """Return the arguments of hobbit.Llama for each policy, predictor and use of a device.

        The usual ones are left out, and what is written in two ways is one.
        """
        policies = [parse_policy(text) for text in self.policy] or [DEFAULT]
        predictors = [parse_prediction(text) for text in self.predictor] or [Prediction()]
        found = []
        for policy, predictor, there in itertools.product(policies, predictors, self.devices()):
            own = {"policy": str(policy)} if policy != DEFAULT else {}
            own |= there
            own |= {"predict": str(predictor)} if predictor != Prediction() else {}
            found += [own] if own not in found else []
        return found

    def loading(self) -> list[Options]:
        """Return how each model is named."""
        return [Options(model=name) for name in self.names]

    def read_limit(self) -> int:
        """Return bytes a second; 0: no limit."""
        if not self.read_bps:
            return 0
        limit = parse_size(self.read_bps)
        if limit < 1 << 20:
            raise UsageError(f"--read-bps {self.read_bps}: must be 1M a second or more")
        return limit

    def text_file(self) -> str:
        """Return the text's path, "" for random tokens."""
        if self.text == RANDOM:
            return ""
        return str(Path(self.text).expanduser().resolve() if self.text else path_of(SAMPLE))

    def cases(self) -> list[Case]:
        """Return what is run, with llama-bench's rows.

        A prompt and what is decoded after it are one case. Of several prompts or lengths, further
        prompts are cases without decoding, and further lengths follow the first prompt.
        """
        prompts, lengths = _numbers("-p", self.n_prompt), _numbers("-n", self.n_gen)
        amounts: list[tuple[int, int, tuple[Test, ...]]] = [(prompts[0], lengths[0], ("pp", "tg"))]
        amounts += [(n, 0, ("pp",)) for n in prompts[1:]]
        amounts += [(prompts[0], n, ("tg",)) for n in lengths[1:]]
        amounts += [(*_pair(text), ("pg",)) for text in self.pg]
        amounts = [(p, n, tests) for p, n, tests in amounts if p or n]
        if not amounts:
            raise UsageError("-p 0 -n 0 leaves nothing to measure")
        return [
            Case(prompt, length, depth, tests, batch, ubatch, threads, k, v, _cache(k, v))
            for depth, batch, ubatch, threads, k, v in self._swept()
            for prompt, length, tests in amounts
        ]

    def _swept(self) -> Iterator[tuple[int, int, int, int, str, str]]:
        default = str(Options().n_threads)
        return itertools.product(
            _numbers("-d", self.n_depth),
            _numbers("-b", self.batch_size, least=1),
            _numbers("-ub", self.ubatch_size, least=1),
            _numbers("-t", self.threads or default, least=1, most=MAX_THREADS),
            _known("-ctk", _split(self.cache_type_k)),
            _known("-ctv", _split(self.cache_type_v)),
        )

    def setup(self, layout: Layout) -> Setup:
        """Return the benchmark of this model; raises what an arm would find missing."""
        check_graph(layout, self.cases()[0].context)
        engines = self.engines()
        arms = [arm for n in self.arm_names for arm in _arms(n, self.memory, layout, engines)]
        low = {path for _, files in arms for path in files}
        return Setup(
            layout,
            [arm for arm, _ in arms],
            self.cases(),
            self.text_file(),
            self.repetitions,
            self.read_limit(),
            self.warm,
            self.roofline,
            self.interference,
            self.delay,
            tuple(sorted(low - {part.path for part in layout.gguf.parts})),
        )


def _arms(
    text: str, memory: str, layout: Layout, engines: Sequence[dict[str, str]]
) -> list[tuple[Arm, list[Path]]]:
    """Return the arms of a name, each with the files that it reads besides the model's."""
    name, at, own = text.partition("@")
    cap = cap_bytes(own if at else memory, file_bytes(layout.gguf))
    stock = next((engine for engine in _STOCK if engine == name), None)
    if stock:
        number = f", {layout.other_number}" if layout.other_number else ""
        told = {"kv_overrides": layout.kv_overrides} if number else {}
        return [(Arm(f"{name}{number}", stock, told, cap), [])]
    quality = choose(layout, name if name in (EXACT_NAME, *BUDGETS) else float(name))
    chosen: dict[str, Any] = {} if name == EXACT_NAME else {"quality": name}
    if layout.other_number:
        name, chosen = quality.name, chosen | {"n_expert_used": layout.n_expert_used}
    files = [part.path for part in quality.low.gguf.parts] if quality.low else []
    return [(Arm(name, arguments=chosen | engine, cap=cap), files) for engine in engines]


def _check_arm(text: str) -> None:
    name, at, cap = text.partition("@")
    if at:
        cap_bytes(cap, 1 << 40)
    if name in (EXACT_NAME, *_STOCK):
        return
    try:
        budget_of(name)
    except UsageError:
        known = ", ".join((EXACT_NAME, *BUDGETS, *_STOCK))
        raise UsageError(
            f"--arm {text}: an arm is {known} or a KL budget as 0.02, and may have a cap of its "
            "own, as stock@none or exact@3G"
        ) from None


def cap_bytes(text: str, model_bytes: int) -> int:
    """Return a cap: a size, a share of the machine's memory (50%) or of the model (55%model).

    0 is none, and what "none" means.
    """
    if text in ("none", "0", ""):
        return 0
    if text.endswith(_OF_MODEL):
        try:
            share = float(text.removesuffix(_OF_MODEL)) / 100
        except ValueError:
            share = 0.0
        if not 0 < share < 100:
            raise UsageError(f"{text!r} is not a share of the model: write it like 55%model")
        # A cgroup's limit is whole pages.
        return int(share * model_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if text.strip() == "auto":
        raise UsageError("--memory auto: a benchmark's cap is a size, 50%, 55%model or none")
    return resolve_cap(text).bytes


def _is_file(name: str) -> bool:
    return Path(name).expanduser().exists()


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(flag: str, text: str, least: int = 0, most: int = 1 << 31) -> list[int]:
    """Read numbers and ranges as llama-bench does: 1,2 or 128-512*2 or 1-4 or 0-100+50."""
    found: list[int] = []
    for part in _split(text):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise UsageError(f"{flag} {text}: must be numbers, as 512 or 128,256 or 128-512*2")
        first, last, how, step = match.groups()
        found += _range(int(first), int(last or first), how or "+", int(step or 1))
    if not found or not all(least <= value <= most for value in found):
        raise UsageError(f"{flag} {text}: must be numbers from {least} to {most}")
    return list(dict.fromkeys(found))


def _range(first: int, last: int, how: str, step: int) -> Iterator[int]:
    value = first
    while value <= last:
        yield value
        following = value + step if how == "+" else value * step
        if following <= value:
            return
        value = following


def _pair(text: str) -> tuple[int, int]:
    numbers = _split(text)
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) for n in numbers):
        raise UsageError(f"-pg {text}: must be a prompt and what is decoded after it, as 512,128")
    return int(numbers[0]), int(numbers[1])


def _known(flag: str, types: Sequence[str]) -> Sequence[str]:
    for name in types:
        if name not in KV_TYPES:
            raise UsageError(f"{flag} {name}: must be one of {', '.join(KV_TYPES)}")
    return types


def _cache(type_k: str, type_v: str) -> dict[str, Any]:
    """Return the arguments of a Llama for these types of the KV cache."""
    given = {"type_k": KV_TYPES[type_k], "type_v": KV_TYPES[type_v]}
    found: dict[str, Any] = {n: v for n, v in given.items() if v != KV_TYPES["f16"]}
    # llama.cpp needs flash attention for a quantised V cache.
    return found | ({"flash_attn": True} if type_v not in ("f32", "f16", "bf16") else {})
