"""How the building of a mask is measured, on the host and on the device.

Called by ``_runner.py``, which also judges the times.
"""

from __future__ import annotations

import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from jsparse import measure, patterns
from jsparse.bench._cases import CUTOFF, DeviceMaskCase, HostMaskCase
from jsparse.bench._contest import spread
from jsparse.bench._patterns import BLOCK
from jsparse.measure import Progress
from jsparse.patterns import BlockMask

Array = Any


def build_on_host(
    case: HostMaskCase, repeats: int, progress: Progress, record: dict[str, Any]
) -> None:
    """Times `order` and `radius`, the latter in each order that was tried."""
    with progress.stage(f"{case.name}: read"):
        coords = case.coords()
    sizes = {"block_q": BLOCK, "block_kv": BLOCK}
    spent: dict[str, list[float]] = {"order": [], "radius": [], "radius_file_order": []}
    with progress.stage(f"{case.name}: build", total=repeats) as step:
        for _ in range(repeats):
            start = time.perf_counter()
            ordering = patterns.order(coords, CUTOFF, method=case.order, **sizes)
            spent["order"].append(time.perf_counter() - start)
            placed = ordering.apply(coords)
            for name, points in (("radius", placed), ("radius_file_order", coords)):
                start = time.perf_counter()
                built = patterns.radius(points, CUTOFF, **sizes)
                spent[name].append(time.perf_counter() - start)
                if name == "radius":
                    mask = built
            step()
    record |= {
        "kind": "mask on the host",
        "cutoff": CUTOFF,
        "mask": mask.summary() | {"order": ordering.method},
        "orders": ordering.table(),
        "seconds": {name: spread(values) for name, values in spent.items()},
    }


def build_on_device(
    case: DeviceMaskCase, repeats: int, progress: Progress, record: dict[str, Any]
) -> None:
    """Times `patterns.device.radius` under ``jit``; capacity is taken from the host."""
    with progress.stage(f"{case.name}: order"):
        coords = case.coords()
        sizes = {"block_q": BLOCK, "block_kv": BLOCK}
        ordering = patterns.order(coords, CUTOFF, method=case.order, **sizes)
        placed = ordering.apply(coords)
        host = patterns.radius(placed, CUTOFF, **sizes)
    capacity = -(-host.summary()["row_max"] // 8) * 8

    def build(points: Array) -> BlockMask:
        return patterns.device.radius(points, CUTOFF, capacity=capacity, **sizes)

    points = jnp.asarray(placed)
    with progress.stage(f"{case.name}: compile"):
        compiled = measure.compile_call(build, points)
        _, mask = measure.time_call(compiled.call, points)
        mask.check()
    seconds = []
    with progress.stage(f"{case.name}: build", total=repeats) as step:
        for _ in range(repeats):
            seconds.append(measure.time_call(compiled.call, points)[0])
            step()
    wrong = _different_blocks(mask, host, placed)
    record |= {
        "kind": "mask on the device",
        "cutoff": CUTOFF,
        "mask": mask.summary() | {"order": ordering.method},
        "capacity": capacity,
        "wrong_blocks": wrong,
        "compile_seconds": compiled.seconds,
        "temporary_bytes": compiled.temporary_bytes,
        "seconds": {"radius": spread(seconds)},
    }
    if wrong:
        record["missed"].append(
            f"{record['case']}: {wrong} blocks differ from the mask of the host."
        )


def _different_blocks(mask: BlockMask, host: BlockMask, coords: np.ndarray) -> int:
    """Blocks that only one of two masks lists, but for those at the very cut-off.

    Both list a block whose closest atoms lie at the cut-off to within rounding, or not.
    """
    differ = (mask.block_states() != 0) != (host.block_states() != 0)
    count = 0
    for row, column in np.argwhere(differ[0, 0]):
        a = coords[row * BLOCK : (row + 1) * BLOCK].astype(np.float64)
        b = coords[column * BLOCK : (column + 1) * BLOCK].astype(np.float64)
        closest = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1).min())
        count += abs(closest - CUTOFF) > 1e-4
    return int(count)
