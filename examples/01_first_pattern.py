"""A first pattern: which atoms of a protein complex see each other within 10 Å.

Reads two copies of an immune complex, 13,318 atoms, orders the atoms so that few
blocks are needed, and builds the block mask that attention would compute.
"""

from __future__ import annotations

from pathlib import Path

from jsparse import patterns
from jsparse.structure import read_structure

CUTOFF = 10.0  # ångström


def main() -> None:
    structure = read_structure(Path(__file__).parent / "data" / "3KPR.cif.gz")
    print(structure)

    # A block is 128 consecutive atoms, so the order of the atoms decides how many
    # blocks hold a pair within the cut-off. `order` counts them and takes the best.
    ordering = patterns.order(structure.coords, CUTOFF)
    print(f"\n{'order':12}{'blocks':>8}{'density':>9}{'most in a row':>15}")
    for row in ordering.table():
        print(
            f"{row['order']:12}{row['blocks']:8,}{row['density']:9.3f}"
            f"{row['max_per_row']:15}{'  <- chosen' if row['chosen'] else ''}"
        )

    coords = ordering.apply(structure.coords)  # and back: ordering.undo(result)
    mask = patterns.radius(coords, CUTOFF)
    summary = mask.summary()
    print(f"\n{mask}")
    print(f"blocks      {summary['partial']:,} partial, {summary['full']:,} full")
    print(f"in a row    {summary['row_min']} to {summary['row_max']}")
    print(f"memory      {summary['bytes'] / 1e6:.2f} MB")
    print(f"as booleans {len(structure) ** 2 / 1e6:.0f} MB, never made")

    # One mask for both complexes, or one for each in a single, grouped launch:
    halves = [structure.subset(structure.chain_index // 5 == n) for n in (0, 1)]
    ordered = [
        patterns.order(half.coords, cutoff=CUTOFF).apply(half.coords) for half in halves
    ]
    grouped = patterns.BlockMask.concatenate(
        [patterns.radius(half, CUTOFF) for half in ordered]
    )
    print(f"\ngrouped     {grouped.summary()['groups']} problems, {grouped}")


if __name__ == "__main__":
    main()
