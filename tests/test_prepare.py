"""Making the low-precision copy: the bytes, interruptions, memory, space, and the command."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from lowfiles import floats, ggml_quantize, layout_of, wide_model
from moefile import write_moe

from hobbit import low_writer
from hobbit.calibration import path_of
from hobbit.cli import app
from hobbit.errors import HobbitError, ModelError, ReadError, UsageError
from hobbit.gguf_file import GGML_TYPES, open_gguf
from hobbit.importance import UNIFORM, Importance
from hobbit.layout import Layout
from hobbit.low_writer import part_path
from hobbit.prepare import errors_of, make_low, prepare

# By default a copy of up to 5 bits has an importance gathered, for which a model has to speak.
UNGATHERED = ("auto", "uniform")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_moe(tmp_path / "m.gguf", kind="Q8_0")


@pytest.fixture
def layout(model: Path) -> Layout:
    return layout_of(model)


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "low.gguf"


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the work into many units, each of which is noted at once."""
    monkeypatch.setattr(low_writer, "UNIT_BYTES", 1000)
    monkeypatch.setattr(low_writer, "CHECKPOINT_S", 0)


def experts(path: Path) -> dict[tuple[str, int], bytes]:
    """Return the bytes of each expert of each matrix, by the rule for stacked tensors."""
    low = layout_of(path)
    data = path.read_bytes()
    return {
        (m.name, i): data[m.offset + i * m.expert_bytes :][: m.expert_bytes]
        for group in low.groups
        for m in group.matrices
        for i in range(m.n_expert)
    }


def by_gguf_py(weights: np.ndarray, kind: int) -> bytes:
    return gguf.quants.quantize(weights, gguf.GGMLQuantizationType(kind)).tobytes()


def by_ggml(weights: np.ndarray, kind: int) -> bytes:
    return ggml_quantize(weights, kind, None)


@pytest.mark.parametrize(
    ("source", "low", "way"),
    [
        ("Q8_0", "q4_0,q4_1", by_gguf_py),
        ("Q8_0", "q5_0,q5_1", by_gguf_py),
        ("Q8_0", "mxfp4", by_gguf_py),
        ("F16", "q8_0", by_gguf_py),
        ("BF16", "q4_0", by_gguf_py),
        ("F32", "bf16", by_gguf_py),
        ("Q5_1", "iq4_nl", by_ggml),
    ],
)
@pytest.mark.usefixtures("small_units")
def test_bytes_are_those_of_the_quantiser(
    tmp_path: Path, dest: Path, source: str, low: str, way: Callable[[np.ndarray, int], bytes]
) -> None:
    # In parts, so that each matrix has to be found in its own file.
    layout = layout_of(write_moe(tmp_path / "m.gguf", kind=source, tensors_per_part=7))
    assert len(layout.gguf.parts) > 2
    make_low(layout, dest, low, threads=3)
    made = experts(dest)
    assert len(made) == 2 * 3 * 4
    types = {tensor.name: tensor.type for tensor in open_gguf(dest).tensors.values()}
    for matrix in (m for group in layout.groups for m in group.matrices):
        for expert in range(matrix.n_expert):
            expected = way(floats(layout, matrix, expert), types[matrix.name])
            assert made[matrix.name, expert] == expected, (matrix.name, expert)


@pytest.mark.parametrize("low", ["q2_K", "q3_K", "q6_K", "iq4_xs", "iq3_xxs"])
def test_bytes_of_wide_types(
    tmp_path: Path, dest: Path, low: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(wide_model(tmp_path / "m.gguf", monkeypatch, layers=1, experts=2))
    monkeypatch.setattr(low_writer, "UNIT_BYTES", 5000)
    make_low(layout, dest, low, threads=2)
    made = experts(dest)
    for matrix in layout.groups[0].matrices:
        kind = open_gguf(dest).tensors[matrix.name].type
        assert made[matrix.name, 1] == by_ggml(floats(layout, matrix, 1), kind)


def test_the_loss_is_stated(layout: Layout, dest: Path) -> None:
    made = make_low(layout, dest, "q4_0", UNIFORM)
    lost: dict[str, list[float]] = {}
    low = layout_of(dest)
    for group, own in zip(layout.groups, low.groups, strict=True):
        for matrix, copy in zip(group.matrices, own.matrices, strict=True):
            sums = lost.setdefault(matrix.name.split("_")[1], [0, 0])
            for expert in range(matrix.n_expert):
                w = floats(layout, matrix, expert).astype(np.float64)
                sums[0] += ((w - floats(low, copy, expert)) ** 2).sum()
                sums[1] += (w**2).sum()
    expected = {name: error / norm for name, (error, norm) in lost.items()}
    assert made.errors == pytest.approx(expected, rel=1e-9)
    assert errors_of(open_gguf(dest)) == made.errors
    assert made.errors["up"] < make_low(layout, dest, "q4_0").errors["up"]


@pytest.mark.usefixtures("small_units")
def test_the_file_does_not_depend_on_the_threads(layout: Layout, tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "five"]
    for file, threads in zip(files, (1, 5), strict=True):
        make_low(layout, file, "q4_0", threads=threads)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["five", "m.gguf", "one"]


def stop_after(calls: int) -> Callable[[str, float, str], None]:
    """Return a progress function that is interrupted at its n-th call."""
    left = [calls]

    def progress(stage: str, done: float, words: str) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise KeyboardInterrupt

    return progress


@pytest.mark.usefixtures("small_units")
def test_an_interrupted_run_is_continued(layout: Layout, dest: Path, tmp_path: Path) -> None:
    whole = make_low(layout, tmp_path / "whole", "q4_0").path
    with pytest.raises(KeyboardInterrupt):
        make_low(layout, dest, "q4_0", threads=2, progress=stop_after(20))
    assert not dest.exists()
    with pytest.raises(ModelError, match="is not a GGUF file"):
        open_gguf(part_path(dest))
    converted: list[float] = []
    made = make_low(
        layout, dest, "q4_0", progress=lambda stage, done, words: converted.append(done)
    )
    assert 0 < made.resumed_bytes < made.source_bytes
    assert converted[0] > made.resumed_bytes / made.source_bytes
    assert dest.read_bytes() == whole.read_bytes()


KILLED = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from hobbit import low_writer
from hobbit.prepare import make_low
from lowfiles import layout_of
low_writer.UNIT_BYTES, low_writer.CHECKPOINT_S = 1000, 0
def progress(stage, done, words):
    time.sleep(0.01)
    if Path({dest!r} + ".part.journal").read_text().count("\\n") > 20:
        os.kill(os.getpid(), signal.SIGKILL)
make_low(layout_of(Path({model!r})), Path({dest!r}), "q4_0", threads=2, progress=progress)
"""


@pytest.mark.usefixtures("small_units")
def test_a_killed_run_is_continued(model: Path, dest: Path, tmp_path: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), model=str(model), dest=str(dest))
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not dest.exists()
    layout = layout_of(model)
    made = make_low(layout, dest, "q4_0")
    assert made.resumed_bytes >= 20 * 900
    assert dest.read_bytes() == make_low(layout, tmp_path / "whole", "q4_0").path.read_bytes()


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("change", ["type", "importance", "source", "part lost", "part cut"])
def test_what_has_changed_is_begun_anew(
    model: Path, dest: Path, tmp_path: Path, change: str
) -> None:
    layout, low, importance = layout_of(model), "q4_0", None
    with pytest.raises(KeyboardInterrupt):
        make_low(layout, dest, low, threads=1, progress=stop_after(20))
    if change == "type":
        low = "iq4_nl"  # of the same size
    elif change == "importance":
        importance = UNIFORM
    elif change == "source":
        layout = layout_of(write_moe(tmp_path / "other.gguf", kind="Q8_0", seed=1))
    elif change == "part lost":
        part_path(dest).unlink()
    else:
        os.truncate(part_path(dest), 5000)
    made = make_low(layout, dest, low, importance)
    assert made.resumed_bytes == 0
    whole = make_low(layout, tmp_path / "whole", low, importance)
    assert dest.read_bytes() == whole.path.read_bytes()


@pytest.mark.usefixtures("small_units")
def test_a_torn_journal_loses_only_its_end(layout: Layout, dest: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_low(layout, dest, "q4_0", threads=1, progress=stop_after(20))
    journal = part_path(dest).with_name(f"{part_path(dest).name}.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) > 15
    journal.write_bytes(b"".join(lines[:10]) + lines[10][:6] + b"\n\0\0\0\n7 0x1p+0")
    made = make_low(layout, dest, "q4_0")
    assert made.resumed_bytes > 0
    assert dest.read_bytes() == make_low(layout, tmp_path / "whole", "q4_0").path.read_bytes()


def test_no_space(layout: Layout, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 20_000
    monkeypatch.setattr(low_writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(HobbitError) as refused:
        make_low(layout, dest, "q4_0")
    free = int(str(refused.value).split("(")[1].split()[0])
    assert "are needed, 19.5 KiB are free there" in str(refused.value)
    assert app._report(refused.value) == app.EXIT_DISK_FULL
    assert not dest.exists()
    # The figure is the one that works, and the least that does.
    free -= 1
    with pytest.raises(HobbitError):
        make_low(layout, dest, "q4_0")
    free += 1
    assert make_low(layout, dest, "q4_0").size <= free


@pytest.mark.usefixtures("small_units")
def test_a_disk_that_fills_up(
    layout: Layout, dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, [0]

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        calls[0] += 1
        if calls[0] > 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[:100], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(HobbitError, match=r"cannot write .*low\.gguf: No space left") as full:
            make_low(layout, dest, "q4_0", threads=1)
    assert app._report(full.value) == app.EXIT_DISK_FULL
    assert not dest.exists()
    make_low(layout, dest, "q4_0")
    assert dest.read_bytes() == make_low(layout, tmp_path / "whole", "q4_0").path.read_bytes()


def test_a_damaged_source(model: Path, layout: Layout, dest: Path) -> None:
    matrix = layout.groups[1].matrices[0]
    data = bytearray(model.read_bytes())
    at = matrix.offset + 2 * matrix.expert_bytes
    data[at : at + 2] = np.float16(np.nan).tobytes()
    model.write_bytes(data)
    with pytest.raises(ModelError, match=f"expert 2 of {matrix.name} has weights that are no numb"):
        make_low(layout, dest, "q4_0")
    os.truncate(model, matrix.offset + 10)
    with pytest.raises(ReadError, match=r"m\.gguf: ends before byte \d+; it was longer"):
        make_low(layout, dest, "q4_0")
    model.unlink()
    with pytest.raises(ModelError, match=r"m\.gguf: cannot read it: No such file"):
        make_low(layout, dest, "q4_0")
    assert not dest.exists()


def test_one_writer_at_a_time(layout: Layout, dest: Path) -> None:
    refusals = []

    def progress(stage: str, done: float, words: str) -> None:
        with pytest.raises(HobbitError, match="another hobbit is writing it") as refused:
            make_low(layout, dest, "q4_0")
        refusals.append(refused)

    assert make_low(layout, dest, "q4_0", progress=progress).path == dest
    assert refusals


def test_a_file_that_got_its_name_meanwhile_is_not_overwritten(
    layout: Layout, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = low_writer.fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        """Lock, after the other run has finished."""
        part_path(dest).replace(dest)
        real(descriptor, operation)

    monkeypatch.setattr(low_writer.fcntl, "flock", flock)
    with pytest.raises(HobbitError, match="another hobbit is writing it"):
        make_low(layout, dest, "q4_0")


def test_types_that_need_an_importance(
    tmp_path: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(wide_model(tmp_path / "m.gguf", monkeypatch, layers=1, experts=2))
    for make in (
        lambda: make_low(layout, dest, "iq2_xxs"),
        lambda: prepare(layout, dest, "iq2_xxs", "none"),
    ):
        with pytest.raises(UsageError, match="iq2_xxs cannot be made without an importance matrix"):
            make()
    with pytest.raises(UsageError, match="q2_K want an importance matrix: name one with --imatrix"):
        prepare(layout, dest, "q2_K")
    assert prepare(layout, dest, "q2_K", "none") is not None


@pytest.mark.usefixtures("small_units")
def test_what_was_gathered_is_kept_until_the_copy_is_whole(
    tmp_path: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(wide_model(tmp_path / "m.gguf", monkeypatch, layers=1, experts=2))
    monkeypatch.setattr(low_writer, "UNIT_BYTES", 20_000)
    gathered = []

    def gather() -> Importance:
        gathered.append(1)
        rng = np.random.default_rng(len(gathered))
        matrices = layout.groups[0].matrices
        sums = {m.name: rng.exponential(size=(2, m.ne0)).astype(np.float32) for m in matrices}
        return Importance("text", sums, {m.name: np.array([3, 4]) for m in matrices})

    with pytest.raises(KeyboardInterrupt):
        prepare(layout, dest, "q2_K", gather=gather, threads=1, progress=stop_after(10))
    made = prepare(layout, dest, "q2_K", gather=gather)
    assert made is not None
    assert made.resumed_bytes > 0
    assert prepare(layout, dest, "q2_K", gather=gather) is None
    assert len(gathered) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["low.gguf", "m.gguf"]
    gathered.clear()
    whole = prepare(layout, tmp_path / "whole", "q2_K", gather=gather)
    assert whole is not None
    assert dest.read_bytes() == whole.path.read_bytes()
    assert prepare(layout, tmp_path / "none", "q2_K", "none") is not None
    assert dest.read_bytes() != (tmp_path / "none").read_bytes()


def test_a_copy_is_made_once(layout: Layout, dest: Path) -> None:
    assert prepare(layout, dest, *UNGATHERED) is not None
    first = dest.stat().st_ino
    assert prepare(layout, dest, *UNGATHERED) is None
    assert dest.stat().st_ino == first
    assert prepare(layout, dest, *UNGATHERED, force=True) is not None
    assert dest.stat().st_ino != first
    # Another option makes another copy, and not in the folder of the model only.
    for options in (("q4_0", "none"), ("q4_0", "uniform"), ("q4_1", "uniform")):
        assert prepare(layout, dest, *options) is not None
        assert prepare(layout, dest, *options) is None


def test_a_calibration_goes_with_the_copy_it_was_measured_of(layout: Layout, dest: Path) -> None:
    prepare(layout, dest, *UNGATHERED)
    calibration = path_of(dest)
    calibration.write_text("{}")
    assert prepare(layout, dest, *UNGATHERED) is None
    assert calibration.exists()
    assert prepare(layout, dest, "q5_0") is not None
    assert not calibration.exists()


def test_files_of_others_are_left_alone(model: Path, layout: Layout, dest: Path) -> None:
    dest.write_bytes(model.read_bytes())
    with pytest.raises(UsageError, match="exists and is no low copy made by hobbit"):
        prepare(layout, dest)
    assert dest.read_bytes() == model.read_bytes()
    for force in (False, True):
        with pytest.raises(UsageError, match="is the model itself"):
            prepare(layout, model, force=force)
        with pytest.raises(UsageError, match="is a folder; name a file"):
            prepare(layout, model.parent, force=force)
        with pytest.raises(UsageError, match="is not a regular file"):
            prepare(layout, Path(os.devnull), force=force)
    assert prepare(layout, dest, *UNGATHERED, force=True) is not None


def test_a_model_without_experts(tmp_path: Path, dest: Path) -> None:
    layout = layout_of(write_moe(tmp_path / "d.gguf", dense=True))
    with pytest.raises(ModelError, match=r"d\.gguf: has no experts that could be streamed"):
        prepare(layout, dest)


def test_progress_tells_bytes_and_time(layout: Layout, dest: Path) -> None:
    said: list[tuple[str, float, str]] = []
    make_low(layout, dest, "q4_0", progress=lambda *call: said.append(call))
    assert said[-1][1] == 1
    assert "153.0 KiB of 153.0 KiB, " in said[-1][2]
    assert said[-1][2].endswith(" MB/s, 0 s left")
    words = [low_writer._duration(seconds) for seconds in (3.4, 60, 3599, 7260)]
    assert words == ["3 s", "1 min", "1 h 0 min", "2 h 1 min"]


BIG = """
import resource, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from hobbit.prepare import make_low
from lowfiles import layout_of
layout = layout_of(Path({model!r}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
make_low(layout, Path({dest!r}), "q4_0", threads=4)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_memory_does_not_grow_with_the_experts(tmp_path: Path, dest: Path) -> None:
    """Two experts of Mixtral's shape in F16, 117 MB a matrix; the file is a header and a hole."""
    model = tmp_path / "m.gguf"
    shapes = {"gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}
    writer = gguf.GGUFWriter(model, "llama")
    writer.add_expert_count(2)
    writer.add_expert_used_count(1)
    for name, (ne0, ne1) in shapes.items():
        full = f"blk.0.ffn_{name}_exps.weight"
        nbytes = 2 * ne0 * ne1 * 2
        writer.add_tensor_info(full, (2, ne1, ne0), np.dtype(np.float16), nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(model, model.stat().st_size + 32 + 3 * 2 * 4096 * 14336 * 2)
    code = BIG.format(tests=str(Path(__file__).parent), model=str(model), dest=str(dest))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert dest.stat().st_size > 3 * 2 * 4096 * 14336 * 18 // 32
    assert int(done.stdout) < 60


# A model without a vocabulary can be told nothing, so that nothing is gathered or calibrated.
MUTE = ("--imatrix", "uniform", "--no-calibrate")


def hobbit(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hobbit", "prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command(model: Path) -> None:
    first, again = hobbit(model, *MUTE), hobbit(model, *MUTE)
    low = model.with_name("m.hobbit-low.gguf")
    assert (first.returncode, first.stdout) == (0, "")
    lines = first.stderr.splitlines()
    assert lines[1] == "making the low-precision experts"
    assert lines[-3].startswith(f"{low}: ")
    assert lines[-3].endswith(" of the experts")
    assert lines[-2].startswith("converted 153.0 KiB in ")
    assert lines[-2].endswith(" MB/s")
    assert lines[-1].startswith("squared error: down 0.")
    assert again.stderr.splitlines()[1:] == [f"{low}: is made already", lines[-1]]
    assert hobbit(model, *MUTE, "--force", "-q").stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("{model}", "--low", "q4_K_M"), 2, "--low q4_K_M: is not a type; auto, or one of f16"),
        (("{model}", "--low", "q8_0"), 2, "is q8_0 already, which takes no more space"),
        (("{model}", "-o", "{folder}"), 2, "is a folder; name a file"),
        (("{model}", "-o", "{model}"), 2, "is the model itself"),
        (("{model}", "-o", "{model}/x", *MUTE), 1, "cannot write"),
        (("{model}",), 3, "m.gguf: has no tokenizer, so that no text can be given to it"),
        (("{model}", "--imatrix", "uniform"), 3, "has no tokenizer, so that no text can be"),
        (("{model}", "--imatrix", "{model}"), 3, "is a GGUF file, but not an imatrix"),
        (("{model}", "--imatrix", "none.dat"), 3, "none.dat: cannot read it: No such file"),
        (("{model}", "-t", "513"), 2, "-t 513: must be at most 512"),
        (("{dense}",), 3, "has no experts that could be streamed"),
        (("no-such-model",), 3, "no model is called 'no-such-model'"),
        (("no-such.gguf",), 3, "no-such.gguf: no such file"),
    ],
)
def test_errors_of_the_command_are_one_line(
    arguments: tuple[str, ...], code: int, words: str, model: Path, tmp_path: Path
) -> None:
    dense = write_moe(tmp_path / "d.gguf", dense=True)
    names = {"model": model, "folder": tmp_path, "dense": dense}
    done = hobbit(*(argument.format(**names) for argument in arguments), "-q")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("hobbit: error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_leaves_what_the_next_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    model = wide_model(tmp_path / "m.gguf", monkeypatch, layers=4, experts=16)
    part = part_path(tmp_path / "m.hobbit-low.gguf")
    options = ("--low", "q4_K", "--imatrix", "none", "--no-calibrate")
    command = [sys.executable, "-m", "hobbit", "prepare", str(model), *options, "-t", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_blocks) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    lines = err.decode().splitlines()
    assert process.returncode == code, lines
    kept = f"{part} is kept: the same command goes on where this stopped"
    assert lines[-2:] == [kept, "hobbit: error: interrupted"]
    done = hobbit(model, *options)
    assert done.returncode == 0, done.stderr
    assert "of it before" in done.stderr
    layout = layout_of(model)
    whole = make_low(layout, tmp_path / "whole", "q4_K").path
    assert (tmp_path / "m.hobbit-low.gguf").read_bytes() == whole.read_bytes()


def test_an_unknown_failure_of_the_quantiser_is_an_error(
    layout: Layout, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        return int(low_writer.lib.HOBBIT_UNSUPPORTED)

    real = {name: getattr(low_writer.lib, name) for name in dir(low_writer.lib)}
    fake = SimpleNamespace(**real | {"hobbit_quantize": refuse})
    monkeypatch.setattr(low_writer, "lib", fake)
    with pytest.raises(HobbitError, match="ggml cannot convert q8_0 to q4_0"):
        make_low(layout, dest, "q4_0")


def test_rows_of_every_type_are_refused_or_converted() -> None:
    """No pair of types, and no argument, ends the process."""
    lib, ffi = low_writer.lib, low_writer.ffi
    source, out, sums = bytearray(4 * 512), bytearray(4 * 512), ffi.new("double[2]")
    ones = ffi.new("float[]", [1.0] * 512)

    def status(a: int, b: int, rows: int = 1, width: int = 512, row: object = ones) -> int:
        arguments = (ffi.from_buffer(source), b, ffi.from_buffer(out), rows, width, row)
        return int(lib.hobbit_quantize(a, *arguments, sums, sums + 1))

    for a in range(-1, 60):
        for b in range(-1, 60):
            able = lib.hobbit_can_quantize(a, b)
            assert bool(able) <= (a in GGML_TYPES and b in GGML_TYPES)
            # ggml takes seconds to make the tables of the coarsest types.
            rows = 0 if able and GGML_TYPES[b].name.startswith(("iq1", "iq2", "iq3")) else 1
            assert status(a, b, rows) == (lib.HOBBIT_OK if able else lib.HOBBIT_UNSUPPORTED)
    q4_0, q8_0, iq2_xxs = 2, 8, 16
    assert status(q8_0, q4_0, rows=0) == lib.HOBBIT_OK
    for bad in ({"rows": -1}, {"width": 0}, {"width": -32}, {"width": 33}, {"width": 1 << 40}):
        assert status(q8_0, q4_0, **bad) == lib.HOBBIT_ARG
    assert status(q8_0, iq2_xxs, row=ffi.NULL) == lib.HOBBIT_ARG
    for value in (-1.0, float("nan"), float("inf")):
        assert status(q8_0, q4_0, row=ffi.new("float[]", [1.0] * 511 + [value])) == lib.HOBBIT_ARG
