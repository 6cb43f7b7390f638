"""hobbit verify: the logits are stock llama.cpp's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from ..render import Screen, verify_lines
from .console import write
from .flags import chosen, flag
from .loading import check_name, model_path
from .shared import Device, Dispatch, ModelWord, NExpertUsed, Quiet, Rpc, Threads, Vram

if TYPE_CHECKING:
    from ..options import Options


def verify(
    model: ModelWord = None,
    threads: Threads = None,
    device: Device = None,
    vram: Vram = "auto",
    rpc: Rpc = None,
    dispatch: Dispatch = "auto",
    n_expert_used: NExpertUsed = None,
    tolerance: Annotated[
        float,
        flag(
            "--tolerance",
            min=0,
            help="Let them differ by this normalised mean squared error, as those of a device do "
            "that does not compute like the CPU: 0.01.",
        ),
    ] = 0.0,
    quiet: Quiet = False,
) -> int:
    """Compare every logit with stock llama.cpp's, bit by bit. At several cache sizes."""
    from ..options import Options

    options = chosen(Options, locals())
    return _verify(options, tolerance, Screen(quiet))


def _verify(options: Options, tolerance: float, screen: Screen) -> int:
    from ..generate import interruptible
    from ..options import device_arguments
    from ..stock import Job, StockProcess
    from ..verify import EXIT_DIFFERENT
    from ..verify import verify as compare

    check_name(options)
    path = model_path(options, screen)
    job = replace(Job(), n_threads=options.n_threads)
    # An interrupted comparison goes on in its thread until the process ends; its child ends here.
    with StockProcess() as stock:
        there = device_arguments(options.device, options.vram, options.rpc, options.dispatch)
        rows = interruptible(
            lambda: compare(
                path,
                job=job,
                stock=stock,
                device=there,
                n_expert_used=options.n_expert_used,
                on_progress=screen.say,
            )
        )
    for line in verify_lines(rows):
        write(f"{line}\n")
    return 0 if all(row.within(tolerance) for row in rows) else EXIT_DIFFERENT
