"""`hobbit top` and `hobbit ps`: what they make of what a server tells, and the registry."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from serving import Server, loopback_only, served
from terminal import started

from hobbit.errors import HobbitError, UsageError
from hobbit.meters import filled, rows, sparkline, strip
from hobbit.serve.registry import new_token, registered, running
from hobbit.stats import LayerLookUps, Stats
from hobbit.watching.client import checked_url, stats_of
from hobbit.watching.panel import duration, line, panel
from hobbit.watching.table import TITLES
from hobbit.watching.window import Window

no_network = loopback_only


def told(second: int, **changes: Any) -> dict[str, Any]:
    """What a server tells after so many seconds of two tokens each."""
    counted = Stats(
        tokens_generated=2 * second,
        decode_s=float(second),
        hits=30 * second,
        misses=10 * second,
        read_bytes=(2 << 20) * second,
        cap_bytes=8 << 30,
        mode="streamed",
    )
    return {
        "time": 1000.0 + second,
        "state": "answer",
        "model": "m",
        "mode": "streamed",
        "quality": "exact",
        "queue": {"waiting": 1, "limit": 16},
        "prompt": None,
        "generating": 2 * second,
        "context": {"used": 100, "size": 400},
        "requests": {"answered": 3, "failed": 0},
        "uptime_s": 3700.0,
        "resident_bytes": 6 << 30,
        "stats": counted.to_dict(),
        "layers": {"layer": [0, 2], "hits": [25 * second, 5 * second], "misses": [0, 10 * second]},
    } | changes


def test_bars() -> None:
    assert filled(0.5, 4) == "██░░"
    assert filled(2.0, 4) == "████"
    assert sparkline([0.0, 1.0, 2.0], 2) == "▄█"
    assert sparkline([], 9) == ""


def test_a_strip_has_a_bar_a_layer_or_shares_them() -> None:
    layers = [LayerLookUps(0, 0, 5), LayerLookUps(1, 5, 0), LayerLookUps(2), LayerLookUps(5, 1, 1)]
    assert strip(layers, 4) == "▁█·▅"
    assert strip(layers, 3) == "▅▅"
    assert len(strip([LayerLookUps(n, n % 2, 1) for n in range(94)], 40)) == 32
    assert strip([], 4) == ""


def test_rows_name_the_layer_with_the_fewest_hits() -> None:
    layers = [LayerLookUps(0, 3, 1), LayerLookUps(7, 1, 3), LayerLookUps(8)]
    found = rows(Stats(hits=4, misses=4), layers, [1.0], 0, (0, 0), 60)
    assert "lowest 25 % in 7" in found[2] and "▆▃·" in found[2]
    nothing = rows(Stats(), [], [], 0, (0, 0), 60)
    assert len(nothing) == len(found) == 7


def test_rates_are_of_the_last_seconds() -> None:
    window = Window()
    window.add(told(0))
    for second in range(1, 30):
        window.add(told(second))
    assert (window.stats.tokens_generated, window.stats.hits) == (20, 300)
    assert window.layers == [LayerLookUps(0, 250, 0), LayerLookUps(2, 50, 100)]
    assert [*window.speeds][-2:] == [2.0, 2.0]
    shown = panel(window, "http://h", 70)
    assert shown[0] == "m, streamed, exact   http://h   up 1 h 1 min"
    text = "\n".join(shown)
    for part in ("answer, 58 tokens, 1 waiting", "75 % hit", "lowest 33 % in 2", "6.0/8.0 GiB"):
        assert part in text
    assert "1 MiB a token" in text and "100/400" in text and "3 answered, 0 failed" in text
    assert all(len(row) <= 40 for row in panel(window, "http://h", 40))
    assert line(window) == (
        "answer, 58 tokens, 1 waiting | 2.00 tok/s | hit 75 % | 1 MiB/tok | stall 0 % | "
        "mem 6.0/8.0 GiB"
    )


def test_what_rests_keeps_its_rates() -> None:
    window = Window()
    for second in range(5):
        window.add(told(second))
    before = window.stats
    for second in range(5, 30):
        window.add(told(4, time=1000.0 + second, state="idle"))
    assert window.stats == before
    assert [*window.speeds][-3:] == [0.0, 0.0, 0.0]


def test_durations() -> None:
    seconds = (5, 65, 3600, 90000)
    assert [duration(s) for s in seconds] == ["5 s", "1 min 5 s", "1 h 0 min", "1 d 1 h"]


@pytest.mark.parametrize(
    "text", ["", "http://", "ftp://h", "http://h:99999", "http://[::1", "a b:c"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        checked_url(text)
    assert checked_url("h:80/v1") == "http://h:80"
    assert checked_url("https://h/") == "https://h"


def test_who_does_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(HobbitError, match="no hobbit serve answers at http"):
        stats_of(f"http://127.0.0.1:{port}")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOBBIT_STATE", str(tmp_path))
    return tmp_path / "servers"


def test_a_server_is_registered_while_it_runs(state: Path) -> None:
    token = new_token()
    with registered("http://h:1", "m", token):
        (found,) = running()
        assert (found.pid, found.url, found.token) == (os.getpid(), "http://h:1", token)
        (file,) = state.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert running() == [] and not list(state.iterdir())


def test_what_a_dead_server_left_is_removed_and_others_files_are_not(state: Path) -> None:
    with registered("http://h:1", "m", "t"):
        (file,) = state.iterdir()
        own = json.loads(file.read_text())
    ended = subprocess.Popen(["true"])
    ended.wait()
    files = {
        "dead.json": own | {"pid": ended.pid},
        "reused.json": own | {"born": "1"},
        "elsewhere.json": own | {"host": "elsewhere"},
        "later.json": own | {"more": 1},
    }
    for name, record in files.items():
        (state / name).write_text(json.dumps(record))
    (state / "broken.json").write_text("{")
    assert running() == []
    assert sorted(f.name for f in state.iterdir()) == [
        "broken.json",
        "elsewhere.json",
        "later.json",
    ]


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOBBIT_STATE", "/dev/null/state")
    with registered("http://h:1", "m", "t"):
        assert running() == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("top")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    model = tiny.make_text_model(folder / "m.gguf", arch="qwen3moe")
    arguments = ("-c", "512", "-a", "m", "--api-key", "secret")
    with served(model, *arguments, env={"HOBBIT_STATE": str(folder)}) as running:
        ask = {"prompt": "one two", "max_tokens": 9}
        assert running.ask("/v1/completions", ask, Authorization="Bearer secret").status == 200
        yield running


def hobbit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hobbit", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HOBBIT_STATE": str(folder)},
        check=False,
    )


def test_ps_lists_it_without_its_key(server: Server, folder: Path) -> None:
    done = hobbit(folder, "ps")
    titles, row = done.stdout.splitlines()
    assert titles.split() == TITLES
    columns = row.split("  ")
    assert columns[0] == "m" and str(server.process.pid) in row and server.url in row
    assert re.search(r"\d+/1024 MiB +exact +\d+ % +[\d.]+ +\d+/512 +\d+ s", row)
    plain = json.loads(hobbit(folder, "ps", "--json").stdout)
    (one,) = plain["servers"]
    assert one["stats"]["model"] == "m" and "token" not in one
    assert done.returncode == 0 and done.stderr == ""


def test_ps_where_nothing_runs_and_where_one_hangs(tmp_path: Path) -> None:
    done = hobbit(tmp_path, "ps")
    assert (done.returncode, done.stdout) == (0, "") and "no server runs" in done.stderr
    assert json.loads(hobbit(tmp_path, "ps", "--json").stdout)["servers"] == []
    script = (
        "import sys, socket, hobbit.serve.registry as r\n"
        "with r.registered('http://127.0.0.1:1', 'm', 't'):\n"
        "    print('there', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"HOBBIT_STATE": str(tmp_path)},
    )
    try:
        assert process.stdout and process.stdout.readline() == "there\n"
        done = hobbit(tmp_path, "ps")
        assert done.returncode == 0 and "no answer" in done.stdout
        assert "no hobbit serve answers at http://127.0.0.1:1" in done.stderr
    finally:
        process.communicate()


def test_top_without_a_terminal_is_lines(server: Server, folder: Path) -> None:
    for address in ((), (server.url,), (server.url.removeprefix("http://") + "/v1",)):
        done = hobbit(folder, "top", *address, "-n", "1")
        assert done.returncode == 0, done.stderr
        (said,) = done.stdout.splitlines()
        assert re.match(r"idle \| [\d.]+ tok/s \| hit \d+ % \| \d+ MiB/tok", said)
    refused = hobbit(folder / "none", "top", server.url, "-n", "1")
    assert refused.returncode == 1 and "it wants a key" in refused.stderr
    assert hobbit(folder / "none", "top", server.url, "-n", "1", "--api-key", "secret").stdout


def test_top_on_a_terminal_stays_in_place(server: Server, folder: Path) -> None:
    with started("top", HOBBIT_STATE=str(folder), columns=60) as screen:
        screen.wait_for("answered")
        screen.wait_for("lowest")
        assert sum(text.startswith("speed ") for text in screen.lines) == 1
        assert re.search(r"layers   [▁▂▃▄▅▆▇█]{3}  lowest \d+ % in \d", screen.text)
        screen.interrupt()
        assert screen.exit_code() == 130
        assert "Traceback" not in screen.text and "error" not in screen.text


def test_top_ends_when_the_server_does(folder: Path) -> None:
    with (
        served(folder / "m.gguf", "--lazy", env={"HOBBIT_STATE": str(folder / "two")}) as server,
        started("top", HOBBIT_STATE=str(folder / "two")) as screen,
    ):
        screen.wait_for("not loaded yet")
        assert server.stop() == 143
        assert screen.exit_code() == 0
        assert hobbit(folder / "two", "ps").stdout == ""
