"""--session and --continue, as hobbit run and the chat use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ..errors import HobbitError
from ..render import Screen

if TYPE_CHECKING:
    from ..chat.session import Session
    from ..chat.session_file import SessionFile
    from ..options import Options


@contextmanager
def session_file(options: Options, screen: Screen) -> Iterator[SessionFile | None]:
    """Open the session that the options name, and say what is in it; None where they name none."""
    if not options.has_session:
        yield None
        return
    from ..chat.session_file import SessionFile, last_session

    file = SessionFile(options.session or last_session())
    try:
        earlier = sum(message.role != "system" for message in file.messages)
        said = "1 earlier message" if earlier == 1 else f"{earlier} earlier messages"
        screen.say(f"session {file.name}: {said if file.messages else 'a new one'}")
        yield file
    finally:
        file.close()


@contextmanager
def keeping(session: Session | None) -> Iterator[None]:
    """Keep what came of the conversation, however it ends.

    Raises HobbitError where that cannot be; it never takes the place of an error before.
    """
    try:
        yield
    except BaseException:
        if session is not None:
            with suppress(HobbitError):
                session.keep()
        raise
    if session is not None:
        session.keep()
