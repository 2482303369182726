"""How a case is measured.

Ours and the peers run on the same inputs, in turns whose order alternates, so that a
machine that slows down slows both. Inputs are drawn fresh from a standard normal
distribution. On a GPU the time of a pass is the sum of its kernels' times, on a CPU the
wall clock's. What is quoted is the ratio of the times of one round.
"""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable
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
from jsparse.bench._contract import (
    CALLS,
    EVERY,
    Call,
    Contender,
    Direction,
    DoesNotFit,
    Inputs,
    Peer,
    Task,
)
from jsparse.bench._jax_peers import Ours
from jsparse.bench._patterns import BLOCK
from jsparse.bench._peers import PEERS
from jsparse.measure import BadInput, Progress
from jsparse.ops import support
from jsparse.patterns import BlockMask

Array = Any
DTYPES = ("float32", "bfloat16", "float16")

_SETS = 2  # of inputs, used in turns
_FEWER = 8  # times fewer rows are checked where every pair counts
_REASON = 500  # characters of a failure that are kept
_TIMER = "wall clock; of a compiled call, with its inputs on the device"
_KERNEL_TIMER = (
    f"CUPTI; sum of kernel times, mean of {CALLS} calls a round, with the inputs on "
    "the device; copies and memsets are not counted"
)
_WORK = {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}


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
        traced: whether the mask is an argument of our compiled call.
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
    traced: bool = False
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
    on_device = measure.peak_device_memory()
    if on_device is not None:
        record["peak_device_memory_bytes"] = on_device
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
    ours = Ours(_implementation(options, sets[0], mask), options.traced)
    kernels = record["device"]["platform"] == "gpu"
    record |= {
        "kind": "attention",
        "ours": ours.name,
        "pattern": "static" if ours.static else "traced",
        "timer": _KERNEL_TIMER if kernels else _TIMER,
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
    peers, strict = _peers(options, mask, record)
    contest = _Contest(
        record, pattern, Task(mask, sets, kernels), [ours, *peers], strict, progress
    )
    with contest:
        for direction in _directions(options, kernels):
            contest.run(direction, options.repeats)
    _judge(record, options)


def _directions(options: Options, kernels: bool) -> tuple[Direction, ...]:
    """On a GPU the backward pass is timed alone: kernels do not overlap there."""
    if not options.backward:
        return ("forward",)
    return ("forward", "backward" if kernels else "forward_backward")


def _inputs(
    seed: int, mask: BlockMask, heads: int, head_dim: int, dtype: str
) -> Inputs:
    """q, k, v and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = (mask.q_len, heads, head_dim)
    q, k, v, dout = (jax.random.normal(key, shape, jnp.dtype(dtype)) for key in keys)
    return q, k, v, dout


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


def _peers(
    options: Options, mask: BlockMask, record: dict[str, Any]
) -> tuple[list[Peer], bool]:
    """The peers that can run, and whether each of them was asked for by name."""
    strict = options.against is not None
    chosen = []
    for name in PEERS if options.against is None else options.against:
        reason = PEERS[name].available() or PEERS[name].why_not(mask)
        if reason is None:
            chosen.append(PEERS[name])
        elif strict:
            raise BadInput(f"peer {name!r} cannot run here: {reason}.")
        else:
            record["left_out"][name] = reason
    packages = {package for peer in chosen for package in peer.packages}
    for package in sorted(packages):
        version = measure.installed_version(package)
        if version is not None:
            record["versions"][package] = version
    return chosen, strict


class _Contest:
    """Contenders on one pattern; the first is ours. Close it, or use ``with``."""

    def __init__(
        self,
        record: dict[str, Any],
        pattern: Pattern,
        task: Task,
        peers: list[Peer],
        strict: bool,
        progress: Progress,
    ):
        self.record, self.pattern, self.task = record, pattern, task
        self.ours, self.strict, self.progress = peers[0], strict, progress
        self.peers = {peer.name: peer for peer in peers}
        self.rows = measure.choose_rows(pattern.mask.q_len)
        self.contenders: dict[str, Contender] = {}

    def __enter__(self) -> _Contest:
        for name, peer in list(self.peers.items()):
            entered = self._try(name, "start", lambda peer=peer: peer.enter(self.task))
            if entered is not None:
                self.contenders[name] = entered
        return self

    def __exit__(self, *_: object) -> None:
        for contender in self.contenders.values():
            contender.close()

    def run(self, direction: Direction, repeats: int) -> None:
        """Compiles, checks and times every contender; fills ``record[direction]``."""
        calls: dict[str, Call] = {}
        results = self.record[direction] = {}
        for name in list(self.contenders):
            call = self._ready(name, direction)
            if call is not None:
                calls[name] = call
        for name in list(calls):
            errors = self._errors(name, calls[name], direction)
            if errors is None:
                del calls[name]
                continue
            results[name] = {
                "computes": self.peers[name].computes,
                "compile_seconds": calls[name].compile_seconds,
                "temporary_bytes": calls[name].temporary_bytes,
                "errors": errors,
            }
        self._conclude(results, self._rounds(direction, calls, repeats), direction)

    def _rounds(
        self, direction: Direction, calls: dict[str, Call], repeats: int
    ) -> dict[str, list[float]]:
        """Times in turns whose order alternates; of contenders that did not fail."""
        count = CALLS if self.task.kernels else 1
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        title = f"{self.record['case']}: {direction.replace('_', ' + ')}"
        with self.progress.stage(title, total=repeats * len(calls)) as step:
            for n in range(repeats):
                turn = list(calls) if n % 2 == 0 else list(calls)[::-1]
                for name in turn:
                    which = n % len(self.task.sets)
                    times = self._try(
                        *(name, direction),
                        lambda name=name, which=which: calls[name].times(which, count),
                    )
                    if times is None:
                        del calls[name], seconds[name]
                    else:
                        seconds[name].append(float(np.mean(times)))
                    step()
        return seconds

    def _conclude(
        self,
        results: dict[str, Any],
        seconds: dict[str, list[float]],
        direction: Direction,
    ) -> None:
        """Fills in times, rates and ratios; drops who failed on the way."""
        for name in set(results) - set(seconds):
            del results[name]
        ours = seconds[self.ours.name]
        for name, spent in seconds.items():
            found = results[name]
            found["seconds"] = _spread(spent)
            found["rounds"] = spent
            flops = _WORK[direction] * self._flops(self.peers[name].computes)
            rate = flops / found["seconds"]["median"] / 1e9
            found["gflops_per_second"] = rate
            if spent is not ours:
                found["ratio"] = _spread(np.divide(spent, ours))
                found["ours_over_peer"] = _spread(np.divide(ours, spent))

    def _flops(self, computes: str) -> int:
        """Of the forward pass; useful ones, so what a mask throws away is none."""
        mask, shape = self.pattern.mask, self.record["input"]
        every = mask.num_q_blocks * mask.num_kv_blocks
        blocks = every if computes == EVERY else mask.num_blocks
        return measure.useful_flops(
            *(blocks, mask.block_q, mask.block_kv),
            *(shape["heads"], shape["head_dim"]),
        )

    def _ready(self, name: str, direction: Direction) -> Call | None:
        title = f"compile {name}, {direction.replace('_', ' + ')}"
        with self.progress.stage(f"{self.record['case']}: {title}"):
            return self._try(
                name, direction, lambda: self.contenders[name].ready(direction)
            )

    def _errors(
        self, name: str, call: Call, direction: Direction
    ) -> dict[str, Any] | None:
        """Errors of the output and of dq on some rows; this call also warms up."""
        rows, expected = self._expected(self.peers[name].computes)
        with self.progress.stage(f"{self.record['case']}: check {name}"):
            found = self._try(name, direction, lambda: call.rows(rows))
            if found is None:
                return None
            return {
                what: expected(what).check(value).to_dict()
                for what, value in found.items()
            }

    @functools.cache  # noqa: B019 (the contest is short-lived; contenders share these)
    def _expected(self, computes: str) -> tuple[np.ndarray, Any]:
        """Rows to look at, and what they should be; the same for many contenders."""
        rows, kv_len = self.rows, self.pattern.mask.kv_len
        if computes == EVERY:
            # Each of these rows takes as long as many of a sparse pattern.
            rows = rows[::_FEWER]
            allowed = (np.broadcast_to(np.True_, (len(rows), kv_len)),)
        else:
            allowed = self.pattern.allowed(rows)
        q, k, v, dout = map(np.asarray, self.task.sets[0])

        @functools.cache
        def expected(what: str) -> measure.ExpectedRows:
            cotangent = None if what == "out" else dout
            return measure.expect_rows(rows, q, k, v, allowed, q.dtype, dout=cotangent)

        return rows, expected

    def _try[T](self, name: str, where: str, action: Callable[[], T]) -> T | None:
        """What the action gives, or None if a peer cannot go on and is left out.

        A failure of ours is raised. So is one for want of memory of a peer that was
        asked for; any other failure of such a peer counts as missed.
        """
        if name == self.ours.name:
            try:
                return action()
            except DoesNotFit as err:
                raise self._no_room(name, where, err) from err
        try:
            return action()
        except DoesNotFit as err:
            if self.strict:
                raise self._no_room(name, where, err) from err
            reason = str(err)
        except Exception as err:  # noqa: BLE001 (other people's code; kept in the record)
            reason = " ".join(f"{type(err).__name__}: {err}".split())[:_REASON]
            if self.strict:
                self.record["missed"].append(
                    f"{self.record['case']}, {where}: {name} failed: {reason}"
                )
        self.record["left_out"][name] = f"{where}: {reason}"
        if name in self.contenders:
            self.contenders.pop(name).close()
        return None

    def _no_room(self, name: str, where: str, err: DoesNotFit) -> BadInput:
        return BadInput(
            f"{self.record['case']}: {name}, {where}: {err}. Choose a smaller case, "
            "fewer heads, --no-backward, or --against none."
        )


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
    for direction in _WORK:
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
