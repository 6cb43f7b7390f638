"""`hobbit.Llama`: llama_cpp.Llama with experts streamed from disk under a memory cap."""

from __future__ import annotations

import atexit
import difflib
import inspect
import json
import resource
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import llama_cpp
import llama_cpp._internals as upstream_internals
import llama_cpp.llama as upstream_llama
import llama_cpp.llama_cpp as upstream_api
import numpy as np
import numpy.typing as npt

from . import _log, batches, usage
from ._native import CancelFlag
from .arena import Arena, plan_arena, resolve_vram
from .attempt import check_graph
from .cpus import has_amx
from .devices import Device, connect, dispatch_number
from .errors import (
    Cancelled,
    DeviceError,
    HobbitError,
    ModelError,
    PlanError,
    UnsupportedModelError,
    UsageError,
)
from .fingerprint import fingerprint
from .gguf_file import GGUF, open_gguf
from .guarded import Guarded
from .layout import Layout, build_layout, used_key
from .memory import Cap, Line, MemoryPlan, SlotBytes, plan, resolve_cap, total_memory
from .mix import mix_for
from .offload import Offloaded, bytes_on
from .planning.parts import (
    PROCESS_GROWTH,
    batch_bytes,
    output_bytes,
    process_line,
    router_bytes,
    scratch_bytes,
)
from .policy import DEFAULT, Policy, parse_policy
from .prediction import Prediction, parse_prediction
from .quality import EXACT_NAME, Quality, choose, low_copies
from .rule import ALL_LOW, EXACT, Rule
from .schedule import read_note
from .sizes import format_size, parse_size
from .stats import LayerLookUps, Stats
from .streamed import (
    PREDICTORS,
    ContextMemory,
    ExpertInputs,
    Io,
    StreamedModel,
    made,
    measure,
)

T = TypeVar("T")
ResidentLow = Literal["auto", "on", "off"]

# Arguments that llama-cpp-python once had; scripts still pass them.
_DEAD_ARGUMENTS = {"n_gqa", "n_parts", "f16_kv", "rms_norm_eps", "mul_mat_q", "low_vram"}
_UPSTREAM = inspect.signature(llama_cpp.Llama.__init__).parameters
_LLAMA_DECODE_ABORTED = "llama_decode returned 2"


class Llama(llama_cpp.Llama):  # type: ignore[misc]
    """A drop-in for llama_cpp.Llama that runs MoE models bigger than its memory cap.

    Takes the arguments of llama_cpp.Llama, with the same meaning and defaults but for `verbose`,
    which is off, and:

    memory: cap on everything the process holds: bytes, "8G", "50%" or "auto".
    cache_bytes: size of the expert cache in place of what the cap allows; "floor" is the smallest.
    io: "direct" reads bypass the page cache; "auto" tries that first.
    io_threads: reader threads; 0 chooses.
    quality: "exact", or a promise that `hobbit prepare` has measured: "high", "balanced", "fast",
    or the mean KL divergence to exact that is allowed. A Quality is one that was chosen before.
    low: path of a GGUF with the same experts in fewer bits; default: what `hobbit prepare` made.
    deterministic: the output does not depend on the cache's size or past.
    rule: which experts may be low or skipped, in place of a quality.
    resident_low: keep all low copies in memory, so that nothing waits for a read: "on", "off", or
    "auto", where they fit and even all of them together keep the promise.
    warm_start: after the load, read in the background the experts that earlier runs used most, as
    far as there is room, and at the close remember those of this run, in hobbit's cache folder.
    policy: who is evicted from the expert cache: a name ("decay", "hobbit", "lcu", "lfru", "lfu",
    "lru"), perhaps with settings ("decay:half_life=64"), or a Policy.
    predict: who says which experts the next layers will use: "gate", "map", "none", or "auto",
    which tries; perhaps with settings ("gate:depth=2,always", "map:maps=512"), or a Prediction.
    device: ggml's name of a device that is to hold experts too and compute those it holds, while
    the CPU computes others.
    vram: how much of the device's memory they get: "4G", bytes, or "auto", most of what is free.
    rpc: HOST:PORT of a llama.cpp RPC server, whose first device is the default for `device`.
    dispatch: who computes an expert: "auto", by what it costs; "device", which gets a copy of what
    it does not have; "cpu"; or "split", the device what is there and the CPU the rest.
    upload: what is copied to the device at most for each token that is processed, but for what is
    copied to be computed at once.
    n_expert_used: experts of a layer that a token uses, in place of the model's own number; what
    `kv_overrides` say of it means the same. With another number nothing is exact, and quality may
    only be "exact" or a rule, which are then called after it.
    on_plan: called with the memory plan before anything of it is allocated.

    A model without experts runs as in llama_cpp, with `plan.mode` "resident". One generation at a
    time; `cancel`, `stats` and `plan` from any thread. Raises the errors of `hobbit.errors`.
    """

    def __init__(
        self,
        model_path: str,
        *,
        memory: str | int = "auto",
        cache_bytes: int | Literal["floor"] | None = None,
        io: Io = "auto",
        io_threads: int = 0,
        quality: str | float | Quality = EXACT_NAME,
        low: str | None = None,
        deterministic: bool = False,
        rule: Rule | None = None,
        resident_low: ResidentLow = "auto",
        warm_start: bool = False,
        policy: str | Policy = DEFAULT,
        predict: str | Prediction = "auto",
        device: str | None = None,
        vram: str | int = "auto",
        rpc: str | None = None,
        dispatch: str = "auto",
        upload: str | int = "16MiB",
        n_expert_used: int | None = None,
        on_plan: Callable[[MemoryPlan], None] | None = None,
        verbose: bool = False,
        **arguments: Any,
    ) -> None:
        self._streamed: StreamedModel | None = None
        self._is_abandoned = False
        # Of a load, which cannot be cancelled: a server that hangs would be waited for.
        self._progress: Callable[[], int] | None = None
        self._cancelled = CancelFlag()
        self._counted = Stats()
        self._tells_control = False
        self._sequences: set[int] = set()  # that `decode` saw and that did not end
        self.on_progress: Callable[[int, int], None] | None = None
        self._warmed = False
        self._measured = ContextMemory()
        self._arena: Arena | None = None
        self._device: Device | None = None
        self._guard: Guarded | None = None  # where devices have layers of llama.cpp's
        self._process_bytes = 0  # before anything was loaded; known with the first plan
        self._own_arguments: dict[str, Any] = {
            "memory": memory,
            "cache_bytes": cache_bytes,
            "io": io,
            "io_threads": io_threads,
            "quality": quality,
            "low": low,
            "deterministic": deterministic,
            "rule": rule,
            "resident_low": resident_low,
            "warm_start": warm_start,
            "policy": policy,
            "predict": predict,
            "device": device,
            "vram": vram,
            "rpc": rpc,
            "dispatch": dispatch,
            "upload": upload,
            "n_expert_used": n_expert_used,
        }
        arguments = _known(arguments)
        self._batch_arguments = [
            arguments.get(name, _UPSTREAM[name].default) for name in ("n_batch", "n_ubatch")
        ]
        if io not in ("auto", "direct", "buffered"):
            raise UsageError(f"io is {io!r}: use auto, direct or buffered")
        if resident_low not in ("auto", "on", "off"):
            raise UsageError(f"resident_low is {resident_low!r}: use auto, on or off")
        if vram != "auto" and device is None and rpc is None:
            raise UsageError(f"vram {vram} of what device? Name one with device, or a server (rpc)")
        dispatch_number(dispatch)
        self.policy = parse_policy(policy) if isinstance(policy, str) else policy
        self.prediction = parse_prediction(predict) if isinstance(predict, str) else predict
        gguf = open_gguf(Path(model_path))
        layout = build_layout(gguf, _expert_number(gguf, n_expert_used, arguments))
        self._plain_arguments = arguments
        if layout.other_number:
            arguments["kv_overrides"] = (arguments.get("kv_overrides") or {}) | layout.kv_overrides
        self._asked_quality = _chosen(layout, self._own_arguments)
        self.quality: Quality = self._asked_quality
        # A nested copy cannot be without its low copies.
        self.layout: Layout = layout if layout.low else replace(layout, low=self.quality.low)
        self._cap = _cap(memory, cache_bytes)
        self._on_plan = on_plan
        self.plan: MemoryPlan
        if arguments.get("lora_path"):
            _refuse_expert_lora(str(arguments["lora_path"]), self.layout)
        try:
            with _patched(self):
                super().__init__(str(model_path), verbose=verbose, **arguments)
        except BaseException as error:
            self.close()
            if isinstance(error, ValueError) and not isinstance(error, HobbitError):
                raise UnsupportedModelError(f"{model_path}: {error}") from error
            raise
        self._fill_context()

    def _fill_context(self) -> None:
        """Make room for as many tokens as llama.cpp does: it rounds n_ctx up."""
        rows = self.n_ctx()
        if rows > self.context_params.n_ctx:  # what it was asked for, and parent's arrays have
            self.input_ids: npt.NDArray[np.intc] = np.ndarray((rows,), dtype=np.intc)
            if self._logits_all:
                self.scores: npt.NDArray[np.single] = np.ndarray((rows, self.n_vocab()), np.single)

    @cached_property
    def fingerprint(self) -> str:
        """What tells the model from others: see `hobbit.fingerprint`."""
        return fingerprint(self.layout.gguf)

    @property
    def stats(self) -> Stats:
        """Counters since the model was loaded."""
        common = {
            "cap_bytes": self._cap.bytes,
            "peak_bytes": _peak_bytes(),
            "mode": self.plan.mode,
        }
        counted = self._counted.to_dict()
        fields = {name: counted[name] for name in Stats.__dataclass_fields__} | common
        if self._streamed is not None:
            c = self._streamed.counters()
            fields |= {
                "hits": c.hits,
                "misses": c.misses,
                "evictions": c.evictions,
                "read_bytes": c.read_bytes,
                "read_low_bytes": c.read_low_bytes,
                "pairs_high": c.pairs_high,
                "pairs_low": c.pairs_low,
                "pairs_skip": c.pairs_skip,
                "scored": c.scored,
                "unscored": c.unscored,
                "promotions": c.promotions,
                "stand_ins": c.stand_ins,
                "predicted": c.predicted,
                "predicted_right": c.predicted_right,
                "ahead": c.ahead,
                "ahead_used": c.ahead_used,
                "ahead_bytes": c.ahead_bytes,
                "ahead_wasted_bytes": c.ahead_wasted_bytes,
                "predictor": PREDICTORS[c.predictor],
                "device_hits": c.device_hits,
                "device_pairs": c.device_pairs,
                "device_low_pairs": c.device_low_pairs,
                "device_bytes": c.device_bytes,
                "device_brought": c.device_brought,
                "split_s": c.split_ns * 1e-9,
                "split_cpu_s": c.split_cpu_ns * 1e-9,
                "split_device_s": c.split_device_ns * 1e-9,
                "split_longer_s": c.split_longer_ns * 1e-9,
                "break_even_tokens": c.break_even_pairs,
                "device_s": c.device_ns * 1e-9,
                "device_wait_s": c.device_wait_ns * 1e-9,
                "stall_s": c.stall_ns * 1e-9,
                "moe_s": c.compute_ns * 1e-9,
                "predict_s": c.predict_ns * 1e-9,
                "manage_s": c.manage_ns * 1e-9,
                "io": "direct" if c.direct_io else "buffered",
                "cache_bytes": c.cache_bytes,
            }
        return Stats(**fields)

    @property
    def arena(self) -> Arena | None:
        """What a device has of the experts; None without one."""
        return self._arena

    @property
    def offloaded(self) -> tuple[Offloaded, ...]:
        """What llama.cpp's layers (n_gpu_layers) take of devices' own memory."""
        return self._measured.offloaded

    @property
    def look_ups(self) -> list[LayerLookUps]:
        """The hits and misses of `stats` by layer; none where nothing streams."""
        return self._streamed.look_ups() if self._streamed is not None else []

    @property
    def rule(self) -> Rule:
        """Which experts may be low or skipped; a new rule is in force from the next layer on."""
        return self.quality.rule

    @rule.setter
    def rule(self, rule: Rule) -> None:
        if rule.needs_low and not self.layout.low:
            raise UsageError("this rule needs low-precision experts: name them with low=")
        if rule.is_exact and self.plan.low_is_resident:
            raise UsageError("with resident low copies nothing is exact: load the model without")
        self._moe().set_rule(rule)
        quality = Quality("rule", rule, self.layout.low).of(self.layout)
        self.quality = self._asked_quality = quality

    def takes_quality(self, quality: Quality) -> bool:
        """Whether `set_quality` can put it in force: with the cache that there is."""
        if quality.low is not None and self.layout.low is None:
            return False
        return not self.plan.low_is_resident or quality.all_low is not None

    def set_quality(self, quality: str | float | Quality) -> None:
        """Change the quality of a loaded model; it is in force from the next layer on.

        Raises UsageError, and changes nothing, where that needs another cache: where the model was
        loaded without the low copies, or keeps all of them in memory.
        """
        if not isinstance(quality, Quality):
            deterministic = self._own_arguments["deterministic"]
            quality = choose(self.layout, quality, deterministic=deterministic)
        quality = quality.of(self.layout)
        if not self.takes_quality(quality):
            raise UsageError(f"quality {quality.name} needs the model to be loaded with it")
        settled = self._settled(quality.at(self.plan.cached_share))
        if self._streamed is not None or not settled.rule.is_exact:
            self._moe().set_rule(settled.rule)
        self._asked_quality, self.quality = quality, settled

    @contextmanager
    def using(self, quality: Quality) -> Iterator[None]:
        """While it lasts, compute at another quality; see `set_quality`.

        No other cap may be set meanwhile.
        """
        before = self._asked_quality
        self.set_quality(quality)
        try:
            yield
        finally:
            self.set_quality(before)

    def set_memory(self, memory: str | int) -> None:
        """Change the cap of a loaded model, from any thread and also while it generates.

        The cache of experts is made anew; those used most so far are read back in the background.
        Raises PlanError, and changes nothing, where the cap is too small; so does a model that
        does not stream, all of which is in memory.
        """
        self._check_not_lost()
        before = self._cap, self.plan, self.quality, self._own_arguments
        self._own_arguments = self._own_arguments | {"memory": memory, "cache_bytes": None}
        try:
            self._cap = _cap(memory, None)
            slot_bytes = self._streamed.slot_bytes() if self._streamed else ()
            self._make_plan(slot_bytes)
        except HobbitError:
            self._cap, self.plan, self.quality, self._own_arguments = before
            raise
        if self._streamed is not None:
            self._fill_plan(self._streamed)
            uses = self._streamed.usage()
            everything = self.plan.mode == "resident-experts"
            self._streamed.warm(usage.order(uses, everything=everything))

    def set_dispatch(self, dispatch: str) -> None:
        """Change who computes an expert, from the next layer on; the model has a device."""
        self._check_not_lost()
        if self._arena is None or self._streamed is None:
            raise UsageError("the model has no device: name one with device, or a server (rpc)")
        self._streamed.set_dispatch(dispatch)
        self._own_arguments["dispatch"] = dispatch

    @property
    def dispatch(self) -> str | None:
        """Who computes an expert; None without a device."""
        return self._own_arguments["dispatch"] if self._arena is not None else None

    def forget(self) -> None:
        """Drop every cached expert."""
        self._moe().forget()

    @contextmanager
    def recorded(self, path: Path) -> Iterator[None]:
        """While it lasts, write to `path` which precision each expert gets."""
        with self._moe().schedule(str(path), json.dumps(self._identity())):
            yield

    @contextmanager
    def replayed(self, path: Path) -> Iterator[None]:
        """While it lasts, give each expert the precision that was recorded.

        The same tokens in the same batches then give the same logits, whatever is cached. Raises
        ModelError for a recording of another model; what departs from it fails as a ReadError.
        """
        # Recordings of before were all made with the model's own number.
        recorded = {"n_expert_used": self.layout.own_expert_used} | read_note(path)
        for name, value in self._identity().items():
            if recorded.get(name) != value:
                raise ModelError(
                    f"{path}: was recorded with {name} {recorded.get(name)}, this run has {value}"
                )
        with self._moe().schedule(str(path)):
            yield

    @contextmanager
    def traced(self, path: Path | str, *, probs: bool = False) -> Iterator[None]:
        """While it lasts, write to `path` which experts the router chooses: see docs/trace.md.

        With `probs` also its softmax over all experts, where it has one. `forget` before, if the
        trace shall tell all that decides what is cached. Raises HobbitError without streaming
        experts, ReadError when the file cannot be written.
        """
        moe, gguf = self._moe(), self.layout.gguf
        note = self._identity() | {
            "name": str(gguf.get("general.name", gguf.parts[0].path.name)),
            "architecture": gguf.arch,
            "own_expert_used": self.layout.own_expert_used,
            "rule": asdict(self.rule),
            "low_is_resident": self.plan.low_is_resident,
            "nested": any(m.plane_bytes for g in self.layout.groups for m in g.matrices),
            "cached": moe.counters().n_cached,
        }
        with moe.trace(str(path), json.dumps(note), probs):
            yield

    def _identity(self) -> dict[str, Any]:
        """What a precision schedule is of."""
        low = self.layout.low.gguf if self.layout.low else None
        return {
            "model": self.fingerprint,
            "low": fingerprint(low) if low else None,
            "n_expert_used": self.layout.n_expert_used,
            "n_batch": self.context_params.n_batch,
            "n_ubatch": self.context_params.n_ubatch,
            "renormalise": self.rule.renormalise,
            "per_token": self.rule.per_token,
            "substitute": self.rule.substitute,
        }

    def observe(self) -> AbstractContextManager[npt.NDArray[np.int64]]:
        """While it lasts, count the scores s > 0 of (token, expert) pairs.

        The array is [n_groups, bins], with equal bins over 0 to 1.
        """
        return self._moe().observe()

    def collect(self) -> AbstractContextManager[dict[str, ExpertInputs]]:
        """While it lasts, sum the squares of what enters each expert matrix, by tensor name."""
        return self._moe().collect()

    def _moe(self) -> StreamedModel:
        self._check_not_lost()
        if self._streamed is None:
            raise HobbitError("the model has no experts that stream, or is closed")
        return self._streamed

    @contextmanager
    def telling_control(self) -> Iterator[None]:
        """While it lasts, the texts of control tokens are part of what is generated."""
        self._tells_control = True
        try:
            yield
        finally:
            self._tells_control = False

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """Return the bytes of tokens; see llama_cpp.Llama.detokenize."""
        text: bytes = super().detokenize(tokens, prev_tokens, special or self._tells_control)
        return text

    def cancel(self, on: bool = True) -> None:
        """Stop the running evaluation, or else the next, within a layer: it raises Cancelled.

        From any thread. False takes it back, where nothing was running.
        """
        self._cancelled.set(on)

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens; see llama_cpp.Llama.eval. Raises ReadError and Cancelled.

        `on_progress` is called with the tokens done and all of them, before each ubatch of a prompt
        and at its end; what it raises ends the evaluation.
        """
        if self._ctx.ctx is None:
            raise HobbitError("the model is closed")
        self._check_not_lost()
        before = self.n_tokens
        if before == 0 and self._streamed is not None:
            self._streamed.new_sequence()
        is_prompt = len(tokens) != 1 or before == 0
        start = time.perf_counter()
        try:
            with self.translated_errors():
                if is_prompt and self.on_progress is not None:
                    self._eval_prompt(tokens, self.on_progress)
                else:
                    self._eval_batch(tokens)
        finally:
            seconds, done = time.perf_counter() - start, self.n_tokens - before
            new = (
                Stats(tokens_prompt=done, prompt_s=seconds)
                if is_prompt
                else Stats(tokens_generated=done, decode_s=seconds)
            )
            self._counted = self._counted.plus(new)

    def _eval_prompt(self, tokens: Sequence[int], on_progress: Callable[[int, int], None]) -> None:
        """Evaluate ubatch by ubatch, the same ones that llama.cpp makes of each batch."""
        n_batch, n_ubatch = self.n_batch, self.context_params.n_ubatch
        for start in range(0, len(tokens), n_batch):
            batch = tokens[start : start + n_batch]
            for at in range(0, len(batch), n_ubatch):
                on_progress(start + at, len(tokens))
                self._eval_batch(batch[at : at + n_ubatch])
        on_progress(len(tokens), len(tokens))

    def _eval_batch(self, tokens: Sequence[int]) -> None:
        if self._guard is None:
            super().eval(tokens)
            return

        def evaluate() -> None:
            llama_cpp.Llama.eval(self, tokens)
            upstream_api.llama_synchronize(self._ctx.ctx)  # not when somebody asks for logits

        self._guard.call(evaluate, cancels=True)

    def decode(self, batch: Any, context: Any = None) -> None:
        """Call llama_decode on a llama_batch, whose tokens may be of several sequences.

        They share the reads: an expert that several use in one layer is read once. For that
        llama.cpp has to compute them together, which it does where kv_unified is set, or where the
        batch has them in the order of their ids without a gap. What the cache's policy knows of
        their uses stays separate, by seq_id: a sequence begins when none of its tokens are in the
        KV cache. `context` is a llama_context of this model, by default its own; its KV cache and
        its logits are the caller's matter. Raises ReadError, Cancelled, UsageError for a batch that
        llama.cpp cannot take, and HobbitError where the context has no room left.
        """
        if self._ctx.ctx is None:
            raise HobbitError("the model is closed")
        self._check_not_lost()
        context = self._ctx.ctx if context is None else context
        rows = _checked_rows(batch, context)
        present = {row.sequence for row in rows}
        for sequence in sorted(present):
            if self._streamed is not None and _n_past(context, sequence) == 0:
                self._streamed.end_sequence(sequence)  # that had its id before
        start = time.perf_counter()
        with self.translated_errors(), self._telling(rows, context):
            with _log.captured(self.verbose) as said:
                status = self.decode_batch(context, batch)
            if status not in (0, 1, -1):
                raise RuntimeError(f"llama_decode returned {status}")
        if status == 1:
            raise HobbitError("the context has no room left for the tokens of the batch")
        if status == -1:
            raise UsageError(f"llama.cpp refuses the batch: {_log.reason(said)}")
        self._sequences |= present
        seconds = time.perf_counter() - start
        if len(rows) == len(present) and all(row.position > 0 for row in rows):
            new = Stats(tokens_generated=len(rows), decode_s=seconds)
        else:
            new = Stats(tokens_prompt=len(rows), prompt_s=seconds)
        self._counted = self._counted.plus(new)

    def decode_batch(self, context: Any, batch: Any) -> int:
        """Return what llama_decode does, when devices are done with it too."""

        def call() -> int:
            status = int(upstream_api.llama_decode(context, batch))
            if self._guard is not None:
                upstream_api.llama_synchronize(context)
            return status

        return self.guarded(call, cancels=True)

    def logits_row(self, index: int, context: Any = None) -> npt.NDArray[np.float32]:
        """Return the logits [n_vocab] of row `index` of what was decoded last; llama.cpp's own."""
        context = self._ctx.ctx if context is None else context
        row = self.guarded(lambda: upstream_api.llama_get_logits_ith(context, index))
        return np.ctypeslib.as_array(row, shape=(self.n_vocab(),))

    def sample(self, *arguments: Any, **named: Any) -> int:
        """See llama_cpp.Llama.sample."""
        return self.guarded(lambda: int(llama_cpp.Llama.sample(self, *arguments, **named)))

    def end_sequence(self, seq_id: int) -> None:
        """What `decode` saw of this sequence shall no longer count for what is cached.

        Its tokens stay in the KV cache: those are the caller's. Raises UsageError for a sequence
        that is not decoding.
        """
        self._check_not_lost()
        if seq_id not in self._sequences:
            raise UsageError(f"sequence {seq_id} cannot end: nothing of it was decoded")
        self._sequences.remove(seq_id)
        if self._streamed is not None:
            self._streamed.end_sequence(seq_id)

    def _telling(self, rows: Sequence[batches.Row], context: Any) -> AbstractContextManager[None]:
        """Say whose the rows of the next llama_decode are, where their order is known."""
        if self._streamed is None or upstream_api.llama_n_rs_seq(context) > 0:
            return nullcontext()
        n_ubatch, unified = upstream_api.llama_n_ubatch(context), _is_unified(context)
        model = self._model.model
        unified = unified and self.layout.gguf.arch not in batches.NEVER_UNIFIED
        recurrent = upstream_api.llama_model_is_recurrent(model)
        if unified and not recurrent and not upstream_api.llama_model_is_hybrid(model):
            return self._streamed.decoding(rows, batches.consecutive(len(rows), n_ubatch))
        sequential = recurrent or not unified
        return self._streamed.decoding(rows, batches.equal(rows, n_ubatch, sequential=sequential))

    def generate(self, *arguments: Any, **named: Any) -> Any:
        """See llama_cpp.Llama.generate.

        Under a deterministic rule nothing of an earlier prompt is reused: in other batches experts
        would get other precisions.
        """
        if self.rule.deterministic and not self.rule.per_token and named.get("reset", True):
            self.reset()
        return super().generate(*arguments, **named)

    def tokenize(self, *arguments: Any, **named: Any) -> list[int]:
        """See llama_cpp.Llama.tokenize."""
        if llama_cpp.llama_vocab_type(self._model.vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            # llama.cpp aborts the process.
            raise UnsupportedModelError(f"{self.model_path}: has no tokenizer: it takes no text")
        tokens: list[int] = super().tokenize(*arguments, **named)
        return tokens

    def embed(self, *arguments: Any, **named: Any) -> Any:
        """See llama_cpp.Llama.embed."""
        with self.translated_errors():
            return self.guarded(
                lambda: llama_cpp.Llama.embed(self, *arguments, **named), cancels=True
            )

    def reset(self) -> None:
        """See llama_cpp.Llama.reset."""
        self.guarded(lambda: llama_cpp.Llama.reset(self))

    def save_state(self) -> Any:
        """See llama_cpp.Llama.save_state."""
        return self.guarded(lambda: llama_cpp.Llama.save_state(self))

    def load_state(self, state: Any) -> None:
        """See llama_cpp.Llama.load_state."""
        self.guarded(lambda: llama_cpp.Llama.load_state(self, state))

    def close(self) -> None:
        """Free the model, its cache and its threads; harmless when done already."""
        stack = getattr(self, "_stack", None)
        if stack is None or self._is_abandoned:
            return
        try:
            self.guarded(self._remember_usage)  # a lost thread may have the model's lock
            self.guarded(stack.close)
        except DeviceError:
            self._abandon()
            return
        if self._guard is not None:
            self._guard.close()
        if self._device is not None:
            self._device.close()
        self._guard = self._device = self._streamed = None

    def _abandon(self) -> None:
        """Free only the experts, as the lost thread may use the rest: also when Python ends.

        It may come back, and use what it finds here: so that stays what it is, but belongs to
        nobody who would free it. The guard stays too: whatever is asked of it raises.
        """
        self._is_abandoned = True
        if self._streamed is not None:
            self._streamed.abandon()
        owners = [getattr(self, name, None) for name in ("_ctx", "_model")]
        stacks = [self._stack, *(owner._exit_stack for owner in owners if owner is not None)]
        _abandoned.append((self, [stack.pop_all() for stack in stacks]))

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name in _UPSTREAM} | (
            self._own_arguments
        )

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Around calls of llama.cpp on our context: raise ReadError or Cancelled."""
        failure: RuntimeError | None = None
        try:
            with _log.captured(self.verbose):
                yield
        except RuntimeError as error:
            failure = error
        finally:
            self._cancelled.set(False)
        why = self._streamed.take_error() if self._streamed else None
        if why is not None and not isinstance(failure, DeviceError):
            raise why from failure
        if failure is not None and str(failure) == _LLAMA_DECODE_ABORTED:
            raise Cancelled("cancelled") from failure
        if failure is not None:
            raise failure

    def _load(self, params: Any) -> int:
        """In place of llama_model_load_from_file: plan, then load."""
        if not self.layout.groups or params.vocab_only:
            return self._load_resident(params)
        self._check_graph()
        own = self._own_arguments
        device = self._open_device()
        if params.n_gpu_layers != 0:
            self._use_for_layers(device, params)
        streamed = StreamedModel(self.layout, self._cancelled, own["io"], own["io_threads"])
        self._stack.callback(streamed.close)
        self._streamed = streamed
        if device is not None and device.is_remote:
            self._progress = streamed.dense_bytes
        self._measured = self.guarded(
            lambda: measure(streamed.load, params, self._context_params()), progress=self._progress
        )
        if device is not None:
            self._arena = self._plan_arena(device, streamed.slot_bytes())
        self._make_plan(streamed.slot_bytes())
        self._fill_plan(streamed)
        if device is not None and self._arena is not None:
            threads = self.context_params.n_threads
            streamed.use_device(device, self._arena, own["dispatch"], threads)
            streamed.set_policy(self.policy)  # there too
        streamed.set_prediction(self.prediction)
        model = self.guarded(lambda: streamed.load(params, self.verbose), progress=self._progress)
        if own["warm_start"]:
            self._warm(streamed)
        return model

    def _check_graph(self) -> None:
        check_graph(self.layout, self._plain_arguments)

    def _open_device(self) -> Device | None:
        """Open the device that is asked for; it closes after the model."""
        own = self._own_arguments
        name = own["device"]
        if own["rpc"]:
            name = connect(own["rpc"], name)
        if name is None:
            return None
        self._device = Device(name, self.context_params.n_threads)
        return self._device

    def _use_for_layers(self, device: Device | None, params: Any) -> None:
        """Have llama.cpp put its layers on the device, if it is one for that; else on any GPU."""
        if device is not None:
            params.devices = device.for_layers
        if llama_cpp.llama_supports_gpu_offload() if device is None else device.takes_layers:
            self._guard = Guarded(device, self._cancelled)
            _guarded.add(self)

    def guarded(
        self,
        call: Callable[[], T],
        *,
        cancels: bool = False,
        progress: Callable[[], int] | None = None,
    ) -> T:
        """Call what may need a device that has layers of llama.cpp's.

        Raises DeviceError where such a device was lost, and ever after. Ctrl-C is raised after the
        call, which ends early if it `cancels`. The device is lost when `progress` stops.
        """
        if self._guard is None:
            return call()
        return self._guard.call(call, cancels=cancels, progress=progress)

    def _check_not_lost(self) -> None:
        """Raise DeviceError where a device was lost: the thread that is, may have the locks."""
        if self._guard is not None:
            self._guard.check()

    @property
    def is_lost(self) -> bool:
        """Whether it can do nothing any more, as a device was lost that had layers (-ngl)."""
        return self._guard is not None and self._guard.is_lost

    def _plan_arena(self, device: Device, slot_bytes: Sequence[SlotBytes]) -> Arena:
        own = self._own_arguments
        upload = own["upload"]
        token_bytes = parse_size(upload) if isinstance(upload, str) else upload
        taken = bytes_on(device.info.name, self._measured.offloaded)
        vram = resolve_vram(own["vram"], device.info, taken)
        batch = batch_bytes(self.layout, self._context_params().n_ubatch)
        arena = plan_arena(self.layout, device.info, vram, batch, token_bytes)
        if self.layout.low is None:
            return arena
        # Which rule will be in force depends on the plan, and little of that on the arena's slots.
        self._arena = arena
        self._divide(slot_bytes)
        mix = mix_for(self.layout, self._settled(self.quality))
        return plan_arena(self.layout, device.info, vram, batch, token_bytes, mix)

    def _fill_plan(self, streamed: StreamedModel) -> None:
        """Make the expert cache of the plan, with its policy and the rule that fits it."""
        streamed.allocate(self.plan.pools)
        streamed.set_policy(self.policy)
        self.quality = self._settled(self.quality)
        if self.rule != EXACT or self.plan.low_is_resident:
            streamed.set_rule(self.rule)
        if self.plan.low_is_resident:
            streamed.keep_low()

    def _settled(self, quality: Quality) -> Quality:
        """Return the quality with the rule that fits the plan.

        Where everything may be low, what there is room for can be high, where it is asked for.
        """
        if quality.rule == ALL_LOW and quality.all_low is not None:
            if self.plan.low_is_resident:
                return replace(quality, rule=Rule(1.0, 1.0))
            if self.plan.mode == "resident-experts":
                return replace(quality, rule=Rule(1.0, 1.0, patience=2))
        return quality

    def _warm(self, streamed: StreamedModel) -> None:
        """Start to read what earlier runs used most; all experts where there is room for all."""
        self._warmed = True
        if (maps := usage.maps_path(self.fingerprint)) is not None:
            with suppress(HobbitError):  # none yet, or of another size: they will be replaced
                streamed.load_maps(str(maps), self.fingerprint)
        uses = usage.load(self.fingerprint, len(streamed.usage()))
        streamed.warm(usage.order(uses, everything=self.plan.mode == "resident-experts"))

    def _remember_usage(self) -> None:
        if self._streamed is None or not self._warmed:
            return
        usage.save(self.fingerprint, self._streamed.usage())
        if (maps := usage.maps_path(self.fingerprint)) is not None:
            with suppress(HobbitError):  # the disk is full: no harm done
                self._streamed.save_maps(str(maps), self.fingerprint)

    def _load_resident(self, params: Any) -> int:
        if self._own_arguments["device"] or self._own_arguments["rpc"]:
            raise UsageError("the model has no experts that a device could hold")
        params.use_extra_bufts = params.use_extra_bufts and not has_amx()
        if params.load_mode == llama_cpp.LLAMA_LOAD_MODE_MMAP:
            params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE  # mapped pages could be evicted
        if not params.vocab_only:
            self._measured = measure(self._load_path, params, self._context_params())
        self._make_plan(())
        return self._load_path(params)

    def _load_path(self, params: Any) -> int:
        return made(
            lambda: _load_from_file(self.model_path.encode(), params),
            f"{self.model_path}: llama.cpp cannot load it",
            self.verbose,
        )

    def _make_plan(self, slot_bytes: Sequence[SlotBytes]) -> None:
        self._divide(slot_bytes)
        if self._on_plan is not None:
            self._on_plan(self.plan)

    def _divide(self, slot_bytes: Sequence[SlotBytes]) -> None:
        """Plan, and settle on the quality that the plan has room for."""
        cache = self._own_arguments["cache_bytes"]
        # What there is before the model is, whenever the plan is made.
        self._process_bytes = self._process_bytes or resident_bytes() + PROCESS_GROWTH
        process = self._process_bytes

        def divide(cap_bytes: int) -> MemoryPlan:
            parts = [*self._parts(bool(slot_bytes)), process_line(process, cap_bytes)]
            made = plan(self._cap, self.layout, parts, slot_bytes, cache)
            arena = self._arena
            shown = arena.line if arena and not arena.device.shares_memory else None
            layers = tuple(part.line for part in self._measured.offloaded)
            return replace(made, device=shown, layers=layers)

        try:
            self.plan = divide(self._cap.bytes)
        except PlanError as error:
            divide(error.needed_bytes)  # the page tables of the cap that the error is to name
            raise
        self.quality = self._asked_quality.at(self.plan.cached_share)
        if self._keeps_low():
            self.plan = self.plan.with_resident_low()

    def _keeps_low(self) -> bool:
        """Whether all low copies are to stay in memory."""
        wish, quality = self._own_arguments["resident_low"], self.quality
        if wish == "on" and (quality.rule.is_exact or quality.low is None):
            raise UsageError("resident low copies are for a lossy quality: add -Q or --t1 and --t2")
        if wish == "off" or self.plan.mode != "streamed":
            return False
        if wish == "auto":
            return quality.all_low is not None and self.plan.low_fits
        if not self.plan.low_fits:
            needed = self.plan.low_resident_bytes
            raise PlanError(
                f"the low copies of all experts do not fit a memory cap of "
                f"{format_size(self.plan.cap.bytes)}: the smallest that works is "
                f"--memory {-(-needed >> 20)}M, or use --resident-low auto",
                needed,
            )
        return True

    def _parts(self, streams: bool) -> list[Line]:
        """The fixed parts of the plan, but for the process's own."""
        measured = self._measured
        parts = [
            Line("dense", measured.dense, "weights every token needs, in anonymous memory"),
            Line("kv", measured.kv, f"context of {self._context_params().n_ctx} tokens"),
            Line("compute", measured.compute + self._output_bytes(), "buffers of llama.cpp"),
        ]
        if streams:
            parts.append(Line("scratch", self._scratch_bytes(), "gathered rows, reads in flight"))
        if self._arena is not None and self._arena.device.shares_memory:
            parts.append(self._arena.line)
        return parts

    def _context_params(self) -> Any:
        """The context's parameters, with the model's own context length where that is asked for."""
        params = self.context_params
        length = self.layout.gguf.get(f"{self.layout.gguf.arch}.context_length", 0)
        if params.n_ctx == 0 and isinstance(length, int):
            params = type(params).from_buffer_copy(params)
            params.n_ctx = length
            params.n_batch = min(length, self._batch_arguments[0])
            params.n_ubatch = min(params.n_batch, self._batch_arguments[1])
        return params

    def _output_bytes(self) -> int:
        params = self._context_params()
        rounded = -(-params.n_ctx // _CONTEXT_STEP) * _CONTEXT_STEP
        rows = params.n_batch + rounded if self._logits_all else 1
        return output_bytes(self.layout.gguf, rows)

    def _scratch_bytes(self) -> int:
        n_ubatch, io_threads = self._context_params().n_ubatch, self._own_arguments["io_threads"]
        more = self._moe().prediction_bytes(self.prediction)
        more += self._arena.staging(self.layout) if self._arena else 0
        more += router_bytes(self.layout) if self._measured.offloaded else 0
        return scratch_bytes(self.layout, n_ubatch, int(io_threads)) + more


_patch_lock = threading.Lock()
_abandoned: list[Any] = []
# To be closed before Python ends, which then has no thread to do it with.
_guarded: weakref.WeakSet[Llama] = weakref.WeakSet()


@atexit.register
def _close_guarded() -> None:
    for llm in [*_guarded]:
        llm.close()


_load_from_file = upstream_api.llama_model_load_from_file
_init_from_model = upstream_api.llama_init_from_model
_suppress_output = upstream_internals.suppress_stdout_stderr
# llama.cpp rounds n_ctx up to a multiple of it.
_CONTEXT_STEP = 256
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@contextmanager
def _patched(llm: Llama) -> Iterator[None]:
    """The one place where llama-cpp-python is patched, while a constructor of ours runs.

    The parent's constructor builds the parameters and loads in one go: its two calls of the C API
    come here. Other threads' models pass through untouched. It also sends the process's stdout and
    stderr to nowhere while it loads, with whatever `on_plan` and other threads print.
    """
    owner = threading.get_ident()

    def load_from_file(path: bytes, params: Any) -> Any:
        ours = threading.get_ident() == owner
        return llm._load(params) if ours else _load_from_file(path, params)

    def init_from_model(model: Any, params: Any) -> Any:
        if threading.get_ident() != owner:
            return _init_from_model(model, params)
        function, data = llm._cancelled.abort_callback()
        params.abort_callback = upstream_api.ggml_abort_callback(function)
        params.abort_callback_data = data
        return llm.guarded(
            lambda: made(
                lambda: _init_from_model(model, params),
                f"{llm.model_path}: llama.cpp makes no context",
                llm.verbose,
            ),
            progress=llm._progress,
        )

    with _patch_lock:
        upstream_api.llama_model_load_from_file = load_from_file
        upstream_api.llama_init_from_model = init_from_model
        for module in (upstream_internals, upstream_llama):
            module.suppress_stdout_stderr = lambda disable: nullcontext()
        try:
            yield
        finally:
            upstream_api.llama_model_load_from_file = _load_from_file
            upstream_api.llama_init_from_model = _init_from_model
            for module in (upstream_internals, upstream_llama):
                module.suppress_stdout_stderr = _suppress_output


def _is_unified(context: Any) -> bool:
    """Whether all sequences share the cells of one KV buffer."""
    cells, each = upstream_api.llama_n_ctx(context), upstream_api.llama_n_ctx_seq(context)
    return bool(cells == each)


def _checked_rows(batch: Any, context: Any) -> list[batches.Row]:
    """Read a batch; llama.cpp would end the process over one that is empty or too long."""
    most, limit = upstream_api.llama_n_batch(context), upstream_api.llama_n_seq_max(context)
    if not 0 < batch.n_tokens <= most:
        raise UsageError(f"the batch has {batch.n_tokens} tokens: this context takes 1 to {most}")
    rows = batches.read_rows(batch, lambda sequence: _n_past(context, sequence))
    highest = max(sequence for row in rows for sequence in row.sequences)
    if highest >= limit:
        raise UsageError(
            f"the batch has a token of sequence {highest}: this context has {limit} (n_seq_max)"
        )
    return rows


def _n_past(context: Any, sequence: int) -> int:
    """Return the position that the sequence goes on with."""
    memory = upstream_api.llama_get_memory(context)
    return int(upstream_api.llama_memory_seq_pos_max(memory, sequence)) + 1


def _signature() -> inspect.Signature:
    """The parent's parameters with our defaults, then our own."""
    own = inspect.signature(Llama.__init__).parameters
    merged = {name: p for name, p in _UPSTREAM.items() if p.kind is not p.VAR_KEYWORD}
    merged |= {name: p for name, p in own.items() if p.kind is not p.VAR_KEYWORD}
    return inspect.Signature([*merged.values()])


def _known(arguments: dict[str, Any]) -> dict[str, Any]:
    """Drop dead arguments with a warning; raise TypeError for unknown ones, as a function would."""
    for name in [*arguments]:
        if name in _UPSTREAM:
            continue
        if name in _DEAD_ARGUMENTS:
            warnings.warn(f"Llama() ignores {name}: llama.cpp no longer has it", stacklevel=3)
            del arguments[name]
            continue
        near = difflib.get_close_matches(name, inspect.signature(Llama.__init__).parameters, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"Llama() has no argument {name!r}{hint}")
    return arguments


def _chosen(layout: Layout, own: dict[str, Any]) -> Quality:
    """Resolve what was asked for; a rule is a matter of its own."""
    low = Path(own["low"]) if own["low"] is not None else None
    rule, exact = own["rule"], own["quality"] == EXACT_NAME
    if isinstance(own["quality"], Quality):
        return own["quality"].of(layout)
    if rule is None:
        chosen = choose(layout, own["quality"], low, deterministic=own["deterministic"])
        # Named all the same, low copies are there for rules that come later.
        return replace(chosen, low=low_copies(layout, low)) if low and exact else chosen
    if not exact:
        raise UsageError("quality and rule are two ways to say the same: give one")
    rule = replace(rule, deterministic=rule.deterministic or own["deterministic"])
    needed = low is not None or rule.needs_low
    return Quality("rule", rule, low_copies(layout, low) if needed else None).of(layout)


def _expert_number(gguf: GGUF, asked: int | None, arguments: dict[str, Any]) -> int | None:
    """Return how many experts a token is to use, said in either way; None: as the model says."""
    key = used_key(gguf)
    told = (arguments.get("kv_overrides") or {}).get(key, asked)
    for name, value in (("n_expert_used", asked), (f"kv_overrides: {key}", told)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise UsageError(f"{name} is {value!r}: must be a number of experts")
    if asked not in (None, told):
        raise UsageError(f"n_expert_used is {asked}, and kv_overrides say {told}: give one")
    return told


def _cap(memory: str | int, cache_bytes: object) -> Cap:
    """A cache size given outright is not limited by how much memory happens to be free."""
    if memory == "auto" and cache_bytes is not None:
        return Cap(*total_memory())
    return resolve_cap(memory)


def _refuse_expert_lora(path: str, layout: Layout) -> None:
    adapter = open_gguf(Path(path))
    for name in adapter.tensors:
        if name.removesuffix(".lora_a").removesuffix(".lora_b") in layout.streamed:
            raise UnsupportedModelError(
                f"{path}: changes {name}, which streams from disk: merge the adapter into the model"
            )


def _peak_bytes() -> int:
    # getrusage also counts what the process was before exec: its parent's size.
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT


def resident_bytes() -> int:
    """Return what of this process is in memory now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
    return pages * resource.getpagesize()


Llama.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
