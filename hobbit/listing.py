"""What `hobbit ls` and `hobbit show` print for people."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .sizes import format_size

if TYPE_CHECKING:
    from .models.catalogue import Known
    from .models.inventory import LowCopy, Row

_DAY_S = 86400
_AGES = ((365 * _DAY_S, "year"), (30 * _DAY_S, "month"), (7 * _DAY_S, "week"), (_DAY_S, "day"))


def row_lines(rows: Sequence[Row], now: float | None = None) -> list[str]:
    """Return a table of the models that are here."""
    titles = ["NAME", "SIZE", "QUANT", "ARCH", "EXPERTS", "LOW-BIT", "MODIFIED", "SOURCE"]
    now = time.time() if now is None else now
    return table(
        titles,
        [
            [
                row.name,
                format_size(row.size),
                row.quant,
                row.arch,
                row.experts or "-",
                _low(row.low),
                _age(now - row.modified),
                row.source,
            ]
            for row in rows
        ],
    )


def known_lines(models: Sequence[Known], sizes: Mapping[str, int]) -> list[str]:
    """Return a table of the models that hobbit knows by name."""
    rows = []
    for known in models:
        total = f"{known.parameters:g}B" if known.parameters else "-"
        size = format_size(sizes[known.name]) if known.name in sizes else "-"
        quant = known.quants[0] if known.quants else "-"
        rows.append([known.name, total, quant, size, known.licence, known.summary])
    return table(["NAME", "PARAMS", "QUANT", "SIZE", "LICENCE", "WHAT IT IS"], rows)


def fact_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return what is known of a model, one thing a line."""
    shape, low = facts["shape"], facts["low"]
    about = " (estimated from its shape)" if facts["estimate"] else ""
    rows = {
        "name": facts["name"],
        "title": facts["title"],
        "what it is": facts["summary"],
        "licence": facts["licence"],
        "source": facts["source"],
        "path": facts["path"],
        "size": f"{format_size(facts['size'])} in {_files(facts['parts'])}{about}",
        "quantisation": f"{facts['quant']} ({_types(facts['tensor_types'])})",
        "architecture": shape["arch"],
        "parameters": f"{shape['parameters'] / 1e9:.2f} billion",
        "layers": _layers(shape),
        "experts": _experts(shape),
        "bytes": f"experts {format_size(facts['expert_bytes'])}, "
        f"the rest {format_size(facts['dense_bytes'])}",
        "context": shape.get("context"),
        "chat template": {True: "yes", False: "no", None: None}[facts["chat_template"]],
        "low copy": low and f"{low['type'].lower()}, {format_size(low['size'])}: {low['path']}",
        "calibration": _calibration(facts),
    }
    return [f"{name + ':':<15}{value}" for name, value in rows.items() if value not in (None, "")]


def _layers(shape: Mapping[str, Any]) -> str:
    kv = shape.get("kv_heads")
    heads = f"{shape.get('heads')} heads, {max(kv) if isinstance(kv, list) else kv} of K and V"
    return f"{shape.get('layers')} of width {shape.get('embedding')}, {heads}"


def _experts(shape: Mapping[str, Any]) -> str:
    if not shape["expert_layers"]:
        return "none: it runs like in llama.cpp"
    each = format_size(shape["expert_bytes"])
    return (
        f"{shape.get('experts')} in each of {shape['expert_layers']} layers, "
        f"{shape.get('experts_used')} used, {each} each"
    )


def _calibration(facts: Mapping[str, Any]) -> str | None:
    found = facts["calibration"]
    if found is None:
        return "none: hobbit prepare makes it" if facts["low"] else None
    kl = ", ".join(
        f"{name} {'-' if value is None else f'{value:.3g}'}" for name, value in found["kl"].items()
    )
    return f"mean KL {kl} ({found['tokens']} tokens of {found['text']})"


def _types(types: Mapping[str, int]) -> str:
    total = sum(types.values()) or 1
    shares = ((name, 100 * size / total) for name, size in types.items())
    return ", ".join(f"{name} {share:.0f} %" for name, share in shares if share >= 0.5)


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _low(low: LowCopy | None) -> str:
    if low is None:
        return "-"
    return f"{low.type.lower()} {format_size(low.size)}{'' if low.calibrated else ', uncalibrated'}"


def _age(seconds: float) -> str:
    for size, name in _AGES:
        count = int(seconds // size)
        if count:
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "today"


def table(titles: list[str], rows: list[list[str]]) -> list[str]:
    """Return rows in columns as wide as their widest cells."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in (titles, *rows)
    ]
