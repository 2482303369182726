"""How a case is run: contenders, errors, refusals, demands."""

from __future__ import annotations

import fcntl
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.bench import (
    PEERS,
    Options,
    _builds,
    _contest,
    _runner,
    facts,
    markdown,
    run_case,
)
from jsparse.bench._cases import (
    AttentionCase,
    DeviceMaskCase,
    HostMaskCase,
    ball,
    of_blocks,
)
from jsparse.bench._contract import EVERY, Task
from jsparse.bench._jax_peers import Dense, JaxCall, JaxContender, JaxPeer, Ours
from jsparse.bench._patterns import uniform
from jsparse.measure import BadInput, Progress
from jsparse.ops import block_sparse_attention

CASE = AttentionCase(
    "tiny", "a test", 2, 16, "float32", lambda: of_blocks(uniform(4, 2))
)


def run(case: Any = CASE, **options: Any) -> dict[str, Any]:
    return run_case(case, Options(**{"repeats": 3, **options}), Progress())


def test_record_of_an_attention_case():
    record = run()
    assert record["kind"] == "attention"
    assert record["mask"]["blocks"] == 8
    assert record["mask"]["density"] == 0.5
    assert record["input"]["distribution"] == "standard normal"
    assert record["missed"] == []
    for direction, outputs in (
        ("forward", ["out"]),
        ("forward_backward", ["out", "dq"]),
    ):
        ours, dense = record[direction]["xla"], record[direction]["dense"]
        assert ours["seconds"]["count"] == dense["seconds"]["count"] == 3
        assert "ratio" not in ours
        ratios = np.divide(dense["rounds"], ours["rounds"])
        assert dense["ratio"]["median"] == pytest.approx(np.median(ratios))
        assert dense["ratio"]["min"] == pytest.approx(ratios.min())
        assert list(ours["errors"]) == outputs
        for found in (ours, dense):
            assert all(check["ok"] for check in found["errors"].values())
            assert found["temporary_bytes"] > 0
    work = 4 * 8 * 128 * 128 * 2 * 16
    median = record["forward"]["xla"]["seconds"]["median"]
    rate = record["forward"]["xla"]["gflops_per_second"]
    assert rate == pytest.approx(work / median / 1e9)


def test_turns_alternate(monkeypatch):
    turns = []
    real = JaxCall.times

    def spy(call, n, count, kernels):
        turns.append((call.temporary_bytes, n, count))
        return real(call, n, count, kernels)

    monkeypatch.setattr(JaxCall, "times", spy)
    record = run(backward=False, repeats=4)
    ours, dense = (found["temporary_bytes"] for found in record["forward"].values())
    assert [turn[0] for turn in turns] == [ours, dense, dense, ours] * 2
    assert [turn[1:] for turn in turns[::2]] == [(0, 1), (1, 1)] * 2


@pytest.fixture
def kernels(monkeypatch):
    """A machine whose GPU is this CPU: kernel times are invented, nothing else."""
    real, counts = _runner.measure.machine, []

    def times(call, *arguments, count):
        counts.append(count)
        spent = _runner.measure.time_call(call, *arguments)[0]
        return [spent] * count

    monkeypatch.setattr(
        _runner.measure, "machine", lambda: real() | {"platform": "gpu"}
    )
    monkeypatch.setattr(_runner.measure, "kernel_times", times)
    return counts


def test_gpus_are_timed_by_kernels_and_backward_alone(kernels):
    record = run(repeats=2)
    assert record["timer"].startswith("CUPTI; sum of kernel times, mean of 10 calls")
    assert "forward_backward" not in record
    assert kernels == [1, 10] * (2 * 2 * 2)
    assert record["missed"] == []
    work = 4 * 8 * 128 * 128 * 2 * 16
    for direction, times, output in (("forward", 1, "out"), ("backward", 2.5, "dq")):
        found = record[direction]["xla"]
        assert list(found["errors"]) == [output]
        assert found["errors"][output]["ok"]
        rate = times * work / found["seconds"]["median"] / 1e9
        assert found["gflops_per_second"] == pytest.approx(rate)
        dense = record[direction]["dense"]
        ratios = np.divide(found["rounds"], dense["rounds"])
        assert dense["ours_over_peer"]["median"] == pytest.approx(np.median(ratios))


def test_long_calls_are_timed_one_by_one(kernels, monkeypatch):
    monkeypatch.setattr(_contest, "LONGEST_TURN", 0.0)
    record = run(repeats=2, backward=False)
    assert kernels == [1] * (2 * 2)
    assert record["forward"]["dense"]["seconds"]["count"] == 2


def test_latency_is_a_record_of_its_own(kernels, monkeypatch):
    monkeypatch.setattr(_runner, "LATENCY_CALLS", 12)
    record = run(kind="latency", against=("dense",))
    assert record["kind"] == "latency"
    assert record["missed"] == []
    assert kernels == [10, 2] * 4
    for direction in ("forward", "backward"):
        for found in record[direction].values():
            for timer in ("wall", "kernels"):
                assert found[timer]["count"] == 12
                assert found[timer]["min"] <= found[timer]["p50"] <= found[timer]["max"]
            assert "ratio" not in found
    work = 4 * 8 * 128 * 128 * 2 * 16
    found = record["forward"]["xla"]
    rate = work / found["kernels"]["p50"] / 1e9
    assert found["gflops_per_second"] == pytest.approx(rate)


@pytest.mark.parametrize("kind", ["attention", "latency"])
def test_only_times_are_taken_alone(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(_runner, "LATENCY_CALLS", 2)
    alone = {}

    class Watch(Progress):
        def stage(self, name, total=None):
            with (tmp_path / "lock").open() as other:
                try:
                    fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    alone[name] = False
                except BlockingIOError:
                    alone[name] = True
            return super().stage(name, total)

    options = Options(kind=kind, backward=False, lock=tmp_path / "lock")
    run_case(CASE, options, Watch())
    timed = "tiny: forward" if kind == "attention" else "tiny: 2 calls, forward"
    assert alone.pop(timed)
    assert len(alone) > 4 and not any(alone.values())


def test_latency_on_a_cpu_has_no_kernels(monkeypatch):
    monkeypatch.setattr(_runner, "LATENCY_CALLS", 3)
    record = run(kind="latency", against=(), backward=False)
    assert "kernels" not in record["forward"]["xla"]


def test_latency_needs_attention():
    case = HostMaskCase("m", "a test", functools.partial(ball, 2000), "auto")
    with pytest.raises(BadInput, match="expected an attention case for --latency"):
        run(case, kind="latency")


class Everything(JaxPeer):
    """Dense attention without the mask, as dense kernels compute it."""

    name = "everything"
    computes = EVERY

    def forward(self, q, k, v, pattern):
        return jax.nn.dot_product_attention(q[None], k[None], v[None])[0]


def test_dense_kernels_are_held_to_dense_attention(monkeypatch):
    monkeypatch.setitem(PEERS, "everything", Everything())
    record = run(against=("everything",), repeats=1)
    for direction in ("forward", "forward_backward"):
        found = record[direction]["everything"]
        assert found["computes"] == "all"
        assert all(check["ok"] for check in found["errors"].values())
        # All 16 blocks are useful to it, 8 to us.
        ours = record[direction]["xla"]
        work = [x["gflops_per_second"] * x["seconds"]["median"] for x in (ours, found)]
        assert work[1] == pytest.approx(2 * work[0])
    assert record["forward"]["xla"]["computes"] == "blocks"
    assert record["missed"] == []


def test_rows_are_checked_as_many_as_are_affordable(monkeypatch):
    monkeypatch.setitem(PEERS, "everything", Everything())
    # 512 keys and 2 heads, and 1 of 2 blocks.
    for elements, sparse, every in (
        (1 << 21, 256, 256),
        (100 * 512, 100, 50),
        (0, 8, 8),
    ):
        monkeypatch.setattr(_contest, "_ELEMENTS", elements)
        found = run(against=("everything",), repeats=1, backward=False)["forward"]
        assert found["xla"]["errors"]["out"]["rows"] == sparse
        assert found["everything"]["errors"]["out"]["rows"] == every


@pytest.mark.parametrize("where", ["enter", "ready", "rows", "times"])
def test_peer_that_fails_is_left_out_and_said(monkeypatch, where):
    def broken(*_):
        raise RuntimeError("the kernel\ndoes not compile")

    owner = {"enter": Everything, "ready": JaxContender}.get(where, JaxCall)
    real = getattr(owner, where)

    def only_the_peer(self, *arguments):
        name = getattr(getattr(self, "peer", self), "name", None)
        names = getattr(self, "names", None)
        chosen = name == "everything" or (names and self.sets is not first)
        return broken() if chosen else real(self, *arguments)

    first: list = []
    if owner is JaxCall:
        ready = JaxContender.ready

        def remember(self, direction):
            nonlocal first
            call = ready(self, direction)
            if self.peer.name != "everything":
                first = call.sets
            return call

        monkeypatch.setattr(JaxContender, "ready", remember)
    monkeypatch.setitem(PEERS, "everything", Everything())
    monkeypatch.setattr(owner, where, only_the_peer)
    record = run(against=("everything",), backward=False)
    assert list(record["forward"]) == ["xla"]
    reason = "RuntimeError: the kernel does not compile"
    assert record["left_out"]["everything"].endswith(reason)
    (line,) = record["missed"]
    assert f"everything failed: {reason}" in line


def test_our_own_failure_is_raised(monkeypatch):
    monkeypatch.setattr(JaxCall, "rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(against=())


def test_static_patterns_are_closed_over():
    seen = []

    class Planned(Ours):
        def forward(self, q, k, v, pattern):
            seen.append(pattern)
            return block_sparse_attention(q, k, v, pattern, implementation="xla")

    mask = CASE.load().mask
    sets = [tuple(jax.random.normal(jax.random.key(0), (4, 512, 2, 16)))]
    for traced in (False, True):
        ours = Planned("mosaic_gpu", traced=traced)
        assert ours.static is not traced
        contender = ours.enter(Task(mask, sets))
        rows = np.arange(3)
        assert list(contender.ready("backward").rows(rows)) == ["dq"]
        assert list(contender.ready("forward").rows(rows)) == ["out"]
        assert all((pattern is mask) is not traced for pattern in seen)
        seen.clear()
    assert not Ours("xla", traced=False).static


def test_overrides_make_another_case():
    record = run(heads=1, dtype="bfloat16", backward=False, against=())
    assert record["case"] == "tiny-h1-d16-bfloat16"
    assert list(record["forward"]) == ["xla"]
    assert record["missed"] == []


def test_a_traced_mask_makes_another_case():
    record = run(traced=True, backward=False, against=())
    assert (record["case"], record["pattern"]) == ("tiny-traced", "traced")


def test_wrong_results_are_missed(monkeypatch):
    real = Ours.forward
    monkeypatch.setattr(Ours, "forward", lambda *a: real(*a) * 1.01)
    record = run(backward=False)
    assert not record["forward"]["xla"]["errors"]["out"]["ok"]
    assert record["forward"]["dense"]["errors"]["out"]["ok"]
    (line,) = record["missed"]
    assert "tiny, forward, xla: out is wrong" in line


@pytest.mark.parametrize("asked_for", [True, False])
def test_peer_that_is_wrong_gives_no_ratio(monkeypatch, asked_for):
    real = Dense.forward
    monkeypatch.setattr(Dense, "forward", lambda *a: real(*a) * 1.01)
    against = ("dense",) if asked_for else None
    record = run(backward=False, against=against, min_ratio=1e-9)
    found = record["forward"]["dense"]
    assert not found["errors"]["out"]["ok"]
    assert {"ratio", "ours_over_peer"}.isdisjoint(found)
    where = "tiny, forward, dense: out is wrong"
    assert where in record["left_out"]["dense"]
    *lines, last = record["missed"]
    assert "no peer ran and was right" in last
    assert [where in line for line in lines] == [True] * asked_for
    (row,) = (row for row in facts(record)[1].rows if row[0] == "dense (wrong)")
    assert row[4] == ""
    assert "| dense (wrong) " in markdown([record])


def test_a_failing_close_loses_no_record(monkeypatch):
    def broken(_):
        raise OSError("the pipe\nis gone")

    monkeypatch.setattr(JaxContender, "close", broken)
    record = run(repeats=1)
    assert record["left_out"]["dense"] == "close: OSError: the pipe is gone"
    assert record["missed"] == []
    for direction in ("forward", "forward_backward"):
        assert record[direction]["dense"]["ratio"]["count"] == 1


def test_wrong_gradients_are_missed(monkeypatch):
    real = Ours.backward

    def wrong(*arguments):
        out, dq, dk, dv = real(*arguments)
        return out, -dq, dk, dv

    monkeypatch.setattr(Ours, "backward", wrong)
    record = run(against=())
    assert [line.split(" is wrong")[0] for line in record["missed"]] == [
        "tiny, forward_backward, xla: dq"
    ]


def test_demands_that_are_not_met():
    record = run(min_ratio=1e9, max_seconds=1e-9, backward=False)
    assert len(record["missed"]) == 2
    assert "less than the 1e+09 demanded" in record["missed"][0]
    assert "more than the 1e-09 s demanded" in record["missed"][1]
    assert run(min_ratio=1e-9, max_seconds=60, backward=False)["missed"] == []


def test_a_ratio_needs_a_peer():
    (line,) = run(min_ratio=1.0, against=(), backward=False)["missed"]
    assert "no peer ran" in line


def test_peer_that_does_not_fit_is_left_out_or_refused(monkeypatch):
    case = AttentionCase(
        "wide", "a test", 2, 16, "float32", lambda: of_blocks(uniform(16, 1))
    )
    monkeypatch.setattr(_runner.measure, "available_memory", lambda: 20_000_000)
    refusal = r"wide: dense, forward: needs .* MB, 20.0 MB are free"
    with pytest.raises(BadInput, match=refusal):
        run(case, against=("dense",))
    record = run(case)
    assert list(record["forward"]) == list(record["forward_backward"]) == ["xla"]
    assert "needs" in record["left_out"]["dense"]


def test_peer_left_out_once_stays_out(monkeypatch):
    free = iter([10**12, 10**12, 0, 10**12])  # inputs, ours, dense, ours again
    monkeypatch.setattr(_runner.measure, "available_memory", lambda: next(free))
    record = run()
    assert list(record["forward"]) == list(record["forward_backward"]) == ["xla"]
    assert record["left_out"]["dense"].startswith("forward: needs")


def test_a_case_that_does_not_fit_is_refused(monkeypatch):
    free = iter([10**12, 1000])  # inputs, ours
    monkeypatch.setattr(_runner.measure, "available_memory", lambda: next(free))
    with pytest.raises(BadInput, match="tiny: xla, forward: needs"):
        run()


def test_inputs_that_do_not_fit_are_not_made(monkeypatch):
    def forbidden(*_):
        raise AssertionError("the inputs were made")

    monkeypatch.setattr(_runner, "draw_inputs", forbidden)
    with pytest.raises(BadInput, match="1 heads of 99999 are 99,999 channels"):
        run(heads=1, head_dim=99999)
    monkeypatch.setattr(_runner.measure, "available_memory", lambda: 1000)
    with pytest.raises(BadInput, match=r"need 0.5 MB and 0.0 MB are free"):
        run()


def test_nothing_dense_is_allocated_to_find_out_that_it_does_not_fit(monkeypatch):
    def forbidden(*_):
        raise AssertionError("the mask was written out")

    monkeypatch.setattr(Dense, "prepare", forbidden)
    case = AttentionCase(
        "wide", "a test", 1, 8, "float32", lambda: of_blocks(uniform(300, 1))
    )
    monkeypatch.setattr(_runner.measure, "available_memory", lambda: 10**9)
    record = run(case, backward=False, repeats=1)
    assert "are free" in record["left_out"]["dense"]


def test_peer_that_is_not_available(monkeypatch):
    monkeypatch.setattr(Dense, "available", lambda _: "there is no paper")
    with pytest.raises(BadInput, match="'dense' cannot run here: there is no paper"):
        run(against=("dense",))
    assert run(backward=False)["left_out"]["dense"] == "there is no paper"


@pytest.mark.parametrize(
    "options",
    [
        {"repeats": 0},
        {"heads": -1},
        {"dtype": "int8"},
        {"against": ("fa9",)},
        {"implementation": "magic"},
        {"min_ratio": float("nan")},
        {"max_seconds": float("nan")},
        {"max_seconds": -1.0},
    ],
)
def test_bad_options(options):
    with pytest.raises(BadInput):
        Options(**options)


def test_implementation_that_cannot():
    with pytest.raises(BadInput, match=r"'cutlass' cannot run this: .* These can: xla"):
        run(implementation="cutlass")


def test_dense_peer_gives_ours():
    pattern = CASE.load()
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((512, 2, 16), np.float32)) for _ in range(3)
    )
    ours = Ours("reference").forward(q, k, v, pattern.mask)
    out = Dense().forward(q, k, v, Dense().prepare(pattern.mask))
    np.testing.assert_allclose(out, ours, atol=1e-5)


def test_host_mask_case():
    case = HostMaskCase("m", "a test", functools.partial(ball, 2000), "auto")
    record = run(case)
    assert record["kind"] == "mask on the host"
    assert {row["order"] for row in record["orders"]} == {
        "file",
        "hilbert",
        "bisection",
    }
    assert record["mask"]["q_len"] == 2000
    assert all(spent["count"] == 3 for spent in record["seconds"].values())
    assert run(case, max_seconds=1e-9)["missed"]


def test_device_mask_case(monkeypatch):
    case = DeviceMaskCase("m", "a test", functools.partial(ball, 2000), "auto")
    record = run(case)
    assert record["kind"] == "mask on the device"
    assert record["wrong_blocks"] == 0
    assert record["missed"] == []

    real = _builds.patterns.device.radius
    monkeypatch.setattr(
        _builds.patterns.device,
        "radius",
        lambda points, cutoff, **rest: real(points, cutoff * 0.7, **rest),
    )
    record = run(case)
    assert record["wrong_blocks"] > 0
    assert "differ from the mask of the host" in record["missed"][0]
