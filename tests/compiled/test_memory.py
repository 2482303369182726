"""Device memory beyond inputs and outputs, of the model shapes that are measured."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jsparse import block_sparse_attention, patterns
from jsparse.bench import _models
from jsparse.bench._kinds import ModelCase
from tests.compiled.conftest import compiled, temporaries

CASES = {x.name: x for x in _models.model_cases() if isinstance(x, ModelCase)}
MB = 1_000_000


def programs(name: str):
    """The forward pass, and both passes."""
    model = CASES[name].load()
    shapes = model.shapes
    if model.arrange is not None:
        *shapes, _ = jax.eval_shape(model.arrange, *shapes, shapes[0])

    def attend(*arrays):
        return model.attend(*arrays, implementation="mosaic_gpu")

    def both(dout, *arrays):
        inputs, data = arrays[: len(shapes)], arrays[len(shapes) :]
        out, pull = jax.vjp(lambda *x: attend(*x, *data), *inputs)
        return out, pull(dout)

    arrays = (*shapes, *model.data)
    return compiled(attend, *arrays), compiled(both, shapes[0], *arrays)


@pytest.mark.parametrize(
    "name, forward, both",
    [
        ("triangle768_h4_d32", 12, 24),
        ("triangle128x4096_h4_d32", 14, 24),
        ("triangle768_h4_d32_padded", 22, 34),
        ("pair2048_h16_d48", 1, 1),
        ("pair4096_h16_d64", 1, 1),
        ("windows100k_h4_d32", 4, 7),
        ("graph32k_distance", 4, 28),
        ("neighbors27k_h4_d32", 26, 66),
        ("neighbors27k_h4_d32_bias", 34, 70),
    ],
)
def test_little_more_than_inputs_and_outputs(name, forward, both):
    """Limits in megabytes; a copy of a bias, or of q, k and v, is more."""
    for limit, program in zip((forward, both), programs(name), strict=True):
        assert temporaries(program) < limit * MB


def test_no_copies_of_any_length():
    """100,003 queries are no multiple of the rows that a tile's copies come in."""
    mask = patterns.window(100_003, left=500, right=500)
    x = jax.ShapeDtypeStruct((100_003, 16, 64), jnp.bfloat16)

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, mask, implementation="mosaic_gpu")

    def both(dout, *arrays):
        out, pull = jax.vjp(attend, *arrays)
        return out, pull(dout)

    size = x.size * x.dtype.itemsize
    assert temporaries(compiled(attend, x, x, x)) < 0.05 * 4 * size
    assert temporaries(compiled(both, x, x, x, x)) < 0.05 * 8 * size
