"""What Prometheus is told: llama-server's names, and hobbit's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .generation import Finished
from .service import Service, rate

if TYPE_CHECKING:
    from prometheus_client import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300)


class Metrics:
    """The distributions of finished requests, and at each scrape the counters of the service."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._ttft = Histogram(
            "hobbit_ttft_seconds",
            "From a request's turn to its first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._token = Histogram(
            "hobbit_token_seconds",
            "Time of one token",
            buckets=(0.002, 0.005, *_SECONDS),
            registry=self._registry,
        )

    def observe(self, done: Finished) -> None:
        """Take in a finished request; from any thread."""
        self._ttft.observe(done.ttft_s)
        for seconds in done.token_seconds:
            self._token.observe(seconds)

    def text(self, service: Service) -> bytes:
        """Return everything in Prometheus's text format."""
        scrape = CollectorRegistry()
        scrape.register(_Counters(service))
        return generate_latest(scrape) + generate_latest(self._registry)


class _Counters(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        yield from self._llama_server()
        yield from self._hobbit()

    def _llama_server(self) -> Iterator[Metric]:
        engine = self._service.engine
        totals, last = engine.totals, engine.totals.last
        decoded = totals.generated_tokens
        for name, words, value in (
            ("prompt_tokens", "Prompt tokens evaluated", totals.prompt_tokens),
            ("prompt_seconds", "Time of prompts", totals.prompt_s),
            ("tokens_predicted", "Tokens generated", decoded),
            ("tokens_predicted_seconds", "Time of generating", totals.generated_s),
            ("n_decode", "Calls of llama_decode for an answer", decoded),
        ):
            yield CounterMetricFamily(f"llamacpp:{name}", words, value=value)
        prompt_n = last.n_prompt - last.n_cached if last else 0
        for name, words, value in (
            ("prompt_tokens_seconds", "Prompt tokens a second of the last request",
             rate(prompt_n, last.prompt_s) if last else 0.0),
            ("predicted_tokens_seconds", "Tokens a second of the last request",
             rate(len(last.token_seconds), last.decode_s) if last else 0.0),
            ("requests_processing", "Requests being answered", int(engine.busy)),
            ("requests_deferred", "Requests waiting", engine.waiting),
            ("n_tokens_max", "Longest context so far", totals.n_tokens_max),
            ("n_busy_slots_per_decode", "Sequences in a decode", 1 if decoded else 0),
        ):  # fmt: skip
            yield GaugeMetricFamily(f"llamacpp:{name}", words, value=value)

    def _hobbit(self) -> Iterator[Metric]:
        facts, model = self._service.stats(), self._service.engine.model
        stats, plan = model.stats, model.facts.plan
        if plan is not None:
            parts = GaugeMetricFamily("hobbit_memory_bytes", "The memory plan", labels=["part"])
            for line in plan.lines:
                parts.add_metric([line.name], line.bytes)
            parts.add_metric(["spare"], plan.spare_bytes)
            yield parts
            yield GaugeMetricFamily("hobbit_memory_cap_bytes", "The cap", value=plan.cap.bytes)
        yield GaugeMetricFamily(
            "hobbit_model_loaded", "1: the model is loaded", value=int(model.state == "loaded")
        )
        yield GaugeMetricFamily(
            "hobbit_experts_used",
            "Experts of a layer that a token uses",
            value=self._service.layout.n_expert_used,
        )
        yield GaugeMetricFamily(
            "hobbit_memory_resident_bytes",
            "What the process holds now",
            value=facts["resident_bytes"],
        )
        yield GaugeMetricFamily(
            "hobbit_memory_peak_bytes", "Most the process held", value=stats.peak_bytes
        )
        lookups = CounterMetricFamily(
            "hobbit_expert_lookups", "Experts asked for in a layer", labels=["tier", "result"]
        )
        lookups.add_metric(["device", "hit"], stats.device_hits)
        lookups.add_metric(["ram", "hit"], stats.hits - stats.device_hits)
        lookups.add_metric(["disk", "miss"], stats.misses)
        yield lookups
        pairs = CounterMetricFamily(
            "hobbit_expert_pairs", "Pairs of token and expert", labels=["precision"]
        )
        for name in ("high", "low", "skip"):
            pairs.add_metric([name], getattr(stats, f"pairs_{name}"))
        yield pairs
        arena = model.facts.arena
        if arena is not None:
            device = GaugeMetricFamily(
                "hobbit_device_memory_bytes", "What a device has for experts", labels=["device"]
            )
            device.add_metric([arena.device.name], arena.bytes)
            yield device
        requests = CounterMetricFamily("hobbit_requests", "Requests", labels=["result"])
        for name, count in facts["requests"].items():
            requests.add_metric([name], count)
        yield requests
        for name, words, value in (
            ("read_bytes", "Read from the model's files", stats.read_bytes),
            ("stall_seconds", "Computing waited for a read", stats.stall_s),
            ("evictions", "Experts evicted", stats.evictions),
            ("device_bytes", "Copied to the device", stats.device_bytes),
            ("device_seconds", "The device had something to compute", stats.device_s),
            ("device_wait_seconds", "Only the device was waited for", stats.device_wait_s),
            ("majflt", "Major page faults of the process", facts["majflt"]),
        ):
            yield CounterMetricFamily(f"hobbit_{name}", words, value=value)
