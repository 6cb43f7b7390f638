"""What `hobbit run` was asked to do, checked, and turned into what the library takes."""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .arena import DISPATCHES
from .cpus import physical_cores
from .errors import UsageError
from .generate import Sampling, parsed_grammar
from .gguf_file import padded
from .policy import DEFAULT, parse_policy
from .prediction import Prediction, parse_prediction
from .quality import Quality, choose
from .sizes import parse_size

if TYPE_CHECKING:
    from .layout import Layout

DEMO = "demo"
DEMO_PROMPT = "Explain in a few sentences why the sky is blue."
DEMO_TOKENS = 256
DEFAULT_CONTEXT = 4096
# For multiple-choice questions, most of which are short.
TASK_CONTEXT = 1024
# ggml's GGML_MAX_N_THREADS.
MAX_THREADS = 512
MAX_IO_THREADS = 256
# More than any model has; llama.cpp would try for a minute to get the memory.
MAX_CONTEXT = 2**24
# llama.cpp takes 32 bits with a sign.
MAX_BATCH = 2**31 - 1
# llama.cpp takes 32 bits, of which the largest number means a random seed.
MAX_SEED = 2**32 - 2
DEFAULT_POLICY = str(DEFAULT)
DEFAULT_PREDICTOR = str(Prediction())

# What can follow an answer on stderr: nothing, one line, that and all counters, or a JSON object.
STATS = ("none", "line", "full", "json")

# The types that llama.cpp accepts for the KV cache, with ggml's numbers.
KV_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q4_0": 2,
    "q4_1": 3,
    "iq4_nl": 20,
    "q5_0": 6,
    "q5_1": 7,
}


@dataclass(frozen=True)
class Options:
    """One value for each flag of `hobbit run`, by the name of its parameter."""

    words: tuple[str, ...] = ()
    model: str | None = None
    hf_repo: str | None = None
    hf_file: str | None = None
    prompt: str | None = None
    file: Path | None = None
    escape: bool = False
    system_prompt: str | None = None
    system_prompt_file: Path | None = None
    raw: bool = False
    predict: int | None = None
    ctx_size: int | None = None
    threads: int | None = None
    threads_batch: int | None = None
    batch_size: int = 2048
    ubatch_size: int = 512
    gpu_layers: str = "auto"
    main_gpu: int = 0
    split_mode: str = "layer"
    flash_attn: str = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    temp: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int = -1
    reverse_prompt: tuple[str, ...] = ()
    grammar: str | None = None
    grammar_file: Path | None = None
    json_schema: str | None = None
    json_schema_file: Path | None = None
    quality: str = "exact"
    t1: float | None = None
    t2: float | None = None
    patience: int = 0
    deterministic: bool = False
    low_file: Path | None = None
    resident_low: str = "auto"
    n_expert_used: int | None = None
    warm_start: bool = True
    record: Path | None = None
    replay: Path | None = None
    memory: str = "auto"
    policy: str = DEFAULT_POLICY
    predictor: str = DEFAULT_PREDICTOR
    io: str = "auto"
    io_threads: int = 0
    device: str | None = None
    vram: str = "auto"
    rpc: str | None = None
    dispatch: str = "auto"
    output: Path | None = None
    json_output: bool = False
    jsonl: bool = False
    no_stream: bool = False
    think: bool | None = None
    hide_thinking: bool = False
    panel: bool = False
    session: str | None = None
    continue_last: bool = False
    stats: str | None = None
    verbose: int = 0
    quiet: bool = False
    color: str = "auto"

    def __post_init__(self) -> None:
        for name in _CHOICES:
            allowed, value = _CHOICES[name], getattr(self, name)
            if value is not None and value not in allowed:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} {value}: must be one of {', '.join(allowed)}")
        self._check_numbers()
        if self.hf_file and not self.hf_repo:
            raise UsageError(f"-hff {self.hf_file}: name the repository that it is in with -hf")
        if not all(self.reverse_prompt):
            raise UsageError("-r '': an empty text would stop at once")
        if self.flash_attn == "off" and _is_quantised(self.cache_type_v):
            raise UsageError(f"-fa off: -ctv {self.cache_type_v} needs flash attention")
        if self.predict is not None and self.predict < -2:
            raise UsageError(f"-n {self.predict}: must be a number of tokens, or -1 for no limit")
        device_arguments(self.device, self.vram, self.rpc, self.dispatch)
        if self.record and self.replay:
            raise UsageError("--record and --replay: a run does one of the two")
        if self.json_output and self.jsonl:
            raise UsageError("--json and --jsonl: one object, or a stream of them?")
        if not -1 <= self.seed <= MAX_SEED:
            raise UsageError(f"--seed {self.seed}: must be -1 (random), or from 0 to {MAX_SEED}")
        _gpu_layers(self.gpu_layers)
        parse_policy(self.policy)
        parse_prediction(self.predictor)
        self._check_session()

    def _check_session(self) -> None:
        if self.session is not None and self.continue_last:
            raise UsageError("--session and --continue: name a session, or go on with the last one")
        if self.session is not None and not is_session_name(self.session):
            raise UsageError(
                f"--session {self.session!r}: must be a plain name: letters, digits, '-', '_' and "
                f"'.', at most {_LONGEST_NAME} bytes, and begin with a letter, a digit or '_'"
            )
        if self.has_session and self.raw:
            raise UsageError(
                "--raw has no messages that a session could keep: leave one of the two"
            )
        if self.has_session and self.predict == 0:
            raise UsageError("-n 0 makes no answer that a session could keep: leave one of the two")

    def _check_numbers(self) -> None:
        most = (
            ("-t", self.threads, MAX_THREADS),
            ("-tb", self.threads_batch, MAX_THREADS),
            ("-c", self.ctx_size, MAX_CONTEXT),
            ("-b", self.batch_size, MAX_BATCH),
            ("-ub", self.ubatch_size, MAX_BATCH),
            ("--io-threads", self.io_threads, MAX_IO_THREADS),
        )
        for flag, count, limit in most:
            if count is not None and count > limit:
                raise UsageError(f"{flag} {count}: must be at most {limit}")
        for name in ("temp", "top_p", "min_p", "repeat_penalty", "t1", "t2"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be a number")

    @property
    def model_name(self) -> str | None:
        """The model as it was named: by -m, or as the first word."""
        return self.model or (None if self.hf_repo else next(iter(self.words), None))

    @property
    def is_demo(self) -> bool:
        return not self.hf_repo and self.model_name in (None, DEMO)

    @property
    def n_threads(self) -> int:
        """Threads that compute: as asked, or one a core."""
        asked = self.threads
        return asked if asked is not None and asked > 0 else physical_cores()

    @property
    def prompt_words(self) -> tuple[str, ...]:
        return self.words if self.model or self.hf_repo else self.words[1:]

    @property
    def has_session(self) -> bool:
        """Whether the conversation is kept: in a session by name, or in the last one."""
        return self.session is not None or self.continue_last

    @property
    def wants_chat(self) -> bool:
        """Whether nothing speaks against a conversation: no prompt, and nothing for one answer."""
        prompt = self.prompt or self.file or self.prompt_words
        once = self.json_output or self.jsonl or self.record or self.replay or self.predict == 0
        return not (prompt or once)

    @property
    def wanted_stats(self) -> str:
        """What is said of an answer when it is over: one of STATS."""
        if self.quiet:
            return "none"
        return self.stats or ("full" if self.verbose else "line")

    @property
    def is_silent(self) -> bool:
        """Whether one answer has nothing on stderr but errors, and what a program reads there."""
        return self.quiet or (self.wanted_stats == "json" and not self.verbose)

    def resolved(self, settings: Sampling) -> dict[str, Any]:
        """Return all settings as plain data, with the values that were chosen in place of None."""
        chosen = {
            "temp": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "min_p": settings.min_p,
            "repeat_penalty": settings.repeat_penalty,
            "seed": settings.seed,
            "predict": -1 if settings.max_tokens is None else settings.max_tokens,
        }
        paths_as_text = json.dumps(asdict(self) | chosen, default=str)
        plain: dict[str, Any] = json.loads(paths_as_text)
        return plain


@dataclass(frozen=True)
class EvalOptions:
    """One value for each flag of `hobbit eval`, by the name of its parameter."""

    model: str | None = None
    file: Path | None = None
    tokens: int = 1536
    window: int = 256
    mode: tuple[str, ...] = ()
    t1: float | None = None
    t2: float | None = None
    deterministic: bool = False
    low: Path | None = None
    tasks: tuple[Path, ...] = ()
    max_kld: float | None = None
    plot: Path | None = None
    ctx_size: int | None = None
    threads: int | None = None
    memory: str = "auto"
    policy: str = DEFAULT_POLICY
    predictor: str = DEFAULT_PREDICTOR
    device: str | None = None
    vram: str = "auto"
    rpc: str | None = None
    dispatch: str = "auto"
    json_output: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        self.loading()
        if not self.tokens and not self.tasks:
            raise UsageError("--tokens 0 measures nothing without --tasks")
        if self.ctx_size is not None and self.tokens and self.ctx_size < self.window:
            raise UsageError(f"-c {self.ctx_size}: a window of {self.window} tokens does not fit")

    @property
    def has_thresholds(self) -> bool:
        return (self.t1, self.t2) != (None, None)

    def loading(self) -> Options:
        """Return how the model is loaded: no larger context than is needed."""
        needed = max(self.window if self.tokens else 0, TASK_CONTEXT if self.tasks else 0)
        return Options(
            model=self.model,
            ctx_size=self.ctx_size or needed,
            threads=self.threads,
            memory=self.memory,
            policy=self.policy,
            predictor=self.predictor,
            device=self.device,
            vram=self.vram,
            rpc=self.rpc,
            dispatch=self.dispatch,
            warm_start=False,
        )

    def facts(self, model: Path, text: str) -> dict[str, Any]:
        """Return what was measured, as plain data."""
        return {
            "model": str(model),
            "low": None,
            "text": str(self.file) if self.file else "built-in",
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "tokens": self.tokens,
            "window": self.window,
            "deterministic": self.deterministic,
            "max_kld": self.max_kld,
        }


@dataclass(frozen=True)
class TraceOptions:
    """One value for each flag of `hobbit trace`, by the name of its parameter."""

    model: str | None = None
    file: Path | None = None
    output: Path | None = None
    show: Path | None = None
    tokens: int = 1024
    probs: bool = False
    batch: int = 1
    ubatch: int = 512
    ctx_size: int | None = None
    threads: int | None = None
    memory: str = "auto"
    policy: str = DEFAULT_POLICY
    predictor: str = DEFAULT_PREDICTOR
    n_expert_used: int | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.show and (self.model or self.file or self.output):
            raise UsageError("--show reads a trace that is there: without a model, -f and -o")
        if not self.show and not self.output:
            raise UsageError("name the file to write with -o FILE, or a trace to read with --show")

    def loading(self) -> Options:
        """Return how the model is loaded: no larger context than is needed."""
        return Options(
            model=self.model,
            ctx_size=self.ctx_size or self.tokens or None,
            threads=self.threads,
            memory=self.memory,
            policy=self.policy,
            predictor=self.predictor,
            n_expert_used=self.n_expert_used,
            warm_start=False,
            batch_size=self.batch,
            ubatch_size=min(self.ubatch, self.batch),
        )


@dataclass(frozen=True)
class PrepareOptions:
    """One value for each flag of `hobbit prepare`, by the name of its parameter."""

    model: str | None = None
    low: str = "auto"
    imatrix: str = "auto"
    output: Path | None = None
    threads: int | None = None
    nested: bool = False
    low_file: Path | None = None
    file: Path | None = None
    calibration: bool = True
    plot: Path | None = None
    memory: str = "auto"
    force: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        made = (self.low, self.imatrix, self.output) != ("auto", "auto", None)
        if self.low_file and made:
            raise UsageError("--low-file is calibrated as it is: --low, --imatrix and -o make one")
        if self.nested and (self.low_file or self.low != "auto"):
            raise UsageError("--nested makes low copies of its own: without --low and --low-file")
        if not self.calibration and (self.low_file or self.file or self.plot):
            raise UsageError("--no-calibrate leaves nothing to do for --low-file, -f and --plot")

    @property
    def n_threads(self) -> int:
        return self.loading().n_threads

    def loading(self) -> Options:
        """Return how the model is named and loaded."""
        return Options(model=self.model, threads=self.threads, memory=self.memory, warm_start=False)


@dataclass(frozen=True)
class PlanOptions:
    """One value for each flag of `hobbit plan`, by the name of its parameter."""

    name: str | None = None
    model: str | None = None
    memory: str = "auto"
    for_tok_s: float | None = None
    read_gbps: float | None = None
    device: str | None = None
    vram: str = "auto"
    rpc: str | None = None
    gpu_layers: str = "auto"
    device_gbps: float | None = None
    quality: str = "exact"
    n_expert_used: int | None = None
    ctx_size: int | None = None
    threads: int | None = None
    ubatch_size: int = 512
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    remeasure: bool = False
    llama_cpp: bool = False
    json_output: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        self.loading()
        if self.device is None and self.rpc is None:
            if self.vram not in ("auto", "0"):
                parse_size(self.vram)  # of a card that is not here
        else:
            device_arguments(self.device, self.vram, self.rpc)

    def loading(self) -> Options:
        """Return how the model would be loaded, which checks the flags that are shared."""
        return Options(
            model=self.model_name,
            threads=self.threads,
            ctx_size=self.ctx_size,
            ubatch_size=self.ubatch_size,
            cache_type_k=self.cache_type_k,
            cache_type_v=self.cache_type_v,
            gpu_layers=self.gpu_layers,
        )

    @property
    def there(self) -> dict[str, Any]:
        """The device that is asked about, as the arguments of `hobbit.plan`."""
        if self.device is None and self.rpc is None:
            asked: dict[str, Any] = {"vram": self.vram}
        else:
            asked = device_arguments(self.device, self.vram, self.rpc)
            asked.pop("dispatch", None)
        layers = _gpu_layers(self.gpu_layers)
        return asked | {"device_gbps": self.device_gbps, "n_gpu_layers": layers}

    @property
    def model_name(self) -> str | None:
        return self.model or self.name

    @property
    def n_threads(self) -> int:
        return self.loading().n_threads

    @property
    def type_k(self) -> int:
        return KV_TYPES[self.cache_type_k]

    @property
    def type_v(self) -> int:
        return KV_TYPES[self.cache_type_v]


# With llama.cpp's numbers.
_SPLIT_MODES = {"none": 0, "layer": 1, "row": 2}
_CHOICES: dict[str, tuple[str, ...]] = {
    "split_mode": tuple(_SPLIT_MODES),
    "flash_attn": ("auto", "on", "off"),
    "io": ("auto", "direct", "buffered"),
    "dispatch": DISPATCHES,
    "color": ("auto", "always", "never"),
    "stats": STATS,
    "resident_low": ("auto", "on", "off"),
    "cache_type_k": tuple(KV_TYPES),
    "cache_type_v": tuple(KV_TYPES),
}


# A file's name has 255 bytes at most, and there is more in it than this.
_LONGEST_NAME = 200
_SESSION_NAME = re.compile(r"\w[\w.-]*")


def is_session_name(name: str) -> bool:
    """Whether a session can have that name: it is also its file's, and never a path."""
    return bool(_SESSION_NAME.fullmatch(name)) and len(name.encode()) <= _LONGEST_NAME


def read_prompt(options: Options, stdin: TextIO | None) -> str:
    """Join what stdin, -f, -p and the command line say, in this order; stdin is not a terminal."""
    parts = [stdin.read() if stdin else ""]
    parts.append(_contents(options.file).removesuffix("\n") if options.file else "")
    typed = [options.prompt or "", " ".join(options.prompt_words)]
    parts += [_unescaped(text) for text in typed] if options.escape else typed
    prompt = "\n".join(part for part in parts if part)
    if prompt.strip():
        return prompt
    if options.is_demo:
        return ""
    raise UsageError(
        f"no prompt: hobbit run {options.model_name or options.hf_repo} 'Why is the sky blue?', "
        "or -p TEXT, -f FILE, or text on stdin"
    )


_ESCAPE = re.compile(r"""\\(?:([ntr'"\\])|x([0-9a-fA-F]{2}))""")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r"}


def _unescaped(text: str) -> str:
    """Replace the escapes that llama.cpp knows."""
    return _ESCAPE.sub(lambda m: chr(int(m[2], 16)) if m[2] else _ESCAPED.get(m[1], m[1]), text)


def system_prompt(options: Options) -> str:
    if options.system_prompt_file:
        return _contents(options.system_prompt_file).removesuffix("\n")
    return options.system_prompt or ""


# llama.cpp's sampling defaults: the flag's field, the key by which a model sets its own, the value.
_SAMPLING = (
    ("temp", "temp", 0.8),
    ("top_k", "top_k", 40),
    ("top_p", "top_p", 0.95),
    ("min_p", "min_p", 0.05),
    ("repeat_penalty", "penalty_repeat", 1.0),
)


def grammar(options: Options) -> str:
    """Return the grammar of the answer as checked GBNF text; empty when there is none."""
    return parsed_grammar(
        _text_or_file(options.grammar, options.grammar_file),
        _text_or_file(options.json_schema, options.json_schema_file),
    )


def sampling(options: Options, metadata: Callable[[str, Any], Any], grammar: str = "") -> Sampling:
    """Resolve the sampling settings: a flag, else the model's own wish, else llama.cpp's default.

    A random seed is drawn here so that it can be reported.
    """
    values: dict[str, Any] = {}
    for name, key, default in _SAMPLING:
        own = metadata(f"general.sampling.{key}", default)
        flag = getattr(options, name)
        values[name] = flag if flag is not None else type(default)(own)
    limit = options.predict
    if limit is None and options.is_demo:
        limit = DEMO_TOKENS
    return Sampling(
        max_tokens=None if limit is None or limit < 0 else limit,
        temperature=values.pop("temp"),
        **values,
        seed=secrets.randbits(31) if options.seed == -1 else options.seed,
        stop=options.reverse_prompt,
        grammar=grammar,
    )


def chosen_quality(options: Options, layout: Layout) -> Quality:
    """Return what -Q, --t1 and --t2 come to for this model."""
    low = options.low_file.expanduser() if options.low_file else None
    return choose(
        layout,
        options.quality,
        low,
        t1=options.t1,
        t2=options.t2,
        patience=options.patience,
        deterministic=options.deterministic,
    )


def model_arguments(options: Options, trained_context: int) -> dict[str, Any]:
    """Turn flags into the keyword arguments of `hobbit.Llama`."""
    context = options.ctx_size
    if context is None:
        context = min(DEFAULT_CONTEXT, trained_context or DEFAULT_CONTEXT)
    threads, batch = options.n_threads, options.threads_batch
    arguments: dict[str, Any] = {
        # llama.cpp rounds up likewise; llama-cpp-python has to know of it.
        "n_ctx": padded(context, 256),
        "n_batch": options.batch_size,
        "n_ubatch": options.ubatch_size,
        "n_threads": threads,
        "n_threads_batch": batch if batch is not None and batch > 0 else threads,
        "n_gpu_layers": _gpu_layers(options.gpu_layers),
        "main_gpu": options.main_gpu,
        "split_mode": _SPLIT_MODES[options.split_mode],
        "memory": options.memory,
        "policy": options.policy,
        "predict": options.predictor,
        "io": options.io,
        "io_threads": options.io_threads,
        **device_arguments(options.device, options.vram, options.rpc, options.dispatch),
        "resident_low": options.resident_low,
        "n_expert_used": options.n_expert_used,
        "warm_start": options.warm_start,
        "verbose": options.verbose > 1,
    }
    # llama.cpp needs flash attention for a quantised V cache.
    quantised = _is_quantised(options.cache_type_v)
    if options.flash_attn == "on" or (options.flash_attn == "auto" and quantised):
        arguments["flash_attn"] = True
    for name, value in (("type_k", options.cache_type_k), ("type_v", options.cache_type_v)):
        if value != "f16":
            arguments[name] = KV_TYPES[value]
    return arguments


def _is_quantised(kind: str) -> bool:
    return kind not in ("f32", "f16", "bf16")


def device_arguments(
    device: str | None, vram: str, rpc: str | None, dispatch: str = "auto"
) -> dict[str, Any]:
    """Return the arguments of `hobbit.Llama` that name a device; none of them for "none"."""
    named = None if device == "none" else device
    if named is not None and "," in named:
        raise UsageError(f"--device {device}: experts go to one device: name one of them")
    if device == "none" and rpc is not None:
        raise UsageError("--device none and --rpc: is a device to be used or not?")
    if named is None and rpc is None:
        if vram != "auto":
            raise UsageError(f"--vram {vram}: name the device, --device, or a server, --rpc")
        if dispatch != "auto":
            raise UsageError(f"--dispatch {dispatch}: name the device, --device, or --rpc")
        return {}
    if vram != "auto":
        parse_size(vram)
    if dispatch not in DISPATCHES:
        raise UsageError(f"--dispatch {dispatch}: must be one of {', '.join(DISPATCHES)}")
    return {"device": named, "vram": vram, "rpc": rpc, "dispatch": dispatch}


def _gpu_layers(text: str) -> int:
    named = {"auto": 0, "all": -1}
    if text in named:
        return named[text]
    if not text.removeprefix("-").isdecimal():
        raise UsageError(f"-ngl {text}: must be a number, auto or all")
    return int(text)


def _text_or_file(text: str | None, file: Path | None) -> str:
    return _contents(file) if file else text or ""


def _contents(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read {path}: {reason}") from exc
