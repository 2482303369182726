"""What is measured, by name.

An attention case is a mask with heads and a dtype; a model case (``_models.py``) is the
attention of a model, with its bias; a mask case is the building of a mask, on the host
or on the device. A case loads its data only when it is run.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jsparse import patterns
from jsparse._job import ORDERS, read_file
from jsparse.bench import _patterns
from jsparse.bench._kinds import AttentionCase as AttentionCase
from jsparse.bench._kinds import Case as Case
from jsparse.bench._kinds import DeviceMaskCase as DeviceMaskCase
from jsparse.bench._kinds import HostMaskCase as HostMaskCase
from jsparse.bench._kinds import ModelCase as ModelCase
from jsparse.bench._kinds import Pattern as Pattern
from jsparse.bench._kinds import of_blocks as of_blocks
from jsparse.bench._models import model_cases
from jsparse.bench._patterns import BLOCK, Columns
from jsparse.bench._patterns import ball as ball
from jsparse.measure import BadInput, within_cutoff

CUTOFF = 10.0  # ångström, of every pattern made of coordinates

LATENCY_CASES = ("seed800", "seed1600", "seed3200")
"""80 % of the blocks are empty; the work doubles."""

SWEEP = "sweep16k_d64_p"
"""How the names of the cases begin that differ in density only."""

_SWEEP_PERCENT = (1, 2, 5, 10, 20, 50, 100)


def all_cases(
    structure: Path | None = None, copies: int | None = 1, order: str = "auto"
) -> dict[str, Case]:
    """The named cases, and those of a structure file if one is given.

    Args:
        structure: file that `jsparse.structure.read_structure` reads.
        copies: copies of its biological assembly; None for all.
        order: of its atoms, see `jsparse.patterns.order`.

    Returns:
        Cases by name.

    Raises:
        BadInput: for an unknown order.

    Example:
        >>> "seed800" in all_cases()
        True
        >>> list(all_cases(Path("examples/data/3KPR.cif.gz")))[-3:]
        ['3kpr_h4_d32', '3kpr_mask', '3kpr_mask_device']
    """
    if order not in ORDERS:
        raise BadInput(f"order {order!r} is unknown; expected {', '.join(ORDERS)}.")
    cases = _block_cases() + model_cases()
    cases.append(
        DeviceMaskCase(
            "points100k_mask_device",
            "radius mask of 100,000 points in a ball, built under jit",
            functools.partial(ball, 100_000),
            "auto",
        )
    )
    if structure is not None:
        cases += _structure_cases(structure, copies, order)
    return {case.name: case for case in cases}


def choose_cases(
    known: dict[str, Case], names: Sequence[str], of_structure: bool
) -> list[Case]:
    """The cases to run.

    Args:
        known: all cases.
        names: asked for; ``all`` means every one.
        of_structure: whether, without names, those of the structure are meant.

    Raises:
        BadInput: for an unknown name, or none.

    Example:
        >>> [case.name for case in choose_cases(all_cases(), ["seed800"], False)]
        ['seed800']
    """
    if not names and of_structure:
        return list(known.values())[-3:]
    if not names:
        raise BadInput(f"name at least one case, or 'all': {', '.join(known)}.")
    unknown = [name for name in names if name not in known and name != "all"]
    if unknown:
        raise BadInput(
            f"unknown case {unknown[0]!r}; expected {', '.join(known)}, or 'all'. "
            "--structure FILE adds the cases of a structure."
        )
    return list(known.values()) if "all" in names else [known[n] for n in names]


def _block_cases() -> list[Case]:
    ribosome = "100,000 central atoms of 6ZU5, 10 Å, uneven rows"
    rows: list[tuple[str, str, int, int, str, Callable[[], Columns]]] = [
        ("ribosome100k_h16_d64", ribosome, 16, 64, "bfloat16", _patterns.ribosome),
        ("ribosome100k_h4_d32", ribosome, 4, 32, "bfloat16", _patterns.ribosome),
        (
            *("seed800", "63 x 63 blocks, 800 of them", 1, 64, "float16"),
            lambda: _patterns.random_tiles(63, 800),
        ),
        (
            *("seed1600", "89 x 89 blocks, 1600 of them", 1, 64, "float16"),
            lambda: _patterns.random_tiles(89, 1600),
        ),
        (
            *("seed3200", "126 x 126 blocks, 3200 of them", 1, 64, "float16"),
            lambda: _patterns.random_tiles(126, 3200),
        ),
        (
            *("seed100k", "800 x 800 blocks, 160 per row", 1, 64, "float16"),
            lambda: _patterns.uniform(800, 160),
        ),
        (
            *("diag100k", "800 diagonal blocks, 102,400 rows", 1, 64, "float16"),
            lambda: _patterns.diagonal(800),
        ),
        (
            *("graph32k_h16_d64", "band and far blocks, 31 per row"),
            *(16, 64, "bfloat16", lambda: _patterns.band_and_random(256, 8, 16)),
        ),
        (
            *("graph16k_h16_d128", "26 random blocks per row"),
            *(16, 128, "bfloat16", lambda: _patterns.uniform(128, 26)),
        ),
        *(
            (
                *(f"{SWEEP}{percent:02}", f"band and far blocks, {percent} % of all"),
                *(16, 64, "bfloat16"),
                functools.partial(_patterns.band_at_density, 128, percent),
            )
            for percent in _SWEEP_PERCENT
        ),
    ]
    return [
        AttentionCase(
            *row[:5], load=functools.partial(lambda make: of_blocks(make()), row[5])
        )
        for row in rows
    ]


def of_coords(coords: np.ndarray, order: str = "auto") -> Pattern:
    """The radius pattern of atoms.

    Args:
        coords: ``[N, 3]`` float32, ångström.
        order: of the atoms, see `jsparse.patterns.order`.

    Example:
        >>> pattern = of_coords(ball(1000))
        >>> pattern.mask.q_len, len(pattern.allowed(np.arange(3))[0])
        (1000, 3)
    """
    sizes = {"block_q": BLOCK, "block_kv": BLOCK}
    ordering = patterns.order(coords, CUTOFF, method=order, **sizes)
    placed = ordering.apply(coords)
    mask = patterns.radius(placed, CUTOFF, **sizes)
    return Pattern(
        mask, lambda rows: within_cutoff(placed, rows, CUTOFF), ordering.method
    )


def _structure_cases(file: Path, copies: int | None, order: str) -> list[Any]:
    stem = re.sub(r"(\.(cif|mmcif|pdb|ent|bcif|gz))+$", "", file.name, flags=re.I)
    stem = re.sub(r"[^a-z0-9]+", "_", stem.lower()).strip("_") or "structure"
    about = f"atoms of {file.name}"
    if copies != 1:
        stem += "_all" if copies is None else f"_x{copies}"
        about += ", all copies" if copies is None else f", {copies} copies"
    if order != "auto":
        stem += f"_{order}"
        about += f", {order} order"

    @functools.cache
    def coords() -> np.ndarray:
        return read_file(file, copies).coords

    attention = AttentionCase(
        name=f"{stem}_h4_d32",
        about=f"{about}, {CUTOFF:g} Å",
        heads=4,
        head_dim=32,
        dtype="float32",
        load=lambda: of_coords(coords(), order),
    )
    host = HostMaskCase(
        f"{stem}_mask", f"{about}: order and mask on the host", coords, order
    )
    device = DeviceMaskCase(
        f"{stem}_mask_device", f"{about}: mask built under jit", coords, order
    )
    return [attention, host, device]
