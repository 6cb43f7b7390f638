"""The command as a process: what it prints where, how it ends."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny
from moefile import write_moe

from hobbit.cli import app
from hobbit.cli.run import run
from hobbit.errors import ModelError
from hobbit.options import Options

STATS_LINE = re.compile(
    r"^\[\d+ tok, [\d.]+ tok/s, first token [\d.]+ s \(\d+ tok prompt, [\d.]+ tok/s\) \| "
    r"mem \d+/\d+ MiB \| exact \| hit \d+ % \| \d+ MiB/tok \| stall \d+ %\]$"
)
SMALL = ("-c", "256", "-t", "1", "-s", "1", "--memory", "1G")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_text_model(tmp_path_factory.mktemp("cli") / "m.gguf")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_text_model(tmp_path_factory.mktemp("cli") / "chat.gguf", chat=True)


def hobbit(
    *arguments: str | Path, stdin: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hobbit", *map(str, arguments)],
        input=stdin,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@contextmanager
def started(*arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a generation and wait until the model is loaded."""
    command = [sys.executable, "-m", "hobbit", *map(str, arguments)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(stream: Any, start: bytes) -> None:
    for line in stream:
        if line.startswith(start):
            return
    raise AssertionError(f"no line started with {start!r}")


def test_the_answer_alone_is_on_stdout(model: Path) -> None:
    loud = hobbit("run", model, "one two", "-n", "8", *SMALL)
    quiet = hobbit("run", model, "one two", "-n", "8", *SMALL, "--quiet")
    whole = hobbit("run", model, "one two", "-n", "8", *SMALL, "--no-stream")
    assert (loud.returncode, quiet.returncode, quiet.stderr) == (0, 0, "")
    assert loud.stdout == quiet.stdout == whole.stdout
    assert loud.stdout.endswith("\n")
    assert len(loud.stdout.split()) >= 4
    assert "mode:" not in loud.stdout


def test_banner_and_stats_line_are_on_stderr(model: Path, tmp_path: Path) -> None:
    env = {**os.environ, "HOBBIT_CACHE": str(tmp_path)}  # no speeds, of which a line would tell
    lines = hobbit("run", model, "one two", "-n", "8", *SMALL, env=env).stderr.splitlines()
    assert len(lines) == 4, lines
    assert re.match(r"llama .* layers x 8 experts, top-2$", lines[0])
    assert lines[1].startswith("mode: ")
    assert re.match(r"io: (direct|buffered)   threads: 1   context: 256   seed: 1$", lines[2])
    assert STATS_LINE.match(lines[3])
    cap, parts = re.findall(r"memory (\d+) MiB cap \((.*)\)", lines[1])[0]
    assert sum(int(part.split()[1]) for part in parts.split(" + ")) == int(cap) == 1024


def test_usage_is_remembered_unless_told_not_to(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    env = {**os.environ, "HOBBIT_CACHE": str(cache)}
    del env["HOBBIT_WARM_START"]
    run = ("run", model, "one two", "-n", "8", *SMALL)
    cold = hobbit(*run, "--no-warm-start", env=env)
    assert cold.returncode == 0 and not cache.exists()
    for _ in range(2):
        warm = hobbit(*run, env=env)
        assert (warm.returncode, warm.stdout) == (0, cold.stdout)
    assert len([*cache.glob("usage/*.json")]) == 1
    report = json.loads(hobbit(*run, "--json", env=env).stdout)
    assert report["config"]["warm_start"] is True


def test_prompt_from_everywhere(model: Path, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("one two\n")
    ways: list[Any] = [
        hobbit("run", model, "one", "two", *SMALL, "-n", "4"),
        hobbit("run", model, "-p", "one two", *SMALL, "-n", "4"),
        hobbit("run", model, "-f", tmp_path / "f", *SMALL, "-n", "4"),
        hobbit("run", "-m", model, "one two", *SMALL, "-n", "4"),
        hobbit("run", model, *SMALL, "-n", "4", stdin="one two"),
    ]
    assert {way.returncode for way in ways} == {0}
    assert len({way.stdout for way in ways}) == 1


def test_flags_from_the_environment(model: Path) -> None:
    plain = hobbit("run", model, "one two", *SMALL, "-n", "4", "-q")
    names = {"PROMPT": "one two", "PREDICT": "4", "CTX_SIZE": "256", "SEED": "1", "QUIET": "1"}
    environment = os.environ | {f"HOBBIT_{key}": value for key, value in names.items()}
    assert hobbit("run", model, "-t", "1", env=environment).stdout == plain.stdout
    environment["HOBBIT_MODEL"] = str(model)
    assert hobbit("run", "-t", "1", env=environment).stdout == plain.stdout


def test_chat_template(chat_model: Path) -> None:
    def prompt_tokens(*arguments: str) -> int:
        done = hobbit("run", chat_model, "one two", "-n", "2", *SMALL, "--json", *arguments)
        return int(json.loads(done.stdout)["usage"]["prompt_tokens"])

    assert prompt_tokens("--raw") < prompt_tokens() < prompt_tokens("-sys", "be brief")


def test_json(model: Path) -> None:
    done = hobbit("run", model, "one two", "-n", "4", *SMALL, "--json")
    data = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert data["schema"] == "hobbit.run/1"
    assert data["usage"]["completion_tokens"] == 4
    assert data["finish_reason"] == "length"
    assert data["config"]["seed"] == 1
    plan = data["plan"]
    assert sum(line["bytes"] for line in plan["lines"]) + plan["spare_bytes"] == 1 << 30
    plain = hobbit("run", model, "one two", "-n", "4", *SMALL, "-q")
    assert plain.stdout == data["text"] + "\n"


def test_verbose(model: Path) -> None:
    done = hobbit("run", model, "one two", "-n", "2", *SMALL, "-v")
    assert "prompt eval rate:" in done.stderr
    assert "spare" in done.stderr


def test_a_dense_model_says_that_it_is_resident(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_moe(path, dense=True)
    done = hobbit("run", path, "x", "-n", "2", *SMALL)
    assert "mode: resident" in done.stderr


def test_grammar(model: Path) -> None:
    done = hobbit("run", model, "one two", *SMALL, "-n", "9", "-q", "--grammar", 'root ::= "one"')
    assert (done.stdout, done.returncode) == ("one\n", 0)


def test_thoughts_are_shown_unless_told_not_to(model: Path, chat_model: Path) -> None:
    run = (*SMALL, "-n", "40", "-q", "--grammar", 'root ::= "<think>hm</think>\\n\\nyes"')
    assert hobbit("run", model, "x", *run).stdout == "<think>hm</think>\n\nyes\n"
    for how in ((), ("--no-stream",)):
        assert hobbit("run", model, "x", *run, "--hide-thinking", *how).stdout == "yes\n"
    refused = hobbit("run", chat_model, "x", *run, "--no-think")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no switch for thinking" in refused.stderr


def test_the_template_is_told_to_think_or_not(tmp_path: Path) -> None:
    path = tiny.make_text_model(tmp_path / "m.gguf", chat=True, template=tiny.CONTROL_TEMPLATE)

    def prompt_tokens(*arguments: str) -> int:
        done = hobbit("run", path, "one two", "-n", "2", *SMALL, "--json", *arguments)
        return int(json.loads(done.stdout)["usage"]["prompt_tokens"])

    assert prompt_tokens() == prompt_tokens("--think") < prompt_tokens("--no-think")


ERRORS: list[tuple[tuple[str, ...], int, str]] = [
    (("run", "no-such-model", "x"), 3, "no model is called 'no-such-model'"),
    (("run", "no-such-model"), 3, "no model is called 'no-such-model'"),
    (("verify", "no-such-model"), 3, "no model is called 'no-such-model'"),
    (("run", "no-such.gguf", "x"), 3, "no-such.gguf: no such file"),
    (("run", "{folder}", "x"), 3, "the folder has no .gguf file"),
    (("run", "{text}", "x"), 3, "is not a GGUF file"),
    (("run", "{cut}", "x"), 3, "is truncated"),
    (("run", "-hf", "nobody", "x"), 3, "-hf nobody: must be user/name"),
    (("run", "{model}"), 2, "no prompt"),
    (("run", "{model}", "x", "--memory", "8Q"), 2, "is not a size"),
    (("run", "{model}", "x", "--memory", "20M"), 4, "the smallest cap that works is --memory"),
    (("run", "Why is the sky blue?"), 3, "a prompt for it is given with -p"),
    (("run", "{model}", "x", "-n", "-3"), 2, "-n -3"),
    (("run", "{model}", "x", "-n", "many"), 2, "-n"),
    (("run", "{model}", "x", "--io", "mmap"), 2, "--io mmap"),
    (("run", "{model}", "x", "-f", "no-such-file"), 2, "cannot read no-such-file"),
    (("run", "{model}", "x", "-t", "100000"), 2, "-t 100000: must be at most 512"),
    (("verify", "{model}", "-t", "513"), 2, "-t 513: must be at most 512"),
    (("run", "{model}", "x", "--seed", "99999999999"), 2, "--seed 99999999999: must be"),
    (("run", "{model}", "x", "--grammar", "root ::= <no-token>"), 2, "the grammar cannot be"),
    # What needs no model is checked before one is opened.
    (("run", "no-such.gguf", "x", "--grammar", "root"), 2, "the grammar cannot be parsed"),
    (("run", "no-such.gguf", "x", "-j", "{{"), 2, "it is not JSON: Expecting property name"),
    (("run", "no-such.gguf", "x", "--memory", "banana"), 2, "'banana' is not a size"),
    (("run", "no-such.gguf", "x", "-ngl", "abc"), 2, "-ngl abc"),
    (("run", "no-such.gguf", "x", "--policy", "mru"), 2, "there is no cache policy 'mru': use"),
    (("eval", "no-such.gguf", "--predictor", "gate:x"), 2, "a predictor has no setting 'x': use"),
    (("trace", "no-such.gguf", "-o", "o", "--policy", "lfu:w=1"), 2, "has no setting 'w': use"),
    (("run", "{model}", "x " * 600, "-c", "256"), 2, "raise it with -c"),
    (("run", "{model}", "x", "-cmoe"), 2, "-cmoe: hobbit places experts itself"),
    (("run", "{model}", "x", "-ncmoe", "3"), 2, "-ncmoe 3: hobbit"),
    (("run", "{model}", "x", "-ot", "exps=CPU"), 2, "-ot exps=CPU: hobbit"),
    (("run", "{model}", "--frobnicate"), 2, "--frobnicate"),
    (("frobnicate",), 2, "frobnicate"),
    (("verify", "no-such.gguf"), 3, "no such file"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), ERRORS)
def test_errors_are_one_line(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    model: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "text").write_text("This is a text.")
    (tmp_path / "cut").write_bytes(model.read_bytes()[:-100_000])
    names = {"folder": tmp_path, "text": tmp_path / "text", "cut": tmp_path / "cut", "model": model}
    done = hobbit(*(argument.format(**names) for argument in arguments))
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("hobbit: error: ")
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_figure_in_the_refusal_works(model: Path) -> None:
    refused = hobbit("run", model, "x", "-n", "2", *SMALL[:-1], "20M")
    figure = refused.stderr.split()[-1]
    done = hobbit("run", model, "x", "-n", "2", *SMALL[:-1], figure)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_the_answer(model: Path, number: signal.Signals, code: int) -> None:
    arguments = ("-c", "60000", "-t", "1", "-s", "1", "--memory", "4G")
    with started("run", model, "one two", *arguments) as process:
        assert process.stdout
        assert process.stdout.read(10)
        process.send_signal(number)
        sent = time.monotonic()
        out, err = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert process.returncode == code
    assert out.endswith(b"\n")
    last = err.decode().splitlines()[-1]
    assert last.startswith("[")
    assert last.endswith("| cancelled]")


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the process's children; the kernel lists them by the thread that started them."""
    tasks = Path(f"/proc/{process.pid}/task")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("stage", [b"stock llama.cpp", b"hobbit, cache floor"])
def test_ctrl_c_stops_a_comparison(model: Path, stage: bytes) -> None:
    with started("verify", model, "-t", "1") as process:
        wait_for(process.stderr, stage)
        stock = children(process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, b"")
    # On a busy machine it may have come to the next cache size meanwhile.
    assert err.endswith(b"hobbit: error: interrupted\n") and b"Traceback" not in err
    assert len(stock) == (1 if stage.startswith(b"stock") else 0)
    assert not any(Path(f"/proc/{pid}").exists() for pid in stock)


def test_ctrl_c_while_the_command_starts() -> None:
    """Sent by an import, so that it always comes before the command line is read."""
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from hobbit.__main__ import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "hobbit: error: interrupted\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(model: Path, closed: str) -> None:
    command = [sys.executable, "-m", "hobbit", "run", str(model), "x", "-n", "2", *SMALL]
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    done = subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 0
    assert bool(done.stdout) == (">&-" not in closed.split())
    assert b"Traceback" not in done.stderr
    assert b"error" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [("run", "{model}", "x", "-n", "2", *SMALL), ("--help",)])
def test_an_answer_that_cannot_be_written(model: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "hobbit", *(text.format(model=model) for text in arguments)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == app.EXIT_DISK_FULL
    last = done.stderr.splitlines()[-1]
    assert re.match(r"hobbit: error: (cannot write to stdout: )?No space left on device$", last)


def test_the_prompt_only(model: Path) -> None:
    done = hobbit("run", model, "one two", "-n", "0", *SMALL)
    assert (done.returncode, done.stdout) == (0, "\n")
    assert re.match(
        r"\[0 tok, 0\.00 tok/s, no token \([1-9]\d* tok prompt", done.stderr.split("\n")[-2]
    )


def test_flags_of_llama_cpp_that_change_nothing(model: Path) -> None:
    flags = [
        "-no-cnv",
        "-cnv",
        "-st",
        "--show-timings",
        "--no-mmap",
        "--mlock",
        "--perf",
        "--jinja",
    ]
    plain = hobbit("run", model, "one two", "-n", "4", *SMALL, "-q")
    done = hobbit("run", *flags, "-m", model, "-p", "one two", "-n", "4", *SMALL, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, plain.stdout, "")


def test_a_closed_pipe_ends_the_run_quietly(model: Path) -> None:
    with started("run", model, "one two", "-c", "60000", "-t", "1", "--memory", "4G") as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(10)
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait(60) == 1
    assert "Traceback" not in err
    assert "Exception" not in err


def test_an_endless_stdin_is_announced(model: Path) -> None:
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "hobbit", "run", str(model), "x", "-n", "2", *SMALL]
    with subprocess.Popen(command, stdin=reader, stderr=subprocess.PIPE) as process:
        os.close(reader)
        wait_for(process.stderr, b"waiting for the end of stdin")
        os.close(writer)
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_version_and_help() -> None:
    done = hobbit("--version")
    assert re.match(r"hobbit \d+\.\d+\.\d+ \(llama-cpp-python [\d.]+\)\n$", done.stdout)
    for arguments in ((), ("--help",), ("run", "-h"), ("verify", "--help")):
        done = hobbit(*arguments)
        assert done.returncode == 0
        assert "Usage: hobbit" in done.stdout


def test_help_does_not_import_llama_cpp() -> None:
    code = (
        "import sys, hobbit.cli as c; c.main(['run', '--help']); "
        "print([m for m in ('llama_cpp', 'numpy', 'gguf', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_policy_and_predictor_reach_the_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOBBIT_POLICY", "lfu")
    flags = ("--predictor", "gate:depth=1,always", "--memory", "200M")
    done = hobbit("run", model, "x", "-n", "4", *SMALL, *flags, "--json", "-v")
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)["config"]
    assert (config["policy"], config["predictor"]) == ("lfu", "gate:depth=1,always")
    assert config["predict"] == 4
    assert json.loads(done.stdout)["experts"]["predictor"] == "gate"
    assert "time of a token: " in done.stderr


def test_every_option_has_a_flag() -> None:
    parameters = set(inspect.signature(run).parameters)
    assert parameters - {"offline"} == {field.name for field in fields(Options)}


def test_defaults_are_those_of_the_options() -> None:
    for name, parameter in inspect.signature(run).parameters.items():
        if name in Options.__dataclass_fields__:
            default = getattr(Options(), name)
            expected = None if default == () else default
            assert (name, parameter.default) == (name, expected)


def test_disk_full_has_its_own_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    error = ModelError("cannot write the demo")
    error.__cause__ = OSError(28, "No space left on device")
    assert app._report(error) == app.EXIT_DISK_FULL
    assert capfd.readouterr().err == "hobbit: error: cannot write the demo\n"


@pytest.mark.parametrize(
    ("arguments", "command"),
    [(("simulate",), "hobbit simulate"), (("run", "--foo"), "hobbit run"), (("foo",), "hobbit")],
)
def test_the_parser_s_hint_names_the_command(arguments: tuple[str, ...], command: str) -> None:
    done = hobbit(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"hint: {command} --help"


def test_an_unforeseen_error_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert app._report(KeyError("x")) == 1
    assert capfd.readouterr().err.splitlines() == [
        "hobbit: error: KeyError: 'x'",
        "hint: set HOBBIT_VERBOSE=1 to see where",
    ]


def test_verify(model: Path) -> None:
    done = hobbit("verify", model, "-t", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["floor", "layer", "half", "all"]
    assert all("identical logits" in line for line in lines)
