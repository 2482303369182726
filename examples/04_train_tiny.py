"""A small model learns chemistry from geometry: it names atoms whose element is hidden.

One atom in five hides its element. The model sees the elements of the other atoms and,
through a learned bias, how far away they are. It trains on two proteins, is tested on a
third, and is compiled once, as all three are padded to one bucket.
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

DATA, STEPS = Path(__file__).parent / "data", 80
BUCKET, BLOCK, CUTOFF = 1664, 32, 4.0  # atoms, atoms, ångström
KINDS, HIDDEN, FEATURES, HEADS = (6, 7, 8, 16), 4, 32, 4  # KINDS: C, N, O, S


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attend = BlockSparseAttention(HEADS, FEATURES, use_gate=True, rngs=rngs)
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.hidden = nnx.Linear(FEATURES, 64, rngs=rngs)
        self.out = nnx.Linear(64, FEATURES, rngs=rngs)
        # A bias for each head at 0, 0.25, ... 4 Å. The heads start apart: they prefer
        # atoms at 1, 1.5, 2 and 2.5 Å, around the lengths of one bond and of two.
        preferred = 1 + np.arange(HEADS)[:, None] / 2
        self.table = nnx.Param(-2 * jnp.square(jnp.linspace(0, CUTOFF, 17) - preferred))

    def __call__(self, x, mask, coords):
        bias = DistanceBias.table(self.table[...], CUTOFF, coords)
        x = x + self.attend(self.norm(x), mask=mask, bias=bias)
        return x + self.out(nnx.gelu(self.hidden(x)))


def load(file: str, chain: int = 0):
    """Kinds ``[BUCKET]`` (-1: no atom), mask and coordinates of one protein chain."""
    atoms = read_structure(DATA / file)
    atoms = atoms.subset((atoms.chain_index == chain) & np.isin(atoms.elements, KINDS))
    order = patterns.order(atoms.coords, CUTOFF, block_q=BLOCK, block_kv=BLOCK)
    atoms, pad = atoms.subset(order.permutation), BUCKET - len(atoms)
    mask = patterns.radius(atoms.coords, CUTOFF, block_q=BLOCK, block_kv=BLOCK)
    kinds = np.pad(np.searchsorted(KINDS, atoms.elements), (0, pad), constant_values=-1)
    coords = np.pad(atoms.coords, ((0, pad), (0, 0)))
    return kinds, mask.pad_to(BUCKET, capacity=BUCKET // BLOCK), coords


def loss_of(model, kinds, mask, coords, key):
    hidden = jax.random.bernoulli(key, 0.2, kinds.shape) & (kinds >= 0)
    x = model["embed"](jnp.where(hidden | (kinds < 0), HIDDEN, kinds))
    for layer in model["layers"]:
        x = layer(x, mask, coords)
    loss = optax.softmax_cross_entropy_with_integer_labels(model["head"](x), kinds)
    return loss.mean(where=hidden)


@nnx.jit
def train_step(model, optimizer, protein, key):
    print("compiling the training step")  # runs when the step is traced, not later
    loss, grads = nnx.value_and_grad(loss_of)(model, *protein, key)
    optimizer.update(model, grads)
    return loss


def main() -> None:
    train, test = [load("1UBI.pdb.gz"), load("1GBT.cif.gz")], load("3KPR.cif.gz", 3)
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        embed=nnx.Embed(len(KINDS) + 1, FEATURES, rngs=rngs),
        layers=nnx.List([Layer(rngs), Layer(rngs)]),
        head=nnx.Linear(FEATURES, len(KINDS), rngs=rngs),
    )
    optimizer = nnx.Optimizer(model, optax.adam(5e-3), wrt=nnx.Param)
    for step in range(STEPS + 1):
        loss = train_step(model, optimizer, train[step % 2], jax.random.key(step))
        if step % 10 == 0:
            print(f"step {step:3}  loss {loss:.3f}")

    kinds, mask, coords = test
    counts = np.bincount(np.concatenate([k[k >= 0] for k, _, _ in train]))
    guess = -np.log(counts / counts.sum())[kinds[kinds >= 0]].mean()
    scrambled = np.random.default_rng(0).permutation(coords)
    evaluate, key = nnx.jit(loss_of), jax.random.key(-1)
    print(f"test loss             {evaluate(model, *test, key):.3f}")
    print(f"distances scrambled   {evaluate(model, kinds, mask, scrambled, key):.3f}")
    print(f"element frequencies   {guess:.3f}")


if __name__ == "__main__":
    main()
