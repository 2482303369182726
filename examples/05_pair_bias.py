"""AlphaFold 3's attention with pair bias: before, in plain jnp, and after, in one call.

Five diffusion samples attend over the residues of a T-cell receptor and what it binds,
16 heads of 48 channels, with a pair bias projected from distances that they share.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.nn.functional import pair_bias_attention
from jsparse.structure import read_structure

SAMPLES, BUCKET, HEADS, HEAD_SIZE, BINS = 5, 896, 16, 48, 16


def before(q, k, v, gate, bias, mask):
    """Algorithm 24, lines 9 and 10: makes logits and weights [samples, H, N, N]."""
    logits = jnp.einsum("bihc,bjhc->bhij", q, k) / jnp.sqrt(HEAD_SIZE)
    logits = jnp.where(mask, logits + bias, -1e9)
    out = jnp.einsum("bhij,bjhc->bihc", jax.nn.softmax(logits), v)
    return jnp.where(mask[:, None, None], jax.nn.sigmoid(gate) * out, 0)


def after(q, k, v, gate, bias, mask):
    return pair_bias_attention(q, k, v, bias, gate=gate, mask=mask)


def load():
    """Binned distances [N, N, bins] of the alpha carbons, and which tokens exist."""
    structure = read_structure(Path(__file__).parent / "data" / "3KPR.cif.gz")
    alpha = (structure.atom_names == "CA") & (structure.elements == 6)
    coords = structure.coords[alpha & (structure.chain_index < 5)]  # one of two copies
    mask = np.arange(BUCKET) < len(coords)
    coords = np.pad(coords, ((0, BUCKET - len(coords)), (0, 0)))
    distances = np.linalg.norm(coords[:, None] - coords[None], axis=-1)
    bins = np.digitize(distances, np.linspace(3, 30, BINS - 1))
    return jax.nn.one_hot(bins, BINS), mask


def main() -> None:
    pairs, mask = load()
    print(f"{mask.sum()} residues in a bucket of {BUCKET}, {SAMPLES} samples")
    keys = jax.random.split(jax.random.key(0), 6)
    shape = (SAMPLES, BUCKET, HEADS, HEAD_SIZE)
    q, k, v, gate, target = (jax.random.normal(key, shape) for key in keys[:5])
    weights = jax.random.normal(keys[5], (BINS, HEADS))

    def loss(attend, q, k, v, gate, weights):
        bias = jnp.einsum("ijc,ch->hij", pairs, weights)  # once, for all samples
        return jnp.sum(attend(q, k, v, gate, bias, mask) * target)

    found = {}
    for attend in (before, after):
        gradients = jax.value_and_grad(loss, argnums=(1, 2, 3, 4, 5))
        step = jax.jit(gradients, static_argnums=0)
        compiled = step.lower(attend, q, k, v, gate, weights).compile()
        found[attend] = compiled(q, k, v, gate, weights)
        memory = compiled.memory_analysis()
        if memory is not None:  # where the platform tells
            size = memory.temp_size_in_bytes / 1e6
            print(f"{attend.__name__:6} {size:6.1f} MB of temporaries")

    (value, grads), (want, want_grads) = found[after], found[before]
    print(f"loss {value:.3f}, before {want:.3f}")
    names = ("dq", "dk", "dv", "dgate", "dweights")
    for name, x, y in zip(names, grads, want_grads, strict=True):
        error = jnp.linalg.norm(x - y) / jnp.linalg.norm(y)
        print(f"relative error of {name}: {error:.1e}")
        assert error < 1e-5, name


if __name__ == "__main__":
    main()
