"""Which config of a kernel is fastest on a case: candidates timed in turns.

Each kernel has a short list of configs (`pallas_kernels/mosaic_gpu/_candidates.py`).
A candidate must compute what the chosen config does; what counts is its time over the
chosen one's in the same round. Then, with the fastest configs, which implementation is
faster in each pass. Called by ``_runner.py`` and by ``jsparse bench``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jsparse import measure
from jsparse.backends import _measured
from jsparse.backends._contract import Problem
from jsparse.bench._contest import reason_of, spread
from jsparse.bench._contract import CALLS, Array, Task
from jsparse.bench._jax_peers import JaxCall, JaxContender, JaxPeer
from jsparse.measure import BadInput, Progress
from jsparse.ops._dispatch import choices
from jsparse.report import to_json, write_file

TUNED = "mosaic_gpu"
"""The implementation whose kernels have configs."""

_CONTENT = {"entries": "configs", "choices": "implementations"}
_CLEARLY = 0.99  # times the chosen config's time: what is less displaces it
_ROUNDING = 4.0  # spacings of the dtype that a row may differ by


class Trial(Protocol):
    """A kernel that was built with one config."""

    def results(self) -> Sequence[Array]:
        """What it computes from the first inputs."""
        ...

    def seconds(self, n: int) -> float:
        """Mean time of its pass with the n-th inputs."""
        ...


@dataclass(frozen=True)
class Found:
    """Outcome of a search.

    Attributes:
        rounds: seconds of each config that was right, the chosen one first.
        differences: of the results of each, see `difference`.
        left_out: why the other configs are.
    """

    rounds: dict[Any, list[float]]
    differences: dict[Any, float]
    left_out: dict[Any, str]

    def ratios(self, config: Any) -> np.ndarray:
        """Its time over the chosen one's, round by round."""
        chosen = next(iter(self.rounds))
        return np.divide(self.rounds[config], self.rounds[chosen])

    def best(self) -> Any:
        """The fastest config; the chosen one, unless another is clearly faster."""
        chosen = next(iter(self.rounds))
        median = {c: float(np.median(self.ratios(c))) for c in self.rounds}
        fastest = min(self.rounds, key=median.__getitem__)
        return fastest if median[fastest] < _CLEARLY else chosen


def search(
    configs: Sequence[Any],
    launch: Callable[[Any], Trial],
    repeats: int,
    sets: int,
    progress: Progress,
    title: str,
) -> Found:
    """Builds, compares and times configs.

    Args:
        configs: the chosen one first. What it computes is right; its failure is raised.
        launch: builds one; what it raises leaves that config out.
        repeats: rounds, whose order alternates.
        sets: of inputs, used in turns.
        progress: told about each build and turn.
        title: of the stages.
    """
    chosen = configs[0]
    trials: dict[Any, Trial] = {}
    differences: dict[Any, float] = {}
    left_out: dict[Any, str] = {}
    expected: Sequence[Array] = ()

    def attempt[T](config: Any, action: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return action(*arguments)
        except Exception as err:
            if config == chosen:
                raise
            left_out[config] = reason_of(err)
            trials.pop(config, None)
            return None

    with progress.stage(f"{title}: build {len(configs)}", total=len(configs)) as step:
        for config in configs:
            trial = attempt(config, launch, config)
            results = None if trial is None else attempt(config, trial.results)
            step()
            if trial is None or results is None:
                continue
            expected = expected or results
            apart = difference(results, expected)
            limit = _ROUNDING * float(jnp.finfo(expected[0].dtype).eps)
            if apart > limit:
                left_out[config] = (
                    f"its results differ by {apart:.1e} from the chosen config's; at "
                    f"most {limit:.1e} is rounding"
                )
            else:
                trials[config], differences[config] = trial, apart
    rounds: dict[Any, list[float]] = {config: [] for config in trials}
    turns = repeats * len(trials)
    with progress.stage(f"{title}: time {len(trials)}", total=turns) as step:
        for n in range(repeats):
            for config in list(trials)[:: 1 if n % 2 == 0 else -1]:
                spent = attempt(config, trials[config].seconds, n % sets)
                if spent is not None:
                    rounds[config].append(spent)
                step()
    return Found({c: rounds[c] for c in trials}, differences, left_out)


def difference(found: Sequence[Array], expected: Sequence[Array]) -> float:
    """The largest distance between rows of two results, over the row's norm.

    Rows that are shorter than is usual count as if they were not. NaN is infinitely
    far, unless it stands in both.

    Args:
        found: arrays ``[..., D]``.
        expected: as many, of the same shapes.

    Example:
        >>> ones = jnp.ones((3, 4))
        >>> difference([ones * 1.5], [ones])
        0.5
    """
    worst = 0.0
    for x, y in zip(found, expected, strict=True):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        apart = jnp.where(jnp.isnan(x) & jnp.isnan(y), 0, x - y)
        distance = jnp.linalg.norm(apart, axis=-1)
        size = jnp.linalg.norm(jnp.nan_to_num(y), axis=-1)
        usual = jnp.sqrt(jnp.mean(size * size))
        relative = distance / jnp.maximum(size, usual)
        relative = jnp.where(jnp.isnan(relative), jnp.inf, relative)
        relative = jnp.where(distance == 0, 0, relative)
        worst = max(worst, float(relative.max()))
    return worst


# ------------------------------------------------------------------------ on a GPU


def one_kernel(ours: JaxPeer, kernel: str) -> JaxPeer:
    """Ours; of its backward pass only the gradients that one kernel computes.

    Args:
        ours: with the implementation `TUNED`.
        kernel: ``"forward"``, ``"dq"`` or ``"dkv"``.
    """
    peer = copy.copy(ours)
    peer.part = slice(1, 3) if kernel == "dkv" else slice(0, 1)
    return peer


@dataclass(frozen=True)
class KernelTrial:
    """A compiled pass: `Trial`."""

    call: JaxCall

    def results(self) -> Sequence[Array]:
        """See `Trial.results`."""
        _, found = measure.time_call(self.call.compiled.call, *self.call.sets[0])
        return jax.tree_util.tree_leaves(found)

    def seconds(self, n: int) -> float:
        """See `Trial.seconds`."""
        return float(np.mean(self.call.times(n, CALLS, kernels=True)))


def build(contender: JaxContender, key: Any, config: Any) -> Trial:
    """Compiles the pass of `one_kernel` with a config of that kernel."""
    from jsparse.pallas_kernels.mosaic_gpu import _tables

    direction = "forward" if key.kernel == "forward" else "backward"
    with _tables.trying({key: _tables.fields_of(config)}.get):
        return KernelTrial(contender.ready(direction))


def tune(
    record: dict[str, Any],
    task: Task,
    ours: JaxPeer,
    rivals: Mapping[str, JaxPeer],
    backward: bool,
    configs: bool,
    repeats: int,
    progress: Progress,
) -> None:
    """Searches the configs of each kernel of a case, then the faster implementation.

    Fills ``record["tuned"]``, one item for each kernel with all that was tried,
    ``record["entries"]``, the best as entries of a table, and ``record["choices"]``,
    the faster implementation of each pass as entries of another.

    Args:
        record: of the case.
        task: its mask and inputs.
        ours: with the implementation `TUNED`.
        rivals: ours with the others that ``auto`` chooses from.
        backward: whether to measure the backward pass as well.
        configs: whether to search them; else kernels keep those that are shipped.
        repeats: timed rounds.
        progress: told about each stage.
    """
    from jsparse.pallas_kernels.mosaic_gpu import _candidates, _tables

    record["tuned"], record["entries"], fastest = [], [], {}
    for key in _keys(task, ours, backward) if configs else ():
        contender = one_kernel(ours, key.kernel).enter(task)
        found = search(
            _candidates.candidates(key, task.sets[0][0].dtype),
            functools.partial(build, contender, key),
            *(repeats, len(task.sets), progress),
            f"{record['case']}: configs of {key.kernel}",
        )
        contender.close()
        best = found.best()
        fastest[key] = _tables.fields_of(best)
        record["tuned"].append(
            {"kernel": key.kernel, **_outcome(found, _tables.fields_of)}
        )
        measured = _measured_of(record, found)
        record["entries"].append(_tables.entry_of(key, best, measured))
    record["choices"] = []
    ways = {ours.name: ours, **rivals}
    # Nothing is to be chosen where one refuses the case.
    if all(way.available() is None for way in ways.values()):
        with _tables.trying(fastest.get):
            _compare(record, task, ways, backward, repeats, progress)


def _outcome(
    found: Found, fields_of: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """What a record says of a search."""
    best = found.best()
    return {
        "tried": [
            {
                "config": fields_of(config),
                "seconds": spread(seconds),
                "ratio": spread(found.ratios(config)),
                "difference": found.differences[config],
                "best": config == best,
            }
            for config, seconds in found.rounds.items()
        ],
        "left_out": [
            {"config": fields_of(config), "reason": reason}
            for config, reason in found.left_out.items()
        ],
    }


def _measured_of(record: dict[str, Any], found: Found) -> dict[str, Any]:
    """What an entry of a table says of its measurement."""
    best = found.best()
    return {
        "case": record["case"],
        "dtype": record["input"]["dtype"],
        "pattern": record["pattern"],
        "device": record["device"]["device"],
        "date": record["date"],
        "commit": record["commit"],
        "seconds": float(np.median(found.rounds[best])),
        "ratio": float(np.median(found.ratios(best))),
    }


def _compare(
    record: dict[str, Any],
    task: Task,
    ways: Mapping[str, JaxPeer],
    backward: bool,
    repeats: int,
    progress: Progress,
) -> None:
    """Times ours with each implementation that ``auto`` chooses from, pass by pass."""
    problem = _problem(task, ways[TUNED])
    for direction in _measured.PASSES[: 2 if backward else 1]:
        found = search(
            _measured.RIVALS,
            functools.partial(build_pass, task, ways, direction),
            *(repeats, len(task.sets), progress),
            f"{record['case']}: implementations, {direction}",
        )
        outcome = _outcome(found, lambda name: {"implementation": name})
        record["tuned"].append({"kernel": f"the {direction} pass", **outcome})
        key = _measured.Key.of(problem, direction)
        measured = _measured_of(record, found)
        record["choices"].append(_measured.entry_of(key, found.best(), measured))


def build_pass(
    task: Task, ways: Mapping[str, JaxPeer], direction: str, implementation: str
) -> Trial:
    """Compiles a pass of an implementation."""
    return KernelTrial(ways[implementation].enter(task).ready(direction))


def _problem(task: Task, ours: JaxPeer) -> Problem:
    """What the case asks of a backend: once, or nothing is chosen by it."""
    *inputs, _ = jax.eval_shape(ours.arrange, *task.sets[0])
    with choices() as made:
        if ours.static:
            jax.eval_shape(lambda *x: ours.forward(*x, task.mask), *inputs)
        else:
            jax.eval_shape(ours.forward, *inputs, ours.describe(task.mask))
    ((problem, _),) = made
    return problem


def _keys(task: Task, ours: JaxPeer, backward: bool) -> list[Any]:
    """What the kernels of the case ask their table for."""
    from jsparse.pallas_kernels.mosaic_gpu import _tables

    asked: dict[str, Any] = {}

    def listen(key: Any) -> None:
        asked[key.kernel] = key

    *inputs, dout = jax.eval_shape(ours.arrange, *task.sets[0])
    arguments = *inputs, ours.describe(task.mask)
    with _tables.trying(listen):
        if backward:
            jax.eval_shape(ours.backward, *arguments, dout)
        else:
            jax.eval_shape(ours.forward, *arguments)
    return list(asked.values())


def _format(kind: str) -> Any:
    """The module that reads tables of a kind."""
    from jsparse.pallas_kernels.mosaic_gpu import _tables

    return {"entries": _tables, "choices": _measured}[kind]


def read_entries(file: Path, kind: str = "entries") -> list[dict[str, Any]]:
    """The entries of a table; none if the file is missing.

    Args:
        file: the table.
        kind: ``"entries"`` of configs, or ``"choices"`` of implementations.

    Raises:
        BadInput: if the file is no table of this kind.
    """
    if not file.exists():
        return []
    try:
        return _format(kind).parse(file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as err:
        raise BadInput(f"{file}: is no table of {_CONTENT[kind]} ({err}).") from err


def write_entries(
    file: Path, entries: Sequence[dict[str, Any]], kind: str = "entries"
) -> None:
    """Puts entries into a table, in place of those with the same key.

    Args:
        file: the table; made if it is missing.
        entries: as a record has them, under the name of the kind.
        kind: see `read_entries`.

    Raises:
        BadInput: if the file is no table of this kind.
    """
    tables = _format(kind)
    both = (*read_entries(file, kind), *entries)
    table = {tables.key_of(entry): entry for entry in both}
    order = sorted(table, key=lambda key: ["" if x is None else x for x in key])
    found = {"format": tables.FORMAT, "entries": [table[key] for key in order]}
    write_file(file, to_json(found) + "\n")
