"""The main job: a structure file in, checked block-sparse attention out.

``jsparse run`` is this job, ``jsparse pattern`` its first half. The result grows stage
by stage in ``Job.result``, plain data that `jsparse.report` writes, so that a job that
is stopped leaves what it had found. Called by the command line.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse import measure, patterns
from jsparse.backends import IMPLEMENTATIONS
from jsparse.measure import BadInput, Progress
from jsparse.ops import Choice, block_sparse_attention, choice, support
from jsparse.patterns import BlockMask
from jsparse.report import format_bytes
from jsparse.structure import Structure, StructureError, read_structure

ORDERS = ("auto", "file", "hilbert", "bisection")

_SECONDS = 5.0  # spent on repeats where their number is not given
_FEWEST, _MOST = 3, 20  # repeats within that
_MAX_CHANNELS = 1 << 14  # heads * head_dim
_MAX_BLOCK = 1024

# Whatever else a file names (ligands, ions, modified residues) counts as one kind.
_RESIDUES = (
    *("ALA", "ARG", "ASN", "ASP", "CYS", "GLN", "GLU", "GLY", "HIS", "ILE"),
    *("LEU", "LYS", "MET", "PHE", "PRO", "SER", "THR", "TRP", "TYR", "VAL"),
    *("A", "C", "G", "U", "DA", "DC", "DG", "DT"),
)


@dataclass(frozen=True)
class PatternConfig:
    """Which atoms are read, and the pattern that is built of them.

    Attributes:
        file: structure file, see `jsparse.structure.read_structure`.
        copies: copies of the biological assembly; None for all.
        cutoff: distance within which atoms see each other, ångström.
        block_q: atoms per query block.
        block_kv: atoms per key block.
        order: ``"auto"`` or the name of one order, see `jsparse.patterns.order`.

    Raises:
        BadInput: for a value that makes no sense.
    """

    file: Path
    copies: int | None = 1
    cutoff: float = 10.0
    block_q: int = 128
    block_kv: int = 128
    order: str = "auto"

    def __post_init__(self) -> None:
        """Refuses impossible values before the file is read."""
        if self.order not in ORDERS:
            raise BadInput(
                f"order {self.order!r} is unknown; expected one of {', '.join(ORDERS)}."
            )
        for name in ("block_q", "block_kv"):
            check_block(name, getattr(self, name))
        try:  # the builder's own words for what a cut-off may be
            patterns.radius(np.zeros((1, 3)), self.cutoff)
        except (TypeError, ValueError) as err:
            raise BadInput(str(err).removeprefix("radius: ")) from err


@dataclass(frozen=True)
class JobConfig(PatternConfig):
    """What `Job` computes, and how often.

    Attributes:
        heads: number of attention heads.
        head_dim: channels of each.
        implementation: ``"auto"`` or a backend's name.
        repeats: timed calls; None for as many as fit in a few seconds.
        backward: whether to time and check forward + backward as well.
    """

    heads: int = 4
    head_dim: int = 32
    implementation: str = "auto"
    repeats: int | None = None
    backward: bool = False

    def __post_init__(self) -> None:
        """Refuses impossible values before the file is read."""
        super().__post_init__()
        for name in ("heads", "head_dim"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}; expected at least 1.")
        check_channels(self.heads, self.head_dim)
        if self.implementation not in ("auto", *IMPLEMENTATIONS):
            raise BadInput(
                f"implementation {self.implementation!r} is unknown; expected one of "
                f"auto, {', '.join(IMPLEMENTATIONS)}."
            )
        if self.repeats is not None and self.repeats < 1:
            raise BadInput(f"repeats is {self.repeats}; expected at least 1.")


class Job:
    """One run of the main job.

    Attributes:
        result: what is known so far, plain data; ``result["status"]`` is ``"running"``,
            ``"complete"``, ``"wrong"`` (the check failed), ``"interrupted"`` or
            ``"failed"``.
        mask: the pattern, once it is built.

    Example:
        >>> from pathlib import Path
        >>> file = Path("examples/data/1UBI.pdb.gz")
        >>> job = Job(JobConfig(file, repeats=1), Progress())
        >>> job.run()["check"]["ok"], job.mask.num_q_blocks
        (True, 5)
    """

    def __init__(self, config: PatternConfig, progress: Progress):
        self.config = config
        self.progress = progress
        self.mask: BlockMask | None = None
        self._start = time.perf_counter()
        self.result: dict[str, Any] = {
            "format": 1,
            "status": "running",
            "completed": [],
            "seconds": {},
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "options": {**dataclasses.asdict(config), "file": config.file.name},
            "versions": measure.versions(),
        }

    # ------------------------------------------------------------------- stages

    def build_pattern(self) -> BlockMask:
        """Reads the file, orders the atoms and builds the radius mask.

        Raises:
            BadInput: for a file that cannot be read, or a pattern that is too large.
        """
        config = self.config
        with self._stage("read"):
            structure = read_file(config.file, config.copies)
        self.result["structure"] = {
            "name": structure.name,
            "atoms": len(structure),
            "residues": structure.num_residues,
            "chains": structure.num_chains,
        }
        sizes = {"block_q": config.block_q, "block_kv": config.block_kv}
        try:
            with self._stage("order"):
                ordering = patterns.order(
                    structure.coords, config.cutoff, method=config.order, **sizes
                )
            self.structure = structure.subset(ordering.permutation)
            with self._stage("mask"):
                mask = patterns.radius(self.structure.coords, config.cutoff, **sizes)
        except ValueError as err:
            raise BadInput(f"{config.file}: {err}") from err
        self.result["order"] = ordering.method
        self.result["orders"] = ordering.table()
        self.result["mask"] = mask.summary()
        self.mask = mask
        return mask

    def run(self) -> dict[str, Any]:
        """Runs every stage.

        Returns:
            ``self.result``.

        Raises:
            BadInput: for input that cannot be served.
            KeyboardInterrupt: on Ctrl-C; ``self.result`` keeps what was completed.
        """
        config = self.config
        if not isinstance(config, JobConfig):
            raise TypeError(
                f"Job.run: the config is a {type(config).__name__}; expected a "
                "JobConfig. Call build_pattern for the pattern alone."
            )
        mask = self.build_pattern()
        self.result["machine"] = measure.machine()
        # Of such arrays `project` holds up to six at once.
        check_inputs(6, len(self.structure), config.heads, config.head_dim)
        with self._stage("features"):
            q, k, v = project(self.structure, config.heads, config.head_dim)
        auto = choice(q, k, v, mask)
        self.result["backend"] = _choose(
            config.implementation, auto, support(q, k, v, mask)
        )
        arguments = (q, k, v, mask)
        forward = _forward(self._backend)
        out = self._time("forward", 1.0, config, forward, arguments)
        checks: dict[str, tuple[Any, Any]] = {"check": (out, None)}
        if config.backward:
            dout = jax.random.normal(jax.random.key(1), v.shape, v.dtype)
            both, name = _backward(self._backend), "forward + backward"
            dq = self._time(name, 3.5, config, both, (*arguments, dout))[1]
            checks["gradient_check"] = (dq, dout)
        with self._stage("check"):
            rows = measure.choose_rows(mask.q_len)
            near = measure.within_cutoff(self.structure.coords, rows, config.cutoff)
            for name, (value, cotangent) in checks.items():
                found = measure.check_rows(value, rows, q, k, v, near, dout=cotangent)
                self.result[name] = found.to_dict()
        right = all(self.result[name]["ok"] for name in checks)
        self.finish("complete" if right else "wrong")
        return self.result

    def finish(self, status: str, error: str | None = None) -> None:
        """Closes the result: how it ended, time and memory."""
        self.result["status"] = status
        if error is not None:
            self.result["error"] = error
        self.result["peak_memory_bytes"] = measure.peak_memory()
        self.result["seconds"]["total"] = time.perf_counter() - self._start

    # ------------------------------------------------------------------ private

    @property
    def _backend(self) -> str:
        return self.result["backend"]["implementation"]

    def _stage(self, name: str, total: int | None = None) -> _Stage:
        return _Stage(self, name, total)

    def _time(
        self, name: str, work: float, config: JobConfig, function: Any, arguments: Any
    ) -> Any:
        """Compiles, calls once to warm up, times; returns the first call's result.

        ``work`` is how many forward passes' operations the call counts as.
        """
        with self._stage(f"compile {name}"):
            compiled = measure.compile_call(function, *arguments)
        _check_memory(name, compiled.total_bytes, self._backend)
        with self._stage(f"warm up {name}"):
            first, out = measure.time_call(compiled.call, *arguments)
        repeats = config.repeats
        if repeats is None:
            repeats = min(_MOST, max(_FEWEST, int(_SECONDS / max(first, 1e-9))))
        seconds: list[float] = []
        with self._stage(name, total=repeats) as step:
            for _ in range(repeats):
                seconds.append(measure.time_call(compiled.call, *arguments)[0])
                step()
        mask: BlockMask = arguments[3]
        flops = work * measure.useful_flops(
            mask.num_blocks, mask.block_q, mask.block_kv, config.heads, config.head_dim
        )
        figures = measure.percentiles(seconds)
        self.result[name.replace(" + ", "_")] = {
            "compile_seconds": compiled.seconds,
            "run_seconds": figures,
            "gflops_per_second": flops / figures["p50"] / 1e9,
            "temporary_bytes": compiled.temporary_bytes,
        }
        return out


class _Stage:
    """Runs one stage with progress, and notes in the result that it was completed."""

    def __init__(self, job: Job, name: str, total: int | None):
        self._job, self._name = job, name
        self._shown = job.progress.stage(name, total)

    def __enter__(self) -> Any:
        self._start = time.perf_counter()
        return self._shown.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._shown.__exit__(*error)
        if error[0] is None:
            seconds = time.perf_counter() - self._start
            self._job.result["completed"].append(self._name)
            self._job.result["seconds"][self._name] = seconds


def read_file(file: Path, copies: int | None = 1) -> Structure:
    """Reads a structure, and says what is wrong with it as bad input.

    Args:
        file: structure file.
        copies: copies of the biological assembly; None for all.

    Raises:
        BadInput: for a file that is missing, damaged or holds no structure.

    Example:
        >>> len(read_file(Path("examples/data/1UBI.pdb.gz")))
        602
    """
    try:
        return read_structure(file, copies=copies)
    except StructureError as err:
        raise BadInput(str(err)) from err
    except OSError as err:
        raise BadInput(f"{file}: {err.strerror or err}.") from err


def check_block(name: str, value: int) -> None:
    """Refuses a block size that no mask of atoms has.

    Raises:
        BadInput: says which size, and what it may be.

    Example:
        >>> check_block("block_q", 128)
    """
    if not 1 <= value <= _MAX_BLOCK:
        raise BadInput(
            f"{name} is {value}; expected 1 to {_MAX_BLOCK} atoms, usually 128."
        )


def check_channels(heads: int, head_dim: int) -> None:
    """Refuses heads so many or large that no model has them.

    Raises:
        BadInput: says how many channels there may be.

    Example:
        >>> check_channels(heads=4, head_dim=32)
    """
    if heads * head_dim > _MAX_CHANNELS:
        raise BadInput(
            f"{heads} heads of {head_dim} are {heads * head_dim:,} channels for each "
            f"atom; expected at most {_MAX_CHANNELS:,}, e.g. 4 heads of 32."
        )


def check_inputs(
    arrays: int, length: int, heads: int, head_dim: int, itemsize: int = 4
) -> None:
    """Refuses inputs that would not fit in memory, before they are made.

    Args:
        arrays: how many there are at once.
        length: atoms or tokens of each.
        heads: heads of each.
        head_dim: channels of each head.
        itemsize: bytes of a number.

    Raises:
        BadInput: says how much is needed and how much is free.

    Example:
        >>> check_inputs(3, length=602, heads=4, head_dim=32)
    """
    needed = arrays * length * heads * head_dim * itemsize
    free = measure.available_memory()
    if free is not None and needed > free:
        raise BadInput(
            f"{heads} heads of {head_dim} for {length:,} atoms or tokens: their inputs "
            f"alone need {format_bytes(needed)} and {format_bytes(free)} are free. "
            "Use fewer heads or channels, or a smaller case."
        )


def project(
    structure: Structure, heads: int, head_dim: int, seed: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values made from each atom's element and residue type.

    The one-hot code of both (119 elements, 29 residue types) is multiplied by a random
    matrix into ``heads * head_dim`` channels, and these by one random matrix each.

    Args:
        structure: N atoms.
        heads: number of heads H.
        head_dim: channels D of each.
        seed: of all four matrices.

    Returns:
        Three float32 arrays ``[N, H, D]``.

    Example:
        >>> ubiquitin = read_structure("examples/data/1UBI.pdb.gz")
        >>> q, k, v = project(ubiquitin, heads=4, head_dim=32)
        >>> q.shape, q.dtype.name
        ((602, 4, 32), 'float32')
    """
    rng = np.random.default_rng(seed)
    size = heads * head_dim
    kinds = {name: n for n, name in enumerate(_RESIDUES)}
    names, which = np.unique(structure.residue_names, return_inverse=True)
    residue = np.array([kinds.get(str(name), len(kinds)) for name in names])[which]
    # A one-hot code times a matrix picks the matrix's rows.
    of_element = rng.standard_normal((119, size), np.float32)
    of_residue = rng.standard_normal((len(kinds) + 1, size), np.float32)
    hidden = (of_element[structure.elements] + of_residue[residue]) / math.sqrt(2)
    out = []
    for _ in range(3):
        weights = rng.standard_normal((size, size), np.float32) / math.sqrt(size)
        out.append(jnp.asarray((hidden @ weights).reshape(-1, heads, head_dim)))
    return out[0], out[1], out[2]


def _choose(
    implementation: str, auto: Choice, why_not: dict[str, str | None]
) -> dict[str, Any]:
    """Which backend runs, and why the others do not."""
    able = [name for name, reason in why_not.items() if reason is None]
    name, why = implementation, f"{implementation} was asked for"
    if implementation == "auto":
        name, why = auto.implementation, auto.reason
    if why_not.get(name) is not None:
        raise BadInput(
            f"implementation {name!r} cannot run this: {why_not[name]}. These can: "
            f"{', '.join(able)}."
        )
    reasons = {
        other: reason or f"it can, but {why}"
        for other, reason in why_not.items()
        if other != name
    }
    return {"implementation": name, "why_not": reasons}


def _forward(implementation: Any) -> Any:
    def forward(q, k, v, mask):
        return block_sparse_attention(q, k, v, mask, implementation=implementation)

    return forward


def _backward(implementation: Any) -> Any:
    forward = _forward(implementation)

    def both(q, k, v, mask, dout):
        out, pull = jax.vjp(lambda *qkv: forward(*qkv, mask), q, k, v)
        return out, *pull(dout)

    return both


def _check_memory(name: str, needed: int, implementation: str) -> None:
    """Refuses a call that would not fit, rather than swapping or being killed."""
    free = measure.available_memory()
    if jax.default_backend() == "cpu" and free is not None and needed > free:
        raise BadInput(
            f"{name} with implementation {implementation!r} needs "
            f"{format_bytes(needed)} and {format_bytes(free)} are free. Use fewer "
            "copies or heads, or another implementation."
        )
