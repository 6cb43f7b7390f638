"""Who may use whom: imports between modules of hobbit, includes between files of native.

The tables are the allowed arrows, and the tests are strict both ways: an arrow that is not here
fails, and so does one here that no file needs. The sources are read as text: nothing is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hobbit"
NATIVE = ROOT / "native"

IMPORTS: dict[str, set[str]] = {
    "demo": {"errors"},
    "errors": set(),
    "gguf_file": {"errors"},
    "layout": {"errors", "gguf_file"},
    "memory": {"errors", "layout", "sizes"},
    "sizes": {"errors"},
    "stats": set(),
    "stock": set(),
    "verify": {"errors", "stock"},
}

# Packages that only these modules may import.
THIRD_PARTY: dict[str, set[str]] = {
    "cffi": {"_native"},
    "ctypes": {"llama"},
    "gguf": {"demo"},
    "llama_cpp": {"llama", "stock"},
    "numpy": {"demo", "stock", "verify"},
    "rich": {"render"},
    "typer": {"cli"},
}

# A .c file may always include its own header.
INCLUDES: dict[str, set[str]] = {
    "cache.c": set(),
    "cache.h": {"policy.h"},
}

# Headers of ggml that only these files may include.
GGML: dict[str, set[str]] = {
    "ggml-backend-impl.h": {"backend.c"},
}


def imports_of(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything that a module imports, also inside its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"hobbit.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            yield base
            if base == "hobbit":
                yield from (f"hobbit.{alias.name}" for alias in node.names)


def our_imports(path: Path) -> set[str]:
    modules = {file.stem for file in PACKAGE.glob("*.py")}
    parts = (name.split(".") for name in imports_of(path))
    found = {name[1] if len(name) > 1 else "__init__" for name in parts if name[0] == "hobbit"}
    # `from hobbit import demo` names a module; the package itself is meant only otherwise.
    ours = found & modules
    return ours - {"__init__"} if ours != {"__init__"} else ours


def includes_of(path: Path) -> set[str]:
    return set(re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', path.read_text(), re.MULTILINE))


def native_files() -> list[Path]:
    return sorted(path for path in NATIVE.iterdir() if path.suffix in {".c", ".cpp", ".h"})


def difference(real: Mapping[str, set[str]], allowed: Mapping[str, set[str]]) -> list[str]:
    """Say in words where the two sets of arrows differ."""
    arrows = {(a, b) for a, to in real.items() for b in to}
    permitted = {(a, b) for a, to in allowed.items() for b in to}
    said = [f"{a} uses {b}: not allowed" for a, b in sorted(arrows - permitted)]
    said += [f"{a} no longer uses {b}: take it out" for a, b in sorted(permitted - arrows)]
    said += [f"{name} has no entry" for name in sorted(set(real) - set(allowed))]
    return said + [f"{name} does not exist" for name in sorted(set(allowed) - set(real))]


def cycle(arrows: Mapping[str, set[str]]) -> list[str]:
    """Return the names that are left when everything that depends on nothing is taken away."""
    left = {name: set(to) for name, to in arrows.items()}
    while free := [name for name, to in left.items() if not to & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_imports_follow_the_table() -> None:
    real = {path.stem: our_imports(path) for path in PACKAGE.glob("*.py")}
    assert difference(real, IMPORTS) == []
    assert cycle(IMPORTS) == []


def test_third_party_packages_stay_where_they_belong() -> None:
    real: dict[str, set[str]] = {name: set() for name in THIRD_PARTY}
    for path in PACKAGE.glob("*.py"):
        for name in {name.split(".")[0] for name in imports_of(path)} & real.keys():
            real[name].add(path.stem)
    assert difference(real, THIRD_PARTY) == []


def test_includes_follow_the_table() -> None:
    names = {path.name for path in native_files()}
    real = {
        path.name: (includes_of(path) & names) - {path.with_suffix(".h").name}
        for path in native_files()
    }
    assert difference(real, INCLUDES) == []
    headers = {name: to for name, to in INCLUDES.items() if name.endswith(".h")}
    assert cycle(headers) == []


def test_ggml_headers_stay_where_they_belong() -> None:
    real: dict[str, set[str]] = {}
    for path in native_files():
        for header in includes_of(path):
            if re.match(r"(ggml|gguf|llama)[-.\w]*\.h$", header):
                real.setdefault(header, set()).add(path.name)
    assert difference(real, GGML) == []
