"""The texts that come with hobbit: what they are and where they are from is in docs/texts.md."""

from __future__ import annotations

from pathlib import Path

from .errors import UsageError

_DATA = Path(__file__).parent / "data"

# What thresholds and importance matrices are made from, and what is held out to judge them by.
CALIBRATION = "calibration"
SAMPLE = "sample"
NAMES = (CALIBRATION, SAMPLE)


def built_in(name: str) -> str:
    """Return a built-in text by its name, one of NAMES: English of several kinds, and Python."""
    return path_of(name).read_text(encoding="utf-8")


def path_of(name: str) -> Path:
    """Return the file of a built-in text."""
    if name not in NAMES:
        raise ValueError(f"no text is called {name!r}")
    return _DATA / f"{name}.txt"


def read(file: Path | None, built: str = SAMPLE) -> str:
    """Return the text of a file, or else a built-in one; raise UsageError if it is not a text."""
    if file is None:
        return built_in(built)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read {file}: {reason}") from exc
