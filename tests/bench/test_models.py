"""Attention of models: small shapes of every kind, run against their peers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.backends._measured import RIVALS
from jsparse.bench import Options, all_cases, facts, markdown, run_case
from jsparse.bench._contract import BLOCKS
from jsparse.bench._kinds import ModelCase
from jsparse.bench._models import (
    MODEL_PEERS,
    ModelPeer,
    distance_case,
    neighbors_case,
    pair_case,
    triangle_case,
    windows_case,
)
from jsparse.bench._runner import _ours, draw_model_inputs
from jsparse.measure import BadInput, Progress

CASES: dict[str, tuple[ModelCase, list[str]]] = {
    "triangle": (triangle_case("triangle", 21, 21, 2, 8, "float32"), ["einsum"]),
    "rows": (triangle_case("rows", 3, 140, 2, 8, "float32"), ["einsum"]),
    "pair": (pair_case("pair", 150, 4, 24, "float32"), ["einsum"]),
    "windows": (windows_case("windows", 300, 2, 8, "float32"), ["einsum"]),
    "distance": (distance_case("distance", 24, 1, 8, "float32"), ["no_bias"]),
    "neighbors": (neighbors_case("neighbors", 400, 9, 2, 8, "float32"), ["gather"]),
    "biased": (
        neighbors_case("biased", 400, 9, 2, 8, "float32", bias=True, capacity=2),
        ["gather"],
    ),
}


def run(case: ModelCase, **options: Any) -> dict[str, Any]:
    return run_case(case, Options(**{"repeats": 1, **options}), Progress())


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_case_runs_and_is_right(name):
    case, peers = CASES[name]
    record = run(case)
    assert record["missed"] == []
    for direction, results in (
        ("forward", {"out"}),
        ("forward_backward", {"out", "dq"}),
    ):
        assert [*record[direction]] == ["xla", *peers]
        for found in record[direction].values():
            assert {*found["errors"]} == results
            assert all(check["ok"] for check in found["errors"].values())
            assert found["temporary_bytes"] >= 0
        assert "ours_over_peer" in record[direction][peers[0]]
    assert record["input"]["heads"] == case.heads
    names = {*RIVALS} | {p.name for p in case.load().peers}
    assert {*record["left_out"]} == names - {*peers}
    assert any(case.name in table.title for table in facts(record))
    assert case.name in markdown([record])


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_every_peer_agree_with_ours(name):
    case, _ = CASES[name]
    model = case.load()
    inputs = draw_model_inputs(0, model)
    ours = _ours(Options(), model)
    *arranged, dout = ours.arrange(*inputs)
    _, *grads = jax.jit(ours.backward)(
        *arranged, ours.prepare(model.pattern.mask), dout
    )
    found = [jax.tree_util.tree_leaves(x) for x in grads]
    assert all(np.asarray(x).any() for leaves in found for x in leaves)
    for peer in model.peers:
        if not isinstance(peer, ModelPeer) or peer.computes != BLOCKS:
            continue
        if peer.available() is not None:
            continue
        *plain, dout = inputs
        data = peer.prepare(model.pattern.mask)
        _, *want = jax.jit(peer.backward)(*plain, data, dout)
        if model.arrange is not None:  # ours has the gradient on its own blocks
            want = ours.arrange(*want, dout)[:-1]
        for x, y in zip(grads, want, strict=True):
            for a, b in zip(*map(jax.tree_util.tree_leaves, (x, y)), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=5e-5)


def test_bias_is_checked():
    case, _ = CASES["pair"]
    model = case.load()

    def forget(q, k, v, bias, *, implementation):
        return model.attend(q, k, v, 0 * bias, implementation=implementation)

    wrong = ModelCase(
        *("wrong", "a test", case.heads, case.head_dim, case.dtype),
        load=lambda: type(model)(**{**vars(model), "attend": forget}),
    )
    record = run(wrong, backward=False)
    assert "out is wrong" in record["missed"][0]


def test_shapes_are_those_of_the_models():
    def sizes(name):
        case = all_cases()[name]
        assert isinstance(case, ModelCase)
        model = case.load()
        return [x.shape for x in model.shapes[2:]], model.pattern.batch

    assert sizes("triangle768_h4_d32") == ([(768, 768, 4, 32), (4, 768, 768)], 768)
    assert sizes("pair2048_h16_d48") == ([(1, 2048, 16, 48), (16, 2048, 2048)], 1)
    assert sizes("windows100k_h4_d32") == ([(102400, 4, 32), (3200, 4, 32, 128)], 1)
    assert sizes("graph32k_distance") == ([(32768, 16, 64), (16,), (32768, 3)], 1)


def test_random_slopes_are_positive_and_coordinates_wide():
    model = CASES["distance"][0].load()
    *_, slope, coords, dout = draw_model_inputs(0, model)
    assert 0 <= slope.min() <= slope.max() <= 1
    assert 25 < float(jnp.std(coords)) < 35
    assert dout.shape == model.shapes[0].shape


def test_peers_of_other_libraries_say_what_is_missing():
    left_out = run(CASES["triangle"][0], backward=False)["left_out"]
    assert left_out["tokamax"] == "tokamax is not installed: pip install tokamax"
    assert left_out["cuequivariance"].startswith(
        "cuequivariance_jax, cuequivariance_ops_jax are not installed: pip install"
    )
    assert left_out["cudnn"].startswith("it needs an NVIDIA GPU")
    assert "implementation='cutlass' cannot run this" in left_out["cutlass"]
    assert {*left_out} < {*MODEL_PEERS, *RIVALS}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 2}, "has the heads of a model"),
        ({"kind": "profile"}, "--profile cannot run here: it needs"),
        ({"kind": "tune"}, "--tune cannot run here: it needs"),
        ({"traced": True}, "expected a case of blocks for --traced"),
        ({"against": ("gather",)}, "peer 'gather' does not compute pair"),
        ({"against": ("cudnn",)}, "peer 'cudnn' cannot run here: it needs"),
        ({"implementation": "mosaic_gpu"}, "'mosaic_gpu' cannot run this"),
    ],
)
def test_refused(options, message):
    with pytest.raises(BadInput, match=message):
        run(CASES["pair"][0], **options)
