"""What `hobbit serve` was asked to do, checked."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError
from ..options import Options
from ..sizes import parse_size


@dataclass(frozen=True)
class ServeOptions:
    """One value for each flag of `hobbit serve` that a run does not have, by its parameter's name.

    `loading` has the others: which model, how it is loaded, `predict` as the most of an answer.
    """

    loading: Options = field(default_factory=Options)
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: tuple[str, ...] = ()
    api_key_file: Path | None = None
    alias: str | None = None
    strict_model: bool = False
    cors_origins: str = ""
    timeout: float = 3600.0
    sse_ping: float = 5.0
    queue: int = 16
    metrics: bool = True
    no_ui: bool = False
    max_body: str = "16M"
    preload: bool = True
    sleep_idle_seconds: float = 0.0
    log_json: bool = False

    def __post_init__(self) -> None:
        words = self.loading.words
        if len(words) > 1:
            raise UsageError(f"one model is served, not {' and '.join(words)}")
        if self.loading.predict == 0:
            raise UsageError("-n 0: no request could be answered; -1 is no limit")
        if not self.body_bytes():
            raise UsageError(f"--max-body {self.max_body}: no request could be read")
        for origin in self.origins():
            if origin != "*" and "://" not in origin:
                raise UsageError(
                    f"--cors-origins {origin}: an origin is written like http://localhost:3000"
                )

    def body_bytes(self) -> int:
        """Return the largest request body that is read."""
        return parse_size(self.max_body)

    def keys(self) -> tuple[str, ...]:
        """Return the API keys, of the flag and of the file, one a line."""
        if not all(key.strip() for key in self.api_key):
            raise UsageError("--api-key: a key cannot be empty")
        keys = [key.strip() for key in self.api_key]
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.expanduser().read_text(encoding="utf-8").split("\n")
            except (OSError, UnicodeDecodeError) as exc:
                raise UsageError(f"cannot read --api-key-file {self.api_key_file}: {exc}") from exc
            found = [line.strip() for line in lines if line.strip()]
            if not found:
                raise UsageError(f"{self.api_key_file}: has no key in it")
            keys += found
        return tuple(keys)

    def origins(self) -> tuple[str, ...]:
        """Return the web pages, by origin, that may use the server besides its own."""
        return tuple(origin.strip() for origin in self.cors_origins.split(",") if origin.strip())

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
