"""config.toml: what flags are where neither the command line nor the environment sets them.

A key is a flag's name, the one that HOBBIT_<NAME> has too. At the top it is for every command that
has such a flag, in a table, as [run], for that command.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from .console import write

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def config_path() -> Path:
    """Return where it is, or would be: HOBBIT_CONFIG, or in the user's folder for such files."""
    own, shared = os.environ.get("HOBBIT_CONFIG"), os.environ.get("XDG_CONFIG_HOME")
    if own:
        return Path(own).expanduser()
    try:
        return Path(shared or Path.home() / ".config") / "hobbit" / "config.toml"
    except RuntimeError:
        return Path("config.toml").absolute()


def default_map(group: Any) -> dict[str, Any]:
    """Return the file's defaults for each command of `group`, as the parser takes them.

    Nothing where there is no file; raises UsageError for what cannot be read, or no command has.
    """
    path = config_path()
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise UsageError(f"{path}: {exc}") from exc
    flags = {name: _flags(command) for name, command in group.commands.items()}
    tables = {key: value for key, value in found.items() if isinstance(value, dict)}
    common = {key: value for key, value in found.items() if key not in tables}
    _check(path, "", common, {key for of in flags.values() for key in of})
    _check(path, "table ", tables, {*flags})
    for name, table in tables.items():
        _check(path, f"{name}.", table, {*flags[name]})
    # Another name for run, which can have settings of its own.
    tables["chat"] = tables.get("run", {}) | tables.get("chat", {})
    return {
        name: {
            of[key].name: _value(of[key], value)
            for key, value in (common | tables.get(name, {})).items()
            if key in of
        }
        for name, of in flags.items()
    }


def _flags(command: Any) -> dict[str, Any]:
    """Return the flags of a command, the parser's objects, by their names without dashes."""
    return {
        _long(param).removeprefix("--"): param
        for param in command.params
        if param.param_type_name == "option" and param.name != "help" and not param.hidden
    }


def _value(param: Any, value: Any) -> Any:
    """Let one value do for a flag that may be repeated."""
    return [value] if param.multiple and not isinstance(value, list) else value


def _long(param: Any) -> str:
    names: list[str] = param.opts
    return next((name for name in names if name.startswith("--")), names[0])


def _check(path: Path, what: str, given: Mapping[str, Any], known: set[str]) -> None:
    for name in given.keys() - known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{path}: no command has {what}{name}{hint}")


def config(
    context: typer.Context,
    action: Annotated[str, typer.Argument(metavar="[show|path]", help="What to print.")] = "show",
    command: Annotated[
        str, typer.Argument(metavar="[COMMAND]", help="Whose flags to show.")
    ] = "run",
) -> int:
    """Show a command's settings, and where each comes from."""
    if action not in ("show", "path"):
        raise UsageError(f"hobbit config {action}: it is show or path")
    write(f"{config_path()}\n" if action == "path" else _shown(context, command))
    return 0


def _shown(context: Any, name: str) -> str:
    root = context.find_root()
    command = root.command.commands.get(name)
    if command is None:
        raise UsageError(f"hobbit config show {name}: hobbit has no such command")
    parsed = command.make_context(name, [], parent=root, resilient_parsing=True)
    lines = []
    for param in command.params:
        if param.param_type_name != "option" or param.hidden or param.name == "help":
            continue
        source = parsed.get_parameter_source(param.name)
        origin = {"ENVIRONMENT": param.envvar, "DEFAULT_MAP": str(config_path())}
        where = origin.get(source.name, "") if source else ""
        lines.append(f"{_long(param):<22} {_word(parsed.params[param.name]):<12} {where}".rstrip())
    return "\n".join(lines) + "\n"


def _word(value: Any) -> str:
    if value is None or value == () or value == []:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
