"""What fast means: for each case and pass, our time over a peer's, at most.

Ratios of one run on one machine, on an H100; times of different machines are not
comparable. Called by ``jsparse bench --targets``, which reads them off the records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jsparse.bench._records import DIRECTIONS, Record, wrong
from jsparse.measure import BadInput
from jsparse.report import Facts

DEVICE = "H100"

Verdict = Literal["met", "missed", "no record"]


@dataclass(frozen=True)
class Target:
    """One line: ``ours / peer <= limit``.

    Attributes:
        group: what ``--targets`` calls it together with its like.
        case: name of the case.
        direction: pass of the record.
        peer: whose time ours is divided by.
        ours: our implementation.
        limit: the most that the median ratio may be.
    """

    group: str
    case: str
    direction: str
    peer: str
    ours: str
    limit: float


@dataclass(frozen=True)
class Outcome:
    """What the newest record says of a target.

    Attributes:
        target: the line.
        verdict: whether it is met.
        ratio: ours / peer, or None without a record.
        date: of the record.
        note: why a ratio that is small enough does not count, or what a record of
            another GPU says where there is none of an H100.
    """

    target: Target
    verdict: Verdict
    ratio: float | None = None
    date: str | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **vars(self.target),
            "verdict": self.verdict,
            "ratio": self.ratio,
            "date": self.date,
            "note": self.note,
        }


# Case, peer, then at most: Mosaic forward and backward, CUTLASS forward and backward.
_BLOCK_SPARSE = (
    ("seed800", "fa4", 0.5, None, 0.45, None),
    ("diag100k", "flex", 0.72, None, 0.7, None),
    ("seed100k", "fa4", 0.85, 1.25, 0.75, 1.0),
    ("graph32k_h16_d64", "fa4", 0.85, 1.25, 0.75, 1.0),
    ("ribosome100k_h16_d64", "fa4", 0.85, 1.25, 0.75, 1.0),
    ("graph16k_h16_d128", "fa4", 0.95, 1.25, 0.88, 1.0),
    ("ribosome100k_h4_d32", "fa4", 0.7, 1.25, 0.65, 1.0),
)
_COLUMNS = (
    ("mosaic_forward", "mosaic_gpu", "forward"),
    ("mosaic_backward", "mosaic_gpu", "backward"),
    ("cutlass_forward", "cutlass", "forward"),
    ("cutlass_backward", "cutlass", "backward"),
)
# Case, peer, pass, at most. ``no_bias`` is our own time on the case without its bias.
_BIAS = (
    ("triangle768_h4_d32", "tokamax", "forward", 0.66),
    ("triangle768_h4_d32", "tokamax", "forward_backward", 0.5),
    ("pair4096_h16_d64", "tokamax", "forward", 0.9),
    ("pair4096_h16_d64", "tokamax", "forward_backward", 0.7),
    ("pair2048_h16_d48", "tokamax", "forward", 0.85),
    ("pair2048_h16_d48", "tokamax", "forward_backward", 0.65),
    ("windows100k_h4_d32", "einsum", "forward", 0.25),
    ("windows100k_h4_d32", "einsum", "forward_backward", 0.2),
    ("graph32k_distance", "no_bias", "forward", 1.6),
    ("graph32k_distance", "no_bias", "backward", 2.0),
    ("triangle128x4096_h4_d32", "tokamax", "forward_backward", 0.5),
    ("neighbors27k_h4_d32", "gather", "forward", 0.1),
    ("neighbors27k_h4_d32", "gather", "forward_backward", 0.1),
)


def _all_targets() -> Iterator[Target]:
    for n, (group, ours, direction) in enumerate(_COLUMNS):
        for case, peer, *limits in _BLOCK_SPARSE:
            limit = limits[n]
            if limit is not None:
                yield Target(group, case, direction, peer, ours, limit)
    for case, peer, direction, limit in _BIAS:
        yield Target("bias", case, direction, peer, "mosaic_gpu", limit)


TARGETS = tuple(_all_targets())


def choose_targets(groups: Sequence[str] = ()) -> list[Target]:
    """The targets of some groups; a group may be named by its start.

    Args:
        groups: names or what names start with, as ``mosaic``; none means all.

    Raises:
        BadInput: for a group that does not exist.

    Example:
        >>> len(choose_targets()), len(choose_targets(["mosaic_backward", "bias"]))
        (37, 18)
        >>> len(choose_targets(["cutlass"]))
        12
    """
    names = list(dict.fromkeys(target.group for target in TARGETS))
    for group in groups:
        if not any(name.startswith(group) for name in names):
            raise BadInput(
                f"unknown group of targets {group!r}; expected {', '.join(names)}."
            )
    starts = tuple(groups) or ("",)
    return [target for target in TARGETS if target.group.startswith(starts)]


def judge_targets(
    targets: Sequence[Target], records: Sequence[Record]
) -> list[Outcome]:
    """What the newest record with the ratio says of each target.

    Args:
        targets: what to look for.
        records: as `read_records` returns them, oldest first.

    Example:
        >>> [outcome.verdict for outcome in judge_targets(TARGETS[:1], [])]
        ['no record']
    """
    return [_judge(target, records) for target in targets]


def _judge(target: Target, records: Sequence[Record]) -> Outcome:
    found = [record for record in records if _is_about(target, record)]
    if not found:
        return Outcome(target, "no record")
    counting = [record for record in found if DEVICE in _device(record)]
    record = (counting or found)[-1]
    results = record[target.direction]
    ours, peer = (results[who]["rounds"] for who in (target.ours, target.peer))
    ratio = float(np.median(np.divide(ours, peer)))
    missed = wrong(results[target.ours])
    note = f"{', '.join(missed)} wrong" if missed else ""
    if not counting:
        note = f"{note or f'{ratio:.2f}'} on {_device(record)}"
        return Outcome(target, "no record", note=note)
    verdict = "met" if ratio <= target.limit and not missed else "missed"
    return Outcome(target, verdict, ratio, record["date"], note)


def _device(record: Record) -> str:
    return record["device"]["device"]


def _is_about(target: Target, record: Record) -> bool:
    """Whether the record has the ratio, and of a peer that computed the right thing."""
    if record["kind"] != "attention" or record["case"] != target.case:
        return False
    results = record.get(target.direction, {})
    return (
        target.ours in results
        and target.peer in results
        and not wrong(results[target.peer])
    )


def targets_tables(outcomes: Sequence[Outcome]) -> list[Facts]:
    """The outcomes as tables for the terminal, one for each group."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.target.group, []).append(outcome)
    return [_group_table(name, found) for name, found in groups.items()]


def _group_table(group: str, outcomes: list[Outcome]) -> Facts:
    met = sum(outcome.verdict == "met" for outcome in outcomes)
    rows = []
    for outcome in outcomes:
        target, ratio = outcome.target, outcome.ratio
        found = "?" if ratio is None else f"{ratio:.3f}"
        rows.append(
            (
                target.case,
                DIRECTIONS[target.direction],
                target.peer,
                f"{found} <= {target.limit:g}",
                outcome.verdict + (f" ({outcome.note})" if outcome.note else ""),
            )
        )
    title = f"{group}, {DEVICE}: {met} of {len(rows)} met"
    return Facts(title, ("case", "pass", "peer", "ours / peer", ""), rows)
