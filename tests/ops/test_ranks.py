"""The operation in an application that forbids NumPy's rank promotion in its own code.

The examples in docstrings run so too (`tests/test_doctests.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, use_abstract_mesh

from jsparse import BlockMask, block_sparse_attention
from jsparse.backends import mosaic_gpu
from jsparse.patterns import Window
from tests.pallas_kernels.launches import H100
from tests.support.cases import biases, random_mask

SIZES = (60, 100, 16, 32)


@pytest.fixture(autouse=True)
def forbidden() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield


def arrays(mask: BlockMask, *batch: int) -> list[jax.Array]:
    rng = np.random.default_rng(1)
    lengths = mask.q_len, mask.kv_len, mask.kv_len
    return [
        jnp.asarray(rng.standard_normal((*batch, n, 2, 16)), "float32") for n in lengths
    ]


def loss(mask: BlockMask, implementation: Any) -> Callable[..., jax.Array]:
    def of(q, k, v, bias=None):
        out, lse = block_sparse_attention(
            q, k, v, mask, bias=bias, return_lse=True, implementation=implementation
        )
        lse = jnp.where(lse > -jnp.inf, lse, 0.0)
        return jnp.sin(out.astype("float32")).sum() + jnp.sin(lse).sum()

    return of


def test_an_application_is_held_to_it():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.add(jnp.ones((2, 3)), jnp.ones(3))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("kind", [None, "dense", "block", "linear", "table"])
def test_gradients_under_jit_and_vmap(kind, implementation):
    rng = np.random.default_rng(0)
    start = rng.integers(0, 50, (1, SIZES[0])).astype(np.int32)
    rule = Window(start, start + np.int32(30))
    mask = random_mask(rng, SIZES, 9, elements=False, rules=(rule,))
    bias = None if kind is None else biases(rng, mask, 2, 1)[kind]
    bias = jax.tree_util.tree_map(jnp.asarray, bias)
    gradients = jax.grad(loss(mask, implementation), (0, 1, 2))
    one = gradients(*arrays(mask, 1), bias)
    compiled = jax.jit(gradients)(*arrays(mask, 1), bias)
    mapped = jax.vmap(jax.jit(gradients), (0, 0, 0, None))(*arrays(mask, 3, 1), bias)
    assert [x.shape for x in mapped] == [(3, *x.shape) for x in one]
    assert all(np.allclose(x, y, atol=1e-5) for x, y in zip(one, compiled, strict=True))


# Those in CUDA: `tests/backends/test_cutlass.py`.
@pytest.mark.parametrize("kind", [None, "dense", "table"])
def test_kernels_for_hopper_lower(kind, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "why_not", lambda problem: None)
    rng = np.random.default_rng(0)
    mask = random_mask(rng, (300, 500, 128, 64), 12)
    bias = None if kind is None else biases(rng, mask, 2, 1)[kind]
    shapes = [jax.ShapeDtypeStruct((1, n, 2, 64), "bfloat16") for n in (300, 500, 500)]
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        gradients = jax.jit(jax.grad(loss(mask, "mosaic_gpu"), (0, 1, 2)))
        traced = gradients.trace(*shapes, bias)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 3
