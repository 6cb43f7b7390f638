"""--session and --continue: what the model is sent, what is kept, and what nothing may lose."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from terminal import Terminal, started
from test_pull import in_namespace

import hobbit
from hobbit.chat import transcript
from hobbit.chat.session import Session
from hobbit.chat.session_file import SessionFile, last_session
from hobbit.chat.transcript import Message
from hobbit.errors import HobbitError, UsageError
from hobbit.generate import Sampling
from hobbit.options import Options

SMALL = ("-c", "256", "-t", "1", "-s", "1", "--memory", "1G", "-n", "8")
GREEDY = (*SMALL, "--temp", "0")
ARGUMENTS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "memory": "1G"}
TURN = [Message("user", "the sea"), Message("assistant", " of old")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sessions")
    return tiny.make_text_model(folder / "m.gguf", chat=True, template=tiny.CONTROL_TEMPLATE)


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[hobbit.Llama]:
    with hobbit.Llama(str(model), **ARGUMENTS) as made:
        yield made


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOBBIT_STATE", str(tmp_path / "state"))
    return tmp_path / "state" / "sessions"


def run(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hobbit", "run", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def messages(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(path: Path) -> list[str]:
    return [message["content"] for message in messages(path)]


def error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that it said, which is the only error."""
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def begin(name: str = "trip", said: list[Message] = TURN) -> bytes:
    """Keep a session; return its bytes."""
    file = SessionFile(name)
    file.write(said)
    file.close()
    return file.path.read_bytes()


# --------------------------------------------------------------------------------------------------
# one answer at a time


def test_the_model_is_sent_what_was_said_before(
    model: Path, llm: hobbit.Llama, folder: Path
) -> None:
    """Prompt and answer are, to the token and the letter, those of the messages sent at once."""
    sent: list[Any] = []
    for text in ("the way of the sea", "and the sky", "of old"):
        sent.append({"role": "user", "content": text})
        llm.reset()
        told: Any = llm.create_chat_completion(sent, max_tokens=8, temperature=0.0, seed=1)
        done = run(model, text, *GREEDY, "--session", "trip", "--json")
        report = json.loads(done.stdout)
        assert report["usage"]["prompt_tokens"] == told["usage"]["prompt_tokens"]
        assert report["text"] == told["choices"][0]["message"]["content"]
        assert report["config"]["session"] == "trip"
        sent.append({"role": "assistant", "content": report["text"]})
        assert messages(folder / "trip.jsonl") == sent
    alone = json.loads(run(model, "of old", *GREEDY, "--json").stdout)
    assert alone["usage"]["prompt_tokens"] < report["usage"]["prompt_tokens"] / 2


def test_the_answer_alone_is_on_stdout(model: Path, folder: Path) -> None:
    first = run(model, "the sea", *SMALL, "--session", "trip")
    assert first.stdout == run(model, "the sea", *SMALL).stdout
    assert first.stderr.startswith("session trip: a new one\n")
    second = run(model, "the sky", *SMALL, "--session", "trip")
    assert second.stderr.startswith("session trip: 2 earlier messages\n")
    quiet = run(model, "the way", *SMALL, "--continue", "-q")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    said = contents(folder / "trip.jsonl")[1::2]
    assert [f"{answer}\n" for answer in said] == [first.stdout, second.stdout, quiet.stdout]


def test_one_for_its_owner_alone_and_nothing_beside_it(model: Path, folder: Path) -> None:
    assert run(model, "the sea", *SMALL, "--session", "trip").returncode == 0
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "trip.jsonl").stat().st_mode) == 0o600
    assert os.listdir(folder) == ["trip.jsonl"]


def test_continue_goes_on_with_the_one_written_last(model: Path, folder: Path) -> None:
    for name in ("one", "two", "three"):
        begin(name)
    begin("two", [*TURN, *TURN])
    (folder / ".hidden.jsonl").write_text("")
    (folder / "notes.txt").write_text("")
    done = run(model, "the sky", *SMALL, "--continue")
    assert done.stderr.startswith("session two: 4 earlier messages\n")
    (folder / "two.jsonl").unlink()
    assert last_session() == "three"


def test_nothing_to_continue(model: Path, folder: Path) -> None:
    done = run(model, "the sky", *SMALL, "--continue")
    assert (done.returncode, done.stdout) == (2, "")
    assert error(done).endswith(
        f"--continue: there is no session yet in {folder}: begin with --session"
    )


def test_a_session_begins_with_a_turn(model: Path, folder: Path) -> None:
    done = run(model, "the sea " * 300, *SMALL, "--session", "trip", "-sys", "be brief")
    assert done.returncode == 2 and "the message does not fit" in error(done)
    assert os.listdir(folder) == []


def test_the_system_prompt_stays_until_another_is_given(model: Path, folder: Path) -> None:
    def prompt_tokens(*more: str) -> int:
        done = run(model, "x", *GREEDY, "--session", "trip", "--json", *more)
        return int(json.loads(done.stdout)["usage"]["prompt_tokens"])

    tokens = prompt_tokens("-sys", "be brief and say a lot of what there is")
    without = json.loads(run(model, "x", *GREEDY, "--json").stdout)["usage"]["prompt_tokens"]
    assert tokens > without
    before = messages(folder / "trip.jsonl")
    assert before[0] == {"role": "system", "content": "be brief and say a lot of what there is"}
    prompt_tokens()
    assert messages(folder / "trip.jsonl")[:3] == before
    prompt_tokens("-sys", "be long")
    after = messages(folder / "trip.jsonl")
    assert after[0] == {"role": "system", "content": "be long"}
    assert after[1:3] == before[1:] and len(after) == 7


def test_another_model_may_go_on(model: Path, tmp_path: Path, folder: Path) -> None:
    other = tiny.make_text_model(tmp_path / "other.gguf")  # without a template
    assert run(model, "the sea", *SMALL, "--session", "trip").returncode == 0
    done = run(other, "the sky", *SMALL, "--session", "trip")
    assert done.returncode == 0
    assert [m["role"] for m in messages(folder / "trip.jsonl")] == ["user", "assistant"] * 2


def test_more_than_the_context_holds(model: Path, folder: Path) -> None:
    long = [Message(m.role, f"{m.content} {n}") for n in range(300) for m in TURN]
    begin(said=long)
    done = run(model, "the sky", *SMALL, "--session", "trip", "--json")
    assert done.returncode == 0, done.stderr
    said = re.search(
        r"the context was full: (\d+) oldest turns left out of it \(the s", done.stderr
    )
    assert said and 280 < int(said[1]) < 300
    report = json.loads(done.stdout)
    assert 64 < report["usage"]["prompt_tokens"] <= 128
    assert len(messages(folder / "trip.jsonl")) == 602


def test_as_many_turns_are_left_out_as_must_be(llm: hobbit.Llama) -> None:
    """The search finds what trying each turn after the other would."""
    session = Session(llm, Sampling(max_tokens=8, seed=1))
    session.messages = [
        Message(m.role, f"{m.content} {'x' * (n % 5)}") for n in range(40) for m in TURN
    ]
    question = [*session.messages, Message("user", "the sky")]

    def tokens(turn: int) -> int:
        return len(session._prompt(question[2 * turn :])[1])

    fitted = session._fitted(question)
    assert fitted.first == 2 * fitted.dropped
    assert tokens(fitted.dropped) <= 128 < tokens(fitted.dropped - 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--session", "a", "--continue"), "--session and --continue: "),
        (("--session", "a", "--raw"), "--raw has no messages"),
        (("--continue", "--raw"), "--raw has no messages"),
        (("--session", "a", "-n", "0"), "-n 0 makes no answer"),
        (("--session", "../a"), "must be a plain name: letters, digits, '-', '_' and '.'"),
        (("--session", ""), "--session '': must be a plain name"),
    ],
)
def test_flags_that_do_not_go_together(
    model: Path, folder: Path, flags: tuple[str, ...], message: str
) -> None:
    done = run(model, "x", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in error(done)
    assert not folder.exists()


def test_names() -> None:
    for name in ("a", "2026-11-30", "_x", "a.b", "über", "x" * 200):
        assert Options(session=name).has_session
    for name in (".", "..", ".a", "-a", "a b", "a/b", "a\n", "a\0", "x" * 201, "ü" * 101, "\udcff"):
        with pytest.raises(UsageError, match="must be a plain name"):
            Options(session=name)


def test_it_is_kept_without_a_history_too(model: Path, folder: Path) -> None:
    done = run(model, "the sea", *SMALL, "--session", "trip", HOBBIT_NOHISTORY="1")
    assert done.returncode == 0
    assert len(messages(folder / "trip.jsonl")) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_was_said_before_an_interrupt_stays(
    model: Path, folder: Path, number: signal.Signals, code: int
) -> None:
    before = begin()
    command = [sys.executable, "-m", "hobbit", "run", str(model), "the sky", "--session", "trip"]
    endless = ("-c", "60000", "-t", "1", "-s", "1", "--memory", "4G", "-q")
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    with subprocess.Popen([*command, *endless], **pipes) as process:
        assert process.stdout
        shown = process.stdout.read(10)
        process.send_signal(number)
        shown += process.communicate(timeout=60)[0]
    assert process.returncode == code
    assert (folder / "trip.jsonl").read_bytes().startswith(before)
    assert contents(folder / "trip.jsonl")[2:] == ["the sky", shown.decode().removesuffix("\n")]


def test_what_a_closed_pipe_has_seen_stays(model: Path, folder: Path) -> None:
    endless = ("-c", "60000", "-t", "1", "-s", "1", "--memory", "4G")
    command = [sys.executable, "-m", "hobbit", "run", str(model), "the sea", *endless]
    shell = ["sh", "-c", '"$@" | head -c 20', "sh", *command, "--session", "trip"]
    subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=True)
    question, answer = contents(folder / "trip.jsonl")
    assert question == "the sea" and len(answer) > 10


# --------------------------------------------------------------------------------------------------
# the file


def test_any_text_comes_back() -> None:
    odd = [
        Message("system", "a\u2028b"),
        Message("user", "\x85 é \n\r \x1c"),
        Message("assistant", ""),
    ]
    begin(said=odd)
    file = SessionFile("trip")
    assert file.messages == odd
    file.close()


def test_it_is_one_process_s_own(model: Path, folder: Path) -> None:
    before = begin()
    file = SessionFile("trip")
    for flags in (("--session", "trip"), ("--continue",)):
        done = run(model, "the sky", *SMALL, *flags)
        assert (done.returncode, done.stdout) == (1, "")
        assert "session trip is in use by another hobbit: wait" in error(done)
    assert run(model, "the sky", *SMALL, "--session", "other").returncode == 0
    assert (folder / "trip.jsonl").read_bytes() == before
    file.close()
    assert run(model, "the sky", *SMALL, "--session", "trip").returncode == 0
    assert (folder / "trip.jsonl").read_bytes().startswith(before)


ADDING = """
import sys, time
from hobbit.chat.session_file import SessionFile
from hobbit.chat.transcript import Message
from hobbit.errors import HobbitError
for number in range(40):
    while True:
        try:
            file = SessionFile("trip")
            break
        except HobbitError as exc:
            assert "in use" in str(exc), exc
            time.sleep(0.001)
    file.write([*file.messages, Message("user", f"{sys.argv[1]} {number}")])
    file.close()
"""


def test_no_turn_is_lost_between_processes(folder: Path) -> None:
    command = [sys.executable, "-c", ADDING]
    running = [subprocess.Popen([*command, str(n)], stderr=subprocess.PIPE) for n in range(4)]
    failed = [process.communicate(timeout=120)[1].decode() for process in running]
    assert failed == [""] * 4
    said = contents(folder / "trip.jsonl")
    assert sorted(said) == sorted(f"{n} {number}" for n in range(4) for number in range(40))
    assert os.listdir(folder) == ["trip.jsonl"]


def test_a_process_that_was_killed_leaves_no_lock(model: Path, folder: Path) -> None:
    begin()
    (folder / ".trip.lock").touch()
    assert run(model, "the sky", *SMALL, "--session", "trip").returncode == 0
    assert os.listdir(folder) == ["trip.jsonl"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b'{"role": "user", "cont', "trip.jsonl:3: is no message"),
        (b"\xff\xfe\n", "trip.jsonl: is not UTF-8 text"),
    ],
)
def test_a_damaged_file(model: Path, folder: Path, damage: bytes, message: str) -> None:
    before = begin() + damage
    (folder / "trip.jsonl").write_bytes(before)
    done = run(model, "the sky", *SMALL, "--session", "trip")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"session trip: {folder}/{message}" in error(done)
    assert error(done).endswith("; mend or remove that file")
    assert (folder / "trip.jsonl").read_bytes() == before
    assert os.listdir(folder) == ["trip.jsonl"]


def test_what_someone_else_has_written_is_left_alone(folder: Path) -> None:
    begin()
    file = SessionFile("trip")
    path = folder / "trip.jsonl"
    path.write_text(path.read_text().replace("sea", "sky"))
    edited = path.read_bytes()
    with pytest.raises(HobbitError, match=r"session trip is not kept: .* was changed meanwhile"):
        file.write([*TURN, *TURN])
    assert path.read_bytes() == edited
    path.unlink()  # there is nothing to lose
    file.write([*TURN, *TURN])
    assert len(messages(path)) == 4
    file.close()


def test_a_full_disk_leaves_what_there_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = begin()
    file = SessionFile("trip")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(transcript.os, "fsync", full)
        with pytest.raises(
            HobbitError, match=r"is not kept: cannot write .*trip\.jsonl: No sp"
        ) as ex:
            file.write([*TURN, *TURN])
    assert isinstance(ex.value.__cause__, OSError)  # which gives the command its exit code
    assert (folder / "trip.jsonl").read_bytes() == before
    file.write([*TURN, *TURN])
    file.close()
    assert len(messages(folder / "trip.jsonl")) == 4
    assert os.listdir(folder) == ["trip.jsonl"]


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system of its own")
@pytest.mark.parametrize(
    ("spoil", "code", "reason"),
    [
        ("head -c 1000000 /dev/zero >{disk}/fill || true", 5, errno.ENOSPC),
        ("mount -o remount,ro {disk}", 1, errno.EROFS),
    ],
)
def test_the_answer_comes_though_it_cannot_be_kept(
    model: Path, tmp_path: Path, spoil: str, code: int, reason: int
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    run_ = f"{sys.executable} -m hobbit run {model} {' '.join(SMALL)} -q --session trip"
    script = f"""
        mount -t tmpfs -o size=64k none {disk}
        export HOBBIT_STATE={disk}/state
        {run_} the sea </dev/null
        before=$(cat {disk}/state/sessions/trip.jsonl)
        {spoil.format(disk=disk)} 2>/dev/null
        code=0; {run_} the sky </dev/null || code=$?
        echo "code $code"
        test "$before" = "$(cat {disk}/state/sessions/trip.jsonl)"
        ls -A {disk}/state/sessions
        code=0; HOBBIT_STATE={disk}/new {run_} the sky </dev/null || code=$?
        echo "code $code"
    """
    done = in_namespace(script, dict(os.environ))
    assert done.returncode == 0, done.stderr
    first, second, ended, *left, third, new = done.stdout.splitlines()
    assert all(len(answer) > 8 for answer in (first, second, third)), done.stdout
    assert ended == f"code {code}" and "trip.jsonl" in left
    assert not any(name.endswith(".part") for name in left)
    assert new == f"code {code}"
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert f"hobbit: error: session trip is not kept: cannot write {disk}/state" in errors[0]
    assert errors[0].endswith(os.strerror(reason))
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------
# the chat


def ready(screen: Terminal) -> None:
    screen.wait_for(">>> Send a message")


def test_a_chat_goes_on_and_keeps_each_turn(model: Path, folder: Path) -> None:
    """The second turn of a chat has the answer that one process for each turn gives."""
    for text in ("the sea", "the sky"):
        assert run(model, text, *GREEDY, "--session", "apart").returncode == 0
    path = folder / "trip.jsonl"
    assert run(model, "the sea", *GREEDY, "--session", "trip").returncode == 0
    with started("run", model, *GREEDY, "--session", "trip") as screen:
        ready(screen)
        assert "session trip: 2 earlier messages" in screen.lines
        screen.enter("the sky")
        assert messages(path) == messages(folder / "apart.jsonl")
        refused = run(model, "x", *SMALL, "--continue")
        assert "is in use by another hobbit" in error(refused)
        screen.enter("the way")
        assert len(messages(path)) == 6
        screen.type("/bye\r")
        assert screen.exit_code() == 0
    prompts = [int(n) for n in re.findall(r"\((\d+)\s+tok\s+prompt", screen.text)]
    assert prompts[0] > prompts[1]  # the earlier messages are read once
    with started("chat", model, *SMALL, "--continue", HOBBIT_NOHISTORY="1") as screen:
        ready(screen)
        assert "session trip: 6 earlier messages" in screen.lines
        screen.enter("of old")
        assert len(messages(path)) == 8


def test_commands_change_what_is_kept(model: Path, folder: Path) -> None:
    path = folder / "trip.jsonl"
    with started("run", model, *SMALL, "--session", "trip") as screen:
        ready(screen)
        assert "session trip: a new one" in screen.lines
        screen.enter("the sea")
        once = messages(path)
        screen.enter("/regen")
        again = messages(path)
        assert again[0] == once[0] and again[1] != once[1]
        screen.enter("/set system be brief")
        assert messages(path) == [{"role": "system", "content": "be brief"}, *again]
        screen.enter("/clear")
        assert messages(path) == [{"role": "system", "content": "be brief"}]
        assert "Cleared: the conversation begins anew, and session trip with it" in screen.lines
        screen.enter("the sky")
        assert contents(path)[:2] == ["be brief", "the sky"]


def test_ctrl_c_in_a_chat_keeps_what_was_said(model: Path, folder: Path) -> None:
    endless = ("-c", "60000", "-t", "1", "-s", "1", "--memory", "4G")
    with started("run", model, *endless, "--session", "trip") as screen:
        ready(screen)
        screen.type("the sea\r")
        screen.wait(lambda: len(screen.text.partition(">>> the sea")[2].split()) > 20, "words")
        screen.interrupt()
        screen.wait_for("cancelled]")
        ready(screen)
        question, answer = contents(folder / "trip.jsonl")
        assert question == "the sea" and len(answer) > 20
        screen.type("the sky\r")
        screen.wait(lambda: len(screen.text.partition(">>> the sky")[2].split()) > 20, "words")
        screen.terminate()
        assert screen.exit_code() == 143
    assert contents(folder / "trip.jsonl")[:3] == [question, answer, "the sky"]


def test_a_chat_that_cannot_be_kept_goes_on_and_ends_with_an_error(
    model: Path, folder: Path
) -> None:
    folder.parent.write_text("a file, where a folder should be")
    with started("run", model, *SMALL, "--session", "trip", columns=160) as screen:
        ready(screen)
        screen.enter("the sea")
        assert "error: session trip is not kept: cannot write" in screen.text
        screen.enter("the sky")
        screen.type("/bye\r")
        assert screen.exit_code() == 1


def test_a_chat_keeps_what_it_could_not_before(model: Path, folder: Path) -> None:
    folder.parent.write_text("a file, where a folder should be")
    with started("run", model, *SMALL, "--session", "trip", columns=160) as screen:
        ready(screen)
        screen.enter("the sea")
        folder.parent.unlink()
        screen.type("/bye\r")
        assert screen.exit_code() == 0
    assert contents(folder / "trip.jsonl")[0] == "the sea"
