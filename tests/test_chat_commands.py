"""What begins with a slash, without a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

import hobbit
from hobbit.chat.commands import Commands, words
from hobbit.chat.display import Display
from hobbit.chat.prompts import Prompts
from hobbit.chat.session import Session
from hobbit.chat.settings import PARAMETERS, parameter_rows, with_parameter
from hobbit.chat.view import Live
from hobbit.errors import HobbitError, UsageError
from hobbit.generate import Sampling


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hobbit.Llama]:
    folder = tmp_path_factory.mktemp("chat")
    path = tiny.make_text_model(folder / "m.gguf", chat=True, template=tiny.CONTROL_TEMPLATE)
    with hobbit.Llama(str(path), n_ctx=256, n_threads=1, memory="1G") as made:
        yield made


class Said(list[str]):
    def __call__(self, *lines: str) -> None:
        self.extend(lines)

    @property
    def text(self) -> str:
        return "\n".join(self)


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def commands(llm: hobbit.Llama, said: Said) -> Commands:
    session = Session(llm, Sampling(max_tokens=4, seed=1))
    return Commands(session, Display(Live(llm), lambda text: None), said)


def talk(commands: Commands) -> None:
    commands.session.ask("the sea", lambda text: None)


def test_help_names_every_command(commands: Commands, said: Said) -> None:
    commands.run("/?")
    for name in words():
        assert name in said.text
    assert max(map(len, said)) < 80
    for topic in ("set", "show", "shortcuts"):
        before = len(said)
        commands.run(f"/? {topic}")
        assert len(said) > before


@pytest.mark.parametrize("line", ["/x", "/by", "/SET", "/etc/passwd what is it"])
def test_an_unknown_command_is_said_and_not_sent(commands: Commands, said: Said, line: str) -> None:
    outcome = commands.run(line)
    assert said == [f"Unknown command '{line.split()[0]}'. Type /? for help"]
    assert not (outcome.leave or outcome.regenerate or outcome.edit)
    assert commands.session.messages == []


@pytest.mark.parametrize("line", ["/bye", "/exit", " /bye "])
def test_leaving(commands: Commands, line: str) -> None:
    assert commands.run(line).leave


def test_regen_and_edit(commands: Commands) -> None:
    with pytest.raises(UsageError, match="there is no message yet"):
        commands.run("/edit")
    talk(commands)
    assert commands.run("/regen").regenerate
    assert commands.run("/edit").edit == "the sea"


def test_clear(commands: Commands) -> None:
    commands.session.system = "be brief"
    talk(commands)
    commands.run("/clear")
    assert (commands.session.messages, commands.session.system) == ([], "be brief")


def test_save_and_load(commands: Commands, said: Said, tmp_path: Path) -> None:
    talk(commands)
    messages = commands.session.messages
    commands.run(f"/save {tmp_path}/c.jsonl")
    commands.run("/clear")
    commands.run(f"/load {tmp_path}/c.jsonl")
    assert commands.session.messages == messages
    assert f"Saved 2 messages: {tmp_path}/c.jsonl" in said
    for line in ("/save", "/load", "/save c.txt", "/load none.jsonl", f"/load {tmp_path}"):
        with pytest.raises(HobbitError):
            commands.run(line)


def test_a_name_is_kept_in_the_state_folder(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    talk(commands)
    commands.run("/save trip")
    assert (tmp_path / "hobbit/chats/trip.jsonl").is_file()
    commands.run("/load trip")


def test_parameters(commands: Commands, said: Said) -> None:
    for line in ("temperature 0.5", "top_k 7", "num_predict -1", "stop END", "stop FIN", "seed 5"):
        commands.run(f"/set parameter {line}")
    sampling = commands.session.sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.5, 7, None)
    assert (sampling.stop, sampling.seed) == (("END", "FIN"), 5)
    said.clear()
    commands.run("/show parameters")
    assert "temperature     0.5" in said
    assert [line for line in said if line.startswith("stop")] == [
        "stop            END",
        "stop            FIN",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", "-1"),
        ("temperature", "nan"),
        ("top_p", "2"),
        ("top_k", "0.5"),
        ("num_predict", "0"),
        ("seed", "-1"),
        ("stop", ""),
        ("temperature", ""),
        ("colour", "red"),
    ],
)
def test_wrong_parameters(commands: Commands, name: str, value: str) -> None:
    before = commands.session.sampling
    with pytest.raises(UsageError):
        commands.run(f"/set parameter {name} {value}")
    assert commands.session.sampling == before


def test_what_is_set_at_the_start_names_its_flag() -> None:
    with pytest.raises(UsageError, match="num_ctx is set when hobbit starts: with -c"):
        with_parameter(Sampling(), "num_ctx", "9")


def test_every_parameter_is_a_setting() -> None:
    for field, _, _ in PARAMETERS.values():
        assert hasattr(Sampling(), field)
    assert [name for name, _ in parameter_rows(Sampling(seed=None))] == [
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repeat_penalty",
    ]
    assert with_parameter(Sampling(), "temp", "1").temperature == 1


def test_settings(commands: Commands) -> None:
    display, kept = commands.display, []
    commands.keep_history = kept.append
    for line in ("verbose", "nowordwrap", "nohistory", "history"):
        commands.run(f"/set {line}")
    assert (display.stats, display.quiet, display.wordwrap) == ("full", False, False)
    assert kept == [False, True]
    commands.run("/set quiet")
    assert (display.stats, display.quiet) == ("none", True)
    commands.run("/set system Speak in rhymes")
    assert commands.session.system == "Speak in rhymes"
    commands.run("/set nothink")
    assert commands.session.think is False
    with pytest.raises(UsageError, match=r"type /\? set"):
        commands.run("/set colour red")
    with pytest.raises(UsageError, match=r"type /\? show"):
        commands.run("/show colour")


def test_a_template_without_a_switch(commands: Commands) -> None:
    commands.session.prompts = Prompts(commands.session.llm, raw=True)
    with pytest.raises(UsageError, match="no switch for thinking"):
        commands.run("/set think")


def test_format(commands: Commands) -> None:
    commands.run("/set format json")
    assert "root ::=" in commands.session.sampling.grammar
    commands.run('/set format {"type": "integer"}')
    assert "object" not in commands.session.sampling.grammar
    with pytest.raises(UsageError, match="it is not JSON"):
        commands.run("/set format {")
    commands.run("/set noformat")
    assert commands.session.sampling.grammar == ""


def test_show(commands: Commands, said: Said) -> None:
    session = commands.session
    commands.run("/show system")
    assert said.pop() == "No system prompt is set"
    session.system = "be brief"
    commands.run("/show modelfile")
    assert said[0] == f"FROM {session.llm.model_path}"
    assert 'SYSTEM """be brief"""' in said
    assert "PARAMETER temperature 0.8" in said
    said.clear()
    commands.run("/show template")
    assert said == [tiny.CONTROL_TEMPLATE]
    commands.run("/show license")
    assert said.pop() == "The model file names no license"
    said.clear()
    commands.run("/show info")
    assert "name: tiny random llama" in said
    assert any(line.startswith("mode: ") for line in said)


def test_stats_and_plan(commands: Commands, said: Said) -> None:
    commands.run("/stats")
    assert said[0] == "no answer yet"
    said.clear()
    commands.last = commands.session.ask("the sea", lambda text: None)
    commands.run("/stats")
    assert said[0] == "last answer:"
    assert any(line.startswith("eval rate:") for line in said)
    said.clear()
    commands.run("/plan")
    assert "dense" in said.text


def test_memory(commands: Commands, said: Said) -> None:
    commands.run("/memory")
    assert "1024 MiB cap" in said.text
    said.clear()
    commands.run("/memory 900M")
    assert "900 MiB cap" in said.text
    assert commands.session.llm.stats.cap_bytes == 900 << 20
    with pytest.raises(HobbitError, match="the smallest cap that works is"):
        commands.run("/memory 10M")
    with pytest.raises(UsageError, match="is not a size"):
        commands.run("/memory much")
    assert commands.session.llm.stats.cap_bytes == 900 << 20


def test_quality(commands: Commands, said: Said) -> None:
    commands.run("/quality")
    assert ", exact" in said.text
    commands.run("/quality exact")
    with pytest.raises(HobbitError, match="hobbit prepare"):
        commands.run("/quality fast")
    with pytest.raises(UsageError):
        commands.run("/quality best")
    assert commands.session.llm.quality.name == "exact"
