"""A small model that learns chemistry from geometry: it names atoms by what is near.

One atom in five hides its element. The model sees the elements of the others and, by a
learned bias, how far away they are. It trains on two proteins and is tested on a third.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jsparse import DistanceBias, patterns
from jsparse.nn import BlockSparseAttention
from jsparse.structure import read_structure

DATA, STEPS = Path(__file__).parent / "data", 150
BUCKET, BLOCK, CUTOFF = 1664, 32, 4.0  # atoms, atoms, ångström
KINDS, HIDDEN = (6, 7, 8, 16), 4  # carbon, nitrogen, oxygen, sulfur


class Model(nnx.Module):
    """One attention layer whose heads learn which distances matter."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(len(KINDS) + 1, 32, rngs=rngs)
        self.attend = BlockSparseAttention(4, 32, out_features=len(KINDS), rngs=rngs)
        start = jnp.array([[1.0], [1.5], [2.0], [2.5]])  # Å, what the heads prefer
        self.table = nnx.Param(-2 * (jnp.linspace(0, CUTOFF, 17) - start) ** 2)

    def loss(self, kinds, mask, coords, key):
        """Mean cross-entropy of the atoms that hide their element."""
        hidden = jax.random.bernoulli(key, 0.2, kinds.shape) & (kinds >= 0)
        x = self.embed(jnp.where(hidden | (kinds < 0), HIDDEN, kinds))
        bias = DistanceBias.table(self.table[...], CUTOFF, coords)
        logits = self.attend(x, mask=mask, bias=bias)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, kinds)
        return losses.mean(where=hidden)


def load(file: str, chain: int = 0):
    atoms = read_structure(DATA / file)
    atoms = atoms.subset((atoms.chain_index == chain) & np.isin(atoms.elements, KINDS))
    mask = patterns.radius(atoms.coords, CUTOFF, block_q=BLOCK, block_kv=BLOCK)
    pad = (0, BUCKET - len(atoms))
    kinds = np.pad(np.searchsorted(KINDS, atoms.elements), pad, constant_values=-1)
    return kinds, mask.pad_to(BUCKET, capacity=24), np.pad(atoms.coords, (pad, (0, 0)))


@nnx.jit
def train_step(model, optimizer, protein, key):
    loss, grads = nnx.value_and_grad(Model.loss)(model, *protein, key)
    optimizer.update(model, grads)
    return loss


def main() -> None:
    train, test = [load("1UBI.pdb.gz"), load("1GBT.cif.gz")], load("3KPR.cif.gz", 3)
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    for step in range(STEPS + 1):
        loss = train_step(model, optimizer, train[step % 2], jax.random.key(step))
        if step % 15 == 0:
            print(f"step {step:3}  loss {loss:.3f}")
    kinds, mask, coords = test
    share = np.bincount(kinds[kinds >= 0]) / (kinds >= 0).sum()
    scrambled = np.random.default_rng(0).permutation(coords)
    evaluate, key = nnx.jit(Model.loss), jax.random.key(-1)
    print(f"test loss            {evaluate(model, *test, key):.3f}")
    print(f"distances scrambled  {evaluate(model, kinds, mask, scrambled, key):.3f}")
    print(f"elements' entropy    {-(share * np.log(share)).sum():.3f}")


if __name__ == "__main__":
    main()
