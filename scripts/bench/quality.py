"""Measure what mixed precision saves and what it costs, on this machine.

`speed`: decode rate of each mode on a large model in a memory cgroup, and of exact. Each arm is a
process of its own; the arms alternate. Needs root. Missing models and low copies are made.

`frontier`: KL to exact against bytes a token on the demo with half of its experts cached, for our
rules and for what they are compared with, token by token in one process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import quality_frontier
import quality_speed

from hobbit.errors import HobbitError


def parse_args(args: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="quality-bench", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in (("speed", quality_speed), ("frontier", quality_frontier)):
        about = module.__doc__ or ""
        command = commands.add_parser(
            name, help=about.splitlines()[0], description=about, formatter_class=raw
        )
        module.add_options(command)
        command.set_defaults(run=module.run)
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    options = parse_args(args)
    try:
        print("\n".join(options.run(options)))
    except (HobbitError, OSError) as exc:
        print(f"quality-bench: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
