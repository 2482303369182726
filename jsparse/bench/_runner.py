"""How a case is measured.

Ours and the peers run in one process on the same inputs, in turns whose order
alternates, so that a machine that slows down slows both. Inputs are drawn fresh from a
standard normal distribution. What is quoted is the ratio of the times of one round.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse import measure, patterns
from jsparse._job import check_channels, check_inputs
from jsparse.backends import IMPLEMENTATIONS
from jsparse.bench._cases import (
    CUTOFF,
    AttentionCase,
    Case,
    DeviceMaskCase,
    HostMaskCase,
    Pattern,
)
from jsparse.bench._patterns import BLOCK
from jsparse.bench._peers import PEERS, Ours, Peer
from jsparse.measure import BadInput, Progress
from jsparse.ops import support
from jsparse.patterns import BlockMask
from jsparse.report import format_bytes

Array = Any
DTYPES = ("float32", "bfloat16", "float16")

_SETS = 2  # of inputs, used in turns
_TIMER = "wall clock; of a compiled call, with its inputs on the device"


@dataclass(frozen=True)
class Options:
    """What to run, and what to demand.

    Attributes:
        against: names of peers; None for all that are available and fit in memory.
        backward: whether to measure forward + backward.
        repeats: timed rounds.
        heads: in place of the case's own.
        head_dim: in place of the case's own.
        dtype: in place of the case's own.
        implementation: ours, or ``"auto"``.
        min_ratio: a peer's time / ours must be at least this.
        max_seconds: our median time must be at most this.

    Raises:
        BadInput: for a value that makes no sense.
    """

    against: tuple[str, ...] | None = None
    backward: bool = True
    repeats: int = 5
    heads: int | None = None
    head_dim: int | None = None
    dtype: str | None = None
    implementation: str = "auto"
    min_ratio: float | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if self.against == ("none",):
            object.__setattr__(self, "against", ())
        for name in self.against or ():
            if name not in PEERS:
                raise BadInput(
                    f"unknown peer {name!r}; expected {', '.join(PEERS)} or none."
                )
        for name in ("repeats", "heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} is {value}; expected at least 1.")
        for name in ("min_ratio", "max_seconds"):
            value = getattr(self, name)
            # A NaN would pass every comparison, and so every demand.
            if value is not None and not value > 0:
                raise BadInput(f"{name} is {value}; expected a number above 0.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise BadInput(
                f"dtype {self.dtype!r} is unknown; expected {', '.join(DTYPES)}."
            )
        if self.implementation not in ("auto", *IMPLEMENTATIONS):
            raise BadInput(
                f"implementation {self.implementation!r} is unknown; expected auto, "
                f"{', '.join(IMPLEMENTATIONS)}."
            )


def run_case(case: Case, options: Options, progress: Progress) -> dict[str, Any]:
    """Measures one case.

    Args:
        case: what to measure.
        options: how, and what to demand.
        progress: told about each stage.

    Returns:
        A record: plain data. ``missed`` lists what was wrong or not reached.

    Raises:
        BadInput: if it does not fit in memory, or the implementation refuses it.

    Example:
        >>> from jsparse.bench._cases import AttentionCase, of_blocks
        >>> from jsparse.bench._patterns import uniform
        >>> case = AttentionCase(
        ...     "tiny", "an example", 2, 16, "float32", lambda: of_blocks(uniform(4, 2))
        ... )
        >>> record = run_case(case, Options(repeats=1, backward=False), Progress())
        >>> record["mask"]["blocks"], list(record["forward"])
        (8, ['xla', 'dense'])
    """
    record: dict[str, Any] = {
        "format": 1,
        "case": case.name,
        "about": case.about,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": measure.machine(),
        "versions": measure.versions(),
        "commit": measure.git_commit(Path(__file__).parent),
        "timer": _TIMER,
        "missed": [],
    }
    measure.reset_peak_memory()
    if isinstance(case, AttentionCase):
        _run_attention(case, options, progress, record)
    elif isinstance(case, HostMaskCase):
        _run_host_mask(case, options, progress, record)
    else:
        _run_device_mask(case, options, progress, record)
    record["peak_memory_bytes"] = measure.peak_memory()
    return record


# ----------------------------------------------------------------------- attention


def _run_attention(
    case: AttentionCase, options: Options, progress: Progress, record: dict[str, Any]
) -> None:
    heads = options.heads or case.heads
    head_dim = options.head_dim or case.head_dim
    dtype = options.dtype or case.dtype
    if (heads, head_dim, dtype) != (case.heads, case.head_dim, case.dtype):
        record["case"] = f"{case.name}-h{heads}-d{head_dim}-{dtype}"
    check_channels(heads, head_dim)
    with progress.stage(f"{case.name}: pattern"):
        pattern = case.load()
    mask = pattern.mask
    size = jnp.dtype(dtype).itemsize
    check_inputs(4 * _SETS, mask.q_len, heads, head_dim, size)
    sets = [_inputs(seed, mask, heads, head_dim, dtype) for seed in range(_SETS)]
    ours = Ours(_implementation(options, sets[0], mask))
    record |= {
        "kind": "attention",
        "ours": ours.name,
        "mask": mask.summary() | {"order": pattern.order},
        "input": {
            "distribution": "standard normal",
            "seeds": list(range(_SETS)),
            "heads": heads,
            "head_dim": head_dim,
            "dtype": dtype,
        },
        "left_out": {},
    }
    peers, strict = _peers(options, record)
    contest = _Contest(record, pattern, sets, [ours, *peers], strict, progress)
    flops = measure.useful_flops(mask.num_blocks, BLOCK, BLOCK, heads, head_dim)
    contest.run("forward", options.repeats, flops)
    if options.backward:
        contest.run("forward_backward", options.repeats, 3.5 * flops)
    _judge(record, options)


def _inputs(
    seed: int, mask: BlockMask, heads: int, head_dim: int, dtype: str
) -> tuple[Array, ...]:
    """q, k, v and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = (mask.q_len, heads, head_dim)
    return tuple(jax.random.normal(key, shape, jnp.dtype(dtype)) for key in keys)


def _implementation(options: Options, arrays: Any, mask: BlockMask) -> str:
    q, k, v, _ = arrays
    why_not = support(q, k, v, mask)
    able = [name for name, reason in why_not.items() if reason is None]
    name = able[0] if options.implementation == "auto" else options.implementation
    if why_not[name] is not None:
        raise BadInput(
            f"implementation {name!r} cannot run this: {why_not[name]}. These can: "
            f"{', '.join(able)}."
        )
    return name


def _peers(options: Options, record: dict[str, Any]) -> tuple[list[Peer], bool]:
    """The peers that can run, and whether each of them was asked for by name."""
    strict = options.against is not None
    chosen = []
    for name in PEERS if options.against is None else options.against:
        reason = PEERS[name].available()
        if reason is None:
            chosen.append(PEERS[name])
        elif strict:
            raise BadInput(f"peer {name!r} cannot run here: {reason}.")
        else:
            record["left_out"][name] = reason
    return chosen, strict


class _Contest:
    """Contenders on one pattern; the first is ours."""

    def __init__(
        self,
        record: dict[str, Any],
        pattern: Pattern,
        sets: Sequence[tuple[Array, ...]],
        contenders: list[Peer],
        strict: bool,
        progress: Progress,
    ):
        self.record, self.pattern, self.sets = record, pattern, sets
        self.contenders, self.strict, self.progress = contenders, strict, progress
        self.rows = measure.choose_rows(pattern.mask.q_len)
        self.allowed = pattern.allowed(self.rows)
        self.prepared: dict[str, Any] = {}

    def run(self, direction: str, repeats: int, flops: float) -> None:
        """Compiles, checks and times every contender; fills ``record[direction]``."""
        calls = {}
        for peer in list(self.contenders):
            compiled = self._compile(peer, direction)
            if compiled is not None:
                calls[peer.name] = compiled
        results = self.record[direction] = {}
        for name, compiled in calls.items():
            results[name] = {
                "compile_seconds": compiled.seconds,
                "temporary_bytes": compiled.temporary_bytes,
                "errors": self._errors(name, compiled, direction),
            }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        title = f"{self.record['case']}: {direction.replace('_', ' + ')}"
        with self.progress.stage(title, total=repeats * len(calls)) as step:
            for n in range(repeats):
                turn = list(calls) if n % 2 == 0 else list(calls)[::-1]
                for name in turn:
                    arguments = self._arguments(name, direction, n % len(self.sets))
                    spent, _ = measure.time_call(calls[name].call, *arguments)
                    seconds[name].append(spent)
                    step()
        ours = seconds[self.contenders[0].name]
        for name, spent in seconds.items():
            results[name]["seconds"] = _spread(spent)
            results[name]["rounds"] = spent
            if spent is ours:
                rate = flops / results[name]["seconds"]["median"] / 1e9
                results[name]["gflops_per_second"] = rate
            else:
                results[name]["ratio"] = _spread(np.divide(spent, ours))

    def _compile(self, peer: Peer, direction: str) -> measure.Compiled | None:
        """Compiles from shapes alone; None if a peer nobody named needs too much."""
        q, k, v, dout = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.sets[0])
        shapes = (q, k, v, peer.describe(self.pattern.mask))
        title = f"compile {peer.name}, {direction.replace('_', ' + ')}"
        with self.progress.stage(f"{self.record['case']}: {title}"):
            if direction == "forward":
                compiled = measure.compile_call(peer.forward, *shapes)
            else:
                compiled = measure.compile_call(peer.backward, *shapes, dout)
        needed, free = compiled.total_bytes, measure.available_memory()
        if peer.name not in self.prepared:
            # The pattern exists on the host and on the device for a moment.
            needed += compiled.total_bytes - compiled.temporary_bytes
        if free is not None and needed > free:
            reason = f"needs {format_bytes(needed)}, {format_bytes(free)} are free"
            if peer is self.contenders[0] or self.strict:
                raise BadInput(
                    f"{self.record['case']}: {peer.name}, {direction}: {reason}. "
                    "Choose a smaller case, fewer heads, --no-backward, or "
                    "--against none."
                )
            self.record["left_out"][peer.name] = f"{direction}: {reason}"
            self.contenders.remove(peer)
            return None
        if peer.name not in self.prepared:
            self.prepared[peer.name] = peer.prepare(self.pattern.mask)
        return compiled

    def _arguments(self, name: str, direction: str, n: int) -> tuple[Any, ...]:
        q, k, v, dout = self.sets[n]
        pattern = self.prepared[name]
        return (q, k, v, pattern, *(() if direction == "forward" else (dout,)))

    def _errors(
        self, name: str, compiled: measure.Compiled, direction: str
    ) -> dict[str, Any]:
        """Errors of the output and of dq on some rows; this call also warms up."""
        title = f"{self.record['case']}: check {name}"
        with self.progress.stage(title):
            arguments = self._arguments(name, direction, 0)
            _, result = measure.time_call(compiled.call, *arguments)
            q, k, v, dout = self.sets[0]
            if direction == "forward":
                values = {"out": (result, None)}
            else:
                values = {"out": (result[0], None), "dq": (result[1], dout)}
            return {
                what: measure.check_rows(
                    value, self.rows, q, k, v, self.allowed, dout=cotangent
                ).to_dict()
                for what, (value, cotangent) in values.items()
            }


def _spread(values: Any) -> dict[str, float]:
    x = np.asarray(values, np.float64)
    return {
        "count": len(x),
        "min": float(x.min()),
        "median": float(np.median(x)),
        "max": float(x.max()),
    }


def _judge(record: dict[str, Any], options: Options) -> None:
    """Lists what is wrong or was not reached."""
    record["demanded"] = {
        "min_ratio": options.min_ratio,
        "max_seconds": options.max_seconds,
    }
    for direction in ("forward", "forward_backward"):
        for name, found in record.get(direction, {}).items():
            where = f"{record['case']}, {direction}, {name}"
            for what, check in found["errors"].items():
                if name == record["ours"] and not check["ok"]:
                    record["missed"].append(
                        f"{where}: {what} is wrong: error {check['max_error']:.1e}, at "
                        f"most {check['tolerance']:.1e} is rounding."
                    )
            ratio = found.get("ratio")
            least = options.min_ratio
            if ratio and least is not None and ratio["median"] < least:
                record["missed"].append(
                    f"{where}: its time / ours is {ratio['median']:.2f}, less than the "
                    f"{least:g} demanded."
                )
    if options.min_ratio is not None and len(record["forward"]) < 2:
        record["missed"].append(
            f"{record['case']}: no peer ran, so no ratio of {options.min_ratio:g} was "
            "shown."
        )
    median = record["forward"][record["ours"]]["seconds"]["median"]
    _judge_seconds(record, options, median)


def _judge_seconds(record: dict[str, Any], options: Options, median: float) -> None:
    most = options.max_seconds
    if most is not None and median > most:
        record["missed"].append(
            f"{record['case']}: {median:.3g} s, more than the {most:g} s demanded."
        )


# --------------------------------------------------------------------------- masks


def _run_host_mask(
    case: HostMaskCase, options: Options, progress: Progress, record: dict[str, Any]
) -> None:
    """Times `order` and `radius`, the latter in each order that was tried."""
    with progress.stage(f"{case.name}: read"):
        coords = case.coords()
    sizes = {"block_q": BLOCK, "block_kv": BLOCK}
    spent: dict[str, list[float]] = {"order": [], "radius": [], "radius_file_order": []}
    with progress.stage(f"{case.name}: build", total=options.repeats) as step:
        for _ in range(options.repeats):
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
        "seconds": {name: _spread(values) for name, values in spent.items()},
    }
    record["demanded"] = {"max_seconds": options.max_seconds}
    _judge_seconds(record, options, record["seconds"]["radius"]["median"])


def _run_device_mask(
    case: DeviceMaskCase, options: Options, progress: Progress, record: dict[str, Any]
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
    with progress.stage(f"{case.name}: build", total=options.repeats) as step:
        for _ in range(options.repeats):
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
        "seconds": {"radius": _spread(seconds)},
    }
    if wrong:
        record["missed"].append(
            f"{record['case']}: {wrong} blocks differ from the mask of the host."
        )
    record["demanded"] = {"max_seconds": options.max_seconds}
    _judge_seconds(record, options, record["seconds"]["radius"]["median"])


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
