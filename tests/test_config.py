"""config.toml: under the environment, above what is built in; what is wrong in it is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cli import hobbit

from hobbit.cli.config import config_path


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("HOBBIT_CONFIG", str(path))
    return path


def shown(command: str = "run") -> dict[str, list[str]]:
    """Return what `config show` says of each flag: value, and origin."""
    done = hobbit("config", "show", command)
    assert done.returncode == 0 and done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_precedence(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('memory = "3G"\nthreads = 3\npolicy = "lru"\n[run]\nthreads = 1\n')
    monkeypatch.setenv("HOBBIT_POLICY", "lfu")
    monkeypatch.delenv("HOBBIT_WARM_START")
    run = shown()
    assert run["--memory"] == ["3G", str(file)]
    assert run["--threads"] == ["1", str(file)]
    assert run["--policy"] == ["lfu", "HOBBIT_POLICY"]
    assert run["--quality"] == ["exact"] and run["--seed"] == ["-1"]
    assert shown("trace")["--threads"] == ["3", str(file)]
    monkeypatch.delenv("HOBBIT_POLICY")
    assert shown("bench")["--policy"] == ["lru", str(file)]  # repeatable there


def test_it_is_what_a_run_gets(file: Path) -> None:
    file.write_text('memory = "none of that"\n')
    done = hobbit("run", "absent.gguf", "x")
    assert done.returncode == 2 and "none of that" in done.stderr
    asked = hobbit("run", "absent.gguf", "x", "--memory", "1G")
    assert asked.returncode == 3 and "absent.gguf" in asked.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('memroy = "1G"', "no command has memroy; did you mean memory?"),
        ("[benhc]\nthreads = 1", "no command has table benhc; did you mean bench?"),
        ("[run]\nsweep = 1", "no command has run.sweep"),
        ("memory = ", "config.toml: "),
    ],
)
def test_mistakes(file: Path, text: str, words: str) -> None:
    file.write_text(text)
    done = hobbit("run", "absent.gguf", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr and str(file) in done.stderr
    assert hobbit("--version").returncode == hobbit("--help").returncode == 0


def test_a_value_of_the_wrong_kind(file: Path) -> None:
    file.write_text('threads = "many"')
    done = hobbit("run", "absent.gguf", "x")
    assert done.returncode == 2 and "--threads" in done.stderr and "valid integer" in done.stderr


def test_a_file_that_cannot_be_read(file: Path) -> None:
    file.mkdir()
    done = hobbit("run", "absent.gguf", "x")
    assert done.returncode == 2 and done.stderr.startswith(f"hobbit: error: cannot read {file}")


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_path() == Path.home() / ".config" / "hobbit" / "config.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    assert config_path() == Path.home() / ".config" / "hobbit" / "config.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", "/x")
    assert config_path() == Path("/x/hobbit/config.toml")
    assert hobbit("config", "path").stdout == "/x/hobbit/config.toml\n"


def test_refusals() -> None:
    for words in (("config", "nix"), ("config", "show", "nix")):
        done = hobbit(*words)
        assert (done.returncode, done.stdout) == (2, "") and "nix" in done.stderr
