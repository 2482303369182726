"""Block-sparse attention under `jit` and `grad`, with a bias computed from distances.

Attends over the atoms of trypsin (1,644) within 8 Å, with a learned penalty per
ångström for each head, and checks output and gradients against dense attention.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from jsparse import DistanceBias, block_sparse_attention, patterns
from jsparse.structure import read_structure

HEADS, HEAD_SIZE = 4, 32


def main() -> None:
    structure = read_structure(Path(__file__).parent / "data" / "1GBT.cif.gz")
    order = patterns.order(structure.coords, 8.0, block_q=64, block_kv=64)
    coords = order.apply(structure.coords)
    mask = patterns.radius(coords, 8.0, block_q=64, block_kv=64)
    print(mask)

    keys = jax.random.split(jax.random.key(0), 4)
    shape = (len(structure), HEADS, HEAD_SIZE)  # [T, H, D], as in jax.nn
    q, k, v, target = (jax.random.normal(key, shape) for key in keys)
    slope = jnp.array([0.1, 0.3, 1.0, 3.0])  # per ångström, one for each head

    def loss(q, k, v, slope, **options):
        bias = DistanceBias.linear(slope, coords)  # no [H, T, S] array is ever made
        out = block_sparse_attention(q, k, v, mask, bias=bias, **options)
        return jnp.mean((out - target) ** 2)

    # The mask is closed over, so its pattern is a constant of the compiled program.
    grad = functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3))
    fast = jax.jit(grad(loss))
    dense = jax.jit(grad(functools.partial(loss, implementation="reference")))
    value, grads = fast(q, k, v, slope)
    want_value, want_grads = dense(q, k, v, slope)
    print(f"loss {value:.6f}, dense {want_value:.6f}")
    print(f"d loss / d slope {grads[3]}")
    names = ("dq", "dk", "dv", "dslope")
    for name, got, want in zip(names, grads, want_grads, strict=True):
        error = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
        print(f"relative error of {name}: {error:.1e}")

    # The dense program holds [H, T, T] arrays, the other one a few blocks at a time.
    for name, program in (("block-sparse", fast), ("dense", dense)):
        memory = program.lower(q, k, v, slope).compile().memory_analysis()
        if memory is not None:  # where the platform tells
            print(f"{name:13} {memory.temp_size_in_bytes / 1e6:6.1f} MB of temporaries")

    again = fast(q, k, v, slope)[1]
    same = all(bool((a == b).all()) for a, b in zip(grads, again, strict=True))
    print(f"gradients of a second run have the same bits: {same}")


if __name__ == "__main__":
    main()
