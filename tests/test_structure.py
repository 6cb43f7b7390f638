"""Who may use whom: imports between modules of hobbit, includes between files of native.

The tables are strict both ways: what is not allowed here fails, and so does an entry that no file
needs. The sources are read as text: nothing is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hobbit"
NATIVE = ROOT / "native"

# A module uses modules of its own layer and of those above it in this list, never in a circle.
LAYERS: dict[str, set[str]] = {
    "leaves": {
        "_log", "bench_arm", "cpus", "errors", "folders", "grammars", "harmony", "stats", "stock",
    },
    "files and settings": {
        "arena", "attempt", "calibration", "demo", "disk", "fingerprint", "gguf_file", "importance",
        "layout", "low_file", "low_types", "memory", "mix", "offload", "policy", "prediction",
        "quality", "rule", "schedule", "sizes", "texts", "trace", "trace_summary", "usage",
        "models", "models.catalogue", "models.hub", "models.inventory", "models.location",
        "models.mixtures", "models.names", "models.pulling", "models.removal", "models.shape",
        "models.skeleton", "models.stores", "models.transfer", "planning", "planning.estimate",
        "planning.history", "planning.offload", "planning.parts", "planning.tiers",
    },
    "native": {
        "_native", "batches", "devices", "guarded", "low_writer", "nested", "planning.machine",
        "planning.planner", "planning.probe", "planning.subject", "prepare", "simulate", "streamed",
        "structs",
    },
    "running a model": {
        "__init__", "forced", "generate", "llama", "patching", "template", "verify",
    },
    "measuring": {
        "bench", "calibrate", "cgroup", "choices", "doctor", "doctor.check", "doctor.engine",
        "doctor.storage", "doctor.system", "evaluate", "lab", "planning.feedback", "search",
        "tracing", "tune",
    },
    "asking and showing": {
        "bench_options", "bench_rows", "listing", "meters", "modes", "options", "pictures",
        "pictures.files", "pictures.png", "pictures.reports", "pictures.routing",
        "pictures.terminal", "planning.others", "planning.report", "planning.why", "plot", "render",
        "report", "simulating",
    },
    "serving": {
        "serve", "serve.answer", "serve.app", "serve.channels", "serve.chat", "serve.engine",
        "serve.errors", "serve.exchange", "serve.generation", "serve.guard", "serve.info",
        "serve.keeper", "serve.log", "serve.metrics", "serve.native", "serve.openai",
        "serve.options", "serve.ports", "serve.registry", "serve.replies", "serve.requests",
        "serve.scoring", "serve.server", "serve.service", "serve.sse", "serve.start",
        "serve.stream", "serve.text", "serve.turns",
    },
    "watching": {
        "watching", "watching.client", "watching.live", "watching.panel", "watching.table",
        "watching.window",
    },
    "chat": {
        "chat", "chat.bottom", "chat.commands", "chat.display", "chat.flow",
        "chat.interrupts", "chat.loop", "chat.prompts", "chat.screen", "chat.session",
        "chat.session_file", "chat.settings", "chat.transcript", "chat.view",
    },
    "commands": {
        "__main__", "cli", "cli.app", "cli.bench", "cli.chat", "cli.config", "cli.console",
        "cli.destination", "cli.doctor", "cli.eval", "cli.flags", "cli.foreign", "cli.forms",
        "cli.loading", "cli.ls", "cli.plan", "cli.plot", "cli.prepare", "cli.ps", "cli.pull",
        "cli.rm", "cli.run", "cli.serve", "cli.sessions", "cli.shared", "cli.show", "cli.signals",
        "cli.simulate", "cli.top", "cli.trace", "cli.verify", "cli.why",
    },
}  # fmt: skip

# Packages that only these modules may import.
THIRD_PARTY: dict[str, set[str]] = {
    "cffi": set(),
    "ctypes": {"stock"},
    "gguf": {"demo", "importance", "planning.probe"},
    "huggingface_hub": {"models.hub", "models.removal", "models.stores", "models.transfer"},
    "llama_cpp": {
        "_log",
        "_native",
        "bench_arm",
        "doctor.engine",
        "forced",
        "generate",
        "llama",
        "patching",
        "planning.probe",
        "serve.answer",
        "serve.scoring",
        "stock",
        "streamed",
        "template",
    },
    "matplotlib": {"plot"},
    "numpy": {
        "bench_arm",
        "demo",
        "evaluate",
        "forced",
        "importance",
        "lab",
        "llama",
        "low_writer",
        "pictures",
        "pictures.png",
        "pictures.routing",
        "pictures.terminal",
        "planning.probe",
        "search",
        "serve.scoring",
        "simulate",
        "stock",
        "streamed",
        "trace",
        "trace_summary",
        "verify",
    },
    "prometheus_client": {"serve.metrics"},
    "prompt_toolkit": {"chat.screen"},
    "rich": {"pictures.terminal", "render", "watching.live"},
    "starlette": {
        "serve.app",
        "serve.guard",
        "serve.info",
        "serve.native",
        "serve.openai",
        "serve.server",
        "serve.service",
        "serve.stream",
    },
    "typer": {
        "cli.app",
        "cli.bench",
        "cli.config",
        "cli.doctor",
        "cli.eval",
        "cli.flags",
        "cli.foreign",
        "cli.plan",
        "cli.plot",
        "cli.pull",
        "cli.rm",
        "cli.run",
        "cli.serve",
        "cli.shared",
        "cli.show",
        "cli.simulate",
        "cli.top",
        "cli.trace",
    },
    "uvicorn": {"serve.server"},
    "wcwidth": {"chat.flow"},
}

# A source file includes its own header besides.
INCLUDES: dict[str, set[str]] = {
    # Knows no model: numbers, files, memory.
    "block.h": set(),
    "cache.c": {"heap.h"},
    "cache.h": {"hobbit.h", "policy.h", "records.h"},
    "forecast.c": {"odds.h"},
    "forecast.h": {"routers.h"},
    "routers.c": set(),
    "routers.h": set(),
    "heap.c": set(),
    "heap.h": set(),
    "hobbit.h": set(),
    "map_predictor.c": {"odds.h"},
    "map_predictor.h": {"maps.h", "routers.h"},
    "maps.c": {"block.h", "maps_impl.h"},
    "maps.h": set(),
    "maps_file.c": {"maps_impl.h"},
    "maps_impl.h": {"maps.h"},
    "nested.c": {"hobbit.h"},
    "nested.h": set(),
    "odds.c": set(),
    "odds.h": set(),
    "os.c": set(),
    "os.h": set(),
    "policy.c": set(),
    "policy.h": {"hobbit.h"},
    "reader.c": set(),
    "reader.h": {"os.h"},
    "records.c": set(),
    "records.h": {"policy.h"},
    "rows.c": {"records.h"},
    "rows.h": {"hobbit.h"},
    # The model's bytes: no word of ggml.
    "costs.c": set(),
    "costs.h": set(),
    "dispatch.c": set(),
    "dispatch.h": {"costs.h", "hobbit.h"},
    "catalog.c": {"nested.h"},
    "catalog.h": {"hobbit.h", "os.h"},
    "gguf_stream.c": {"os.h"},
    "gguf_stream.h": {"hobbit.h"},
    "schedule.c": {"hobbit.h"},
    "schedule.h": set(),
    "model.c": {"gguf_stream.h", "model_impl.h"},
    "model_impl.h": {"model.h", "schedule.h", "trace.h", "trial.h"},
    "choice.c": {"model_impl.h"},
    "kept_maps.c": {"model_impl.h"},
    "loads.c": {"model_impl.h", "nested.h"},
    "sequences.c": {"model_impl.h"},
    "usage.c": {"model_impl.h"},
    "ahead.c": {"model_impl.h"},
    "trial.c": set(),
    "trial.h": set(),
    "model.h": {
        "cache.h",
        "catalog.h",
        "forecast.h",
        "hobbit.h",
        "map_predictor.h",
        "reader.h",
        "rows.h",
        "rule.h",
        "tier.h",
        "trace.h",
    },
    "rule.c": set(),
    "rule.h": {"cache.h"},
    "trace.c": set(),
    "trace.h": {"hobbit.h"},
    "traced.c": {"model_impl.h"},
    # Copies on a device, of which it knows no more than that a thread fills them.
    "tier.c": set(),
    "tier.h": {"cache.h", "worker.h"},
    "tiered.c": {"model_impl.h"},
    "worker.c": {"os.h"},
    "worker.h": set(),
    # Graphs.
    "moe.c": {
        "precision.h",
        "predict.h",
        "router.h",
        "shape.h",
        "substitute.h",
        "tracing.h",
        "wave.h",
    },
    "split.c": {"wave.h"},
    "wave.h": {
        "block.h",
        "dispatch.h",
        "executor.h",
        "model.h",
        "replica.h",
        "routing.h",
        "segment.h",
    },
    "moe.h": set(),
    "needs.c": {"scorer.h"},
    "needs.h": {"routing.h", "rule.h"},
    "precision.c": {"model.h", "needs.h", "scorer.h", "shape.h"},
    "precision.h": {"block.h", "routing.h", "segment.h"},
    "predict.c": {"model.h", "os.h", "router.h", "scorer.h"},
    "predict.h": {"block.h", "routing.h", "segment.h"},
    "replica.c": {"shape.h"},
    "replica.h": {"block.h", "model.h", "routing.h", "segment.h"},
    "router.c": set(),
    "router.h": {"model.h", "segment.h"},
    "routing.c": {"hobbit.h"},
    "routing.h": {"block.h"},
    "scorer.c": {"hobbit.h"},
    "scorer.h": set(),
    "segment.c": {"shape.h"},
    "segment.h": {"catalog.h"},
    "shape.c": set(),
    "shape.h": set(),
    "substitute.c": {"model.h", "router.h", "shape.h"},
    "substitute.h": {"block.h", "segment.h"},
    "tracing.c": {"model.h", "router.h", "shape.h"},
    "tracing.h": {"block.h", "rows.h", "segment.h"},
    # Without a model: routing alone.
    "simulate.c": set(),
    "simulate.h": {"cache.h", "hobbit.h", "routing.h", "rule.h"},
    "simulated_ahead.c": {"scorer.h", "simulate.h"},
    "simulated_layer.c": {"needs.h", "scorer.h", "simulate.h"},
    # ggml's and llama.cpp's interfaces.
    "backend.c": {"hobbit.h", "model.h", "moe.h", "os.h", "router.h", "segment.h"},
    "context_memory.cpp": {"device.h", "hobbit.h"},
    "quantize.c": {"hobbit.h"},
    "device.c": {"executor.h", "guard.h", "rpc.h", "segment.h"},
    "device.h": {"hobbit.h", "worker.h"},
    "caller.c": {"device.h", "guard.h", "rpc.h"},
    "calibrate.c": set(),
    "calibrate.h": {"model.h", "site.h", "worker.h"},
    "executor.c": {"executor_impl.h", "site.h"},
    "executor.h": set(),
    "executor_costs.c": {"calibrate.h", "executor_impl.h"},
    "executor_impl.h": {"device.h", "dispatch.h", "executor.h", "model.h", "replica.h", "uses.h"},
    "executor_memory.c": {"executor_impl.h", "site.h"},
    "use_device.c": {"executor_impl.h"},
    "uses.c": set(),
    "uses.h": {"segment.h"},
    "guard.c": {"worker.h"},
    "guard.h": set(),
    "site.c": set(),
    "site.h": {"block.h", "catalog.h", "costs.h"},
    "rpc.c": {"guard.h", "hobbit.h", "os.h", "worker.h"},
    "rpc.h": set(),
}

# ggml's and llama.cpp's headers, and who includes each.
GGML: dict[str, set[str]] = {
    "ggml-backend-impl.h": {"backend.c"},
    "ggml-backend.h": {
        "context_memory.cpp",
        "device.h",
        "replica.c",
        "router.c",
        "rpc.h",
        "segment.c",
        "site.h",
    },
    "ggml-cpu.h": {"calibrate.c", "moe.c"},
    "ggml-impl.h": {"executor.c", "moe.c", "segment.c", "uses.c"},
    "ggml.h": {"guard.c", "moe.h", "quantize.c", "routing.h", "segment.h", "shape.h", "site.c"},
    "llama-ext.h": {"context_memory.cpp"},
}


def module_name(path: Path) -> str:
    """Return the dotted name of a module in hobbit: `cli.run`; a package has its own name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything that a module imports, also inside its functions."""
    package = ("hobbit", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            # `from . import demo` names a module; anything else is of the module itself.
            names = {f"{module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name.removeprefix("hobbit.") in FILES}
            yield from modules or {module}


def our_imports(path: Path) -> set[str]:
    ours = {name for name in imports_of(path) if name.split(".")[0] == "hobbit"}
    named = {name.removeprefix("hobbit").lstrip(".") or "__init__" for name in ours}
    return named - {"_hobbit"}  # the compiled binding


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


def test_imports_follow_the_layers() -> None:
    depth = {name: depth for depth, names in enumerate(LAYERS.values()) for name in names}
    assert sum(map(len, LAYERS.values())) == len(depth)
    assert sorted(depth) == sorted(FILES)
    arrows = {name: our_imports(path) for name, path in FILES.items()}
    upwards = [(a, b) for a, to in arrows.items() for b in to if depth[b] > depth[a]]
    assert upwards == []
    assert cycle(arrows) == []


def test_third_party_packages_stay_where_they_belong() -> None:
    real: dict[str, set[str]] = {name: set() for name in THIRD_PARTY}
    for module, path in FILES.items():
        for name in {name.split(".")[0] for name in imports_of(path)} & real.keys():
            real[name].add(module)
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
    names = {path.name for path in native_files()}
    for path in native_files():
        for header in includes_of(path) - names:
            if re.match(r"(ggml|gguf|llama)[-.\w]*\.h$", header):
                real.setdefault(header, set()).add(path.name)
    assert difference(real, GGML) == []
