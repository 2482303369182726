"""Attention of models: small shapes of every kind, run against their peers."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.backends._measured import RIVALS
from jsparse.bench import Options, all_cases, facts, markdown, run_case
from jsparse.bench._contract import BLOCKS, MASKED
from jsparse.bench._kinds import Model, ModelCase
from jsparse.bench._models import (
    MODEL_PEERS,
    ModelPeer,
    distance_case,
    neighbors_case,
    padded_triangle_case,
    pair_case,
    triangle_case,
    windows_case,
)
from jsparse.bench._runner import _ours, draw_model_inputs
from jsparse.measure import BadInput, Progress

CASES: dict[str, tuple[ModelCase, list[str]]] = {
    "triangle": (triangle_case("triangle", 21, 21, 2, 8, "float32"), ["einsum"]),
    "rows": (triangle_case("rows", 3, 140, 2, 8, "float32"), ["einsum"]),
    "padded": (padded_triangle_case("padded", 40, 23, 2, 8, "float32"), ["einsum"]),
    "pair": (pair_case("pair", 150, 4, 24, "float32"), ["einsum"]),
    "wide": (pair_case("wide", 150, 4, 24, "bfloat16", "float32"), ["einsum"]),
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


@pytest.mark.parametrize("name", [x for x in CASES if x != "wide"])  # in float32
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
        if not isinstance(peer, ModelPeer) or peer.computes not in (BLOCKS, MASKED):
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


def attending(case: ModelCase, model: Model, attend: Any) -> ModelCase:
    """The case with another function in place of ours."""
    return dataclasses.replace(
        case, load=lambda: dataclasses.replace(model, attend=attend)
    )


def test_bias_is_checked():
    case, _ = CASES["pair"]
    model = case.load()

    def forget(q, k, v, bias, *, implementation):
        return model.attend(q, k, v, 0 * bias, implementation=implementation)

    record = run(attending(case, model, forget), backward=False)
    assert "out is wrong" in record["missed"][0]


def test_mask_is_checked():
    case, _ = CASES["padded"]
    model = case.load()

    def forget(*arrays, implementation):
        *inputs, exists = arrays
        everything = jnp.ones_like(exists)
        return model.attend(*inputs, everything, implementation=implementation)

    record = run(attending(case, model, forget), backward=False)
    assert "out is wrong" in record["missed"][0]


def test_padding_is_not_looked_at():
    case, _ = CASES["padded"]
    model = case.load()
    edges = model.pattern.exists
    assert edges is not None and edges.sum() == 23 * 23
    *_, dout = draw_model_inputs(0, model)
    np.testing.assert_array_equal(np.asarray(dout).any((2, 3)), edges)

    def spoil(*arrays, implementation):
        out = model.attend(*arrays, implementation=implementation)
        return jnp.where(edges[..., None, None], out, jnp.nan)

    record = run(attending(case, model, spoil))
    assert record["missed"] == []
    assert record["forward"]["xla"]["errors"]["out"]["rows"] == 23
    assert record["pattern"] == "traced"
    assert record["input"]["batch"] == 23
    assert record["input"]["distribution"].endswith("; cotangents of padding 0")


def masked_triangles(q, k, v, bias, mask, scale):
    """The published formula of cuEquivariance's function, with zeros for the rest."""
    logits = scale * jnp.einsum("bnhtd,bnhsd->bnhts", q, k) + bias
    weights = jax.nn.softmax(jnp.where(mask, logits, -1e9), -1)
    return jnp.einsum("bnhts,bnhsd->bnhtd", weights, v), 0, 0


def masked_attention(*arrays, implementation, **others):
    """Tokamax's function in plain XLA."""
    assert implementation in ("mosaic", "triton")
    return jax.nn.dot_product_attention(*arrays, implementation="xla", **others)


@pytest.mark.parametrize("name", ["triangle", "padded"])
@pytest.mark.parametrize("library", ["tokamax", "tokamax_triton", "cuequivariance"])
def test_other_libraries_are_given_the_same(library, name, monkeypatch):
    tokamax = types.SimpleNamespace(dot_product_attention=masked_attention)
    theirs = types.SimpleNamespace(triangle_attention=masked_triangles)
    monkeypatch.setitem(sys.modules, "tokamax", tokamax)
    monkeypatch.setitem(sys.modules, "cuequivariance_jax", theirs)
    model = CASES[name][0].load()
    inputs = draw_model_inputs(0, model)
    peers = {peer.name: peer for peer in model.peers}
    found = []
    for peer in (peers["einsum"], peers[library]):
        assert isinstance(peer, ModelPeer)
        *arranged, dout = peer.arrange(*inputs)
        data = peer.prepare(model.pattern.mask)
        out, *grads = jax.jit(peer.backward)(*arranged, data, dout)
        found.append((*map(peer.rearrange, (out, *grads[:3])), grads[3].ravel()))
    for want, got in zip(*found, strict=True):
        np.testing.assert_allclose(got, want.reshape(got.shape), rtol=0, atol=5e-5)


def test_shapes_are_those_of_the_models():
    def sizes(name):
        case = all_cases()[name]
        assert isinstance(case, ModelCase)
        model = case.load()
        return [x.shape for x in model.shapes[2:]], model.pattern.batch

    triangle = [(768, 768, 4, 32), (4, 768, 768)]
    assert sizes("triangle768_h4_d32") == (triangle, 768)
    assert sizes("triangle768_h4_d32_padded") == (triangle, 620)
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
