"""Logits on a device: the CPU's, to the bit on the stand-in, within a tolerance elsewhere.

`--hobbit-device CUDA0` runs it on a GPU, for all architectures: see scripts/gpu-report.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from gates import JOB, Bench, opened, run
from gpu_report import TOLERANCE
from servers import running

from hobbit.verify import VerifyRow, compare

FEW = ("qwen3moe", "gpt-oss")
BLANK = VerifyRow("floor", 0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arch" in metafunc.fixturenames:
        on_gpu = metafunc.config.getoption("--hobbit-device")
        metafunc.parametrize("arch", tiny.ARCHS if on_gpu else FEW)


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest) -> Iterator[tuple[str, float]]:
    """The device, and how far its logits may be off."""
    named = request.config.getoption("--hobbit-device")
    if named:
        yield named, TOLERANCE
        return
    with running() as server:
        yield server.device, 0.0


def test_logits(arch: str, bench: Bench, place: tuple[str, float]) -> None:
    device, tolerance = place
    there: dict[str, Any] = {"device": device, "vram": "16M", "upload": "1G"}
    there["dispatch"] = "split"
    path = bench.arch(arch)
    with opened(path, "floor", **there) as llm:
        found = run(llm)
        assert llm.stats.device_hits > 10
    row = compare(BLANK, bench.stock(path), found, JOB.n_prompt)
    assert row.within(tolerance), f"NMSE {row.nmse:.3g}, from {row.first_difference} on"
