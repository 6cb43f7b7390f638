"""What `hobbit serve` says on stderr: lines for people, or with --log-json JSON for programs."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from ..errors import HobbitError
from ..render import Report, Screen
from .generation import Finished


class Log(Screen):
    """Lines for people."""

    def finished(self, done: Finished) -> None:
        """Say what a request came to."""
        tok_s = len(done.token_seconds) / done.decode_s if done.decode_s else 0.0
        self.say(
            f"[{done.n_prompt} tok prompt, {done.n_cached} cached | {done.n_generated} tok, "
            f"{tok_s:.1f} tok/s, first token {done.ttft_s:.1f} s | {done.mode} | "
            f"hit {100 * done.decode.hit_rate:.0f} % | {_on_device(done)}"
            f"{done.decode.mib_per_token:.0f} MiB/tok]"
        )

    def listening(self, url: str) -> None:
        self.say(f"listening on {url}", "ready")

    def failed(self, error: BaseException) -> None:
        """Report what is nobody's fault but ours: a read that failed, or a mistake in here."""
        if isinstance(error, HobbitError):
            self.error(str(error))
        else:
            traceback.print_exception(error, file=self.stream)


class JsonLog(Log):
    """An object a line: `time` in seconds since 1970, `level`, `event`, and what belongs to it."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(quiet, "never")
        self.terminal = False
        logging.getLogger().addHandler(_Warnings(self))  # of the packages that we use

    def write(self, level: str, event: str, **more: Any) -> None:
        if self.quiet and level == "info":
            return
        line = {"time": round(time.time(), 3), "level": level, "event": event} | more
        print(json.dumps(line), file=self.stream, flush=True)

    def say(self, *lines: str) -> None:
        for line in lines:
            self.write("info", "message", message=line)

    def error(self, message: str, hint: str = "") -> None:
        more = {"hint": hint} if hint else {}
        self.write("error", "error", message=" ".join(message.split()), **more)

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """Say each stage once."""
        said: set[str] = set()

        def report(stage: str, done: float, words: str = "") -> None:
            if stage not in said:
                self.say(stage)
                said.add(stage)

        yield report

    def finished(self, done: Finished) -> None:
        facts = asdict(done)
        del facts["token_seconds"]
        self.write("info", "request", **facts)

    def listening(self, url: str) -> None:
        self.write("info", "listening", url=url)

    def failed(self, error: BaseException) -> None:
        more = {}
        if not isinstance(error, HobbitError):
            more["traceback"] = "".join(traceback.format_exception(error))
        self.write("error", "error", message=f"{error}" or type(error).__name__, **more)


class _Warnings(logging.Handler):
    def __init__(self, log: JsonLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        more = {}
        if record.exc_info and record.exc_info[1]:
            more["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        level = record.levelname.lower()
        self._log.write(level, record.name, message=record.getMessage(), **more)


def _on_device(done: Finished) -> str:
    share = done.decode.device_share
    return f"device {100 * share:.0f} % | " if share else ""
