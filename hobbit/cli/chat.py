"""hobbit run on a terminal without a prompt: the chat."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from ..render import Screen, model_line, resident_lines
from .console import write
from .loading import check_name, load, model_path, shown_name

if TYPE_CHECKING:
    from ..generate import Result
    from ..llama import Llama
    from ..options import Options
    from ..quality import Quality


def chat(options: Options) -> int:
    """Load the model and talk until the person leaves."""
    from ..chat.display import Display, knows_screen_codes
    from ..chat.loop import Chat
    from ..chat.session import Session
    from ..chat.view import Live
    from ..gguf_file import open_gguf
    from ..layout import build_layout
    from ..memory import resolve_cap
    from ..options import chosen_quality, grammar, sampling, system_prompt
    from ..planning.feedback import expected, expected_line, finished

    screen = Screen(options.quiet, options.color)
    check_name(options)
    resolve_cap(options.memory)
    answer_grammar, system = grammar(options), system_prompt(options)
    layout = build_layout(open_gguf(model_path(options, screen)))
    settings = sampling(options, layout.gguf.get, answer_grammar)
    quality = chosen_quality(options, layout)
    screen.say(model_line(layout), *resident_lines(layout))

    def loaded(options: Options, quality: Quality) -> Llama:
        return load(layout, options, quality, screen)

    session = Session(
        loaded(options, quality), settings, options, quality=quality, system=system, load=loaded
    )
    with closing(session):
        llm = session.llm
        facts = f"threads: {llm.n_threads}   context: {llm.n_ctx()}   seed: {settings.seed}"
        screen.say(f"io: {llm.stats.io or 'none'}   {facts}")
        forecast = expected(llm)
        if forecast is not None:
            screen.say(expected_line(forecast))
        if options.think is not None:
            session.template.check_switch()
            session.think = options.think
        if not session.template.text:
            screen.say("there is no chat template, or --raw: each text is completed")
        display = Display(
            Live(llm),
            write,
            screen_codes=knows_screen_codes(),
            color=screen.color,
            quiet=options.quiet,
            verbose=options.verbose > 0,
            hide_thinking=options.hide_thinking,
            panel=options.panel,
            whole=options.no_stream,
        )

        def told(result: Result) -> str:
            # Memory and quality may have changed since the last answer.
            return finished(session.llm, shown_name(options), result, expected(session.llm))

        Chat(session, display, screen, told).run()
    return 0
