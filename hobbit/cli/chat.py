"""hobbit run on a terminal without a prompt: the chat."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from ..render import Screen, model_line, resident_lines
from .console import write
from .loading import check_name, load, model_path, shown_name
from .sessions import keeping, session_file
from .signals import Farewell

if TYPE_CHECKING:
    from ..chat.session_file import SessionFile
    from ..generate import Result
    from ..llama import Llama
    from ..options import Options
    from ..quality import Quality


def chat(options: Options) -> int:
    """Load the model and talk until the person leaves."""
    from ..memory import resolve_cap

    Farewell()
    screen = Screen(options.quiet, options.color)
    check_name(options)
    resolve_cap(options.memory)
    with session_file(options, screen) as file:
        return _chat(options, screen, file)


def _chat(options: Options, screen: Screen, file: SessionFile | None) -> int:
    from ..chat.display import Display, knows_screen_codes
    from ..chat.loop import Chat
    from ..chat.session import Session
    from ..chat.view import Live
    from ..gguf_file import open_gguf
    from ..layout import build_layout
    from ..options import chosen_quality, grammar, sampling, system_prompt
    from ..planning.feedback import expected, expected_line, finished

    answer_grammar, system = grammar(options), system_prompt(options)
    layout = build_layout(open_gguf(model_path(options, screen)), options.n_expert_used)
    settings = sampling(options, layout.gguf.get, answer_grammar)
    quality = chosen_quality(options, layout)
    screen.say(model_line(layout), *resident_lines(layout))

    def loaded(options: Options, quality: Quality) -> Llama:
        return load(layout, options, quality, screen)

    session = Session(
        loaded(options, quality),
        settings,
        options,
        quality=quality,
        system=system,
        load=loaded,
        file=file,
    )
    with closing(session):
        llm = session.llm
        facts = f"threads: {llm.n_threads}   context: {llm.n_ctx()}   seed: {settings.seed}"
        screen.say(f"io: {llm.stats.io or 'none'}   {facts}")
        forecast = expected(llm)
        if forecast is not None:
            screen.say(expected_line(forecast))
        if options.think is not None:
            session.prompts.check_switch()
            session.think = options.think
        if not session.prompts.text:
            screen.say("there is no chat template, or --raw: each text is completed")
        display = Display(
            Live(llm),
            write,
            screen_codes=knows_screen_codes(),
            color=screen.color,
            quiet=options.quiet,
            stats=options.wanted_stats,
            hide_thinking=options.hide_thinking,
            panel=options.panel,
            whole=options.no_stream,
        )

        def told(result: Result) -> str:
            # Memory and quality may have changed since the last answer.
            return finished(session.llm, shown_name(options), result, expected(session.llm))

        with keeping(session):
            Chat(session, display, screen, told).run()
    return 0
