"""Take llama.cpp's and ggml's headers, the internal ones too, out of llama-cpp-python's sdist.

And the sources of ggml's RPC backend.

usage: fetch_headers.py VERSION FOLDER
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FOLDERS = ("ggml/include/", "ggml/src/", "include/", "src/")
RPC = "ggml/src/ggml-rpc/"


def download(version: str, folder: Path) -> Path:
    options = "--quiet --disable-pip-version-check --no-deps --no-build-isolation"
    command = [sys.executable, "-m", "pip", "download", *options.split()]
    command += ["--no-binary", "llama-cpp-python", "--dest", str(folder)]
    command += [f"llama-cpp-python=={version}"]
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        sys.exit(
            f"pip cannot download the sdist of llama-cpp-python {version}: its headers are needed"
        )
    return next(folder.glob("*.tar.gz"))


def extract(sdist: Path, target: Path) -> None:
    """Only from llama.cpp's own folders: nothing outside `target` can be written."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            _, found, path = member.name.partition("/vendor/llama.cpp/")
            wanted = path.startswith(FOLDERS) and path.endswith(".h")
            wanted = wanted or (path.startswith(RPC) and path.endswith(".cpp"))
            source = archive.extractfile(member) if found and wanted and ".." not in path else None
            if source is not None:
                out = target / path
                out.parent.mkdir(parents=True, exist_ok=True)
                with source, out.open("wb") as file:
                    shutil.copyfileobj(source, file)


def main(version: str, target: Path) -> None:
    if (target / RPC / "transport.cpp").exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        extract(download(version, Path(folder)), target)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
