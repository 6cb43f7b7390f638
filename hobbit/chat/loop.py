"""The chat on a terminal: ask, answer, until it is left."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import HobbitError
from ..generate import Result
from ..render import Screen, say_stats
from . import view
from .commands import Commands, Outcome, words
from .display import Answer, Display
from .interrupts import Interrupts
from .screen import History, Input, no_echo, unquoted
from .session import ModelLost, OnText, Reply, Session

_Turn = Callable[[OnText, Callable[[], None]], Reply]


class Chat:
    """Joins a session with the terminal. Nothing that goes wrong in a turn ends it, unless the
    model is lost. What came of a turn, or of a command, is kept at once, if the session has a file.

    `finished` is told what came of each answer, and says in a few words what is to be known of it.
    """

    def __init__(
        self,
        session: Session,
        display: Display,
        screen: Screen,
        finished: Callable[[Result], str] = lambda result: "",
    ) -> None:
        self._session = session
        self._display = display
        self._screen = screen
        self._finished = finished
        toolbar = self._toolbar if display.screen_codes else None
        self._input = Input(words(), toolbar, display.color)
        self._commands = Commands(session, display, self._screen.say, self._keep_history)
        self._last_line = ""

    def run(self) -> None:
        """Go on until it is left. SIGTERM, as a kind of KeyboardInterrupt, ends it at any time."""
        text = ""
        while True:
            editing, text = bool(text), text
            try:
                line = self._input.ask(text)
            except EOFError:
                return
            except KeyboardInterrupt as exc:
                _only_ctrl_c(exc)
                self._screen.say("Use Ctrl-D or /bye to leave.")
                text = ""
                continue
            outcome = self._do(line, instead=editing)
            if outcome.leave:
                return
            text = outcome.edit or ""

    def _do(self, line: str, *, instead: bool) -> Outcome:
        """Run a command, or send a message; it replaces the last one where that was edited."""
        session = self._session
        try:
            with Interrupts() as interrupts:
                try:
                    if line.lstrip().startswith("/"):
                        # Some are not to be left half done: one loads the model again.
                        outcome = interrupts.after(self._commands.run)(_command(line))
                        if outcome.regenerate:
                            self._answer(session.regenerate, interrupts)
                        return outcome
                    if message := unquoted(line):
                        ask = session.ask_instead if instead else session.ask
                        self._answer(lambda *on: ask(message, *on), interrupts)
                finally:
                    interrupts.after(self._keep)()
        except ModelLost:
            raise
        except HobbitError as exc:
            self._screen.error(str(exc))
        except KeyboardInterrupt as exc:
            _only_ctrl_c(exc)
        return Outcome()

    def _keep(self) -> None:
        try:
            self._session.keep()
        except HobbitError as exc:  # the chat goes on, and with the next turn it is tried again
            self._screen.error(str(exc))

    def _answer(self, turn: _Turn, interrupts: Interrupts) -> None:
        thinking = self._session.prompts.opens_thoughts(self._session.think)
        self._display.live.llm = self._session.llm
        with no_echo(), Answer(self._display, thinking) as answer:
            answer.begin()
            reply = turn(interrupts.after(answer.text), interrupts.after(answer.tick))
            answer.complete(reply.answer)
        if reply.result.signal is not None:
            _only_ctrl_c(reply.result.signal)
        self._commands.last = reply
        self._report(reply)

    def _report(self, reply: Reply) -> None:
        display, result = self._display, reply.result
        stats = result.decode if result.decode.tokens_generated else result.stats
        display.live.first = display.live.first or display.live.start  # it is over
        self._last_line = view.line(display.live, stats, 10**4)
        self._screen.say(*reply.notes("/save"))
        missed = self._finished(result)
        llm = self._session.llm
        say_stats(self._screen, display.stats, result, llm.plan, llm.quality, missed=missed)

    def _toolbar(self, width: int) -> str:
        """Return the numbers below the input line: of the last answer, and the memory now."""
        if self._display.quiet:
            return ""
        if self._last_line:
            return view.cut(self._last_line, width)
        llm = self._session.llm
        return view.cut(view.idle_line(llm), width)

    def _keep_history(self, on: bool) -> None:
        if isinstance(self._input.history, History):
            self._input.history.on = on


def _command(line: str) -> str:
    '''Return a command with a text in """ as it is meant.'''
    name, quotes, text = line.strip().partition('"""')
    return f"{name}{text.removesuffix(quotes).strip()}" if quotes else line


def _only_ctrl_c(exc: KeyboardInterrupt) -> None:
    """Raise again what is more than Ctrl-C."""
    if type(exc) is not KeyboardInterrupt:
        raise exc
