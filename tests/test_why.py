"""`hobbit why`: each cause is told by its share, with something to do and what it would bring."""

from __future__ import annotations

from typing import Any

import pytest

from hobbit.planning.why import Cause, explain
from hobbit.stats import Stats

GIB = 1 << 30


def record(decode: Stats | None = None, run: Stats | None = None, **more: Any) -> dict[str, Any]:
    """Return what a run of 100 tokens leaves: half of the time it waited."""
    decode = decode or Stats(
        tokens_generated=100,
        decode_s=20.0,
        stall_s=10.0,
        moe_s=6.0,
        predict_s=0.2,
        manage_s=0.1,
        hits=600,
        misses=400,
        evictions=350,
        read_bytes=20 * GIB,
        predictor="none",
    )
    run = run or Stats(tokens_prompt=50, prompt_s=2.0, io="direct")
    plan = {
        "mode": "streamed",
        "cap_bytes": 4 * GIB,
        "spare_bytes": 0,
        "cache_bytes": 3 * GIB,
        "below_cliff": False,
        "above_cliff_bytes": None,
    } | more.pop("plan", {})
    values: dict[str, Any] = {
        "model": "m.gguf",
        "quality": "exact",
        "exact": True,
        "lossy_read": None,
        "threads": 4,
        "cores": 4,
        "n_ubatch": 512,
        "machine_bytes": 32 * GIB,
        "token_bytes": GIB // 2,
        "cached_share": 0.3,
        "expert_bytes": 10 * GIB,
        "plan": plan,
        "run": run.to_dict(),
        "decode": decode.to_dict(),
        "predicted": {"tok_s": [4.0, 5.0, 6.0]},
        "swapped_bytes": 0,
        "huge_pages": "madvise",
        "load": 4.0,
    }
    return values | more


def cause(name: str, *arguments: Any, **more: Any) -> Cause:
    found = explain(record(*arguments, **more))
    return next(cause for cause in found.causes if cause.name == name)


def test_the_causes_are_all_of_the_time_and_the_largest_comes_first() -> None:
    found = explain(record())
    assert len(found.causes) == 5
    assert sum(cause.share for cause in found.causes) == pytest.approx(1.0)
    shares = [cause.share for cause in found.causes]
    assert shares == sorted(shares, reverse=True)
    assert len(found.lines()) == 1 + 5 + len(found.notes)
    assert found.lines()[0] == "m.gguf: 5.00 tok/s"
    assert found.lines()[1].startswith(" 45 % - waited for the disk: 204.8 MiB a token, 60 % hits")


def test_more_memory_reads_less() -> None:
    disk = cause("disk")
    assert disk.action == "--memory 6144M"
    assert disk.tok_s is not None
    assert 5.0 < disk.tok_s < 10.0  # never faster than without waiting
    assert f"about {disk.tok_s:.1f} tok/s" in disk.gain
    assert "hobbit prepare m.gguf" in disk.gain


def test_no_more_memory_is_named_than_there_is() -> None:
    assert cause("disk", machine_bytes=6 * GIB).action == f"--memory {int(5.4 * 1024)}M"
    none = cause("disk", machine_bytes=4 * GIB, exact=False)
    assert none.action.startswith("a faster disk")
    lossy = cause("disk", machine_bytes=4 * GIB, lossy_read={"balanced": 0.1})
    assert lossy.action.startswith("-Q balanced (")


def test_past_what_holds_everything_nothing_is_asked_for() -> None:
    disk = cause("disk", expert_bytes=int(3.2 * GIB))
    assert 4096 < int(disk.action.removeprefix("--memory ").removesuffix("M")) < 4400


def test_the_cliff_comes_first() -> None:
    plan = {"below_cliff": True, "above_cliff_bytes": 7 * GIB}
    assert cause("disk", plan=plan).action == "--memory 7168M"
    assert any("below the cliff" in note for note in explain(record(plan=plan)).notes)


def test_more_threads_compute_faster() -> None:
    compute = cause("compute", threads=2)
    assert compute.action == "-t 4"
    assert compute.tok_s is not None
    assert 5.0 < compute.tok_s < 10.0
    assert cause("compute").action.startswith("nothing")
    assert cause("compute", threads=8).action.startswith("-t 4")


def test_a_long_prompt_is_read_in_fewer_rounds() -> None:
    long = Stats(tokens_prompt=1500, prompt_s=60.0)
    prompt = cause("prompt", run=long)
    assert prompt.share == pytest.approx(0.75)
    assert prompt.action == "-ub 2048"
    assert "3 times" in prompt.gain
    assert cause("prompt", run=long, n_ubatch=2048).action.startswith("nothing")


def test_prediction_in_vain_is_turned_off() -> None:
    wasteful = Stats(
        tokens_generated=100,
        decode_s=20.0,
        predict_s=4.0,
        predictor="gate",
        ahead_bytes=100,
        ahead_wasted_bytes=80,
        read_bytes=1,
    )
    found = cause("prediction", wasteful)
    assert found.action == "--predictor none"
    assert found.tok_s is not None
    assert found.tok_s > 5.0
    assert cause("prediction").action == "nothing to do"


def test_what_is_wrong_with_the_machine_is_noted() -> None:
    assert explain(record()).notes == ("4.0-6.0 tok/s were predicted",)
    cold = Stats(tokens_generated=10, decode_s=1.0, misses=50, evictions=10, read_bytes=1)
    assert "80 % of the misses only filled" in explain(record(cold)).notes[0]
    buffered = Stats(tokens_prompt=50, prompt_s=2.0, io="buffered")
    more = {"swapped_bytes": 5 << 20, "huge_pages": "never", "predicted": None, "load": 9.0}
    notes = " ".join(explain(record(run=buffered, **more)).notes)
    for words in ("direct reads", "5.0 MiB of the process", "huge pages", "compete", "hobbit plan"):
        assert words in notes


def test_a_model_in_memory_and_a_run_without_tokens_are_explained() -> None:
    resident = explain(record(Stats(tokens_generated=10, decode_s=1.0), plan={"mode": "resident"}))
    assert resident.causes[0].name == "prompt"
    nothing = explain(record(Stats(), Stats()))
    assert all(cause.share == 0 for cause in nothing.causes)


def test_what_no_run_left_is_refused() -> None:
    for damaged in ({}, {"run": 1}, record() | {"decode": None}):
        with pytest.raises((KeyError, TypeError, AttributeError)):
            explain(damaged)


def with_device(**counted: Any) -> dict[str, Any]:
    decode = Stats(
        tokens_generated=100, decode_s=20.0, moe_s=4.0, hits=900, misses=100, evictions=100,
        device_hits=600, pairs_high=1000, **counted,
    )  # fmt: skip
    return record(decode, device={"name": "GPU0", "bytes": 4 * GIB})


def device_cause(values: dict[str, Any]) -> Cause:
    return next(cause for cause in explain(values).causes if cause.name == "device")


def test_a_device_that_is_waited_for() -> None:
    """4 s for 400 pairs here, 12 s for 600 there: with 333 of them there both would take 6.7 s."""
    found = device_cause(with_device(device_pairs=600, device_s=12.0, device_wait_s=8.0))
    assert found.share == pytest.approx(8 / 22)
    assert found.cause == "waited for GPU0, which computed 60 % of the experts"
    assert found.action == "--vram 2275M, so that both end at the same time"
    # Of 12 s with the experts 6.67 s are left.
    assert found.tok_s == pytest.approx(100 / (20 - 12 + 20 / 3), rel=1e-3)
    notes = explain(with_device(device_pairs=600, device_s=12.0, device_wait_s=8.0)).notes
    assert (
        "60 % of what was asked for was on GPU0, which had nothing to do for 40 % of the time"
        in notes
    )


def test_a_device_that_has_to_compute_so_much() -> None:
    counted = {"device_s": 12.0, "device_wait_s": 8.0}
    found = device_cause(with_device(device_pairs=600, **counted) | {"dispatch": "split"})
    assert found.cause.endswith("60 % of the experts by --dispatch split")
    assert found.action == "--dispatch auto, so that both end at the same time"
    assert found.tok_s == pytest.approx(100 / (20 - 12 + 20 / 3), rel=1e-3)
    found = device_cause(with_device(device_pairs=1000, **counted) | {"dispatch": "device"})
    assert (found.action, found.gain) == ("--dispatch auto", "")
    found = device_cause(with_device(device_pairs=600, **counted) | {"dispatch": "auto"})
    assert found.action.startswith("--vram")
    idle = with_device(device_pairs=600, device_s=2.0, device_wait_s=0.1)
    assert device_cause(idle | {"dispatch": "split"}).action == "nothing to do"


def test_a_device_that_is_not_waited_for() -> None:
    found = device_cause(with_device(device_pairs=600, device_s=2.0, device_wait_s=0.1))
    assert (found.action, found.gain) == ("nothing to do", "")
    assert all(cause.name != "device" for cause in explain(record()).causes)
    computed = next(
        cause
        for cause in explain(with_device(device_pairs=600, device_s=12.0, device_wait_s=8.0)).causes
        if cause.name == "compute"
    )
    assert computed.share == pytest.approx(12 / 22)  # what was waited is not computing
