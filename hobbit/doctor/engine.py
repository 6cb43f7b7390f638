"""llama.cpp as it was built, and our plugin in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version

from ..arena import DeviceInfo
from ..cpus import has_amx
from ..errors import HobbitError
from ..sizes import format_size
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
    plugin = _plugin()
    yield plugin
    if plugin.state == "ok":
        yield from _experts()


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


def _experts() -> Iterator[Check]:
    """Look at each device of this machine that could hold experts.

    A server that this process reached is none, and may be gone: asking it could take for ever.
    """
    from ..devices import Device, names

    for name in (name for name in names() if not re.fullmatch(r"RPC\d+", name)):
        try:
            with closing(Device(name)) as device:
                yield _device(device.info)
        except HobbitError as exc:
            advice = "check its driver, or do without: --device none"
            yield Check(f"device {name}", "warn", str(exc), advice)


def _device(info: DeviceInfo) -> Check:
    free = f"{format_size(info.free_bytes)} of {format_size(info.total_bytes)} free"
    if info.shares_memory:
        whose = "the machine's own memory, so part of --memory"
        use = f"--device {info.name} --vram SIZE"
    else:
        whose, use = "memory of its own", f"--device {info.name}"
    words = f"{info.description}, {free}, {whose}; holds experts with {use}"
    return Check(f"device {info.name}", "ok", words, facts=asdict(info))


def _plugin() -> Check:
    try:
        from .._native import register

        register()
    except Exception as exc:  # whatever it is, it is the answer
        return Check("plugin", "FAIL", f"does not load: {exc}", f"reinstall {_OURS}")
    return Check("plugin", "ok", "loads into llama.cpp")
