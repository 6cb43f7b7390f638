"""What `hobbit serve` was asked to do, checked."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import UsageError
from ..options import DEFAULT_POLICY, DEFAULT_PREDICTOR, Options
from ..sizes import parse_size


@dataclass(frozen=True)
class ServeOptions:
    """One value for each flag of `hobbit serve`, by the name of its parameter."""

    words: tuple[str, ...] = ()
    model: str | None = None
    hf_repo: str | None = None
    hf_file: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: tuple[str, ...] = ()
    api_key_file: Path | None = None
    alias: str | None = None
    cors_origins: str = ""
    timeout: float = 3600.0
    sse_ping: float = 5.0
    queue: int = 16
    metrics: bool = True
    no_ui: bool = False
    max_body: str = "16M"
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
    memory: str = "auto"
    policy: str = DEFAULT_POLICY
    predictor: str = DEFAULT_PREDICTOR
    quality: str = "exact"
    t1: float | None = None
    t2: float | None = None
    patience: int = 0
    deterministic: bool = False
    low_file: Path | None = None
    resident_low: str = "auto"
    warm_start: bool = True
    io: str = "auto"
    io_threads: int = 0
    verbose: int = 0
    quiet: bool = False
    color: str = "auto"

    def __post_init__(self) -> None:
        if len(self.words) > 1:
            raise UsageError(f"one model is served, not {' and '.join(self.words)}")
        if self.predict is not None and self.predict == 0:
            raise UsageError("-n 0: no request could be answered; -1 is no limit")
        self.loading()
        self.body_bytes()

    def loading(self) -> Options:
        """Return how the model is named and loaded."""
        shared = {f.name for f in fields(self)} & {f.name for f in fields(Options)}
        return Options(**{name: getattr(self, name) for name in shared})

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
