"""What `hobbit run` was asked to do, checked, and turned into what the library takes."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .cpus import physical_cores
from .errors import UsageError
from .generate import Sampling, parsed_grammar
from .gguf_file import padded
from .policy import DEFAULT, parse_policy
from .prediction import Prediction, parse_prediction
from .quality import Quality, choose

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
# llama.cpp takes 32 bits, of which the largest number means a random seed.
MAX_SEED = 2**32 - 2
DEFAULT_POLICY = str(DEFAULT)
DEFAULT_PREDICTOR = str(Prediction())

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
    json_output: bool = False
    no_stream: bool = False
    think: bool | None = None
    hide_thinking: bool = False
    panel: bool = False
    verbose: int = 0
    quiet: bool = False
    color: str = "auto"

    def __post_init__(self) -> None:
        for name in _CHOICES:
            allowed, value = _CHOICES[name], getattr(self, name)
            if value not in allowed:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} {value}: must be one of {', '.join(allowed)}")
        for flag, count in (("-t", self.threads), ("-tb", self.threads_batch)):
            if count is not None and count > MAX_THREADS:
                raise UsageError(f"{flag} {count}: must be at most {MAX_THREADS}")
        if self.predict is not None and self.predict < -2:
            raise UsageError(f"-n {self.predict}: must be a number of tokens, or -1 for no limit")
        if self.vram != "auto" and not self.device and not self.rpc:
            raise UsageError(f"--vram {self.vram}: name the device, --device, or a server, --rpc")
        if self.record and self.replay:
            raise UsageError("--record and --replay: a run does one of the two")
        if not -1 <= self.seed <= MAX_SEED:
            raise UsageError(f"--seed {self.seed}: must be -1 (random), or from 0 to {MAX_SEED}")
        _gpu_layers(self.gpu_layers)
        parse_policy(self.policy)
        parse_prediction(self.predictor)

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
    def wants_chat(self) -> bool:
        """Whether nothing speaks against a conversation: no prompt, and nothing for one answer."""
        prompt = self.prompt or self.file or self.prompt_words
        once = self.json_output or self.record or self.replay or self.predict == 0
        return not (prompt or once)

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
    json_output: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
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
    vram: str = "0"
    quality: str = "exact"
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
        if self.vram not in ("0", "auto"):
            raise UsageError(f"--vram {self.vram}: experts are computed on the CPU: use 0")
        self.loading()

    def loading(self) -> Options:
        """Return how the model would be loaded, which checks the flags that are shared."""
        return Options(
            model=self.model_name,
            threads=self.threads,
            cache_type_k=self.cache_type_k,
            cache_type_v=self.cache_type_v,
        )

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


_CHOICES: dict[str, tuple[str, ...]] = {
    "flash_attn": ("auto", "on", "off"),
    "io": ("auto", "direct", "buffered"),
    "color": ("auto", "always", "never"),
    "resident_low": ("auto", "on", "off"),
    "cache_type_k": tuple(KV_TYPES),
    "cache_type_v": tuple(KV_TYPES),
}


def read_prompt(options: Options, stdin: TextIO | None) -> str:
    """Join what stdin, -f, -p and the command line say, in this order; stdin is not a terminal."""
    parts = [stdin.read() if stdin else ""]
    parts.append(_contents(options.file).removesuffix("\n") if options.file else "")
    parts += [options.prompt or "", " ".join(options.prompt_words)]
    prompt = "\n".join(part for part in parts if part)
    if prompt.strip():
        return prompt
    if options.is_demo:
        return ""
    raise UsageError(
        f"no prompt: hobbit run {options.model_name or options.hf_repo} 'Why is the sky blue?', "
        "or -p TEXT, -f FILE, or text on stdin"
    )


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
        "memory": options.memory,
        "policy": options.policy,
        "predict": options.predictor,
        "io": options.io,
        "io_threads": options.io_threads,
        "device": options.device,
        "vram": options.vram,
        "rpc": options.rpc,
        "resident_low": options.resident_low,
        "warm_start": options.warm_start,
        "verbose": options.verbose > 1,
    }
    # llama.cpp needs flash attention for a quantised V cache.
    quantised = options.cache_type_v not in ("f32", "f16", "bf16")
    if options.flash_attn == "on" or (options.flash_attn == "auto" and quantised):
        arguments["flash_attn"] = True
    for name, value in (("type_k", options.cache_type_k), ("type_v", options.cache_type_v)):
        if value != "f16":
            arguments[name] = KV_TYPES[value]
    return arguments


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
