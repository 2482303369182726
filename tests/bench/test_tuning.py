"""The search among configs, by invented times, and what becomes of its outcome.

Results here are small arrays and times are given: no kernel runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, use_abstract_mesh

from jsparse import ops
from jsparse.backends import _measured, cutlass, mosaic_gpu
from jsparse.bench import (
    Options,
    _runner,
    _tuning,
    facts,
    markdown,
    read_entries,
    read_records,
    run_case,
    write_entries,
    write_record,
)
from jsparse.bench._cases import AttentionCase, of_blocks
from jsparse.bench._contract import Task
from jsparse.bench._jax_peers import JaxContender, Ours
from jsparse.bench._models import (
    distance_case,
    pair_case,
    triangle_case,
    windows_case,
)
from jsparse.bench._patterns import uniform
from jsparse.bench._tuning import difference, search
from jsparse.measure import BadInput, Progress
from jsparse.pallas_kernels.mosaic_gpu import _candidates, _tables
from tests.pallas_kernels.launches import H100

ROWS = jnp.asarray(np.random.default_rng(0).standard_normal((50, 2, 16)), "bfloat16")


class Invented:
    """A trial whose results and times the test chooses."""

    def __init__(self, seconds: float, results: Any = None, log: Any = None):
        self.spent, self.log = seconds, log
        self.found = [ROWS] if results is None else results

    def results(self):
        return self.found

    def seconds(self, n: int) -> float:
        if self.log is not None:
            self.log.append((self.spent, n))
        if self.spent <= 0:
            raise RuntimeError("the launch\nfailed")
        return self.spent * (1 + n)


def outcome(trials: dict[str, Any], repeats: int = 4) -> _tuning.Found:
    def launch(name):
        if isinstance(trials[name], Exception):
            raise trials[name]
        return trials[name]

    return search(list(trials), launch, repeats, 2, Progress(), "a test")


def test_the_fastest_is_found_by_the_ratio_of_rounds():
    log: list[tuple[float, int]] = []
    times = {"chosen": 2.0, "slow": 3.0, "fast": 1.0}
    found = outcome({name: Invented(t, log=log) for name, t in times.items()})
    assert found.best() == "fast"
    assert list(found.rounds) == ["chosen", "slow", "fast"]
    assert found.ratios("slow").tolist() == [1.5] * 4
    assert [spent for spent, _ in log] == [2.0, 3.0, 1.0, 1.0, 3.0, 2.0] * 2
    assert [n for _, n in log] == ([0] * 3 + [1] * 3) * 2
    assert found.left_out == {}


@pytest.mark.parametrize("time, best", [(0.995, "chosen"), (0.98, "other")])
def test_the_chosen_one_stays_unless_another_is_clearly_faster(time, best):
    found = outcome({"chosen": Invented(1.0), "other": Invented(time)})
    assert found.best() == best


def test_wrong_and_failing_configs_are_left_out():
    one_row = ROWS.at[7, 1].multiply(0.8)
    found = outcome(
        {
            "chosen": Invented(1.0),
            "wrong": Invented(0.1, [one_row]),
            "nan": Invented(0.1, [ROWS.at[0, 0, 0].set(jnp.nan)]),
            "rounding": Invented(0.9, [ROWS * jnp.asarray(1 + 2**-7, "bfloat16")]),
            "refused": ValueError("does not\ncompile"),
            "failing": Invented(0.0),
        }
    )
    assert list(found.rounds) == ["chosen", "rounding"]
    assert found.best() == "rounding"
    assert found.differences["chosen"] == 0.0
    limit = "from the chosen config's; at most 3.1e-02 is rounding"
    assert found.left_out == {
        "wrong": f"its results differ by 2.0e-01 {limit}",
        "nan": f"its results differ by inf {limit}",
        "refused": "ValueError: does not compile",
        "failing": "RuntimeError: the launch failed",
    }


@pytest.mark.parametrize("trial", [ValueError("no"), Invented(0.0)])
def test_a_failure_of_the_chosen_one_is_raised(trial):
    with pytest.raises((ValueError, RuntimeError)):
        outcome({"chosen": trial, "other": Invented(1.0)})


def test_difference_is_that_of_the_worst_row():
    x = jnp.ones((10, 4))
    assert difference([x, x.at[3].set(1.25)], [x, x]) == 0.25
    short = x.at[3].set(1e-6)
    assert difference([short.at[3].set(0)], [short]) < 2e-6
    nan = x.at[3, 0].set(jnp.nan)
    assert difference([nan], [nan]) == 0.0
    assert difference([x], [nan]) == difference([nan], [x]) == float("inf")


# ------------------------------------------------------------------------- a case

CASE = AttentionCase(
    "tiny", "a test", 2, 64, "bfloat16", lambda: of_blocks(uniform(4, 2))
)


@pytest.fixture
def hopper(monkeypatch):
    """Lets the backend trace its kernels here; nothing runs them."""
    monkeypatch.setattr(mosaic_gpu, "why_not", lambda problem: None)
    monkeypatch.setattr(_runner, "no_gpu", lambda: None)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        yield


@pytest.fixture
def tuned(hopper, monkeypatch) -> dict[str, Any]:
    """A record of invented times: each config is faster than the one before."""
    built = []

    def build(contender, key, config):
        built.append((key, config))
        return Invented(1.0 / len(built))

    monkeypatch.setattr(_tuning, "build", build)
    return run_case(CASE, Options(kind="tune", repeats=2), Progress())


def test_record_of_configs(tuned, tmp_path: Path):
    assert (tuned["kind"], tuned["ours"], tuned["missed"]) == ("tune", "mosaic_gpu", [])
    assert [found["kernel"] for found in tuned["tuned"]] == ["forward", "dq", "dkv"]
    for found, entry in zip(tuned["tuned"], tuned["entries"], strict=True):
        key = _tables.key_of(entry)
        assert key[:6] == ("sm90", found["kernel"], 64, 64, 128, 128)
        assert key.launch == ("few_rows" if key.kernel == "forward" else None)
        configs = _candidates.candidates(key, "bfloat16")
        assert [one["config"] for one in found["tried"]] == [
            _tables.fields_of(config) for config in configs
        ]
        assert [one["best"] for one in found["tried"]] == [
            config is configs[-1] for config in configs
        ]
        assert entry["config"] == found["tried"][-1]["config"]
        assert entry["measured"]["ratio"] == found["tried"][-1]["ratio"]["median"] < 1
        assert entry["measured"]["case"] == "tiny"
    tables = facts(tuned)[1:]
    assert [table.title for table in tables] == [
        f"tiny: configs of {kernel}" for kernel in ("forward", "dq", "dkv")
    ]
    assert all(table.chosen == len(table.rows) - 1 for table in tables)
    assert "tiny-tune." in write_record(tuned, tmp_path).name
    assert read_records(tmp_path)[0]["entries"] == tuned["entries"]
    assert markdown([tuned]) == "No benchmark was recorded yet."


def test_entries_become_a_table(tuned, tmp_path: Path, monkeypatch):
    file = tmp_path / "tables.json"
    write_entries(file, tuned["entries"][:2])
    changed = tuned["entries"][1] | {"measured": {"case": "another"}}
    write_entries(file, [changed, tuned["entries"][2]])
    found = _tables.parse(file.read_text())
    assert {_tables.key_of(entry) for entry in found} == {
        _tables.key_of(entry) for entry in tuned["entries"]
    }
    assert changed in found
    monkeypatch.setattr(_tables, "FILE", file)
    monkeypatch.setattr(_tables, "shipped", _tables.shipped.__wrapped__)
    for entry in tuned["entries"]:
        chosen = _candidates.chosen(_tables.key_of(entry))
        assert _tables.fields_of(chosen) == entry["config"]


def test_entries_do_not_overwrite_another_file(tmp_path: Path):
    file = tmp_path / "package.json"
    for text in ("[]", "{", json.dumps({"format": 1, "entries": [{}]})):
        file.write_text(text)
        with pytest.raises(BadInput, match="is no table of configs"):
            write_entries(file, [])
        assert file.read_text() == text


def test_only_the_forward_kernel_is_tuned_without_backward(hopper, monkeypatch):
    monkeypatch.setattr(_tuning, "build", lambda *_: Invented(1.0))
    options = Options(kind="tune", repeats=1, backward=False)
    record = run_case(CASE, options, Progress())
    (found,) = record["tuned"]
    assert found["kernel"] == "forward"
    assert found["tried"][0]["best"]


def test_configs_are_kept_where_only_implementations_are_compared(rivals):
    record = run_case(CASE, Options(kind="tune", repeats=2, configs=False), Progress())
    assert record["entries"] == []
    assert [x["kernel"] for x in record["tuned"]] == [
        f"the {direction} pass" for direction in _measured.PASSES
    ]
    assert [x["fastest"] for x in record["choices"]] == ["cutlass", "mosaic_gpu"]
    assert [*map(_measured.key_of, record["choices"])] == [
        *map(_measured.key_of, rivals["choices"])
    ]


@pytest.mark.parametrize(
    "case, bias",
    [
        (pair_case("pair", 500, 2, 64), "16 bits"),
        (pair_case("pair32", 500, 2, 64, bias_dtype="float32"), "32 bits"),
        (triangle_case("triangle", 3, 300, 2, 32), "16 bits"),
        (windows_case("windows", 700, 2, 32), "16 bits"),
        (distance_case("distance", 40, 2, 64), "linear"),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_configs_beside_a_bias(case, bias, hopper, monkeypatch):
    monkeypatch.setattr(_tuning, "build", lambda *_: Invented(1.0))
    record = run_case(case, Options(kind="tune", repeats=1), Progress())
    assert record["choices"] == []  # one of the implementations refuses it here
    assert [(x["kernel"], x["bias"]) for x in record["entries"]] == [
        (kernel, bias) for kernel in ("forward", "dq", "dkv")
    ]
    for entry, found in zip(record["entries"], record["tuned"], strict=True):
        key = _tables.key_of(entry)
        assert len(found["tried"]) == len(_candidates.candidates(key, "bfloat16")) > 1


@pytest.mark.parametrize("kernel, part", [("dq", "a"), ("dkv", "bc")])
def test_a_config_is_in_use_while_it_compiles(hopper, monkeypatch, kernel, part):
    arrays = jax.random.normal(jax.random.key(0), (4, 512, 2, 64), "bfloat16")
    task = Task(CASE.load().mask, [tuple(arrays)])
    ours = Ours("mosaic_gpu", traced=False)
    (key,) = (key for key in _tuning._keys(task, ours, True) if key.kernel == kernel)
    config = _candidates.candidates(key, "bfloat16")[1]
    seen = []

    def ready(contender, direction):
        gradients = contender.peer.gradients(lambda dout: "abc", None)
        seen.append((direction, gradients, _candidates.chosen(key)))

    monkeypatch.setattr(JaxContender, "ready", ready)
    contender = _tuning.one_kernel(ours, kernel).enter(task)
    _tuning.build(contender, key, config)
    assert seen == [("backward", part, config)]
    assert _candidates.chosen(key) != config


@pytest.fixture
def rivals(hopper, monkeypatch) -> dict[str, Any]:
    """A record where CUTLASS is faster forward and slower backward."""
    seconds = {"forward": (1.0, 0.8), "backward": (1.0, 1.2)}
    monkeypatch.setattr(cutlass, "why_not", lambda problem: None)
    monkeypatch.setattr(_measured, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(_tuning, "build", lambda *_: Invented(1.0))

    def build_pass(task, ways, direction, implementation):
        which = _measured.RIVALS.index(implementation)
        return Invented(seconds[direction][which])

    monkeypatch.setattr(_tuning, "build_pass", build_pass)
    return run_case(CASE, Options(kind="tune", repeats=2), Progress())


def test_the_faster_implementation_of_each_pass(rivals, tmp_path: Path, monkeypatch):
    forward, backward = rivals["choices"]
    assert (forward["fastest"], backward["fastest"]) == ("cutlass", "mosaic_gpu")
    assert forward["measured"]["ratio"] == pytest.approx(0.8)
    assert _measured.key_of(forward) == _measured.Key(
        *("NVIDIA H100 80GB HBM3", "forward", 64, 64, 128, 128, "few_rows")
    )
    assert _measured.key_of(backward).gradient_launches == 2
    assert [table.title for table in facts(rivals)[-2:]] == [
        f"tiny: configs of the {direction} pass" for direction in _measured.PASSES
    ]
    file = tmp_path / "measured.json"
    write_entries(file, rivals["choices"], "choices")
    changed = forward | {"fastest": "mosaic_gpu"}
    write_entries(file, [changed], "choices")
    assert _measured.parse(file.read_text()) == [backward, changed]
    with pytest.raises(BadInput, match="is no table of configs"):
        read_entries(file)
    # Of a table that nobody shipped, the next call knows nothing.
    monkeypatch.setattr(_measured, "shipped", dict)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 512, 2, 64), "bfloat16")
    assert ops.choice(q, k, v, CASE.load().mask)[:2] == ("mosaic_gpu", "mosaic_gpu")


def test_choices_of_a_model(rivals, monkeypatch):
    case = pair_case("pair", 2048, 2, 64)
    monkeypatch.setattr(
        _runner,
        "_model_rivals",
        lambda ours, model: {"cutlass": _runner.implemented(model, "mosaic_gpu")},
    )
    record = run_case(case, Options(kind="tune", repeats=2), Progress())
    found = [(_measured.key_of(x), x["fastest"]) for x in record["choices"]]
    sizes = (64, 64, 128, 128, "few_rows", "dense", 16, False)
    assert [(key[1:], name) for key, name in found] == [
        (("forward", *sizes, 0), "cutlass"),
        (("backward", *sizes, 1), "mosaic_gpu"),
    ]


def test_nothing_is_chosen_where_one_refuses(tuned):
    assert tuned["choices"] == []


def test_other_machines_are_refused():
    with pytest.raises(BadInput, match="--tune cannot run here: it needs an NVIDIA"):
        run_case(CASE, Options(kind="tune"), Progress())


def test_other_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(_runner, "no_gpu", lambda: None)
    with pytest.raises(BadInput, match="'mosaic_gpu' cannot run this: it needs"):
        run_case(CASE, Options(kind="tune"), Progress())


def test_other_implementations_have_no_configs():
    with pytest.raises(BadInput, match="'xla' has no configs to choose from"):
        Options(kind="tune", implementation="xla")
