"""What the documents say is true: command lines, Python, links, the version.

Every `hobbit ...` line in a shell fence of README.md and docs/ is parsed by the command's own
parser, and run where that is quick. The rule:

- model.gguf stands for a tiny model, low.gguf for its low copy, text.txt for a text; a page's lines
  run in its own folder, in their order, so that one may use what one before it wrote;
- the commands of RUN are run, with few tokens and one thread, where every file that they name is
  there, so not those on the demo; the others, which take long, wait or need a network, are parsed;
- so is `run` without a prompt, which on a terminal is a chat.

Python blocks are run the same way; only compiled are those that use a package that hobbit does not
need, or a server.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer.main
from doclines import Command, blocks, commands
from gates import layout_of
from test_calibration import CALIBRATION

from hobbit.calibration import path_of, save
from hobbit.cli.app import app
from hobbit.fingerprint import fingerprint
from hobbit.low_file import low_path
from hobbit.models.catalogue import known_models
from hobbit.prepare import make_low

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]

RUN = {"run", "trace", "simulate", "plot", "config", "eval"}
QUICK = {
    "HOBBIT_PREDICT": "8",
    "HOBBIT_THREADS": "1",
    "HOBBIT_TOKENS": "128",
    "OMP_NUM_THREADS": "1",
}
# What a block may import and still be run.
IMPORTED = {"hobbit", "llama_cpp", "numpy", *sys.stdlib_module_names}
FILE = re.compile(r"[\w./-]+\.(gguf|trace|txt|json|jsonl|bin)")
GROUP: Any = typer.main.get_command(app)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the documents take for granted."""
    path = tmp_path_factory.mktemp("docs")
    model = tiny.make_text_model(path / "model.gguf", arch="qwen3moe")
    layout = layout_of(model)
    low = low_path(layout.gguf)
    make_low(layout, low, "q4_0")
    save(replace(CALIBRATION, source=fingerprint(layout.gguf)), path_of(low))
    shutil.copy(low, path / "low.gguf")
    (path / "text.txt").write_text(
        "it is the end of a day and they were not at home with you " * 90
    )
    return path


def parsed(command: Command) -> dict[str, Any]:
    """Return the parameters of a hobbit command; the parser's error ends the test."""
    if all(word.startswith("-") for word in command.arguments):  # these act at once
        known = {name for param in GROUP.params for name in param.opts}
        assert {*command.arguments} <= known, command.line
        return {}
    root = GROUP.make_context("hobbit", command.arguments)
    name, chosen, rest = GROUP.resolve_command(root, [*root._protected_args, *root.args])
    found: dict[str, Any] = chosen.make_context(name, rest, parent=root).params
    return found


def is_quick(command: Command, parameters: dict[str, Any], folder: Path) -> bool:
    """Whether the rule says that a command is run."""
    name = next((word for word in command.arguments if not word.startswith("-")), "")
    files = {word for word in command.arguments if FILE.fullmatch(word)}
    written = {str(parameters.get(key)) for key in ("output", "png", "record")}
    missing = [word for word in files - written if not (folder / word).exists()]
    if name not in RUN or missing:
        return False
    if name in ("run", "trace", "eval") and not parameters.get("show"):
        if "model.gguf" not in files:
            return False  # the demo
        words = parameters.get("words") or []
        prompted = parameters.get("prompt") or words[0 if parameters["model"] else 1 :]
        return name != "run" or bool(parameters["file"] or prompted)
    return True


def run(words: Sequence[str], folder: Path, variables: dict[str, str], stdout: str = "") -> None:
    done = subprocess.run(
        words,
        cwd=folder,
        env=os.environ | QUICK | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, f"{words}: {done.stderr}"
    if stdout:
        (folder / stdout).write_text(done.stdout)


@pytest.mark.parametrize("page", TEXTS)
def test_command_lines(page: str, folder: Path, tmp_path: Path) -> None:
    found = [command for command in commands(TEXTS[page]) if command.is_hobbit]
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for command in found:
        try:
            parameters = parsed(command)
        except Exception as exc:
            pytest.fail(f"{command.line}: {getattr(exc, 'message', exc)}")
        if is_quick(command, parameters, tmp_path):
            words = [sys.executable, "-m", "hobbit", *command.arguments]
            run(words, tmp_path, dict(command.variables), command.stdout)


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if "```python" in text])
def test_python_blocks(page: str, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for block in blocks(TEXTS[page], "python"):
        tree = ast.parse(block, page)
        if imports(tree) <= IMPORTED and "http" not in block:
            run([sys.executable, "-c", block], tmp_path, {})


def imports(tree: ast.Module) -> set[str]:
    """Return the packages that a program imports."""
    nodes = [*ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_the_rule_runs_what_it_says(folder: Path) -> None:
    """The table must be able to fail: what is quick is run, what is wrong is refused."""

    def quick(line: str) -> bool:
        (command,) = commands(f"```sh\n{line}\n```\n")
        return is_quick(command, parsed(command), folder)

    assert quick('hobbit run model.gguf --memory 8G -p "x"  # says something')
    assert quick("HOBBIT_POLICY=lru hobbit run -m model.gguf x > out.txt")
    assert quick("hobbit trace model.gguf -f text.txt -o text.trace")
    (redirected, piped) = commands("```sh\nhobbit run x > a.json | grep y 2> b\n```\n")
    assert (redirected.stdout, piped.words) == ("a.json", ("grep", "y"))
    assert not quick("hobbit run model.gguf --memory 8G")
    assert not quick("hobbit run -p x") and not quick("hobbit run demo x")
    assert not quick("hobbit simulate absent.trace")
    assert not quick("hobbit bench model.gguf")
    for line in ("hobbit run --no-such x", "hobbit nix", "hobbit plot", "hobbit run -n many x"):
        with pytest.raises(Exception, match=r"(?i)no such|missing|valid"):
            quick(line)


def test_scripts_exist_and_can_run() -> None:
    found = {word for text in TEXTS.values() for c in commands(text) for word in c.words[:1]}
    scripts = {word for word in found if word.startswith("scripts/")}
    assert {"scripts/hobbit", "scripts/test"} <= scripts
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o111, script


def test_links_between_documents_lead_somewhere() -> None:
    for document in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", TEXTS[document.name]):
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
    text = (ROOT / "models.toml").read_text(encoding="utf-8")
    documented = set(re.findall(r"^#   (\w+)  ", text, re.MULTILINE))
    tables = re.split(r"^\[models\..*\]\n", text, flags=re.MULTILINE)[1::2]
    assert len(tables) == len(known_models())
    for table in tables:
        used = set(re.findall(r"^(\w+) = ", table, re.MULTILINE))
        assert used <= documented
        assert {"summary", "arch", "licence", "source", "parameters", "quants"} <= used
