"""The Flax layer, with masks that are constants and masks that are arguments.

A mask closed over by a jitted function is part of the program. A mask passed as an
argument is data: pad structures and masks to a few *buckets*, and each bucket is
compiled once, whatever the structure.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from jsparse import patterns
from jsparse.nn import BlockSparseAttention
from jsparse.structure import Structure, read_structure

DATA = Path(__file__).parent / "data"
FEATURES, BLOCK, CUTOFF = 32, 64, 8.0
traces: list[str] = []  # grows when a function is traced, that is, compiled


def features(structure: Structure, length: int):
    """Atomic numbers as sines, ``[length, FEATURES]``, with zeros after the atoms."""
    angles = structure.elements[:, None] * jnp.arange(1, FEATURES + 1) / FEATURES
    return jnp.pad(jnp.sin(angles), ((0, length - len(structure)), (0, 0)))


@nnx.jit
def attend(layer, x, mask):
    traces.append(f"mask passed in, {x.shape[0]} atoms")
    return layer(x, mask=mask)


@nnx.jit
def build_and_attend(layer, x, coords, num_atoms):
    traces.append(f"mask built inside, {x.shape[0]} atoms")
    mask = patterns.device.radius(
        coords, CUTOFF, block_q=BLOCK, block_kv=BLOCK, capacity=24, q_length=num_atoms
    )
    return layer(x, mask=mask), mask


def main() -> None:
    layer = BlockSparseAttention(
        8, FEATURES, num_kv_heads=2, use_gate=True, rngs=nnx.Rngs(0)
    )
    for name, parameter in nnx.to_flat_state(nnx.state(layer)):
        print(".".join(map(str, name)), tuple(parameter.shape))

    complex_ = read_structure(DATA / "3KPR.cif.gz")
    structures = [read_structure(DATA / f) for f in ("1UBI.pdb.gz", "1GBT.cif.gz")]
    structures += [complex_.subset(complex_.chain_index == n) for n in (1, 3)]
    for structure in structures:
        num_atoms = len(structure)
        bucket = -(-num_atoms // 1024) * 1024
        mask = patterns.radius(structure.coords, CUTOFF, block_q=BLOCK, block_kv=BLOCK)
        x = features(structure, bucket)

        passed = attend(layer, x, mask.pad_to(bucket, capacity=24))
        coords = jnp.pad(structure.coords, ((0, bucket - num_atoms), (0, 0)))
        inside, built = build_and_attend(layer, x, coords, num_atoms)
        built.check()  # raises CapacityError if 24 blocks in a row were too few
        static = nnx.jit(lambda layer, x, mask=mask: layer(x, mask=mask))
        want = static(layer, x[:num_atoms])  # the mask is a constant of this program
        error = max(abs(y[:num_atoms] - want).max() for y in (passed, inside))
        print(f"{num_atoms} atoms in a bucket of {bucket}: differ by {error:.1e}")

    print(f"{len(traces)} compilations for {2 * len(structures)} calls:")
    print("\n".join(f"  {trace}" for trace in traces))


if __name__ == "__main__":
    main()
