"""Pictures of records: what is drawn, of which device, and that nothing is cut off."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from jsparse.backends._measured import RIVALS
from jsparse.bench import PEERS, _plots, plots, read_records, records_folder
from jsparse.bench._models import MODEL_PEERS
from jsparse.measure import BadInput

DENSE = {"cudnn": 8.6e-3, "tokamax": 9.1e-3, "fa3": 11.2e-3}


def record(case: str, density: float, **changes: Any) -> dict[str, Any]:
    """As of an H100: sparse contenders in proportion to density, dense ones level."""

    def side(seconds: float, computes: str) -> dict[str, Any]:
        work = 4.4e12 * (1.0 if computes == "all" else density)
        return {
            "computes": computes,
            "errors": {"out": {"ok": True}},
            "seconds": {"min": seconds, "median": seconds, "max": seconds},
            "gflops_per_second": work / seconds / 1e9,
        }

    def sides(times: float) -> dict[str, Any]:
        sparse = {"mosaic_gpu": 9e-3, "fa4": 11e-3, "flex": 13e-3}
        found = {
            name: side(times * (20e-6 + density * seconds), "blocks")
            for name, seconds in sparse.items()
        }
        return found | {n: side(times * s, "all") for n, s in DENSE.items()}

    return {
        "kind": "attention",
        "case": case,
        "date": "2026-05-01T00:00:00+00:00",
        "device": {"platform": "gpu", "device": "NVIDIA H100 80GB HBM3"},
        "versions": {"jax": "0.11.2"},
        "ours": "mosaic_gpu",
        "input": {"heads": 16, "head_dim": 64, "dtype": "bfloat16"},
        "mask": {"q_len": 16384, "density": density},
        "forward": sides(1.0),
        "backward": sides(2.6),
        **changes,
    }


SWEEP = [
    record(f"sweep16k_d64_p{percent:02}", percent / 100)
    for percent in (1, 2, 5, 10, 20, 50, 100)
]
CASES = [
    record(case, density)
    for case, density in (
        ("ribosome100k_h16_d64", 0.031),
        ("ribosome100k_h4_d32", 0.031),
        ("seed800", 0.2),
        ("seed100k", 0.2),
        ("diag100k", 0.00125),
        ("graph32k_h16_d64", 0.12),
        ("graph16k_h16_d128", 0.2),
    )
]


def pixels(png: bytes) -> np.ndarray:
    return image.imread(io.BytesIO(png), format="png")[..., :3]


def of_forward_only(record: dict[str, Any]) -> dict[str, Any]:
    """One narrow panel, of more contenders than its legend has columns for."""
    found = {k: v for k, v in record.items() if k != "backward"}
    more = dict.fromkeys(("cutlass", "grouped_gemm"), record["forward"]["fa4"])
    return found | {"forward": record["forward"] | more}


@pytest.mark.parametrize("name", ["rates.png", "density.png", "forward only"])
def test_pictures_are_whole(name):
    if name == "forward only":
        name, records = "density.png", [of_forward_only(x) for x in SWEEP]
    else:
        records = [*CASES, *SWEEP]
    picture = pixels(plots(records)[name])
    sides = (picture[:6], picture[-6:], picture[:, :6], picture[:, -6:])
    edge = np.concatenate([side.reshape(-1, 3) for side in sides])
    assert (edge == 1).all(), "something reaches the edge"
    for colour in ("#2f6db3", "#e07b1f"):
        wanted = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        assert (np.abs(picture - wanted).max(-1) < 0.01).sum() > 100


def test_pictures_are_the_same_each_time():
    assert plots([*CASES, *SWEEP]) == plots([*CASES, *SWEEP])


def test_only_what_was_recorded_is_drawn():
    assert list(plots(CASES)) == ["rates.png"]
    assert list(plots(SWEEP)) == ["density.png"]
    alone = record("seed800", 0.2)
    del alone["backward"]
    alone["forward"] = {"mosaic_gpu": alone["forward"]["mosaic_gpu"]}
    assert list(plots([alone])) == ["rates.png"]


def test_newest_of_the_gpu_is_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(_plots, "draw_rates", lambda records, _: drawn.append(records))
    old, new = record("seed800", 0.2), record("seed800", 0.2)
    cpu = record("seed800", 0.2, device={"platform": "cpu", "device": "ACME"})
    latency = record("seed800", 0.2, kind="latency")
    plots([old, new, cpu, latency])
    assert drawn == [[new]]
    assert drawn[0][0] is new
    plots([cpu])
    assert drawn[1] == [cpu]


def test_every_contender_has_a_colour_of_its_own():
    assert {*PEERS, *RIVALS, *MODEL_PEERS} == set(_plots._COLOURS)
    assert len(set(_plots._COLOURS.values())) == len(_plots._COLOURS)


def test_shipped_records_are_drawn():
    assert "rates.png" in plots(read_records(records_folder()))


def test_rates_of_records_that_have_ours_only():
    old = record("seed800", 0.2)
    ours, peer = (old["forward"][name] for name in ("mosaic_gpu", "fa4"))
    rate = peer.pop("gflops_per_second")
    assert _plots._rates(old, "forward")["fa4"] == pytest.approx(rate)
    assert _plots._rates(old, "forward")["ours"] == ours["gflops_per_second"]
    assert _plots._rates(old, "forward_backward") == {}


def test_wrong_peers_are_not_drawn():
    fast = record("seed800", 0.2)
    fast["forward"]["fa4"]["errors"]["out"]["ok"] = False
    assert "fa4" not in _plots._rates(fast, "forward")
    assert "fa4" in _plots._rates(fast, "backward")


def test_nothing_to_draw():
    with pytest.raises(BadInput, match="no record of an attention case"):
        plots([])
