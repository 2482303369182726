"""How a case is measured.

Ours and the peers run on the same inputs, in turns whose order alternates, so that a
machine that slows down slows both. Inputs are drawn fresh from a standard normal
distribution. On a GPU the time of a pass is the sum of its kernels' times, on a CPU the
wall clock's. What is quoted is the ratio of the times of one round.
"""

from __future__ import annotations

import datetime
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp

from jsparse import measure
from jsparse._job import check_channels, check_inputs
from jsparse.backends import IMPLEMENTATIONS
from jsparse.backends._measured import RIVALS
from jsparse.bench._builds import build_on_device, build_on_host
from jsparse.bench._cases import all_cases
from jsparse.bench._contest import WORK, Contest
from jsparse.bench._contract import (
    CALLS,
    LONGEST_TURN,
    Direction,
    Inputs,
    Peer,
    Task,
)
from jsparse.bench._jax_peers import JaxPeer, Ours, Rival, no_gpu
from jsparse.bench._kinds import (
    AttentionCase,
    Case,
    HostMaskCase,
    Model,
    ModelCase,
    Pattern,
)
from jsparse.bench._models import MODEL_PEERS, ModelPeer
from jsparse.bench._peers import PEERS
from jsparse.bench._profile import Pass, profile_pass
from jsparse.bench._records import wrong
from jsparse.bench._tuning import TUNED, tune
from jsparse.measure import BadInput, Progress, Turns
from jsparse.ops import choice, support
from jsparse.ops._dispatch import choices
from jsparse.patterns import BlockMask

Array = Any
DTYPES = ("float32", "bfloat16", "float16")

LATENCY_CALLS = 100

_SETS = 2  # of inputs, used in turns
_TIMER = "wall clock; of a compiled call, with its inputs on the device"
_KERNEL_TIMER = (
    f"CUPTI; sum of kernel times, mean of {CALLS} calls a round (of one if they would "
    f"take more than {LONGEST_TURN:g} s), with the inputs on the device; copies and "
    "memsets are not counted"
)


@dataclass(frozen=True)
class Options:
    """What to run, and what to demand.

    Attributes:
        against: names of peers and of our other kernels; None for all that are
            available and fit in memory.
        backward: whether to measure forward + backward.
        repeats: timed rounds.
        kind: of record: ``"attention"`` compares, ``"latency"`` measures how times are
            spread, ``"profile"`` reads hardware counters, ``"tune"`` looks for the
            fastest configs of our kernels, and the faster of our implementations.
        configs: whether ``"tune"`` looks for configs; else it only compares
            implementations, with the configs that are shipped.
        heads: in place of the case's own.
        head_dim: in place of the case's own.
        dtype: in place of the case's own.
        implementation: ours, or ``"auto"``.
        traced: whether the mask is an argument of our compiled call.
        min_ratio: a peer's time / ours must be at least this.
        max_seconds: our median time must be at most this.
        lock: a file; runs that name the same one prepare side by side and time alone.

    Raises:
        BadInput: for a value that makes no sense.
    """

    against: tuple[str, ...] | None = None
    backward: bool = True
    repeats: int = 5
    kind: Literal["attention", "latency", "profile", "tune"] = "attention"
    configs: bool = True
    heads: int | None = None
    head_dim: int | None = None
    dtype: str | None = None
    implementation: str = "auto"
    traced: bool = False
    min_ratio: float | None = None
    max_seconds: float | None = None
    lock: Path | None = None

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if self.against == ("none",):
            object.__setattr__(self, "against", ())
        for name in self.against or ():
            names = dict.fromkeys((*PEERS, *RIVALS, *MODEL_PEERS))
            if name not in names:
                known = ", ".join(names)
                raise BadInput(f"unknown peer {name!r}; expected {known} or none.")
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
        if self.kind == "tune" and self.implementation == "auto":
            object.__setattr__(self, "implementation", TUNED)
        elif self.kind == "tune" and self.implementation != TUNED:
            raise BadInput(
                f"implementation {self.implementation!r} has no configs to choose "
                f"from; expected {TUNED} for --tune."
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
    with Turns(options.lock) as turns:
        _measure(case, options, progress, turns, record)
    record["peak_memory_bytes"] = measure.peak_memory()
    on_device = measure.peak_device_memory()
    if on_device is not None:
        record["peak_device_memory_bytes"] = on_device
    return record


def _measure(
    case: Case,
    options: Options,
    progress: Progress,
    turns: Turns,
    record: dict[str, Any],
) -> None:
    """Fills in the record of a case of any kind."""
    if isinstance(case, AttentionCase):
        _run_attention(case, options, progress, turns, record)
    elif isinstance(case, ModelCase):
        _run_model(case, options, progress, turns, record)
    elif options.kind != "attention":
        raise BadInput(
            f"case {case.name!r} builds a mask; expected an attention case for "
            f"--{options.kind}."
        )
    else:
        with turns.alone():
            if isinstance(case, HostMaskCase):
                build_on_host(case, options.repeats, progress, record)
            else:
                build_on_device(case, options.repeats, progress, record)
        record["demanded"] = {"max_seconds": options.max_seconds}
        _judge_seconds(record, options, record["seconds"]["radius"]["median"])


# ----------------------------------------------------------------------- attention


def _run_attention(
    case: AttentionCase,
    options: Options,
    progress: Progress,
    turns: Turns,
    record: dict[str, Any],
) -> None:
    heads = options.heads or case.heads
    head_dim = options.head_dim or case.head_dim
    dtype = options.dtype or case.dtype
    if (heads, head_dim, dtype) != (case.heads, case.head_dim, case.dtype):
        record["case"] = f"{case.name}-h{heads}-d{head_dim}-{dtype}"
    check_channels(heads, head_dim)
    _check_gpu(options)
    with progress.stage(f"{case.name}: pattern"):
        pattern = case.load()
    mask = pattern.mask
    size = jnp.dtype(dtype).itemsize
    check_inputs(4 * _SETS, mask.q_len, heads, head_dim, size)
    sets = [draw_inputs(seed, mask, heads, head_dim, dtype) for seed in range(_SETS)]
    ours = Ours(_implementation(options, sets[0], mask), options.traced)
    if options.traced:
        record["case"] += "-traced"
    kernels = record["device"]["platform"] == "gpu"
    sizes = {"heads": heads, "head_dim": head_dim, "dtype": dtype}
    _describe(record, options, ours.name, pattern, ours.static, sizes)
    if options.kind == "profile":
        del sets  # the child makes its own
        directions = _directions(options, True)
        _run_profile(case.name, directions, options, progress, record)
        return
    known = PEERS | _rivals(ours, options, sets[0], mask)
    directions = _directions(options, kernels)
    _attend(
        *(options, progress, turns, record),
        *(pattern, Task(mask, sets), ours, known, directions),
    )


def _attend(
    options: Options,
    progress: Progress,
    turns: Turns,
    record: dict[str, Any],
    pattern: Pattern,
    task: Task,
    ours: JaxPeer,
    known: Mapping[str, Peer],
    directions: tuple[Direction, ...],
) -> None:
    """Tunes ours, or lets it compete with those of the known peers that can."""
    if options.kind == "tune":
        rivals = {name: known[name] for name in RIVALS if name != ours.name}
        with turns.alone():
            tune(
                *(record, task, ours, cast(dict[str, JaxPeer], rivals)),
                *(options.backward, options.configs, options.repeats, progress),
            )
        return
    kernels = record["device"]["platform"] == "gpu"
    peers, strict = _peers(options, known, task.mask, record)
    with Contest(
        *(record, pattern, task, [ours, *peers], strict, progress, turns)
    ) as contest:
        for direction in directions:
            if options.kind == "latency":
                contest.spread_out(direction, LATENCY_CALLS, kernels)
            else:
                contest.compare(direction, options.repeats, kernels)
    _judge_errors(record, strict)
    if options.kind == "attention":
        _judge(record, options)


def _check_gpu(options: Options) -> None:
    """Refuses what reads a GPU where there is none."""
    reason = no_gpu() if options.kind in ("profile", "tune") else None
    if reason is not None:
        raise BadInput(f"--{options.kind} cannot run here: {reason}.")


def _describe(
    record: dict[str, Any],
    options: Options,
    ours: str,
    pattern: Pattern,
    static: bool,
    sizes: dict[str, Any],
    distribution: str = "standard normal",
) -> None:
    """What a record of attention says before anything is timed."""
    kernels = record["device"]["platform"] == "gpu"
    record |= {
        "kind": options.kind,
        "ours": ours,
        "pattern": "static" if static else "traced",
        "timer": _KERNEL_TIMER if kernels else _TIMER,
        "mask": pattern.mask.summary() | {"order": pattern.order},
        "input": {
            "distribution": distribution,
            "seeds": list(range(_SETS)),
            **sizes,
        },
        "left_out": {},
    }


def _run_model(
    case: ModelCase,
    options: Options,
    progress: Progress,
    turns: Turns,
    record: dict[str, Any],
) -> None:
    """Attention of a model against its own peers."""
    for name in ("heads", "head_dim", "dtype"):
        if getattr(options, name) is not None:
            raise BadInput(
                f"case {case.name!r} has the {name} of a model; expected none other."
            )
    if options.traced:
        raise BadInput(
            f"case {case.name!r} is of a model; expected a case of blocks for --traced."
        )
    _check_gpu(options)
    with progress.stage(f"{case.name}: pattern"):
        model = case.load()
    mask = model.pattern.mask
    size = jnp.dtype(case.dtype).itemsize
    numbers = sum(math.prod(x.shape) for x in model.shapes)
    # Those of a contender in another layout are held beside them.
    check_inputs(2 * _SETS, numbers, 1, 1, size)
    sets = [draw_model_inputs(seed, model) for seed in range(_SETS)]
    ours = _ours(options, model)
    kernels = record["device"]["platform"] == "gpu"
    sizes = {"batch": model.pattern.batch, "heads": case.heads}
    sizes |= {"head_dim": case.head_dim, "dtype": case.dtype}
    drawn = "standard normal"
    if model.draw:
        drawn = "uniform slopes, normal coordinates, else standard normal"
    if model.pattern.exists is not None:
        drawn += "; cotangents of padding 0"
    static = not model.data
    _describe(record, options, ours.name, model.pattern, static, sizes, drawn)
    directions = _directions(options, kernels and case.alone)
    if options.kind == "profile":
        del sets  # the child makes its own
        _run_profile(case.name, directions, options, progress, record)
        return
    known = _model_rivals(ours, model) | {peer.name: peer for peer in model.peers}
    _attend(
        *(options, progress, turns, record),
        *(model.pattern, Task(mask, sets), ours, known, directions),
    )


def _ours(options: Options, model: Model) -> ModelPeer:
    """Ours with the implementation asked for, or with what ``auto`` chooses."""
    name = options.implementation
    if name == "auto":
        with choices() as made:
            implemented(model, name)
        names = {found.implementation for _, found in made}
        name = names.pop() if len(names) == 1 else "auto"
    ours = implemented(model, name)
    reason = ours.available()
    if reason is not None:
        raise BadInput(reason)
    return ours


def implemented(model: Model, name: str) -> ModelPeer:
    """Ours with an implementation; `available` says whether it can."""
    attend = functools.partial(model.attend, implementation=name)
    make = functools.partial(ModelPeer, name, attend, model.data, arrange=model.arrange)
    ours = make()
    try:
        *inputs, _ = jax.eval_shape(ours.arrange, *model.shapes, model.shapes[0])
        jax.eval_shape(ours.forward, *inputs, ours.describe(model.pattern.mask))
    except NotImplementedError as err:
        return make(refused=str(err))
    return ours


def _model_rivals(ours: ModelPeer, model: Model) -> dict[str, Peer]:
    """Our other kernels, to be timed in the same rounds."""
    return {name: implemented(model, name) for name in RIVALS if name != ours.name}


def draw_model_inputs(seed: int, model: Model) -> Inputs:
    """What `Inputs` says, of a model."""
    keys = jax.random.split(jax.random.key(seed), len(model.shapes) + 2)
    own = 3 if model.draw else len(model.shapes)
    drawn = [
        jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(keys, model.shapes[:own], strict=False)
    ]
    others = model.draw(keys[-2]) if model.draw else ()
    q, exists = model.shapes[0], model.pattern.exists
    dout = jax.random.normal(keys[-1], q.shape, q.dtype)
    if exists is not None:
        dout = jnp.where(exists[..., None, None], dout, 0)
    return *drawn, *others, dout


def _run_profile(
    name: str,
    directions: tuple[Direction, ...],
    options: Options,
    progress: Progress,
    record: dict[str, Any],
) -> None:
    """Fills in the counters of each pass; results are checked by the other runs.

    Not alone: ``ncu`` has a lock of its own.
    """
    if name not in all_cases():
        raise BadInput(
            f"case {name!r} is of a structure file; expected a named case for "
            "--profile, see --list."
        )
    shape = record["input"]
    record["timer"] = "ncu --clock-control none; means of a kernel's launches"
    for direction in directions:
        what = Pass(
            *(name, direction, record["ours"], options.traced),
            *(shape["heads"], shape["head_dim"], shape["dtype"]),
        )
        title = f"{record['case']}: counters, {direction}"
        with progress.stage(title):
            record[direction] = profile_pass(what)


def _directions(options: Options, kernels: bool) -> tuple[Direction, ...]:
    """On a GPU the backward pass is timed alone: kernels do not overlap there."""
    if not options.backward:
        return ("forward",)
    return ("forward", "backward" if kernels else "forward_backward")


def draw_inputs(
    seed: int, mask: BlockMask, heads: int, head_dim: int, dtype: str
) -> Inputs:
    """q, k, v and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = (mask.q_len, heads, head_dim)
    q, k, v, dout = (jax.random.normal(key, shape, jnp.dtype(dtype)) for key in keys)
    return q, k, v, dout


def _implementation(options: Options, arrays: Any, mask: BlockMask) -> str:
    q, k, v, _ = arrays
    if options.implementation == "auto":
        return choice(q, k, v, mask).implementation
    name = options.implementation
    why_not = support(q, k, v, mask)
    able = [other for other, reason in why_not.items() if reason is None]
    if why_not[name] is not None:
        raise BadInput(
            f"implementation {name!r} cannot run this: {why_not[name]}. These can: "
            f"{', '.join(able)}."
        )
    return name


def _rivals(
    ours: Ours, options: Options, arrays: Any, mask: BlockMask
) -> dict[str, Peer]:
    """Our other kernels, to be timed in the same rounds."""
    q, k, v, _ = arrays
    refused = support(q, k, v, mask)
    return {
        name: Rival(name, options.traced, refused[name])
        for name in RIVALS
        if name != ours.name
    }


def _peers(
    options: Options,
    known: Mapping[str, Peer],
    mask: BlockMask,
    record: dict[str, Any],
) -> tuple[list[Peer], bool]:
    """The peers that can run, and whether each of them was asked for by name."""
    strict = options.against is not None
    chosen = []
    for name in known if options.against is None else options.against:
        if name not in known:
            raise BadInput(
                f"peer {name!r} does not compute {record['case']}; expected "
                f"{', '.join(known)}."
            )
        reason = known[name].available() or known[name].why_not(mask)
        if reason is None:
            chosen.append(known[name])
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


def _judge(record: dict[str, Any], options: Options) -> None:
    """Lists what was not reached."""
    record["demanded"] = {
        "min_ratio": options.min_ratio,
        "max_seconds": options.max_seconds,
    }
    least = options.min_ratio
    for where, _, found in _results(record):
        ratio = found.get("ratio")
        if ratio and least is not None and ratio["median"] < least:
            record["missed"].append(
                f"{where}: its time / ours is {ratio['median']:.2f}, less than the "
                f"{least:g} demanded."
            )
    if least is not None and not any("ratio" in x for x in record["forward"].values()):
        record["missed"].append(
            f"{record['case']}: no peer ran and was right, so no ratio of "
            f"{least:g} was shown."
        )
    median = record["forward"][record["ours"]]["seconds"]["median"]
    _judge_seconds(record, options, median)


def _judge_errors(record: dict[str, Any], strict: bool) -> None:
    """Lists wrong results as missed, and wrong peers as left out."""
    for where, name, found in _results(record):
        for what in wrong(found):
            check = found["errors"][what]
            reason = (
                f"{where}: {what} is wrong: error {check['max_error']:.1e}, at most "
                f"{check['tolerance']:.1e} is rounding."
            )
            if strict or name == record["ours"]:
                record["missed"].append(reason)
            if name != record["ours"]:
                record["left_out"].setdefault(name, reason)


def _results(record: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Where, whose, and what was found."""
    for direction in WORK:
        for name, found in record.get(direction, {}).items():
            yield f"{record['case']}, {direction}, {name}", name, found


def _judge_seconds(record: dict[str, Any], options: Options, median: float) -> None:
    most = options.max_seconds
    if most is not None and median > most:
        record["missed"].append(
            f"{record['case']}: {median:.3g} s, more than the {most:g} s demanded."
        )
