"""Shell completion: what typer's scripts ask hobbit for, and bash itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Which shell asks is found out from the parent process, which here is none; so it is named.
NAMED = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
HOBBIT = Path(sys.executable).parent / "hobbit"


def script(shell: str) -> str:
    command = [str(HOBBIT), "--show-completion", shell]
    done = subprocess.run(
        command, env=os.environ | NAMED, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str) -> None:
    assert f"_HOBBIT_COMPLETE=complete_{shell}" in script(shell)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("hobbit si", {"simulate"}),
        ("hobbit run --mem", {"--memory"}),
        ("hobbit trace --po", {"--policy"}),
    ],
)
def test_bash_completes(typed: str, offered: set[str], tmp_path: Path) -> None:
    """The function that `complete -F` registers, called as bash calls it."""
    (tmp_path / "complete.sh").write_text(script("bash"))
    words = typed.split()
    program = f"""
source {tmp_path}/complete.sh
complete -p hobbit | grep -o -- '-F [^ ]*'
COMP_WORDS=({typed}) COMP_CWORD={len(words) - 1}
_hobbit_completion hobbit {words[-1]} {words[-2]}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    path = f"{HOBBIT.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", program],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    first, *found = done.stdout.split("\n")
    assert first == "-F _hobbit_completion"
    assert {*filter(None, found)} == offered


def test_bash_installs(tmp_path: Path) -> None:
    environment = os.environ | NAMED | {"HOME": str(tmp_path)}
    command = [str(HOBBIT), "--install-completion", "bash"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "bash completion installed" in done.stdout
    assert "hobbit.sh" in (tmp_path / ".bashrc").read_text()
