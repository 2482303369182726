"""Targets: every line of the table, and what records make of it."""

from __future__ import annotations

from typing import Any

import pytest

from jsparse.bench import (
    PEERS,
    all_cases,
    choose_targets,
    judge_targets,
    targets_tables,
)
from jsparse.bench._kinds import ModelCase
from jsparse.bench._models import MODEL_PEERS
from jsparse.bench._targets import TARGETS, Target
from jsparse.measure import BadInput

LINE = Target("mosaic_forward", "seed800", "forward", "fa4", "mosaic_gpu", 0.5)


def record(ratio: float, **changes: Any) -> dict[str, Any]:
    check = {"ok": True}
    return {
        "kind": "attention",
        "case": "seed800",
        "date": "2026-01-01",
        "device": {"device": "NVIDIA H100 80GB HBM3"},
        "ours": "mosaic_gpu",
        "forward": {
            "mosaic_gpu": {"rounds": [ratio, 1.0, ratio], "errors": {"out": check}},
            "fa4": {"rounds": [1.0, 1.0, 1.0], "errors": {"out": check}},
        },
        **changes,
    }


def test_the_table_has_every_line():
    counts: dict[str, int] = {}
    for target in TARGETS:
        counts[target.group] = counts.get(target.group, 0) + 1
        assert 0 < target.limit <= 2
    assert counts == {
        "mosaic_forward": 7,
        "mosaic_backward": 5,
        "cutlass_forward": 7,
        "cutlass_backward": 5,
        "bias": 13,
    }
    assert LINE in TARGETS
    assert len(set(TARGETS)) == len(TARGETS)


def test_targets_are_of_cases_and_peers_that_exist():
    cases = all_cases()
    for target in TARGETS:
        case = cases[target.case]
        known = MODEL_PEERS if isinstance(case, ModelCase) else PEERS
        assert target.peer in known
        if isinstance(case, ModelCase):
            assert case.alone == (target.peer == "no_bias")


@pytest.mark.parametrize(
    "records, verdict, ratio",
    [
        ([], "no record", None),
        ([record(0.5)], "met", 0.5),
        ([record(0.51)], "missed", 0.51),
        ([record(0.9), record(0.4)], "met", 0.4),
        ([record(0.9), record(0.4, ours="cutlass")], "met", 0.4),
        ([record(0.4), record(0.9, forward={"mosaic_gpu": {}})], "met", 0.4),
        ([record(0.4), record(0.9, kind="latency")], "met", 0.4),
        ([record(0.4, case="seed800-h2-d64-float16")], "no record", None),
    ],
)
def test_verdicts(records, verdict, ratio):
    (found,) = judge_targets([LINE], records)
    assert (found.verdict, found.ratio) == (verdict, ratio)


def test_wrong_results_miss():
    wrong = record(0.1)
    wrong["forward"]["mosaic_gpu"]["errors"]["out"] = {"ok": False}
    (found,) = judge_targets([LINE], [record(0.1), wrong])
    assert (found.verdict, found.note) == ("missed", "out wrong")
    (table,) = targets_tables([found])
    assert table.title == "mosaic_forward, H100: 0 of 1 met"
    assert table.rows[0][3:] == ("0.100 <= 0.5", "missed (out wrong)")


def test_what_another_gpu_says_is_a_note():
    older, newer = (record(x, device={"device": "NVIDIA H200"}) for x in (0.9, 0.4))
    (found,) = judge_targets([LINE], [older, newer])
    assert (found.verdict, found.ratio) == ("no record", None)
    (table,) = targets_tables([found])
    assert table.title == "mosaic_forward, H100: 0 of 1 met"
    assert table.rows[0][3:] == ("? <= 0.5", "no record (0.40 on NVIDIA H200)")
    (found,) = judge_targets([LINE], [record(0.6), newer])
    assert (found.verdict, found.ratio, found.note) == ("missed", 0.6, "")
    newer["forward"]["mosaic_gpu"]["errors"]["out"] = {"ok": False}
    (found,) = judge_targets([LINE], [newer])
    assert (found.verdict, found.note) == ("no record", "out wrong on NVIDIA H200")


def test_a_peer_that_is_wrong_gives_no_ratio():
    wrong = record(0.1)
    wrong["forward"]["fa4"]["errors"] = {"out": {"ok": False}}
    (found,) = judge_targets([LINE], [record(0.6), wrong])
    assert (found.verdict, found.ratio) == ("missed", 0.6)
    (found,) = judge_targets([LINE], [wrong])
    assert found.verdict == "no record"


def test_choice_of_groups():
    assert choose_targets() == list(TARGETS)
    assert {t.group for t in choose_targets(["cutlass"])} == {
        "cutlass_forward",
        "cutlass_backward",
    }
    with pytest.raises(BadInput, match="unknown group of targets 'triton'"):
        choose_targets(["triton"])
