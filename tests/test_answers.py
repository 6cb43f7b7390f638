"""Where `hobbit run` puts an answer, in which form, and what it says of it afterwards."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_cli import SMALL, STATS_LINE, hobbit, started

from hobbit import generate
from hobbit.cli import app, main
from hobbit.cli.destination import Destination, destination
from hobbit.cli.forms import Form, Object, Stream, Text
from hobbit.errors import HobbitError, UsageError
from hobbit.generate import Result
from hobbit.options import Options
from hobbit.pictures.reports import of_json
from hobbit.stats import Stats

ENDLESS = ("-c", "60000", "-t", "1", "-s", "1", "--memory", "4G")
EIGHT = ("one two", "-n", "8", *SMALL)
THOUGHTS = ("x", "-n", "40", *SMALL, "--grammar", 'root ::= "<think>hm</think>\\n\\nyes"')


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_text_model(tmp_path_factory.mktemp("answers") / "m.gguf")


@pytest.fixture(scope="module")
def answer(model: Path) -> str:
    """What a run with EIGHT prints."""
    return hobbit("run", model, *EIGHT, "-q").stdout


def lines_of(text: str) -> list[dict[str, Any]]:
    """Read a stream of JSON lines, of which none is blank and the last is whole."""
    assert text.endswith("\n")
    return [json.loads(line) for line in text[:-1].split("\n")]


def told(lines: list[dict[str, Any]], *kinds: str) -> str:
    return "".join(line["text"] for line in lines if line["type"] in kinds)


def files(folder: Path) -> list[str]:
    """Name what is in a folder, the tests' home folder aside."""
    return sorted(path.name for path in folder.iterdir() if path.name != "home")


def result(text: str, signal: KeyboardInterrupt | None = None) -> Result:
    return Result(text, "cancelled" if signal else "stop", Stats(), Stats(), signal)


def refused(path: Path) -> str:
    """Return why there can be no answer in a file; "" if there can be."""
    try:
        with destination(path):
            return ""
    except HobbitError as error:
        return str(error).rpartition(": ")[2]


def as_nobody(call: Callable[[], str]) -> str:
    """Return what a call returns in a process that may not write what is another's."""
    end, begin = os.pipe()
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setuid(65534)
        os.write(begin, call().encode())
        os._exit(0)
    os.close(begin)
    with os.fdopen(end) as said:
        text = said.read()
    assert os.waitpid(child, 0)[1] == 0
    return text


class TestFile:
    """-o FILE"""

    @pytest.mark.parametrize("form", [(), ("--no-stream",), ("-n", "0"), ("--hide-thinking",)])
    def test_it_has_what_stdout_would_have(
        self, model: Path, tmp_path: Path, form: tuple[str, ...]
    ) -> None:
        run = ("run", model, *EIGHT, *form)
        plain = hobbit(*run)
        filed = hobbit(*run, "-o", tmp_path / "a")
        assert (filed.returncode, filed.stdout) == (0, ""), filed.stderr
        assert (tmp_path / "a").read_bytes() == plain.stdout.encode()
        assert files(tmp_path) == ["a"]
        assert len(filed.stderr.splitlines()) == len(plain.stderr.splitlines())

    def test_json_and_lines_go_there_too(self, model: Path, answer: str, tmp_path: Path) -> None:
        for form in ("--json", "--jsonl"):
            done = hobbit("run", model, *EIGHT, form, "-o", tmp_path / form)
            assert (done.returncode, done.stdout) == (0, "")
        one = json.loads((tmp_path / "--json").read_text())
        last = lines_of((tmp_path / "--jsonl").read_text())[-1]
        assert one["text"] + "\n" == last["text"] + "\n" == answer

    def test_a_dash_is_stdout(
        self, model: Path, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert hobbit("run", model, *EIGHT, "-q", "-o", "-").stdout == answer
        assert files(tmp_path) == []

    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            (("no-such-model", "x"), 3),
            (("{model}", "x", "--memory", "20M"), 4),
            (("{model}", "x", "-n", "-3"), 2),
            (("{model}", "x", "--grammar", "root"), 2),
            (("{model}",), 2),
            (("{model}", "x " * 600, "-c", "256", "--jsonl"), 2),
        ],
    )
    def test_what_fails_before_the_answer_leaves_the_file_alone(
        self, model: Path, tmp_path: Path, arguments: tuple[str, ...], code: int
    ) -> None:
        (tmp_path / "a").write_text("before")
        words = [word.format(model=model) for word in arguments]
        done = hobbit("run", *words, "-o", tmp_path / "a")
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert (tmp_path / "a").read_text() == "before"
        assert files(tmp_path) == ["a"]

    def test_where_it_cannot_be_is_told_before_a_model_is_looked_for(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        places = {
            "no/a": f"there is no folder {tmp_path}/no",
            ".": "it is a folder",
            "file/a": os.strerror(errno.ENOTDIR),
            "a" * 300: os.strerror(errno.ENAMETOOLONG),
        }
        for name, reason in places.items():
            done = hobbit("run", "no-such.gguf", "x", "-o", tmp_path / name)
            last = f"hobbit: error: cannot write {tmp_path / name}: {reason}\n"
            assert (done.returncode, done.stdout, done.stderr) == (1, "", last)

    def test_nor_where_one_may_not_write(self) -> None:
        with tempfile.TemporaryDirectory() as folder:  # tmp_path is for root alone
            (Path(folder) / "kept").write_text("before")
            (Path(folder) / "kept").chmod(0o444)
            Path(folder).chmod(0o555)
            assert as_nobody(lambda: refused(Path(folder) / "kept")) == "Permission denied"
            assert as_nobody(lambda: refused(Path(folder) / "new")) == "Permission denied"
            assert (Path(folder) / "kept").read_text() == "before"
            Path(folder).chmod(0o777)
            assert as_nobody(lambda: refused(Path(folder) / "kept")) == "Permission denied"
            assert as_nobody(lambda: refused(Path(folder) / "new")) == ""

    def test_the_model_is_no_place_for_an_answer(self, model: Path, tmp_path: Path) -> None:
        before = model.read_bytes()
        (tmp_path / "link").symlink_to(model)
        for path in (model, tmp_path / "link"):
            done = hobbit("run", model, *EIGHT, "-o", path)
            assert done.returncode == 2 and "that is the model" in done.stderr
        assert model.read_bytes() == before

    def test_the_prompt_may_be_in_the_same_file(
        self, model: Path, answer: str, tmp_path: Path
    ) -> None:
        (tmp_path / "a").write_text("one two")
        done = hobbit("run", model, *EIGHT[1:], "-q", "-f", tmp_path / "a", "-o", tmp_path / "a")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "a").read_text() == answer

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    @pytest.mark.parametrize("form", [(), ("--json",), ("--jsonl",)])
    def test_a_full_device(self, model: Path, form: tuple[str, ...]) -> None:
        done = hobbit("run", model, *EIGHT, *form, "-o", "/dev/full")
        assert (done.returncode, done.stdout) == (app.EXIT_DISK_FULL, "")
        last = "hobbit: error: cannot write /dev/full: No space left on device"
        assert done.stderr.splitlines()[-1] == last
        assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)

    def test_a_pipe_gets_the_answer_as_it_comes(self, model: Path, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        with started("run", model, "one two", *ENDLESS, "-o", pipe) as process:
            with open(pipe, "rb") as reader:
                assert len(reader.read(10)) == 10
            assert process.wait(60) == 1  # as with a reader of stdout that is gone
            assert process.stdout and process.stdout.read() == b""
        assert files(tmp_path) == ["pipe"]

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_what_came_until_ctrl_c_is_kept(
        self, model: Path, tmp_path: Path, number: signal.Signals, code: int
    ) -> None:
        (tmp_path / "a").write_text("before")
        with started("run", model, "one two", *ENDLESS, "-o", tmp_path / "a") as process:
            end = time.monotonic() + 60
            while not any(p.stat().st_size >= 10 for p in tmp_path.glob(".hobbit-*")):
                assert time.monotonic() < end
                time.sleep(0.01)
            assert (tmp_path / "a").read_text() == "before"
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (code, b"")
        assert err.endswith(b"| cancelled]\n")
        kept = (tmp_path / "a").read_text()
        assert kept.endswith("\n") and len(kept) > 10
        assert files(tmp_path) == ["a"]

    @pytest.mark.parametrize("form", ["--no-stream", "--json", "--jsonl"])
    @pytest.mark.parametrize("text", ["", "One"])
    def test_only_an_answer_that_began_takes_its_place(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, text: str
    ) -> None:
        """Interrupted while the prompt is read, or after the first word."""
        (tmp_path / "a").write_text("before")
        stopped = result(text, KeyboardInterrupt())
        monkeypatch.setattr(generate, "generate", lambda *_: stopped)
        monkeypatch.setattr("sys.stdin", None)
        code = main(["run", str(model), *EIGHT, form, "-o", str(tmp_path / "a"), "-q"])
        assert code == 130
        assert ((tmp_path / "a").read_text() == "before") == (text == "")
        assert files(tmp_path) == ["a"]

    def test_a_file_in_place_keeps_its_mode_and_a_link_its_target(self, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        (tmp_path / "a").chmod(0o640)
        (tmp_path / "link").symlink_to("a")
        with destination(tmp_path / "link") as out:
            out.say("One")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "a").read_text() == "One"
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640

    def test_a_new_file_has_the_usual_mode(self, tmp_path: Path) -> None:
        (tmp_path / "usual").touch()
        with destination(tmp_path / "a") as out:
            out.say("One")
        assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode

    def test_a_failure_keeps_what_was_said(self, tmp_path: Path) -> None:
        with pytest.raises(HobbitError, match="a disk"), destination(tmp_path / "a") as out:
            out.write("(progress)")
            out.say("One")
            raise HobbitError("a disk is lost")
        assert (tmp_path / "a").read_text() == "(progress)One"
        with pytest.raises(HobbitError, match="a disk"), destination(tmp_path / "b") as out:
            out.write("(progress)")
            raise HobbitError("a disk is lost")
        assert files(tmp_path) == ["a"]

    def test_a_place_that_goes_away_is_an_error(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        with (
            pytest.raises(HobbitError, match=f"there is no folder {folder}"),
            destination(folder / "a") as out,
        ):
            out.say("One")
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


def said_by(make: Any, pieces: list[str], **more: Any) -> tuple[str, bool]:
    """Return what a form writes of pieces, of which the last is kept back; and whether it keeps."""
    parts: list[str] = []
    out = Destination(parts.append)
    form: Form = make(out, **more)
    for piece in pieces[:-1]:
        form.text(piece)
    form.end(result("".join(pieces)), {"schema": "s"})
    return "".join(parts), out.keep


class TestForms:
    """What is written of an answer: a piece that an interrupt kept back is not lost."""

    PIECES = ("<th", "ink>h", "m</think>", "\n\n", "y", "es <")

    def test_text(self) -> None:
        pieces = [*self.PIECES]
        for whole in (False, True):
            make: Any = {"whole": whole, "inside": False}
            said = said_by(Text, pieces, hide_thinking=False, **make)
            assert said == ("<think>hm</think>\n\nyes <\n", True)
            assert said_by(Text, pieces, hide_thinking=True, **make) == ("yes <\n", True)
        bare = said_by(Text, [""], whole=False, hide_thinking=False, inside=False)
        assert bare == ("\n", False)

    def test_one_object(self) -> None:
        assert said_by(Object, ["a", "b"]) == ('{"schema": "s"}\n', True)
        assert said_by(Object, [""]) == ('{"schema": "s"}\n', False)

    def test_a_stream(self) -> None:
        text, keeps = said_by(Stream, [*self.PIECES], hide_thinking=False, inside=False)
        lines = lines_of(text)
        assert keeps
        assert told(lines, "thinking") == "<think>hm</think>"
        assert told(lines, "token") == "\n\nyes <"
        assert lines[-1] == {"type": "done", "schema": "s"}
        text, _ = said_by(Stream, [*self.PIECES], hide_thinking=True, inside=False)
        lines = lines_of(text)
        assert told(lines, "thinking", "token") == told(lines, "token") == "yes <"
        text, _ = said_by(Stream, ["hm</thi", "nk>yes"], hide_thinking=False, inside=True)
        assert told(lines_of(text), "thinking") == "hm</think>"


class TestStream:
    """--jsonl"""

    def test_progress_then_pieces_then_what_json_prints(self, model: Path) -> None:
        run = ("run", model, "one two three four five six", "-n", "8", *SMALL, "-ub", "16")
        done = hobbit(*run, "--jsonl")
        assert done.returncode == 0, done.stderr
        assert STATS_LINE.match(done.stderr.splitlines()[-1])
        lines = lines_of(done.stdout)
        kinds = [line["type"] for line in lines]
        pieces = kinds.count("token")
        assert kinds == ["progress"] * (len(lines) - pieces - 1) + ["token"] * pieces + ["done"]
        last, one = lines[-1], json.loads(hobbit(*run, "--json", "-q").stdout)
        total = last["usage"]["prompt_tokens"]
        progress = [(line["processed"], line["total"]) for line in lines if "total" in line]
        assert progress == [(n, total) for n in [*range(0, total, 16), total]] and total > 32
        # The same text, although the prompt was read piece by piece.
        assert told(lines, "token") == last["text"] == one["text"]
        assert [*last] == ["type", *one]
        assert hobbit(*run, "-q").stdout == one["text"] + "\n"

    def test_thoughts_are_lines_of_their_own(self, model: Path) -> None:
        lines = lines_of(hobbit("run", model, *THOUGHTS, "--jsonl", "-q").stdout)
        assert told(lines, "thinking") == "<think>hm</think>"
        assert told(lines, "token") == "\n\nyes"
        assert told(lines, "thinking", "token") == lines[-1]["text"]
        hidden = lines_of(
            hobbit("run", model, *THOUGHTS, "--jsonl", "-q", "--hide-thinking").stdout
        )
        assert told(hidden, "thinking", "token") == "yes"

    def test_it_is_flushed_line_by_line(self, model: Path) -> None:
        with started("run", model, "one two", *ENDLESS, "--jsonl") as process:
            assert process.stdout
            lines = [json.loads(process.stdout.readline()) for _ in range(8)]
        assert [line["type"] for line in lines[:2]] == ["progress"] * 2
        assert lines[-1]["type"] == "token"

    @pytest.mark.parametrize("reads", [True, False])
    def test_ctrl_c(self, model: Path, reads: bool) -> None:
        """Also where the reader is slow, and the command waits for it within a line."""
        with started("run", model, "one two", *ENDLESS, "--jsonl") as process:
            assert process.stdout
            first = process.stdout.readline()
            read: list[bytes] = []
            if reads:
                reader = threading.Thread(target=lambda: read.append(process.stdout.read()))
                reader.start()
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            if reads:
                reader.join(60)
            else:
                read.append(process.stdout.read())
            assert process.wait(60) == 130
        lines = lines_of((first + read[0]).decode())
        assert lines[-1]["finish_reason"] == "cancelled"
        assert told(lines, "token") == lines[-1]["text"] != ""

    def test_a_closed_pipe_ends_the_run_quietly(self, model: Path) -> None:
        with started("run", model, "one two", *ENDLESS, "--jsonl", "-q") as process:
            assert process.stdout and process.stderr
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(60) == 1

    def test_it_is_not_json(self, model: Path) -> None:
        done = hobbit("run", model, "x", "--json", "--jsonl")
        assert (done.returncode, done.stdout) == (2, "")
        assert (
            done.stderr == "hobbit: error: --json and --jsonl: one object, or a stream of them?\n"
        )

    def test_it_is_for_one_answer(self, model: Path) -> None:
        assert Options().wants_chat and not Options(jsonl=True).wants_chat
        done = hobbit("run", model, "--jsonl")
        assert (done.returncode, done.stdout) == (2, "") and "no prompt" in done.stderr


class TestStats:
    """--stats"""

    def lines(self, model: Path, answer: str, *flags: str) -> list[str]:
        """Return stderr without what is expected of a machine that was measured."""
        done = hobbit("run", model, *EIGHT, *flags)
        assert (done.returncode, done.stdout) == (0, answer)
        return [line for line in done.stderr.splitlines() if not line.startswith("expect ")]

    def test_kinds(self, model: Path, answer: str) -> None:
        plain = self.lines(model, answer)
        assert len(plain) == 4 and STATS_LINE.match(plain[-1])
        none = self.lines(model, answer, "--stats", "none")
        assert none == plain[:3]
        line = self.lines(model, answer, "--stats", "line")
        assert line[:3] == none and len(line) == 4 and STATS_LINE.match(line[-1])
        full = self.lines(model, answer, "--stats", "full")
        assert full[:3] == none and STATS_LINE.match(full[-1])
        names = [line.split(":")[0] for line in full[3:-1]]
        assert {"prompt eval count", "eval rate", "peak memory", "expert hits", "read"} <= {*names}

    def test_a_json_object_is_all_of_stderr(self, model: Path, answer: str, tmp_path: Path) -> None:
        (line,) = self.lines(model, answer, "--stats", "json")
        found = json.loads(line)
        whole = json.loads(hobbit("run", model, *EIGHT, "-q", "--json").stdout)
        assert found.pop("schema") == "hobbit.stats/1"
        assert [*found] == [n for n in whole if n not in ("schema", "text", "config", "plan")]
        for part in ("usage", "timings", "memory", "experts", "token"):
            assert [*found[part]] == [*whole[part]]
        assert found["usage"] == whole["usage"]
        assert found["experts"]["hits"] == whole["experts"]["hits"]
        (tmp_path / "stats.json").write_text(line)
        assert len(of_json(tmp_path / "stats.json")) == 1

    def test_with_verbose_it_says_what_follows_the_answer(self, model: Path, answer: str) -> None:
        """The plan is -v's; what comes last is as --stats says."""
        for kind, last in (("none", "io: "), ("line", "["), ("json", "{")):
            lines = self.lines(model, answer, "-v", "--stats", kind)
            assert lines[-1].startswith(last)
            assert any(line.startswith("mode: ") for line in lines)
            assert not any(line.startswith("eval rate") for line in lines)

    @pytest.mark.parametrize("kind", ["line", "full", "json"])
    def test_quiet_wins(self, model: Path, answer: str, kind: str) -> None:
        assert self.lines(model, answer, "-q", "--stats", kind) == []

    def test_it_can_be_set_for_all_runs(
        self, model: Path, answer: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOBBIT_STATS", "none")
        assert len(self.lines(model, answer)) == 3
        assert len(self.lines(model, answer, "--stats", "line")) == 4
        with pytest.raises(UsageError, match="--stats much: must be one of none, line, full, json"):
            Options(stats="much")

    def test_a_cancelled_answer_has_them_too(self, model: Path) -> None:
        with started("run", model, "x", *ENDLESS, "--stats", "json") as process:
            assert process.stdout
            process.stdout.read(10)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert (process.returncode, json.loads(err)["finish_reason"]) == (130, "cancelled")
