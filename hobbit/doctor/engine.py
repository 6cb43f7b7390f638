"""llama.cpp as it was built, and our plugin in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from ..cpus import has_amx
from .check import Check

_PACKAGE, _OURS = "llama-cpp-python", "hobbit-moe"
# Without these, multiplying takes several times as long.
_WANTED = {"AVX2", "FMA"}, {"NEON"}


def checks() -> Iterator[Check]:
    """Look at the packages; llama.cpp is loaded for it."""
    build = _build()
    yield build
    if build.state == "FAIL":
        return
    try:
        import llama_cpp.llama_cpp as api

        said = api.llama_print_system_info().decode()
        offload = bool(api.llama_supports_gpu_offload())
    except (ImportError, OSError, RuntimeError) as exc:
        yield Check("llama.cpp", "FAIL", f"does not load: {exc}", f"reinstall {_PACKAGE}")
        return
    yield _features(said)
    yield _devices(said, offload)
    yield _plugin()


def _build() -> Check:
    wanted = next((text for text in requires(_OURS) or () if text.startswith(_PACKAGE)), "")
    pinned = wanted.partition("==")[2]
    try:
        found = version(_PACKAGE)
    except PackageNotFoundError:
        return Check("build", "FAIL", f"{_PACKAGE} is missing", f"pip install {wanted}")
    if pinned and found != pinned:
        advice = f"pip install {_PACKAGE}=={pinned}"
        return Check("build", "FAIL", f"{_PACKAGE} {found}, hobbit needs {pinned}", advice)
    return Check("build", "ok", f"hobbit {version(_OURS)}, {_PACKAGE} {found}")


def _features(said: str) -> Check:
    """Say which instructions llama.cpp was compiled for."""
    found = re.findall(r"(\w+) = 1", said)
    facts = {"features": found}
    amx = "; its AMX kernels are left out, which crash" if has_amx() else ""
    words = f"{', '.join(found) or 'no instructions named'}{amx}"
    if not any(wanted <= {*found} for wanted in _WANTED):
        advice = f"compile for this machine: pip install --no-binary :all: {_PACKAGE}"
        return Check("instructions", "warn", words, advice, facts)
    return Check("instructions", "ok", words, facts=facts)


def _devices(said: str, offload: bool) -> Check:
    names = re.findall(r"(\w+) : ", said)
    found = ", ".join(names) or "none named"
    gpu = "a GPU can take the dense layers (-ngl)" if offload else "no GPU in this build"
    return Check("devices", "ok", f"{found}; {gpu}", facts={"backends": names, "gpu": offload})


def _plugin() -> Check:
    try:
        from .._native import register

        register()
    except Exception as exc:  # whatever it is, it is the answer
        return Check("plugin", "FAIL", f"does not load: {exc}", f"reinstall {_OURS}")
    return Check("plugin", "ok", "loads into llama.cpp")
