"""What the documents say about the commands and the version is true."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from hobbit.models.catalogue import known_models

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Return the command lines of a document's shell blocks."""
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def hobbit(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hobbit", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_readme_scripts_exist_and_can_run() -> None:
    scripts = {word for line in commands(README) for word in line.split() if "scripts/" in word}
    assert {"scripts/hobbit", "scripts/test"} <= scripts
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o111, script


def test_readme_options_exist() -> None:
    """Every option that the README shows with a hobbit command is one of that command."""
    shown = [line.split() for line in commands(README) if re.match(r"(scripts/)?hobbit \w", line)]
    assert shown
    for words in shown:
        known = set(re.findall(r"(?<!\S)--?[\w-]+", hobbit(words[1], "--help").stdout))
        used = {word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
        assert used <= known, words


def test_links_between_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_cli_reference_is_current() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "cli-reference"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert newest
    assert newest[1] == version("hobbit-moe")


def test_known_models_have_the_documented_keys() -> None:
    text = (ROOT / "hobbit" / "data" / "models.toml").read_text(encoding="utf-8")
    documented = set(re.findall(r"^#   (\w+)  ", text, re.MULTILINE))
    tables = re.split(r"^\[models\..*\]\n", text, flags=re.MULTILINE)[1::2]
    assert len(tables) == len(known_models())
    for table in tables:
        used = set(re.findall(r"^(\w+) = ", table, re.MULTILINE))
        assert used <= documented
        assert {"summary", "arch", "licence", "source", "parameters", "quants"} <= used
