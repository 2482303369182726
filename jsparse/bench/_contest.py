"""Contenders on one pattern and the same inputs: compiled, checked, timed in turns.

The order of turns alternates, so that a machine that slows down slows all. Rows of the
results are compared with the formula once for all that compute the same. Called by
``_runner.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jsparse import measure
from jsparse.bench._contract import (
    CALLS,
    EVERY,
    LONGEST_TURN,
    UNBIASED,
    Call,
    Contender,
    Direction,
    DoesNotFit,
    NoSuchPass,
    Peer,
    Task,
)
from jsparse.bench._kinds import Pattern
from jsparse.bench._records import wrong
from jsparse.measure import BadInput, Progress, Turns

WORK = {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}
"""Operations of a pass over those of the forward pass."""

_ELEMENTS = 1 << 21  # rows x keys x heads written out in NumPy: a second or two
_ROWS = (8, 256)  # fewest and most that are checked, in every head
_REASON = 500  # characters of a failure that are kept


class Contest:
    """Contenders on one pattern; the first is ours. Close it, or use ``with``."""

    def __init__(
        self,
        record: dict[str, Any],
        pattern: Pattern,
        task: Task,
        peers: list[Peer],
        strict: bool,
        progress: Progress,
        turns: Turns,
    ):
        self.record, self.pattern, self.task = record, pattern, task
        self.ours, self.strict = peers[0], strict
        self.progress, self.turns = progress, turns
        self.peers = {peer.name: peer for peer in peers}
        self.contenders: dict[str, Contender] = {}

    def __enter__(self) -> Contest:
        for name, peer in list(self.peers.items()):
            entered = self._try(name, "start", functools.partial(peer.enter, self.task))
            if entered is not None:
                self.contenders[name] = entered
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.contenders):
            self._close(name)

    def compare(self, direction: Direction, repeats: int, kernels: bool) -> None:
        """Times all in turns; fills ``record[direction]`` with times and ratios.

        Args:
            direction: the pass.
            repeats: rounds.
            kernels: whether the sum of kernel times counts, or the wall clock.
        """
        calls, results = self._begin(direction)
        with self.turns.alone(), measure.ClockWatch() as watch:
            seconds = self._rounds(direction, calls, repeats, kernels, watch)
        for name, found in results.items():
            found["clock"] = watch.found(name)
        self._conclude(results, seconds, direction)

    def spread_out(self, direction: Direction, count: int, kernels: bool) -> None:
        """Times many calls of each; fills ``record[direction]`` with percentiles.

        ``wall`` is what a caller waits, ``kernels`` (on a GPU) what the device works.
        """
        calls, results = self._begin(direction)
        timers = {"wall": False, **({"kernels": True} if kernels else {})}
        title = f"{self.record['case']}: {count} calls, {direction}"
        steps = len(calls) * len(timers)
        with self.turns.alone(), self.progress.stage(title, total=steps) as step:
            for name in list(calls):
                for timer, of_kernels in timers.items():
                    times = self._try(
                        *(name, direction),
                        functools.partial(calls[name].times, 0, count, of_kernels),
                    )
                    step()
                    if times is None:
                        del results[name]
                        break
                    found = results[name]
                    found[timer] = measure.percentiles(times)
                    found["gflops_per_second"] = self._rate(
                        direction, name, found[timer]["p50"]
                    )

    def _begin(self, direction: Direction) -> tuple[dict[str, Call], dict[str, Any]]:
        """Compiles and checks every contender."""
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
        return calls, results

    def _rounds(
        self,
        direction: Direction,
        calls: dict[str, Call],
        repeats: int,
        kernels: bool,
        watch: measure.ClockWatch,
    ) -> dict[str, list[float]]:
        """Times in turns whose order alternates; of contenders that did not fail."""
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        title = f"{self.record['case']}: {direction.replace('_', ' + ')}"
        with self.progress.stage(title, total=repeats * len(calls)) as step:
            for n in range(repeats):
                turn = list(calls) if n % 2 == 0 else list(calls)[::-1]
                which = n % len(self.task.sets)
                for name in [name for name in turn if name in calls]:
                    with watch.turn(name):
                        times = self._try(
                            *(name, direction),
                            functools.partial(_turn, calls[name], which, kernels),
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
            found["seconds"] = spread(spent)
            found["rounds"] = spent
            found["gflops_per_second"] = self._rate(
                direction, name, found["seconds"]["median"]
            )
            if spent is not ours and not wrong(found):
                found["ratio"] = spread(np.divide(spent, ours))
                found["ours_over_peer"] = spread(np.divide(ours, spent))

    def _rate(self, direction: Direction, name: str, seconds: float) -> float:
        """Useful GFLOP/s: what a contender throws away under a mask is not counted."""
        mask, shape = self.pattern.mask, self.record["input"]
        every = mask.num_q_blocks * mask.num_kv_blocks
        blocks = every if self.peers[name].computes == EVERY else mask.num_blocks
        blocks *= self.pattern.batch
        flops = WORK[direction] * measure.useful_flops(
            *(blocks, mask.block_q, mask.block_kv),
            *(shape["heads"], shape["head_dim"]),
        )
        return flops / seconds / 1e9

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
        rows = rows + self._entry * self.pattern.mask.q_len
        with self.progress.stage(f"{self.record['case']}: check {name}"):
            found = self._try(name, direction, lambda: call.rows(rows))
            if found is None:
                return None
            return {
                what: expected(what).check(value).to_dict()
                for what, value in found.items()
            }

    @property
    def _entry(self) -> int:
        """The problem of the batch that is looked at."""
        return self.pattern.batch // 2

    def _choose_rows(self, count: int) -> np.ndarray:
        """Some rows of that problem, of those that exist."""
        if self.pattern.exists is None:
            return measure.choose_rows(self.pattern.mask.q_len, count)
        rows = np.flatnonzero(self.pattern.exists[self._entry])
        return rows[measure.choose_rows(len(rows), count)]

    @functools.cache  # noqa: B019 (the contest is short-lived; contenders share these)
    def _expected(self, computes: str) -> tuple[np.ndarray, Any]:
        """Rows to look at, and what they should be; the same for many contenders."""
        mask, heads = self.pattern.mask, self.record["input"]["heads"]
        density = 1.0 if computes == EVERY else mask.density
        count = int(_ELEMENTS / max(1.0, density * mask.kv_len * heads))
        rows = self._choose_rows(int(np.clip(count, *_ROWS)))
        if computes == EVERY:
            allowed = (np.broadcast_to(np.True_, (len(rows), mask.kv_len)),)
        else:
            allowed = self.pattern.allowed(rows)
        inputs = self.task.sets[0]
        q, k, v, dout = (
            np.asarray(x.reshape(-1, *x.shape[-3:])[self._entry])
            for x in (*inputs[:3], inputs[-1])
        )
        bias = None
        if self.pattern.bias is not None and computes not in (EVERY, UNBIASED):
            bias = self.pattern.bias(inputs, rows)

        @functools.cache
        def expected(what: str) -> measure.ExpectedRows:
            cotangent = None if what == "out" else dout
            return measure.expect_rows(
                *(rows, q, k, v, allowed, q.dtype), dout=cotangent, bias=bias
            )

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
        except NoSuchPass as err:
            reason = str(err)
        except Exception as err:  # noqa: BLE001 (other people's code; kept in the record)
            reason = reason_of(err)
            if self.strict:
                self.record["missed"].append(
                    f"{self.record['case']}, {where}: {name} failed: {reason}"
                )
        self.record["left_out"][name] = f"{where}: {reason}"
        if name in self.contenders:
            self._close(name)
        return None

    def _close(self, name: str) -> None:
        """Ends a contender's part; what was found counts even if that fails."""
        try:
            self.contenders.pop(name).close()
        except Exception as err:  # noqa: BLE001 (as above)
            self.record["left_out"].setdefault(name, f"close: {reason_of(err)}")

    def _no_room(self, name: str, where: str, err: DoesNotFit) -> BadInput:
        return BadInput(
            f"{self.record['case']}: {name}, {where}: {err}. Choose a smaller case, "
            "fewer heads, --no-backward, or --against none."
        )


def _turn(call: Call, n: int, kernels: bool) -> list[float]:
    """Times of the calls of a turn: of one where several would take too long."""
    first = call.times(n, 1, kernels)
    if not kernels or first[0] * CALLS > LONGEST_TURN:
        return first
    return call.times(n, CALLS, kernels)


def reason_of(err: Exception) -> str:
    """One line for a record."""
    return " ".join(f"{type(err).__name__}: {err}".split())[:_REASON]


def spread(values: Any) -> dict[str, float]:
    x = np.asarray(values, np.float64)
    return {
        "count": len(x),
        "min": float(x.min()),
        "median": float(np.median(x)),
        "max": float(x.max()),
    }
