"""What `hobbit bench` says: samples as rows, and rows in llama-bench's formats."""

from __future__ import annotations

import csv
import datetime
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from .bench import Case, Measured, Sample, Test
from .cpus import cpu_name
from .policy import DEFAULT
from .prediction import Prediction
from .sizes import format_size

Row = dict[str, Any]

_MIB = 1 << 20
_NS = 1e9
_PHASES: dict[Test, list[str]] = {"pp": ["prompt"], "tg": ["decode"], "pg": ["prompt", "decode"]}
# What llama-bench's rows say besides, of settings that are the same for every arm here: the CPU
# computes, llama.cpp places nothing elsewhere and repacks no weights, threads float.
_FIXED: Row = {
    "build_number": 0,
    "gpu_info": "",
    "cpu_mask": "0x0",
    "cpu_strict": False,
    "poll": 50,
    "n_gpu_layers": 0,
    "n_cpu_moe": 0,
    "split_mode": "none",
    "main_gpu": 0,
    "no_kv_offload": False,
    "devices": "none",
    "tensor_split": "0.00",
    "tensor_buft_overrides": "none",
    "embeddings": False,
    "no_op_offload": 0,
    "no_host": False,
    "repack": False,
    "fit_target": 0,
    "fit_min_ctx": 0,
}
# A part of a token's time, and the counter that it is.
PARTS = {
    "compute_s": "moe_s",
    "stall_s": "stall_s",
    "manage_s": "manage_s",
    "predict_s": "predict_s",
    "device_wait_s": "device_wait_s",
}


@dataclass(frozen=True)
class Phase:
    """The seconds, tokens and counters of what a row is about, in one sample."""

    tokens: int
    seconds: float
    counters: dict[str, float]

    @classmethod
    def of(cls, sample: Sample, test: Test) -> Phase:
        parts = [sample[name] for name in _PHASES[test]]
        counted = {key: sum(part[key] for part in parts) for key in parts[0] if key != "seconds"}
        seconds = sum(sum(part["seconds"]) for part in parts)
        return cls(counted.pop("tokens"), seconds, counted)

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.tokens

    @property
    def streams(self) -> bool:
        """Whether it counts what it reads, as hobbit does."""
        return "read_bytes" in self.counters

    @property
    def hit_rate(self) -> float | None:
        asked = self.counters.get("hits", 0) + self.counters.get("misses", 0)
        return self.counters["hits"] / asked if asked else None

    @property
    def read_bytes(self) -> float:
        """Bytes read for a token: experts, or for stock what the disk gave."""
        return self.counters["read_bytes" if self.streams else "disk_bytes"] / self.tokens

    @property
    def missed_bytes(self) -> float:
        """Of those, what was needed: not what a wrong prediction read."""
        return self.read_bytes - self.counters.get("ahead_wasted_bytes", 0) / self.tokens

    @property
    def device_hit_rate(self) -> float | None:
        """Of the experts asked for, the share that was on a device."""
        asked = self.counters.get("hits", 0) + self.counters.get("misses", 0)
        return self.counters["device_hits"] / asked if asked else None

    def a_token(self, counter: str, unit: float = 1) -> float | None:
        """Return a counter for each token; None for what does not stream."""
        return self.counters[counter] / self.tokens / unit if self.streams else None

    @property
    def accuracy(self) -> float | None:
        """The share of the experts predicted for a next layer that it chose."""
        predicted = self.counters.get("predicted", 0)
        return self.counters["predicted_right"] / predicted if predicted else None

    def breakdown(self) -> dict[str, float | None]:
        """Return where a token's time goes; `rest_s` is what llama.cpp does between the experts."""
        told: dict[str, float | None] = dict.fromkeys([*PARTS, "rest_s"])
        total = self.seconds_per_token
        if self.streams:
            found = {part: self.counters[name] / self.tokens for part, name in PARTS.items()}
            told = {**found, "rest_s": total - sum(found.values())}
        return {"total_s": total, **told}


def bound_s(compute_s: float, missed_bytes: float, disk_bytes_s: float) -> float:
    """Return the seconds a token takes at least: it is computed, and what it misses is read.

    `compute_s` is its time with everything resident; both may go on at the same time.
    """
    return max(compute_s, missed_bytes / disk_bytes_s)


def rows(found: Sequence[Sequence[Measured]]) -> list[Row]:
    """Return a row for each test of each arm: the arms beside each other, test by test."""
    return [
        _row(one, test)
        for arms in found
        for test in arms[0].case.tests
        for one in arms
        if _amount(one.case, test)
    ]


def _amount(case: Case, test: Test) -> int:
    return {"pp": case.n_prompt, "tg": case.n_gen, "pg": case.n_prompt * case.n_gen}[test]


def _row(one: Measured, test: Test) -> Row:
    phases = [Phase.of(sample, test) for sample in one.samples]
    seconds = [phase.seconds for phase in phases]
    rates = [1 / phase.seconds_per_token for phase in phases]
    # The parts of one run add up; medians of each would not.
    middle = sorted(phases, key=lambda phase: phase.seconds)[(len(phases) - 1) // 2]
    ttft = [sum(sample["prompt"]["seconds"]) for sample in one.samples]
    first, setup, case = one.samples[0], one.setup, one.case
    return {
        "hobbit": version("hobbit-moe"),
        "llama_cpp_python": version("llama-cpp-python"),
        "build_commit": f"llama-cpp-python {version('llama-cpp-python')}",
        **_FIXED,
        "cpu_info": cpu_name(),
        "backends": "CPU",
        "model_filename": str(setup.model),
        "model_type": first["model_type"],
        "model_size": first["model_size"],
        "model_n_params": first["model_n_params"],
        "n_batch": case.n_batch,
        "n_ubatch": case.n_ubatch,
        "n_threads": case.n_threads,
        "type_k": case.type_k,
        "type_v": case.type_v,
        "flash_attn": bool(case.context.get("flash_attn")),
        "use_mmap": one.arm.engine == "stock-mmap",
        "use_direct_io": first.get("io") == "direct",
        "n_prompt": case.n_prompt if test != "tg" else 0,
        "n_gen": case.n_gen if test != "pp" else 0,
        "n_depth": case.n_depth,
        "test_time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(statistics.fmean(seconds) * _NS),
        "stddev_ns": round(_deviation(seconds) * _NS),
        "avg_ts": statistics.fmean(rates),
        "stddev_ts": _deviation(rates),
        "test": _test_name(case, test),
        "mode": one.arm.name,
        "quality": first.get("quality"),
        "n_expert_used": setup.layout.n_expert_used,
        "policy": _argument(one, "policy", str(DEFAULT)),
        "predict": _argument(one, "predict", str(Prediction())),
        "mem_bytes": one.arm.cap,
        "read_bps": setup.read_bps,
        "warm": setup.warm,
        "text": setup.text or "random",
        "n_past": case.n_depth + (case.n_prompt if test == "tg" else 0),
        "median_ts": statistics.median(rates),
        "min_ts": min(rates),
        "max_ts": max(rates),
        "hit_rate": _median(phase.hit_rate for phase in phases),
        "mib_per_token": statistics.median(phase.read_bytes / _MIB for phase in phases),
        "predictor": statistics.mode(_predictor(sample) for sample in one.samples),
        "accuracy": _median(phase.accuracy for phase in phases),
        "ahead_mib_per_token": _median(p.a_token("ahead_bytes", _MIB) for p in phases),
        "wasted_mib_per_token": _median(p.a_token("ahead_wasted_bytes", _MIB) for p in phases),
        "evictions_per_token": _median(p.a_token("evictions") for p in phases),
        "hobbit_dispatch": one.arm.arguments.get("dispatch", "auto")
        if first.get("device")
        else None,
        **_device(first.get("device"), phases),
        "ttft_s": statistics.median(ttft) if test != "tg" else None,
        "load_s": statistics.median(sample["load_s"] for sample in one.samples),
        "peak_rss_bytes": max(sample["peak_rss_bytes"] for sample in one.samples),
        "disk_bytes_s": statistics.median(one.disk_bytes_s),
        **_roofline(one, test, phases),
        "breakdown": middle.breakdown(),
        "samples_ns": [round(s * _NS) for s in seconds],
        "samples_ts": rates,
        "samples": one.samples,
    }


def _device(device: dict[str, Any] | None, phases: Sequence[Phase]) -> Row:
    """Say what a device had, and did for each token; nothing for an arm without one."""
    names = ("hit_rate", "mib_per_token", "s_per_token", "wait_s_per_token")
    none: Row = {f"hobbit_device_{name}": None for name in names}
    if device is None:
        return {"hobbit_device": None, "hobbit_device_vram_bytes": None, **none}
    return {
        "hobbit_device": device["name"],
        "hobbit_device_vram_bytes": device["bytes"],
        "hobbit_device_hit_rate": _median(phase.device_hit_rate for phase in phases),
        "hobbit_device_mib_per_token": _median(p.a_token("device_bytes", _MIB) for p in phases),
        "hobbit_device_s_per_token": _median(p.a_token("device_s") for p in phases),
        "hobbit_device_wait_s_per_token": _median(p.a_token("device_wait_s") for p in phases),
    }


def _predictor(sample: Sample) -> str | None:
    """Return the predictor in force at the end; None where nothing was to be predicted."""
    return sample["predictor"] if sample.get("plan") == "streamed" else None


def _argument(one: Measured, name: str, usual: str) -> str | None:
    """Return what an arm of hobbit's was told; None for stock."""
    return one.arm.arguments.get(name, usual) if one.arm.engine == "hobbit" else None


def _roofline(one: Measured, test: Test, phases: Sequence[Phase]) -> Row:
    """Compare each repetition with what was measured beside it.

    Stock has none: what its disk gave is not what it missed, but far more.
    """
    names = ("roofline", "bound", "resident_s_per_token")
    none: Row = dict.fromkeys((*names, "roofline_reading", "reading_s_per_token"))
    if len(one.resident) < len(phases):
        return none
    compute = [Phase.of(sample, test).seconds_per_token for sample in one.resident]
    if not phases[0].streams:
        return none | {"resident_s_per_token": statistics.median(compute)}
    missed = [phase.missed_bytes for phase in phases]
    reads = statistics.median(m / d for m, d in zip(missed, one.disk_bytes_s, strict=True))
    # The rate was that of one phase.
    told = one.interfered and test == ("tg" if one.case.n_gen else "pp")
    slower = [Phase.of(s, test).seconds_per_token for s in one.interfered] if told else []
    return {
        "roofline": _over_least(phases, compute, one.disk_bytes_s),
        "bound": "disk" if reads > statistics.median(compute) else "compute",
        "resident_s_per_token": statistics.median(compute),
        "roofline_reading": _over_least(phases, slower, one.disk_bytes_s) if told else None,
        "reading_s_per_token": statistics.median(slower) if told else None,
    }


def _over_least(
    phases: Sequence[Phase], compute: Sequence[float], disk_bytes_s: Sequence[float]
) -> float:
    """Return the median over the repetitions of a token's time over the least time."""
    together = zip(phases, compute, disk_bytes_s, strict=True)
    return statistics.median(
        phase.seconds_per_token / bound_s(seconds, phase.missed_bytes, disk)
        for phase, seconds, disk in together
    )


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _test_name(case: Case, test: Test) -> str:
    names = {"pp": f"pp{case.n_prompt}", "tg": f"tg{case.n_gen}"}
    names["pg"] = f"{names['pp']}+{names['tg']}"
    return names[test] + (f" @ d{case.n_depth}" if case.n_depth else "")


# The formats


def as_json(found: Sequence[Row]) -> str:
    return json.dumps(found, indent=1) + "\n"


def as_jsonl(found: Sequence[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in found)


def as_csv(found: Sequence[Row]) -> str:
    """Return one line a row, without the single samples; the breakdown is columns of its own."""
    flat = []
    for row in found:
        plain = {name: value for name, value in row.items() if not isinstance(value, list)}
        parts: Row = plain.pop("breakdown")
        flat.append(plain | {f"token_{name}": value for name, value in parts.items()})
    out = io.StringIO()
    table = csv.DictWriter(out, list(flat[0]) if flat else [], quoting=csv.QUOTE_NONNUMERIC)
    table.writeheader()
    table.writerows(flat)
    return out.getvalue()


def as_markdown(found: Sequence[Row], breakdown: bool = False) -> str:
    """Return the table, and on request that of where time goes, and of cache and predictions."""
    tables = [_table(_columns(found), found)]
    if breakdown:
        tables.append(_table([*_arm_columns(found), *_part_columns(found)], found))
        ours = [row for row in found if row["evictions_per_token"] is not None]
        tables += [_table([*_arm_columns(found), *_CACHE_COLUMNS], ours)] if ours else []
        there = [row for row in found if row["hobbit_device"] is not None]
        tables += [_table([*_arm_columns(found), *_DEVICE_COLUMNS], there)] if there else []
    return "\n".join(tables)


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {
    "md": as_markdown,
    "csv": as_csv,
    "json": as_json,
    "jsonl": as_jsonl,
}

Column = tuple[str, Callable[[Row], str]]


def _number(value: float | None, digits: int, unit: float = 1) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


_LEFT: list[Column] = [
    ("model", lambda r: r["model_type"]),
    ("size", lambda r: f"{r['model_size'] / (1 << 30):.2f} GiB"),
    ("params", lambda r: f"{r['model_n_params'] / 1e9:.2f} B"),
    ("backend", lambda r: r["backends"]),
    ("threads", lambda r: str(r["n_threads"])),
]
# Shown, as by llama-bench, where they are not the default: the name, and the default.
_SWEPT = {
    "n_batch": 2048,
    "n_ubatch": 512,
    "type_k": "f16",
    "type_v": "f16",
    "policy": str(DEFAULT),
    "predict": str(Prediction()),
}
_RIGHT: list[Column] = [
    ("test", lambda r: r["test"]),
    ("t/s", lambda r: f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}"),
    ("median (range)", lambda r: f"{r['median_ts']:.2f} ({r['min_ts']:.2f}-{r['max_ts']:.2f})"),
    ("mode", lambda r: r["mode"]),
    ("mem", lambda r: format_size(r["mem_bytes"]) if r["mem_bytes"] else "-"),
    ("hit %", lambda r: _number(r["hit_rate"], 1, 0.01)),
    ("MiB/t", lambda r: _number(r["mib_per_token"], 1)),
    ("ttft", lambda r: _number(r["ttft_s"], 2)),
    ("roofline", lambda r: _number(r["roofline"], 2)),
]


_READING: Column = ("roofline, reading", lambda r: _number(r["roofline_reading"], 2))


def _columns(found: Sequence[Row]) -> list[Column]:
    reading = [_READING] if any(row["roofline_reading"] is not None for row in found) else []
    return [*_LEFT, *_swept(found), *_there(found), *_RIGHT, *reading]


def _arm_columns(found: Sequence[Row]) -> list[Column]:
    """Return columns that tell rows apart in the tables after the first."""
    own = [column for column in _swept(found) if column[0] in ("policy", "predict")]
    return [("test", _text_of("test")), ("mode", _text_of("mode")), *own, *_there(found)[1:-1]]


def _there(found: Sequence[Row]) -> list[Column]:
    """Return the columns of a device, where a row has one."""
    if all(row["hobbit_device"] is None for row in found):
        return []
    return [
        ("device", _text_of("hobbit_device")),
        ("vram", lambda r: format_size(r["hobbit_device_vram_bytes"] or 0)),
        *([("dispatch", _text_of("hobbit_dispatch"))] if _dispatched(found) else []),
        ("device %", lambda r: _number(r["hobbit_device_hit_rate"], 1, 0.01)),
    ]


def _dispatched(found: Sequence[Row]) -> bool:
    return any(row["hobbit_dispatch"] not in (None, "auto") for row in found)


def _swept(found: Sequence[Row]) -> list[Column]:
    """Return columns for what is not the default in some row; stock's rows have no policy."""
    names = (n for n, usual in _SWEPT.items() if any(r[n] not in (usual, None) for r in found))
    return [(name, _text_of(name)) for name in names]


def _text_of(name: str) -> Callable[[Row], str]:
    return lambda row: "-" if row[name] is None else str(row[name])


def _milliseconds(part: str) -> Callable[[Row], str]:
    return lambda row: _number(row["breakdown"][part], 2, 1e-3)


def _part_columns(found: Sequence[Row]) -> list[Column]:
    waits = [("for the device", _milliseconds("device_wait_s"))] if _there(found) else []
    at = [name for name, _ in _PART_COLUMNS].index("rest")
    return [*_PART_COLUMNS[:at], *waits, *_PART_COLUMNS[at:]]


_PART_COLUMNS: list[Column] = [
    ("ms/token", _milliseconds("total_s")),
    ("compute", _milliseconds("compute_s")),
    ("stall", _milliseconds("stall_s")),
    ("cache", _milliseconds("manage_s")),
    ("predicting", _milliseconds("predict_s")),
    ("rest", _milliseconds("rest_s")),
    ("all resident", lambda r: _number(r["resident_s_per_token"], 2, 1e-3)),
    ("disk MB/s", lambda r: _number(r["disk_bytes_s"], 0, 1e6)),
    ("bound", lambda r: r["bound"] or "-"),
    ("load s", lambda r: _number(r["load_s"], 2)),
]
_CACHE_COLUMNS: list[Column] = [
    ("predictor", _text_of("predictor")),
    ("right %", lambda r: _number(r["accuracy"], 1, 0.01)),
    ("ahead MiB/t", lambda r: _number(r["ahead_mib_per_token"], 2)),
    ("wasted MiB/t", lambda r: _number(r["wasted_mib_per_token"], 2)),
    ("evictions/t", lambda r: _number(r["evictions_per_token"], 2)),
]
_DEVICE_COLUMNS: list[Column] = [
    ("device %", lambda r: _number(r["hobbit_device_hit_rate"], 1, 0.01)),
    ("to it MiB/t", lambda r: _number(r["hobbit_device_mib_per_token"], 2)),
    ("its ms/token", lambda r: _number(r["hobbit_device_s_per_token"], 2, 1e-3)),
    ("waited for ms", lambda r: _number(r["hobbit_device_wait_s_per_token"], 2, 1e-3)),
]
_WORDS = (
    "device",
    "dispatch",
    "model",
    "backend",
    "mode",
    "bound",
    "policy",
    "predict",
    "predictor",
)


def _table(columns: Sequence[Column], found: Sequence[Row]) -> str:
    """Align the columns, as llama-bench does: numbers to the right."""
    cells = [[name for name, _ in columns], *([text(row) for _, text in columns] for row in found)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    words = [name in _WORDS for name, _ in columns]

    def line(row: Sequence[str]) -> str:
        aligned = zip(row, widths, words, strict=True)
        padded = (text.ljust(w) if left else text.rjust(w) for text, w, left in aligned)
        return f"| {' | '.join(padded)} |\n"

    rules = (
        "-" * w if left else "-" * (w - 1) + ":" for w, left in zip(widths, words, strict=True)
    )
    head, *body = map(line, cells)
    return head + f"| {' | '.join(rules)} |\n" + "".join(body)
