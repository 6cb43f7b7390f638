"""The chat as a person sees it: on a terminal that pyte plays."""

from __future__ import annotations

import json
import re
import signal
import stat
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import terminal
import tiny
from terminal import Terminal, started

SMALL = ("-t", "1", "-s", "1", "--memory", "1G")
SHORT = (*SMALL, "-c", "512", "-n", "12")
ENDLESS = (*SMALL, "-c", "60000", "--memory", "4G")
# What sets colours, or dims: an SGR sequence that does more than reset.
COLOUR = re.compile(rb"\x1b\[(?!0?m)[0-9;]+m")
HINT = "Send a message (/? for help)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    return tiny.make_text_model(folder / "m.gguf", chat=True, template=tiny.CONTROL_TEMPLATE)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "hobbit"


def ready(screen: Terminal) -> None:
    """Wait for an empty line that asks for a message."""
    screen.wait_for(f">>> {HINT}")


def answers(screen: Terminal) -> list[str]:
    """Return the text between each message and the stats line of its answer."""
    text = "\n" + screen.text
    return re.findall(r"^>>> [^/\n].*\n((?:(?!>>>).*\n)*?)\[\d+ tok", text, re.MULTILINE)


def messages(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_turns_and_leaving(model: Path) -> None:
    with started("run", model, *SHORT) as screen:
        ready(screen)
        screen.enter("the sea")
        screen.enter("the sky")
        screen.type("/bye\r")
        assert screen.exit_code() == 0
        said = answers(screen)
        assert len(said) == 2 and all(len(text.split()) > 2 for text in said)
        stats = [line for line in screen.lines if line.startswith("[")]
        assert all(re.match(r"\[\d+ tok, [\d.]+ tok/s, first token ", line) for line in stats)
        # The whole of the second turn's prompt would be twice as long and more.
        prompts = [int(n) for n in re.findall(r"\((\d+)\s+tok\s+prompt", screen.text)]
        assert prompts[1] < prompts[0] + 15


def test_answers_are_on_stdout_and_the_rest_is_not(model: Path, tmp_path: Path) -> None:
    hobbit = [sys.executable, "-m", "hobbit", "run", str(model), *SHORT]
    command = ["sh", "-c", f'exec "$@" 2>{tmp_path}/err', "sh", *hobbit]
    with terminal.on_terminal(command, 80, 24) as screen:
        ready(screen)
        screen.enter("the sea")
        screen.enter("/save c.txt")
        screen.type("/bye\r")
        assert screen.exit_code() == 0
    err = (tmp_path / "err").read_text()
    assert "mode: " in err and "tok/s, first token" in err
    assert "hobbit: error: c.txt: the name must end in" in err
    assert "mode: " not in screen.text and "first token" not in screen.text
    after = screen.lines[screen.lines.index(">>> the sea") + 1]
    assert len(after.split()) > 2
    assert "\x1b" not in err


def test_what_is_said_of_an_answer(model: Path, tmp_path: Path) -> None:
    """--stats, until /set changes it; as JSON in one piece, whatever the terminal's width."""
    for kind, ending in (("none", ""), ("full", "eval rate:"), ("json", "")):
        hobbit = [sys.executable, "-m", "hobbit", "run", str(model), *SHORT, "--stats", kind]
        err = tmp_path / kind
        command = ["sh", "-c", f'exec "$@" 2>{err}', "sh", *hobbit]
        with terminal.on_terminal(command, 80, 24) as screen:
            ready(screen)
            banner = len(err.read_text())
            screen.enter("the sea")
            said = err.read_text()[banner:]
            assert ending in said and ("[12 tok" in said) == (kind == "full")
            if kind == "json":
                found = json.loads(said)
                assert found["usage"]["completion_tokens"] == 12 and "text" not in found
            if kind == "none":
                assert said == ""
                screen.enter("/set verbose")
                screen.enter("the sky")
                assert "eval rate:" in err.read_text()
            screen.type("/bye\r")
            assert screen.exit_code() == 0


def test_a_file_is_for_one_answer(model: Path, tmp_path: Path) -> None:
    with started("run", model, *SHORT, "-o", tmp_path / "a", columns=300) as screen:
        assert screen.exit_code() == 2
        (line,) = screen.lines
    wanted = "takes one answer: give a prompt with -p; /save is for a chat"
    assert line == f"hobbit: error: -o {tmp_path}/a: {wanted}"
    assert not (tmp_path / "a").exists()


def test_ways_to_type(model: Path, tmp_path: Path) -> None:
    """Several lines, a pasted text, an editor; Tab completes commands and what follows them."""
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "the way" >"$1"\n')
    editor.chmod(0o755)
    with started("run", model, *SHORT, EDITOR=str(editor), VISUAL="") as screen:
        ready(screen)
        screen.type('"""the sea\r')
        screen.wait_for('>>> """the sea\n...')
        screen.enter('the sky"""')
        screen.type("\x1b[200~the sea\nthe sky\n/bye\x1b[201~")
        screen.wait_for("/bye")
        screen.enter(" now")
        screen.type("x\x07")
        screen.wait_for(">>> the way")
        screen.enter("")
        screen.type("/sh\t")
        screen.wait_for(">>> /show")
        screen.type(" lic\t\r")
        screen.wait_for("The model file names no license\n>>>")
        screen.enter(f"/save {tmp_path}/c.jsonl")
    asked = [m["content"] for m in messages(tmp_path / "c.jsonl") if m["role"] == "user"]
    assert asked == ["the sea\nthe sky", "the sea\nthe sky\n/bye now", "the way"]


def test_regen_save_load_and_edit(model: Path, tmp_path: Path) -> None:
    with started("run", model, *SHORT) as screen:
        ready(screen)
        screen.enter("the sea")
        screen.enter(f"/save {tmp_path}/one.jsonl")
        screen.enter("/regen")
        screen.enter(f"/save {tmp_path}/two.jsonl")
        screen.enter("/clear")
        screen.enter("the sky")
        screen.enter(f"/load {tmp_path}/one.jsonl")
        screen.enter("the way")
        screen.type("/edit\r")
        screen.wait(lambda: screen.lines[-2].startswith(">>> the way"), "the last message")
        screen.enter(" of old")
        screen.enter(f"/save {tmp_path}/three.jsonl")
        screen.enter(f"/save {tmp_path}/three.md")
    one, two, three = (messages(tmp_path / f"{n}.jsonl") for n in ("one", "two", "three"))
    assert (one[0], one[0]["content"]) == (two[0], "the sea")
    assert one[1] != two[1]
    assert three[:2] == one
    assert [m["content"] for m in three if m["role"] == "user"] == ["the sea", "the way of old"]
    assert "## Assistant" in (tmp_path / "three.md").read_text()


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_keeps_what_was_said(model: Path, tmp_path: Path, presses: int) -> None:
    with started("run", model, *ENDLESS) as screen:
        ready(screen)
        screen.type("the sea\r")
        screen.wait(lambda: len(screen.text.partition(">>> the sea")[2].split()) > 20, "words")
        for _ in range(presses):
            screen.interrupt()
        screen.wait_for("cancelled]")
        ready(screen)
        screen.enter("/set parameter num_predict 5")
        screen.enter("the sky")
        screen.enter(f"/save {tmp_path}/c.jsonl")
        screen.type("/bye\r")
        assert screen.exit_code() == 0
    kept = messages(tmp_path / "c.jsonl")
    assert [m["role"] for m in kept] == ["user", "assistant"] * 2
    shown = re.sub(r"\s+", "", answers(screen)[0])
    assert shown and shown == re.sub(r"\s+", "", kept[1]["content"]), screen.text


def test_ctrl_c_and_ctrl_d_at_the_prompt(model: Path) -> None:
    with started("chat", model, *SHORT) as screen:
        ready(screen)
        screen.type("half a message")
        screen.wait_for("half a message")
        screen.interrupt()
        screen.wait(lambda: "half" not in screen.text, "an empty line")
        assert "to leave" not in screen.text
        screen.interrupt()
        screen.wait_for("Use Ctrl-D or /bye to leave.")
        ready(screen)
        screen.type("\x04")
        assert screen.exit_code() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("flags", [(), ("--panel",)])
@pytest.mark.parametrize("busy", [False, True])
def test_who_is_killed_leaves_a_terminal_that_works(
    model: Path, busy: bool, flags: tuple[str, ...], number: int
) -> None:
    with started("run", model, *ENDLESS, *flags) as screen:
        before = termios.tcgetattr(screen.process.child_fd)
        ready(screen)
        if busy:
            screen.type("the sea\r")
            screen.wait(lambda: len(screen.text.partition(">>> the sea")[2].split()) > 20, "words")
            assert screen.screen.margins is not None
        for _ in range(2):  # as those do who want to be sure
            screen.process.kill(number)
        assert screen.exit_code() == 128 + number
        assert "Traceback" not in screen.text
        assert screen.screen.margins in (None, (0, screen.screen.lines - 1))
        assert "MiB a token" not in screen.text and " | ctx" not in screen.text
        assert termios.tcgetattr(screen.process.child_fd) == before


def test_a_hang_up_is_ignored_where_that_is_asked_for(model: Path) -> None:
    hobbit = [sys.executable, "-m", "hobbit", "run", str(model), *SHORT]
    ignoring = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *hobbit]
    with terminal.on_terminal(ignoring, 80, 24) as screen:
        ready(screen)
        screen.process.kill(signal.SIGHUP)
        screen.enter("the sea")
        screen.type("/bye\r")
        assert screen.exit_code() == 0


def test_unknown_commands_and_errors_are_one_line(model: Path, tmp_path: Path) -> None:
    with started("run", model, *SHORT, columns=120) as screen:
        ready(screen)
        screen.enter("/foo bar")
        assert "Unknown command '/foo'. Type /? for help" in screen.lines
        screen.enter("/load none.jsonl")
        assert "hobbit: error: cannot read none.jsonl: No such file or directory" in screen.lines
        screen.enter("the sea " * 100)
        assert any("error: the message does not fit" in line for line in screen.lines)
        screen.enter("the sky")
        assert len(answers(screen)) == 1
        assert "Traceback" not in screen.text


@pytest.mark.parametrize("columns", [40, 80])
def test_widths(model: Path, columns: int, tmp_path: Path) -> None:
    flags = (*SMALL, "-c", "512", "-n", "60")
    with started("run", model, *flags, columns=columns) as screen:
        ready(screen)
        screen.enter("the sea")
        screen.enter(f"/save {tmp_path}/c.jsonl")
        screen.wait(lambda: " tok/s | hit " in screen.lines[-1], "numbers")
        said = answers(screen)[0]
        assert said.split() == messages(tmp_path / "c.jsonl")[1]["content"].split()
        assert len(said.splitlines()) > 1
        screen.type("/bye\r")
        assert screen.exit_code() == 0
        # Nothing is left of the live numbers, neither while answering nor below the line.
        assert screen.lines[-1] == ">>> /bye"
        assert " | ctx" not in screen.text


def test_the_panel(model: Path) -> None:
    with started("run", model, *ENDLESS, "--panel") as screen:
        ready(screen)
        screen.type("the sea\r")
        screen.wait(lambda: "MiB a token" in screen.text and "% hit" in screen.text, "the panel")
        screen.wait(lambda: len(answers_so_far(screen)) > 300, "more lines than fit")
        assert screen.screen.display[-2].startswith("context  ")
        screen.interrupt()
        screen.wait_for("cancelled]")
        ready(screen)
        assert "MiB a token" not in screen.text
        # Each line went by once.
        lines = [line for line in screen.lines if len(line) > 40 and line[0] != "["]
        assert len(lines) == len(set(lines))


def answers_so_far(screen: Terminal) -> list[str]:
    return screen.text.partition(">>> the sea")[2].split()


@pytest.mark.parametrize("hidden", [False, True])
def test_thoughts(model: Path, hidden: bool) -> None:
    grammar = ("--grammar", 'root ::= "<think>hm</think>\\n\\nyes"')
    flags = (*SMALL, "-c", "512", "-n", "40", *grammar, *["--hide-thinking"][: int(hidden)])
    with started("run", model, *flags) as screen:
        ready(screen)
        screen.enter("the sea")
        assert answers(screen) == ["yes\n" if hidden else "<think>hm</think>\n\nyes\n"]
    assert (b"\x1b[2m<" in screen.raw) is not hidden


@pytest.mark.parametrize("setting", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_colour(model: Path, setting: dict[str, str]) -> None:
    with started("run", model, *SHORT, **setting) as screen:
        screen.wait(lambda: screen.prompts == 1, "the prompt")
        screen.enter("the sea")
        screen.type("/bye\r")
        assert screen.exit_code() == 0
        assert len(answers(screen)) == 1
    assert bool(COLOUR.search(screen.raw)) == (not setting)
    if "TERM" in setting:
        assert b"\x1b[1;" not in screen.raw  # nothing is set apart at the bottom


def test_history(model: Path, state: Path) -> None:
    with started("run", model, *SHORT) as screen:
        ready(screen)
        screen.enter("the sea")
        screen.enter("/set nohistory")
        screen.enter("the secret")
        screen.type("/bye\r")
        assert screen.exit_code() == 0
    file = state / "history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "+the sea" in file.read_text() and "secret" not in file.read_text()
    with started("run", model, *SHORT) as screen:
        ready(screen)
        screen.type("\x1b[A\x1b[A")
        screen.wait_for(">>> the sea")


def test_no_history(model: Path, state: Path) -> None:
    with started("run", model, *SHORT, HOBBIT_NOHISTORY="1") as screen:
        ready(screen)
        screen.enter("the sea")
        screen.type("\x1b[A")
        screen.wait_for(">>> the sea\n")
    assert not (state / "history").exists()


def test_a_folder_that_cannot_be_written_is_no_error(model: Path, state: Path) -> None:
    state.parent.write_text("a file, where a folder should be")
    with started("run", model, *SHORT) as screen:
        ready(screen)
        screen.enter("the sea")
        screen.type("/bye\r")
        assert screen.exit_code() == 0
        assert "error" not in screen.text


def test_without_a_terminal_nothing_waits(model: Path) -> None:
    call = [sys.executable, "-m", "hobbit", "chat", str(model), *SHORT]
    run: Any = {"capture_output": True, "text": True, "check": False, "timeout": 60}
    silent = subprocess.run(call, stdin=subprocess.DEVNULL, **run)
    assert (silent.returncode, silent.stdout) == (2, "")
    assert "no prompt" in silent.stderr
    piped = subprocess.run(call, input="the sea", **run)
    assert piped.returncode == 0 and piped.stdout.count("\n") == 1
    with terminal.on_terminal(["sh", "-c", '"$@" | cat', "sh", *call], 80, 24) as screen:
        screen.wait_for("no prompt")  # stdin is a terminal, stdout is not
        assert screen.exit_code() == 0


def test_a_prompt_is_answered_once_on_a_terminal_too(model: Path) -> None:
    with started("run", model, "the sea", *SHORT) as screen:
        assert screen.exit_code() == 0
        assert ">>>" not in screen.text


def test_what_is_for_one_answer_does_not_chat(model: Path) -> None:
    with started("run", model, *SHORT, "--json") as screen:
        assert screen.exit_code() == 2
        assert "no prompt" in screen.text
