"""Write the data of a low-precision copy: on all cores, in little memory, to be continued.

The work is cut into units of a few rows of one expert. A unit is read, converted and written to its
place in `DEST.part` by one thread. `DEST.part.journal` lists the units that are on disk, so that a
later run of the same plan does only the others. The header is written last; then the file gets its
name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ._native import ffi, lib
from .errors import HobbitError, ModelError, ReadError, UnsupportedModelError
from .gguf_file import GGML_TYPES, Tensor
from .importance import Array, Importance
from .layout import ExpertMatrix, Layout
from .low_file import LowPlan
from .low_types import role
from .sizes import format_size

# Source bytes of a unit, unless a single row is longer. Each thread holds one and its conversion.
UNIT_BYTES = 2 << 20
# More readers than this do not make a disk faster, and they would hold too much memory.
MAX_THREADS = 128
CHECKPOINT_S = 5.0

# A stage, the share of it that is done, and more in words.
Progress = Callable[[str, float, str], None]
STAGE = "making the low-precision experts"


@dataclass(frozen=True)
class Written:
    """What was written, and how fast.

    `size` is the file's, `source_bytes` the source experts', of which `resumed_bytes` had been
    converted before. `errors` has, by role, the squared error relative to the sum of squares.
    """

    path: Path
    size: int
    source_bytes: int
    resumed_bytes: int
    seconds: float
    errors: dict[str, float]

    @property
    def mb_per_s(self) -> float:
        return (self.source_bytes - self.resumed_bytes) / 1e6 / max(self.seconds, 1e-9)


def part_path(dest: Path) -> Path:
    """Return where the copy is until it is whole."""
    return dest.with_name(f"{dest.name}.part")


def write_low(
    layout: Layout,
    plan: LowPlan,
    dest: Path,
    importance: Importance | None,
    threads: int,
    progress: Progress,
) -> Written:
    """Write the file, or what is missing of it.

    HobbitError: there is no space (caused by an OSError ENOSPC), or it cannot be written.
    ReadError or ModelError: the source cannot be read, or has weights that are no numbers.
    Whatever ends this early, also a KeyboardInterrupt, what was converted is kept.
    """
    try:
        with ExitStack() as stack:
            job = _Job(stack, layout, plan, dest, importance)
            _check_space(dest, job)
            job.run(min(threads, MAX_THREADS), progress)
            return job.finish()
    except OSError as exc:
        if isinstance(exc, HobbitError):
            raise
        raise HobbitError(f"cannot write {dest}: {exc.strerror or exc}") from exc


def _check_space(dest: Path, job: _Job) -> None:
    held = os.fstat(job.out).st_blocks * 512
    free = shutil.disk_usage(dest.parent).free
    needed = job.plan.size - held
    if needed > free:
        raise HobbitError(
            f"cannot write {dest}: {format_size(needed)} ({needed} bytes) are needed, "
            f"{format_size(free)} are free there; -o can name a file elsewhere"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Unit(NamedTuple):
    number: int
    matrix: ExpertMatrix
    tensor: Tensor
    expert: int
    row: int
    n_rows: int

    @property
    def nbytes(self) -> int:
        return self.n_rows * self.matrix.expert_bytes // self.matrix.ne1


class _Sums(NamedTuple):
    error: float
    norm: float


def _units(layout: Layout, plan: LowPlan) -> Iterator[_Unit]:
    """Cut the work, always in the same way, in the order of the source's bytes."""
    matrices = {matrix.name: matrix for group in layout.groups for matrix in group.matrices}
    index = 0
    for tensor in plan.tensors:
        matrix = matrices[tensor.name]
        step = max(UNIT_BYTES // (matrix.expert_bytes // matrix.ne1), 1)
        for expert in range(matrix.n_expert):
            for row in range(0, matrix.ne1, step):
                yield _Unit(index, matrix, tensor, expert, row, min(step, matrix.ne1 - row))
                index += 1


class _Job:
    """The files of one conversion, and what is done of it."""

    def __init__(
        self,
        stack: ExitStack,
        layout: Layout,
        plan: LowPlan,
        dest: Path,
        importance: Importance | None,
    ) -> None:
        self.plan = plan
        self.dest = dest
        self._layout = layout
        self._importance = importance
        self._done: dict[int, _Sums] = {}
        self._pending: dict[int, _Sums] = {}
        self._start = time.monotonic()
        self._resumed = 0
        self._row: tuple[str, int, Array | None] = ("", -1, None)
        dest.parent.mkdir(parents=True, exist_ok=True)
        self.out = _opened(stack, part_path(dest), os.O_RDWR | os.O_CREAT)
        if not _locked(self.out, part_path(dest)):
            raise HobbitError(f"{dest}: another hobbit is writing it")
        self._sources = [_source(stack, part.path) for part in layout.gguf.parts]
        journal = part_path(dest).with_name(f"{part_path(dest).name}.journal")
        self._journal_path = journal
        self._journal = _opened(stack, journal, os.O_RDWR | os.O_CREAT)
        self._resume()

    def _resume(self) -> None:
        """Take over what an earlier run of the same plan has done; otherwise begin anew."""
        digest = self._importance.digest() if self._importance else "none"
        first = f"{self.plan.key} {digest} {UNIT_BYTES}"
        with open(self._journal, encoding="ascii", errors="replace", closefd=False) as file:
            lines = file.read().split("\n")[:-1]
        if lines and lines[0] == first and os.fstat(self.out).st_size == self.plan.size:
            for line in lines[1:]:
                # A crash may have torn the end of the journal, but not what it wrote before.
                with suppress(ValueError):
                    index, error, norm = line.split(" ")
                    self._done[int(index)] = _Sums(float.fromhex(error), float.fromhex(norm))
            return
        os.ftruncate(self._journal, 0)
        os.ftruncate(self.out, 0)
        os.ftruncate(self.out, self.plan.size)
        _write(self._journal, f"{first}\n".encode(), 0)

    def run(self, threads: int, progress: Progress) -> None:
        """Convert what is missing."""
        total = self._layout.expert_bytes
        units = partial(_units, self._layout, self.plan)
        done = self._resumed = sum(unit.nbytes for unit in units() if unit.number in self._done)
        waiting = (unit for unit in units() if unit.number not in self._done)
        running: dict[Future[_Sums], _Unit] = {}
        pool = ThreadPoolExecutor(threads, thread_name_prefix="hobbit-prepare")
        # Converting goes on while what was converted goes to the disk.
        saver, saving, saved = ThreadPoolExecutor(1), None, time.monotonic()
        try:
            while True:
                # A few more than threads, so that none waits for this loop.
                while len(running) < 2 * threads and (unit := next(waiting, None)) is not None:
                    running[pool.submit(self._convert, unit, self._columns(unit))] = unit
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    unit = running[future]
                    self._pending[unit.number] = future.result()
                    del running[future]
                    done += unit.nbytes
                progress(STAGE, done / total, self._words(done, total))
                if time.monotonic() - saved > CHECKPOINT_S and (saving is None or saving.done()):
                    if saving is not None:
                        saving.result()
                    saving, saved = saver.submit(self._checkpoint, self._pending), time.monotonic()
                    self._pending = {}
            if saving is not None:
                saving.result()
        finally:
            pool.shutdown(cancel_futures=True)
            saver.shutdown()
            for future, unit in running.items():
                if not future.cancelled() and future.exception() is None:
                    self._pending[unit.number] = future.result()
            self._checkpoint(self._pending)

    def _words(self, done: int, total: int) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (done - self._resumed) / seconds
        left = f", {_duration((total - done) / rate)} left" if rate else ""
        return f"{format_size(done)} of {format_size(total)}, {rate / 1e6:.0f} MB/s{left}"

    def _columns(self, unit: _Unit) -> Array | None:
        """Return the weights of an expert's columns, computed once an expert."""
        name, expert = unit.matrix.name, unit.expert
        if self._importance is None:
            return None
        if self._row[:2] != (name, expert):
            row = self._importance.row(name, expert)
            self._row = name, expert, np.ones(unit.matrix.ne0, np.float32) if row is None else row
        return self._row[2]

    def _convert(self, unit: _Unit, columns: Array | None) -> _Sums:
        """Convert one unit, without Python's lock but for these few lines."""
        matrix, tensor = unit.matrix, unit.tensor
        start = matrix.offset + unit.expert * matrix.expert_bytes
        start += unit.row * (matrix.expert_bytes // matrix.ne1)
        data = _read(self._sources[matrix.part], unit.nbytes, start, self._name(matrix))
        kind = GGML_TYPES[tensor.type]
        row_bytes = matrix.ne0 // kind.block * kind.nbytes
        out = bytearray(unit.n_rows * row_bytes)
        sums = ffi.new("double[2]")
        weights = ffi.NULL if columns is None else ffi.from_buffer("float[]", columns)
        status = lib.hobbit_quantize(
            matrix.type,
            ffi.from_buffer(data),
            tensor.type,
            ffi.from_buffer(out),
            unit.n_rows,
            matrix.ne0,
            weights,
            sums,
            sums + 1,
        )
        if status != lib.HOBBIT_OK:
            raise self._failed(status, unit)
        _write(self.out, out, tensor.offset + (unit.expert * matrix.ne1 + unit.row) * row_bytes)
        return _Sums(sums[0], sums[1])

    def _failed(self, status: int, unit: _Unit) -> HobbitError:
        matrix = unit.matrix
        if status == lib.HOBBIT_FORMAT:
            return ModelError(
                f"{self._name(matrix)}: expert {unit.expert} of {matrix.name} has "
                "weights that are no numbers: the file is damaged"
            )
        if status == lib.HOBBIT_NOMEM:
            return HobbitError("not enough memory for a few rows of an expert")
        kinds = f"{GGML_TYPES[matrix.type].name} to {unit.tensor.type_name}"
        return UnsupportedModelError(f"{matrix.name}: ggml cannot convert {kinds}")

    def _name(self, matrix: ExpertMatrix) -> Path:
        return self._layout.gguf.parts[matrix.part].path

    def _checkpoint(self, converted: dict[int, _Sums]) -> None:
        """Note units whose data was written, once it is on disk."""
        if not converted:
            return
        os.fsync(self.out)
        lines = [f"{i} {s.error.hex()} {s.norm.hex()}\n" for i, s in converted.items()]
        end = os.lseek(self._journal, 0, os.SEEK_END)
        _write(self._journal, "".join(lines).encode(), end)
        self._done.update(converted)

    def finish(self) -> Written:
        """Write the header and give the file its name."""
        errors = self._errors()
        _write(self.out, self.plan.header(errors), 0)
        os.fsync(self.out)
        os.replace(part_path(self.dest), self.dest)
        folder = os.open(self.dest.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._journal_path.unlink()
        seconds = time.monotonic() - self._start
        total = self._layout.expert_bytes
        return Written(self.dest, self.plan.size, total, self._resumed, seconds, errors)

    def _errors(self) -> dict[str, float]:
        """Add up in the units' order, so that the sums do not depend on which thread was faster."""
        error: defaultdict[str, float] = defaultdict(float)
        norm: defaultdict[str, float] = defaultdict(float)
        for unit in _units(self._layout, self.plan):
            sums = self._done[unit.number]
            error[role(unit.matrix)] += sums.error
            norm[role(unit.matrix)] += sums.norm
        return {name: error[name] / norm[name] if norm[name] else 0.0 for name in sorted(error)}


def _opened(stack: ExitStack, path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    stack.callback(os.close, descriptor)
    return descriptor


def _locked(descriptor: int, path: Path) -> bool:
    """Lock a file until it is closed, unless another has, or has given it another name by now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


def _source(stack: ExitStack, path: Path) -> int:
    try:
        return _opened(stack, path, os.O_RDONLY)
    except OSError as exc:
        raise ReadError(f"{path}: cannot open it: {exc.strerror}") from exc


def _read(descriptor: int, length: int, offset: int, path: Path) -> bytes:
    pieces: list[bytes] = []
    while length:
        try:
            piece = os.pread(descriptor, length, offset)
        except OSError as exc:
            raise ReadError(f"{path}: cannot read at byte {offset}: {exc.strerror}") from exc
        if not piece:
            raise ReadError(f"{path}: ends before byte {offset + length}; it was longer before")
        pieces.append(piece)
        length -= len(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _write(descriptor: int, data: bytes | bytearray, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
