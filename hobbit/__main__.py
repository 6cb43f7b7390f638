"""Where the command starts: Ctrl-C has a meaning before the modules that are slow to import."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run the command and return its exit code."""
    try:
        from . import cli

        return cli.main()
    except KeyboardInterrupt:
        os.write(2, b"hobbit: error: interrupted\n")
        os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
