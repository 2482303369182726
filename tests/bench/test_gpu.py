"""Every peer on a GPU, on a case that takes seconds: it runs, and it is right."""

from __future__ import annotations

import jax
import pytest

from jsparse.bench import PEERS, Options, run_case
from jsparse.bench._cases import AttentionCase, of_blocks
from jsparse.bench._patterns import uniform
from jsparse.measure import Progress

CASE = AttentionCase(
    "small", "a test", 2, 64, "bfloat16", lambda: of_blocks(uniform(16, 5))
)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # other people's
@pytest.mark.parametrize("name", PEERS)
def test_peer_runs_and_is_right(name):
    reason = PEERS[name].available()
    if reason is not None:
        pytest.skip(reason)
    with jax.numpy_dtype_promotion("standard"):
        record = run_case(CASE, Options(against=(name,), repeats=2), Progress())
    assert record["missed"] == []
    without = record["left_out"].keys()
    assert without == ({"grouped_gemm"} if name == "grouped_gemm" else set())
    for direction, output in (("forward", "out"), ("backward", "dq")):
        for found in record[direction].values():
            assert found["errors"][output]["norm_error"] < 2e-2
            assert 1e-6 < found["seconds"]["min"] < 1e-1
        if direction == "forward" or name not in without:
            assert 1e-3 < record[direction][name]["ours_over_peer"]["median"] < 1e3


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_latency_has_both_timers():
    with jax.numpy_dtype_promotion("standard"):
        options = Options(against=(), kind="latency")
        record = run_case(CASE, options, Progress())
    found = record["backward"][record["ours"]]
    assert found["kernels"]["count"] == found["wall"]["count"] == 100
    assert found["kernels"]["p50"] < found["wall"]["max"]
