"""How fast a device is at experts: as given, as earlier runs with it measured, or as assumed."""

from __future__ import annotations

from ..arena import DeviceInfo
from ..cpus import cpu_name
from ..folders import recall, remember
from .estimate import DeviceCosts

FILE = "devices.json"
# Of a graphics card: what the memory of slow ones gives, and for each layer the way there, the
# start and the way back.
ASSUMED_BYTES_S, ASSUMED_BATCH_S = 200e9, 1e-4
# Of fewer pairs the speed says little.
MIN_PAIRS = 500
_KEPT = 50


def costs_of(device: DeviceInfo, processor: float, given_gbps: float | None = None) -> DeviceCosts:
    """Return what a device takes; `given_gbps` is in 10^9 bytes of weights a second.

    One that reads the machine's own memory is assumed to be as fast as the processor is, whose rate
    is given in bytes a second.
    """
    if given_gbps is not None:
        return DeviceCosts(given_gbps * 1e9, ASSUMED_BATCH_S, "given")
    rate = recall(FILE).get(_key(device))
    if isinstance(rate, int | float) and 0 < rate < float("inf"):
        return DeviceCosts(float(rate), 0.0, "measured")
    rate = processor if device.shares_memory else ASSUMED_BYTES_S
    return DeviceCosts(rate, ASSUMED_BATCH_S, "assumed")


def learn(device: DeviceInfo, pair_bytes: float, pairs: int, seconds: float) -> bool:
    """Remember how fast a device was for the pairs of single tokens; False if nothing is kept."""
    if pairs < MIN_PAIRS or seconds <= 0:
        return False
    rates = recall(FILE)
    rates.pop(_key(device), None)  # to the end: those that were not used longest go
    rates = dict([*rates.items()][1 - _KEPT :])
    return remember(FILE, rates | {_key(device): pair_bytes * pairs / seconds})


def _key(device: DeviceInfo) -> str:
    return f"{cpu_name()} {device.name} {device.description}"
