"""hobbit verify: the logits are stock llama.cpp's."""

from __future__ import annotations

from dataclasses import replace

from ..render import Screen, verify_lines
from .console import write
from .loading import check_name, model_path
from .shared import ModelWord, Quiet, Threads


def verify(
    model: ModelWord = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> int:
    """Compare every logit with stock llama.cpp's, bit by bit. At several cache sizes."""
    return _verify(model, threads, Screen(quiet))


def _verify(model: str | None, threads: int | None, screen: Screen) -> int:
    from ..generate import interruptible
    from ..options import Options
    from ..stock import Job, StockProcess
    from ..verify import EXIT_DIFFERENT
    from ..verify import verify as compare

    options = Options(model=model, threads=threads)
    check_name(options)
    path = model_path(options, screen)
    job = replace(Job(), n_threads=options.n_threads)
    # An interrupted comparison goes on in its thread until the process ends; its child ends here.
    with StockProcess() as stock:
        rows = interruptible(lambda: compare(path, job=job, stock=stock, on_progress=screen.say))
    for line in verify_lines(rows):
        write(f"{line}\n")
    return 0 if all(row.equal for row in rows) else EXIT_DIFFERENT
