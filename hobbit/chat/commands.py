"""What begins with a slash: ollama's commands, and hobbit's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..generate import parsed_grammar
from ..render import memory_split, mode_line, model_line, verbose_lines
from ..stats import Stats
from .display import Display
from .session import Reply, Session
from .settings import PARAMETERS, parameter_rows, with_parameter
from .transcript import place

if TYPE_CHECKING:
    from collections.abc import Mapping

_JSON = '{"type": "object"}'


@dataclass(frozen=True)
class Outcome:
    """What the chat has to do after a command: leave, answer once more, or let a text be edited."""

    leave: bool = False
    regenerate: bool = False
    edit: str | None = None


_NOTHING = Outcome()
_Handler = Callable[["Commands", str], "Outcome | None"]


@dataclass(frozen=True)
class _Command:
    names: tuple[str, ...]
    usage: str
    help: str
    run: _Handler


class Commands:
    """Runs commands on a session and its display; what they have to say goes to `say`.

    `keep_history` turns the history of what is typed on and off.
    """

    def __init__(
        self,
        session: Session,
        display: Display,
        say: Callable[..., None],
        keep_history: Callable[[bool], None] = lambda on: None,
    ) -> None:
        self.session = session
        self.display = display
        self.say = say
        self.keep_history = keep_history
        self.last: Reply | None = None

    def run(self, line: str) -> Outcome:
        """Run a line that begins with a slash. Raises HobbitError for what cannot be done."""
        name, _, rest = line.strip().partition(" ")
        command = _BY_NAME.get(name)
        if command is None:
            self.say(f"Unknown command '{name}'. Type /? for help")
            return _NOTHING
        return command.run(self, rest.strip()) or _NOTHING

    def help(self, topic: str) -> None:
        if topic in ("set", "/set"):
            self.say(*(f"  /set {name:<28}{what}" for name, what in _SETTINGS.values()))
        elif topic in ("show", "/show"):
            self.say(*(f"  /show {name:<27}{what}" for name, what, _ in _SHOWN))
        elif topic in ("shortcuts", "/shortcuts"):
            self.say(*_SHORTCUTS)
        else:
            self.say(*(f"  {command.usage:<33}{command.help}" for command in _COMMANDS))
            self.say('  """ begins a message of several lines, and ends it')

    def leave(self, _: str) -> Outcome:
        return Outcome(leave=True)

    def clear(self, _: str) -> None:
        file = self.session.file
        self.session.clear()
        also = f", and session {file.name} with it" if file else ""
        self.say(f"Cleared: the conversation begins anew{also}")

    def regenerate(self, _: str) -> Outcome:
        return Outcome(regenerate=True)

    def edit(self, _: str) -> Outcome:
        question = self.session.last_question
        if question is None:
            raise UsageError("there is no message yet")
        return Outcome(edit=question)

    def save(self, name: str) -> None:
        path = place(_needed(name, "/save NAME, or a file that ends in .md or .jsonl"))
        self.session.save(path)
        self.say(f"Saved {len(self.session.messages)} messages: {path}")

    def load(self, name: str) -> None:
        path = place(_needed(name, "/load NAME, or a .jsonl file"))
        self.session.load(path)
        self.say(f"Loaded {len(self.session.messages)} messages: {path}")

    def stats(self, _: str) -> None:
        if self.last is None:
            self.say("no answer yet")
        else:
            self.say("last answer:", *verbose_lines(self.last.result, 0.0)[2:])
        self.say("since the model was loaded:", *_totals(self.session.llm.stats))

    def plan(self, _: str) -> None:
        llm = self.session.llm
        self.say(mode_line(llm.plan, llm.quality), llm.plan.describe())

    def memory(self, size: str) -> None:
        llm = self.session.llm
        if size:
            self.session.set_memory(size)
        self.say(f"memory: {memory_split(llm.plan)}")
        if size and llm.plan.mode != "resident":
            self.say("the cache of experts is made anew, and filled in the background")

    def quality(self, name: str) -> None:
        session = self.session
        reloaded = session.set_quality(name) if name else False
        if reloaded:
            self.say("the model was loaded again: the next message reads all before it once more")
        else:  # one that loads says its mode itself
            self.say(mode_line(session.llm.plan, session.llm.quality))

    def set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name not in _SETTINGS:
            raise UsageError(f"/set {name}: type /? set for what can be set")
        self._set(name, value.strip())

    def _set(self, name: str, value: str) -> None:
        session, display = self.session, self.display
        if name == "parameter":
            key, _, wanted = value.partition(" ")
            session.sampling = with_parameter(session.sampling, key, wanted.strip())
            self.say(f"Set {key} to {wanted.strip()}")
        elif name == "system":
            session.system = value
            self.say("Set the system prompt; the next message reads all after it once more")
        elif name in ("verbose", "quiet"):
            display.stats = "full" if name == "verbose" else "none"
            display.quiet = name == "quiet"
            self.say(f"Set {name}")
        elif name in ("wordwrap", "nowordwrap"):
            display.wordwrap = name == "wordwrap"
            self.say(f"Set {name}")
        elif name in ("history", "nohistory"):
            self.keep_history(name == "history")
            self.say(f"Set {name}")
        elif name in ("format", "noformat"):
            self._set_format(value if name == "format" else None)
        else:
            self._set_think(name == "think")

    def _set_format(self, value: str | None) -> None:
        if value is None:
            self.session.sampling = replace(self.session.sampling, grammar="")
            self.say("Answers may have any form")
            return
        schema = _JSON if value in ("", "json") else value
        grammar = parsed_grammar("", schema)
        self.session.sampling = replace(self.session.sampling, grammar=grammar)
        self.say("Answers will be JSON")

    def _set_think(self, on: bool) -> None:
        self.session.prompts.check_switch()
        self.session.think = on
        self.say(f"Set {'think' if on else 'nothink'}")

    def show(self, topic: str) -> None:
        for name, _, lines in _SHOWN:
            if name == topic:
                self.say(*lines(self.session))
                return
        raise UsageError(f"/show {topic}: type /? show for what can be shown")


def _needed(value: str, usage: str) -> str:
    if not value:
        raise UsageError(f"name it: {usage}")
    return value


def _totals(stats: Stats) -> list[str]:
    rows = [
        ("prompt tokens", f"{stats.tokens_prompt}"),
        ("generated tokens", f"{stats.tokens_generated}"),
    ]
    if stats.mode != "resident":
        rows += [
            ("expert hits", f"{stats.hits} of {stats.hits + stats.misses}"),
            *([("on the device", f"{stats.device_hits}")] if stats.device_hits else []),
            ("read", f"{stats.read_bytes >> 20} MiB"),
        ]
    rows += [
        ("most memory", f"{stats.peak_bytes >> 20} MiB"),
        ("memory cap", f"{stats.cap_bytes >> 20} MiB"),
    ]
    return [f"{name + ':':<22}{value}" for name, value in rows]


def _info(session: Session) -> list[str]:
    llm = session.llm
    name = llm.metadata.get("general.name")
    return [
        *([f"name: {name}"] if name else []),
        model_line(llm.layout),
        mode_line(llm.plan, llm.quality),
        f"context: {llm.n_tokens} of {llm.n_ctx()} tokens used",
        f"file: {llm.model_path}",
    ]


def _license(session: Session) -> list[str]:
    metadata = session.llm.metadata
    keys = ("general.license.name", "general.license", "general.license.link")
    found = [metadata[key] for key in keys if metadata.get(key)]
    return found or ["The model file names no license"]


def _parameters(session: Session) -> list[str]:
    return [f"{name:<16}{value}" for name, value in parameter_rows(session.sampling)]


def _system(session: Session) -> list[str]:
    return [session.system or "No system prompt is set"]


def _template(session: Session) -> list[str]:
    return [session.prompts.text or "The model has no chat template: texts are completed"]


def _modelfile(session: Session) -> list[str]:
    lines = [f"FROM {session.llm.model_path}"]
    if session.prompts.text:
        # ollama has its own language for templates and takes the file's own from the model.
        lines.append("# the chat template is the model file's own: /show template")
    if session.system:
        lines.append(f'SYSTEM """{session.system}"""')
    rows = parameter_rows(session.sampling)
    return [*lines, *(f"PARAMETER {name} {value}" for name, value in rows)]


_Lines = Callable[[Session], Sequence[str]]
_SHOWN: tuple[tuple[str, str, _Lines], ...] = (
    ("info", "Model, mode, memory and context", _info),
    ("license", "License of the model, as its file says", _license),
    ("modelfile", "Model and settings as an ollama Modelfile", _modelfile),
    ("parameters", "Sampling parameters", _parameters),
    ("system", "System prompt", _system),
    ("template", "Chat template", _template),
)

_SETTINGS: Mapping[str, tuple[str, str]] = {
    "parameter": ("parameter NAME VALUE", "Sampling: " + ", ".join(PARAMETERS)),
    "system": ("system TEXT", 'System prompt; """ for several lines'),
    "verbose": ("verbose", "All counters after each answer"),
    "quiet": ("quiet", "No numbers"),
    "history": ("history", "Keep what is typed in the history"),
    "nohistory": ("nohistory", "Keep nothing typed from now on"),
    "wordwrap": ("wordwrap", "Break lines between words"),
    "nowordwrap": ("nowordwrap", "Leave lines to the terminal"),
    "format": ("format json", "Answers are JSON (or a JSON schema in place of json)"),
    "noformat": ("noformat", "Answers may have any form"),
    "think": ("think", "Let the model think first"),
    "nothink": ("nothink", "Do not"),
}

_SHORTCUTS = (
    "  Ctrl-A, Ctrl-E     begin and end of the line",
    "  Alt-B, Alt-F       a word back, forward",
    "  Ctrl-K, Ctrl-U     delete to the end, to the begin",
    "  Ctrl-R             search the history",
    "  Ctrl-L             clear the screen",
    "  Ctrl-G             edit the message in $EDITOR",
    "  Alt-Enter          new line in the message",
    "  Ctrl-C             stop the answer; empty the line",
    "  Ctrl-D             leave",
)

_COMMANDS = (
    _Command(("/set",), "/set NAME [VALUE]", "Change settings (/? set)", Commands.set),
    _Command(("/show",), "/show NAME", "Show information (/? show)", Commands.show),
    _Command(("/load",), "/load FILE.jsonl|NAME", "Load a conversation", Commands.load),
    _Command(("/save",), "/save FILE.jsonl|FILE.md|NAME", "Save it", Commands.save),
    _Command(("/clear",), "/clear", "Begin a new conversation", Commands.clear),
    _Command(("/regen",), "/regen", "Answer the last message again", Commands.regenerate),
    _Command(("/edit",), "/edit", "Change the last message", Commands.edit),
    _Command(("/memory",), "/memory [SIZE]", "Memory cap, as 8G or 50%", Commands.memory),
    _Command(("/quality",), "/quality [NAME]", "exact, high, balanced, fast", Commands.quality),
    _Command(("/stats",), "/stats", "Counters of the last answer and of all", Commands.stats),
    _Command(("/plan",), "/plan", "What the memory is for", Commands.plan),
    _Command(("/bye", "/exit"), "/bye, /exit", "Leave", Commands.leave),
    _Command(("/?", "/help"), "/?, /help [set|show|shortcuts]", "Help", Commands.help),
)

_BY_NAME = {name: command for command in _COMMANDS for name in command.names}


def words() -> dict[str, list[str]]:
    """Return all commands, each with the words that may follow it, for completion."""
    after = {
        "/set": [*_SETTINGS],
        "/show": [name for name, _, _ in _SHOWN],
        "/quality": ["exact", "high", "balanced", "fast"],
        "/?": ["set", "show", "shortcuts"],
        "/help": ["set", "show", "shortcuts"],
    }
    return {name: after.get(name, []) for name in _BY_NAME}
