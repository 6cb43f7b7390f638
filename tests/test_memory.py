from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_layout import fake, stack

from hobbit import memory
from hobbit.errors import PlanError, UsageError
from hobbit.layout import Layout, build_layout
from hobbit.memory import (
    Cap,
    Line,
    Pool,
    SlotBytes,
    available_memory,
    plan,
    resolve_cap,
    total_memory,
)

GIB = 1 << 30
EXPERT = 3 * 8 * 16 * 4


def machine(root: Path, *, total: int = 16 * GIB, free: int = 10 * GIB) -> Path:
    write(root / "proc/meminfo", f"MemTotal: {total >> 10} kB\nMemAvailable: {free >> 10} kB\nX:\n")
    return root


def write(path: Path, text: str | int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}")


def cgroup_v2(root: Path, path: str, base: str = "/") -> Path:
    write(root / "proc/self/cgroup", f"0::{path}\n")
    mount = f"30 20 0:26 {base} /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
    write(root / "proc/self/mountinfo", "21 1 8:1 / / rw - ext4 /dev/root rw\n" + mount)
    return root / "sys/fs/cgroup"


def cgroup_v1(root: Path, path: str) -> Path:
    write(root / "proc/self/cgroup", f"5:cpu,cpuacct:/x\n4:memory:{path}\n0::/\n")
    text = "34 24 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    text += "35 24 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    write(root / "proc/self/mountinfo", text)
    return root / "sys/fs/cgroup/memory"


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    machine(tmp_path)
    assert available_memory(tmp_path) == (10 * GIB, "available on this machine")
    assert total_memory(tmp_path) == (16 * GIB, "this machine's memory")


def test_version_2_limit_of_an_ancestor(tmp_path: Path) -> None:
    mount = cgroup_v2(machine(tmp_path), "/user.slice/app")
    write(mount / "user.slice/memory.max", 4 * GIB)
    write(mount / "user.slice/memory.current", 3 * GIB)
    write(mount / "user.slice/memory.stat", f"anon 5\nactive_file {GIB}\ninactive_file {GIB}\n")
    write(mount / "user.slice/app/memory.max", "max\n")
    assert available_memory(tmp_path) == (3 * GIB, "left of the 4.0 GiB cgroup /user.slice")
    assert total_memory(tmp_path) == (4 * GIB, "the limit of cgroup /user.slice")


def test_version_2_soft_limit(tmp_path: Path) -> None:
    mount = cgroup_v2(machine(tmp_path), "/a")
    write(mount / "a/memory.max", 8 * GIB)
    write(mount / "a/memory.high", 2 * GIB)
    assert total_memory(tmp_path)[0] == 2 * GIB


def test_version_2_in_a_container(tmp_path: Path) -> None:
    mount = cgroup_v2(machine(tmp_path), "/docker/abc", base="/docker/abc")
    write(mount / "memory.max", 2 * GIB)
    write(mount / "memory.current", GIB)
    assert available_memory(tmp_path) == (GIB, "left of the 2.0 GiB cgroup /")


def test_version_1(tmp_path: Path) -> None:
    mount = cgroup_v1(machine(tmp_path), "/job/7")
    write(mount / "memory.limit_in_bytes", 2**63 - 4096)
    write(mount / "job/memory.limit_in_bytes", 5 * GIB)
    write(mount / "job/memory.usage_in_bytes", 2 * GIB)
    write(mount / "job/memory.stat", f"active_file 1\ntotal_inactive_file {GIB}\n")
    write(mount / "job/7/memory.limit_in_bytes", 6 * GIB)
    assert available_memory(tmp_path) == (4 * GIB, "left of the 5.0 GiB cgroup /job")


def test_a_cgroup_that_is_full(tmp_path: Path) -> None:
    mount = cgroup_v2(machine(tmp_path), "/a")
    write(mount / "a/memory.max", GIB)
    write(mount / "a/memory.current", 2 * GIB)
    assert available_memory(tmp_path)[0] == 0
    assert resolve_cap("auto", tmp_path).bytes == 0


def test_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_physical", lambda: 8 * GIB)
    assert available_memory(tmp_path)[0] == 4 * GIB
    assert total_memory(tmp_path)[0] == 8 * GIB


def test_this_machine() -> None:
    free, total = available_memory()[0], total_memory()[0]
    assert 0 < free <= total


def test_caps(tmp_path: Path) -> None:
    machine(tmp_path)
    assert resolve_cap("8G", tmp_path) == Cap(8 * GIB, "as asked")
    assert resolve_cap(8 * GIB, tmp_path) == Cap(8 * GIB, "as asked")
    assert resolve_cap("50%", tmp_path) == Cap(8 * GIB, "50% of this machine's memory")
    auto = resolve_cap("auto", tmp_path)
    assert auto == Cap(9 * GIB, "auto: available on this machine, less 1.0 GiB")
    assert "only 10.0 GiB is available now" in resolve_cap("12G", tmp_path).reason
    capped = resolve_cap("64G", tmp_path)
    assert capped.bytes == 16 * GIB
    assert capped.reason == "64.0 GiB asked, but this machine's memory is 16.0 GiB"


def test_headroom_has_a_minimum(tmp_path: Path) -> None:
    machine(tmp_path, free=2 * GIB)
    assert resolve_cap("auto", tmp_path).bytes == 2 * GIB - memory.MIN_HEADROOM


def test_headroom_in_a_cgroup(tmp_path: Path) -> None:
    mount = cgroup_v2(machine(tmp_path), "/a")
    write(mount / "a/memory.current", 0)
    write(mount / "a/memory.max", GIB)
    assert resolve_cap("auto", tmp_path).bytes == GIB - int(GIB * memory.HEADROOM_SHARE)
    write(mount / "a/memory.max", GIB // 4)
    assert resolve_cap("auto", tmp_path).bytes == GIB // 4 - memory.MIN_CGROUP_HEADROOM


@pytest.mark.parametrize("text", ["0", 0, -5, "-1G", "much", "0%", "101%", "x%", "nan%", "8Q"])
def test_bad_caps(text: str | int, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        resolve_cap(text, machine(tmp_path))


PARTS = [Line("dense", 1000, "read at start"), Line("kv", 500)]


@pytest.fixture
def layout() -> Layout:
    return build_layout(fake(stack(0) | stack(1)))


def make(layout: Layout, cap: int, **options: object) -> memory.MemoryPlan:
    return plan(Cap(cap, "as asked"), layout, PARTS, **options)  # type: ignore[arg-type]


def test_everything_fits(layout: Layout) -> None:
    result = make(layout, 1500 + 8 * EXPERT + 77)
    assert result.mode == "resident-experts"
    assert result.cache_bytes == 8 * EXPERT
    assert result.spare_bytes == 77
    assert result.cached_share == 1
    assert result.lines[-1] == Line("experts", 8 * EXPERT, "all 8 experts")


def test_part_fits(layout: Layout) -> None:
    result = make(layout, 1500 + 5 * EXPERT + 3)
    assert result.mode == "streamed"
    assert result.pools == (Pool(SlotBytes(EXPERT), 5, 8, 2, (0, 1)),)
    assert result.spare_bytes == 3
    assert result.floor_bytes == 1500 + 2 * EXPERT
    assert result.token_bytes == 4 * EXPERT
    assert sum(line.bytes for line in result.lines) + result.spare_bytes == result.cap.bytes
    assert result.lines[-1].reason == "5 of 8 experts (62 %)"


def test_the_floor_is_exact(layout: Layout) -> None:
    assert make(layout, 1500 + 2 * EXPERT).cache_bytes == 2 * EXPERT
    with pytest.raises(PlanError) as error:
        make(layout, 1500 + 2 * EXPERT - 1)
    assert error.value.needed_bytes == 1500 + 2 * EXPERT
    assert "the smallest cap that works is --memory 1M" in str(error.value)
    assert "dense 1000 B + kv 500 B + experts 3.0 KiB" in str(error.value)


def test_the_figure_in_the_error_works(layout: Layout) -> None:
    big = [Line("dense", 5 * GIB + 12345)]
    with pytest.raises(PlanError) as error:
        plan(Cap(GIB, "as asked"), layout, big)
    typed = str(error.value).rsplit(" ", 1)[1]
    assert plan(resolve_cap(typed), layout, big).mode == "resident-experts"


def test_cap_below_the_fixed_parts(layout: Layout) -> None:
    with pytest.raises(PlanError):
        make(layout, 10)
    with pytest.raises(PlanError):
        make(build_layout(fake({})), 10)


def test_a_dense_model() -> None:
    result = make(build_layout(fake({"a.weight": ((10,), 0)})), 2000)
    assert (result.mode, result.pools, result.cache_bytes) == ("resident", (), 0)
    assert [line.name for line in result.lines] == ["dense", "kv"]
    assert result.floor_bytes == 1500


def test_pools_by_slot_size(layout: Layout) -> None:
    result = make(layout, 1500 + 4096 * 3 + 8192 * 3, slot_bytes=[SlotBytes(4096), SlotBytes(8192)])
    small, large = result.pools
    assert (small.slot_bytes, small.groups) == ((4096, 0), (0,))
    assert (large.slot_bytes, large.groups) == ((8192, 0), (1,))
    assert (small.slots, large.slots) == (3, 3)


@pytest.mark.parametrize("sizes", [(4096, 8192), (512, 100000), (7, 7), (1, 1000)])
def test_pools_use_the_budget(layout: Layout, sizes: tuple[int, int]) -> None:
    floor, everything = 2 * sum(set(sizes)), 4 * sum(sizes)
    for budget in range(floor, everything + 1, max(1, everything // 97)):
        result = make(layout, 1500 + budget, slot_bytes=[SlotBytes(size) for size in sizes])
        assert result.cache_bytes <= budget
        for pool in result.pools:
            assert pool.floor <= pool.slots <= pool.experts
        # Nothing more could have been given.
        open_pools = [pool for pool in result.pools if pool.slots < pool.experts]
        assert all(pool.slot_bytes.high > result.spare_bytes for pool in open_pools)
    assert (
        make(layout, 1500 + everything, slot_bytes=[SlotBytes(size) for size in sizes]).mode
        == "resident-experts"
    )


def test_cache_override(layout: Layout) -> None:
    assert make(layout, GIB, cache="floor").cache_bytes == 2 * EXPERT
    assert make(layout, GIB, cache=3 * EXPERT + 5).cache_bytes == 3 * EXPERT
    assert make(layout, 1500 + 8 * EXPERT, cache=GIB).mode == "resident-experts"
    with pytest.raises(PlanError, match="below the floor"):
        make(layout, GIB, cache=EXPERT)
    with pytest.raises(PlanError, match="too small"):
        make(layout, 1500 + 3 * EXPERT, cache=4 * EXPERT)


def test_small_groups_need_fewer_slots() -> None:
    two = build_layout(
        fake(stack(0, experts=8) | stack(1, experts=2), **{"llama.expert_used_count": 4})
    )
    # 8 experts of layer 0 and 2 of layer 1 share one pool.
    assert make(two, GIB, cache="floor").pools[0].floor == 4
    apart = make(two, GIB, cache="floor", slot_bytes=[SlotBytes(100), SlotBytes(200)])
    assert [pool.floor for pool in apart.pools] == [4, 2]


def test_describe_adds_up(layout: Layout) -> None:
    result = make(layout, 1500 + 3 * EXPERT)
    text = result.describe()
    assert [line.split()[0] for line in text.splitlines()[:5]] == [
        "dense",
        "kv",
        "experts",
        "spare",
        "cap",
    ]
    assert "expect few hits" in text
    assert "expect few hits" not in make(layout, 1500 + 4 * EXPERT).describe()
    assert json.loads(json.dumps(result.to_dict()))["cache_bytes"] == 3 * EXPERT


def test_below_the_cliff(layout: Layout) -> None:
    """Less than one token uses, over all layers: 2 experts in each of 2."""
    below, above = make(layout, 1500 + 3 * EXPERT), make(layout, 1500 + 4 * EXPERT)
    assert (below.below_cliff, above.below_cliff) == (True, False)
    assert below.to_dict()["below_cliff"] is True
    assert above.to_dict()["below_cliff"] is False
    assert above.to_dict()["above_cliff_bytes"] is None
    named = below.describe().splitlines()[-1]
    assert f"--memory {below.above_cliff_bytes >> 20}M " in named
    assert below.to_dict()["above_cliff_bytes"] == below.above_cliff_bytes
    assert not make(layout, 1500 + 8 * EXPERT).below_cliff
    assert not make(build_layout(fake({"a.weight": ((10,), 0)})), 2000).below_cliff
    assert not replace(below, low_is_resident=True).below_cliff


def test_a_pool_below_the_cliff(layout: Layout) -> None:
    """All together there is room for a token, but not where its experts of layer 1 go."""
    one, other = Pool(SlotBytes(100), 4, 4, 2, (0,)), Pool(SlotBytes(100), 2, 8, 2, (1, 2))
    whole = make(layout, 1500 + 6 * EXPERT)
    assert replace(whole, pools=(one, replace(other, slots=4))).below_cliff is False
    assert replace(whole, pools=(one, other)).below_cliff


@pytest.mark.parametrize("sizes", [(4 << 20, 4 << 20), (1 << 20, 9 << 20), (7 << 20, 3 << 20)])
def test_the_cap_above_the_cliff_works(layout: Layout, sizes: tuple[int, int]) -> None:
    slots = [SlotBytes(size) for size in sizes]
    parts = [Line("dense", 100 << 20)]
    below = plan(Cap((100 << 20) + 2 * sum(set(sizes)) + 5, ""), layout, parts, slots)
    if len(set(sizes)) == 1:
        assert below.below_cliff
    cap = below.above_cliff_bytes
    grown = [*parts, Line("process", (cap - below.cap.bytes) // 400)]
    assert not plan(Cap(cap, ""), layout, grown, slots).below_cliff
