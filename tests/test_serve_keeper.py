"""When the served model is in memory: lazy loading, sleeping, and what is known meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
from serving import Server, loopback_only, served

from hobbit.errors import HobbitError
from hobbit.llama import Llama
from hobbit.quality import Quality
from hobbit.rule import EXACT
from hobbit.serve.keeper import Facts, Keeper
from hobbit.stats import LayerLookUps, Stats

no_network = loopback_only

ASK = {"prompt": "one two", "max_tokens": 3, "temperature": 0}
PLAN: Any = object()


class FakeLlama:
    """As much of a model as its keeper looks at."""

    def __init__(self, memory: str | int) -> None:
        self.memory, self.closed, self.is_lost = memory, False, False
        self.arena = None
        self.n_tokens, self.plan, self.quality = 5, PLAN, Quality("exact", EXACT)
        self.stats = Stats(hits=3, misses=1, cap_bytes=8)
        self.look_ups = [LayerLookUps(0, 1, 1), LayerLookUps(2, 2, 0)]
        self.n_ctx, self.n_vocab, self.n_embd = (lambda: 64), (lambda: 9), (lambda: 4)
        self.token_bos = self.token_eos = lambda: -1

    def set_memory(self, memory: str | int) -> None:
        assert not self.closed
        if memory == "0":
            raise HobbitError("too small")
        self.memory = memory

    def close(self) -> None:
        self.closed = True


class Loads(list[FakeLlama]):
    """The models that were loaded, one after the other."""

    def __call__(self, memory: str | int) -> Llama:
        assert all(llm.closed for llm in self), "two at once"
        self.append(FakeLlama(memory))
        return cast(Llama, self[-1])


@pytest.fixture
def loads() -> Loads:
    return Loads()


def keeper(loads: Loads, idle_s: float = 1e-6) -> Keeper:
    return Keeper(loads, Facts(64, 9, 4, Quality("exact", EXACT), None), "auto", idle_s)


def test_it_is_loaded_once_and_when_it_is_needed(loads: Loads) -> None:
    model = keeper(loads)
    assert model.state == "asleep" and model.facts.plan is None and not loads
    assert model.stats == Stats() and model.look_ups == [] and model.n_tokens == 0
    with model.borrowed() as one, model.borrowed() as two:
        assert one is two is cast(Any, loads[0])
        assert model.state == "loaded" and model.facts.plan is PLAN and model.n_tokens == 5
    assert len(loads) == 1


def test_it_sleeps_when_nobody_has_it_and_its_counters_stay(loads: Loads) -> None:
    model = keeper(loads)
    for n in range(1, 4):
        with model.borrowed():
            assert not model.rest()
            assert (model.stats.hits, model.stats.cap_bytes) == (3 * n, 8)
        assert model.rest() and not model.rest()
        assert loads[-1].closed and model.state == "asleep"
        assert model.stats.hits == 3 * n and model.facts.plan is PLAN
        assert model.look_ups == [LayerLookUps(0, n, n), LayerLookUps(2, 2 * n, 0)]
    assert len(loads) == 3


def test_it_sleeps_not_before_its_time(loads: Loads) -> None:
    model = keeper(loads, 3600)
    with model.borrowed():
        assert model.rest_s() == 3600
    left = model.rest_s()
    assert left is not None and 3500 < left <= 3600
    assert not model.rest() and model.state == "loaded"
    assert keeper(loads, 0).rest_s() is None


def test_a_cap_that_was_changed_is_the_next_models_too(loads: Loads) -> None:
    model = keeper(loads)
    model.set_memory("6G")
    with pytest.raises(HobbitError):
        model.set_memory("0")
    assert model.rest()
    with model.borrowed():
        assert [llm.memory for llm in loads] == ["6G", "6G"]


def test_a_model_that_lost_its_device_is_loaded_anew(loads: Loads) -> None:
    model = keeper(loads)
    with model.borrowed():
        loads[0].is_lost = True
        with model.borrowed() as other:  # somebody has it still
            assert other is cast(Any, loads[0])
    with model.borrowed() as again:
        assert again is cast(Any, loads[1]) and loads[0].closed
    assert model.stats.hits == 6


def test_a_load_that_fails_is_tried_again() -> None:
    tries = []

    def load(memory: str | int) -> Llama:
        tries.append(memory)
        raise HobbitError("no disk")

    model = Keeper(load, Facts(64, 9, 4, Quality("exact", EXACT), None), "auto", 0)
    for _ in range(2):
        with pytest.raises(HobbitError, match="no disk"), model.borrowed():
            pass
    assert len(tries) == 2 and model.state == "asleep"


def test_who_comes_while_it_loads_waits_and_what_is_known_does_not(loads: Loads) -> None:
    begun, go = threading.Event(), threading.Event()
    got: list[Llama] = []

    def slow(memory: str | int) -> Llama:
        begun.set()
        assert go.wait(60)
        return loads(memory)

    model = Keeper(slow, Facts(64, 9, 4, Quality("exact", EXACT), None), "auto", 1)

    def borrow() -> None:
        with model.borrowed() as llm:
            got.append(llm)

    threads = [threading.Thread(target=borrow) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    assert model.state == "loading" and model.facts.n_ctx == 64 and model.stats == Stats()
    assert model.rest_s() == 1
    go.set()
    for thread in threads:
        thread.join(60)
    assert len(got) == 3 and len(loads) == 1


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keeper")
    return tiny.make_text_model(folder / "m.gguf", chat=True, arch="qwen3moe")


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Server]:
    """A lazy server that sleeps after half a second; each test finds it asleep, or waits for it."""
    arguments = ("--lazy", "--sleep-idle-seconds", "0.5", "-c", "512", "-a", "m")
    with served(path, *arguments) as running:
        yield running


def asleep(server: Server) -> bool:
    return bool(server.ask("/health").json == {"status": "ok", "model": "asleep"})


def test_a_lazy_server_answers_before_it_has_a_model(path: Path) -> None:
    with served(path, "--lazy", "-c", "300", "-a", "m") as server:
        assert asleep(server) and not any(line.startswith("mode:") for line in server.lines)
        model = server.ask("/v1/models").json["data"][0]
        assert model["id"] == "m" and model["meta"]["mode"] is None
        loaded = ("n_ctx", "n_vocab", "n_embd", "size")
        before = {name: model["meta"][name] for name in loaded}
        assert server.ask("/hobbit/plan").status == 409
        assert server.ask("/hobbit/stats").json["state"] == "asleep"
        assert server.ask("/slots").json[0]["is_processing"] is False
        assert b"hobbit_model_loaded 0.0" in server.ask("/metrics").body
        assert server.ask("/props").json["chat_template"]
        assert asleep(server)
        assert server.ask("/v1/completions", ASK).status == 200
        meta = server.ask("/v1/models/m").json["meta"]
        assert before == {name: meta[name] for name in loaded} and meta["mode"]
        assert server.ask("/health").json["model"] == "loaded"
        assert sum(line.startswith("mode:") for line in server.lines) == 1


def test_it_wakes_for_every_request_that_needs_the_model(server: Server) -> None:
    for path, body in (
        ("/tokenize", {"content": "one"}),
        ("/detokenize", {"tokens": [300]}),
        ("/apply-template", {"messages": [{"role": "user", "content": "one"}]}),
        ("/tokenizer_info", None),
        ("/v1/chat/completions", ASK | {"messages": [{"role": "user", "content": "one"}]}),
        ("/hobbit/memory", {"memory": "900M"}),
    ):
        server.until(lambda: asleep(server), "asleep")
        assert server.ask(path, body).status == 200, path
        assert server.ask("/health").json["model"] == "loaded"
    assert server.ask("/hobbit/plan").json["cap_bytes"] == 900 << 20


def test_answers_are_the_same_after_a_sleep_and_counters_go_on(server: Server) -> None:
    first = server.ask("/v1/completions", ASK).json
    hits = [server.ask("/hobbit/stats").json["stats"]["hits"]]
    server.until(lambda: asleep(server), "asleep")
    slept = server.ask("/hobbit/stats").json
    second = server.ask("/v1/completions", ASK).json
    hits += [slept["stats"]["hits"], server.ask("/hobbit/stats").json["stats"]["hits"]]
    assert second["choices"] == first["choices"]
    assert hits[0] == hits[1] < hits[2]
    assert sum(slept["layers"]["hits"]) == slept["stats"]["hits"] > 0
    server.until(lambda: any(line.startswith("asleep: ") for line in server.lines), "its line")


def test_a_sleeping_server_ends_at_once(path: Path) -> None:
    with served(path, "--lazy") as server:
        assert server.stop() == 143
