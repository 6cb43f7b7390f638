"""Print the folder of llama-cpp-python's libraries; it must be the release we are built for.

usage: find_llama.py VERSION
"""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path


def main(wanted: str) -> None:
    try:
        found = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"hobbit is built against llama-cpp-python=={wanted}, which is not installed")
    if found != wanted:
        sys.exit(f"hobbit is built against llama-cpp-python=={wanted}; {found} is installed")
    # Found, not imported: its libraries need not load here.
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        sys.exit("llama-cpp-python is installed, but its package llama_cpp is not to be found")
    print(Path(spec.origin).parent / "lib")


if __name__ == "__main__":
    main(sys.argv[1])
