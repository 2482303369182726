"""What a structure is: one row per atom, in arrays that cannot be written to.

Knows no file format and imports NumPy only. The reader makes these; pattern builders,
feature code and the command line consume them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


class StructureError(ValueError):
    """A structure file, or a request made of it, that cannot be served.

    The message names the file, what was wrong, what was expected and what to do.
    """


# The narrowest type that holds what the formats allow; names longer than that
# (nothing forbids them in mmCIF) widen the array instead of being cut.
_DTYPES = {
    "coords": np.dtype(np.float32),
    "elements": np.dtype(np.uint8),
    "residue_names": np.dtype("<U5"),
    "atom_names": np.dtype("<U4"),
    "residue_index": np.dtype(np.int32),
    "chain_index": np.dtype(np.int32),
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Structure:
    """Atoms of one model, in file order, chain by chain.

    Arrays are copied, cast and made read-only, so a structure can be shared freely.

    Attributes:
        name: Entry id (``"3KPR"``), or the file's stem where the file has none.
        coords: ``[N, 3]`` float32, Cartesian positions in ångström.
        elements: ``[N]`` uint8, atomic numbers; 0 where the element is unknown and
            1 for hydrogen and deuterium alike.
        residue_names: ``[N]`` str (``<U5``), name of each atom's residue (``"ALA"``).
        atom_names: ``[N]`` str (``<U4``), name of each atom (``"CA"``).
        residue_index: ``[N]`` int32, number of each atom's residue. As read it runs
            0, 1, 2, ... over the whole structure; it never restarts at a chain.
        chain_index: ``[N]`` int32, index into ``chain_names``. Every copy of an
            assembly brings chains of its own.
        chain_names: One name per chain: ``"A"`` as deposited, ``"A-2"`` the image of
            chain A under the second operator of the assembly.

    Raises:
        ValueError: If the arrays disagree in length or an index is out of range.

    Example:
        >>> from jsparse.structure import Structure
        >>> water = Structure(
        ...     name="water",
        ...     coords=[[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]],
        ...     elements=[8, 1, 1],
        ...     residue_names=["HOH"] * 3,
        ...     atom_names=["O", "H1", "H2"],
        ...     residue_index=[0, 0, 0],
        ...     chain_index=[0, 0, 0],
        ...     chain_names=("W",),
        ... )
        >>> water
        Structure('water': 3 atoms, 1 residues, 1 chains)
        >>> water.subset(water.elements > 1).atom_names.tolist()
        ['O']
    """

    name: str
    coords: np.ndarray
    elements: np.ndarray
    residue_names: np.ndarray
    atom_names: np.ndarray
    residue_index: np.ndarray
    chain_index: np.ndarray
    chain_names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Casts, checks and freezes the arrays."""
        for field, dtype in _DTYPES.items():
            object.__setattr__(self, field, _frozen(getattr(self, field), dtype))
        object.__setattr__(self, "chain_names", tuple(self.chain_names))
        if self.coords.ndim != 2 or self.coords.shape[1] != 3:
            raise ValueError(
                f"Structure: coords has shape {self.coords.shape}; expected [N, 3] in "
                "ångström. Pass one row per atom."
            )
        for field in _DTYPES:
            shape = getattr(self, field).shape
            if field != "coords" and shape != (len(self),):
                raise ValueError(
                    f"Structure: {field} has shape {shape}; expected ({len(self)},), "
                    "one entry for each row of coords."
                )
        if len(self) and self.residue_index.min() < 0:
            raise ValueError(
                f"Structure: residue_index holds {self.residue_index.min()}; expected "
                "numbers from 0. Number the residues 0, 1, 2, ..."
            )
        chains = self.chain_index
        if len(self) and not 0 <= chains.min() <= chains.max() < len(self.chain_names):
            raise ValueError(
                f"Structure: chain_index spans {chains.min()} to {chains.max()}; "
                f"expected 0 to {len(self.chain_names) - 1}, an index into the "
                f"{len(self.chain_names)} chain_names."
            )

    def __len__(self) -> int:
        """Number of atoms."""
        return self.coords.shape[0]

    def __repr__(self) -> str:
        """Name and sizes; the arrays themselves would fill the screen."""
        return (
            f"Structure({self.name!r}: {len(self):,} atoms, "
            f"{self.num_residues:,} residues, {self.num_chains:,} chains)"
        )

    @property
    def num_residues(self) -> int:
        """Number of residues that have an atom here."""
        return len(np.unique(self.residue_index))

    @property
    def num_chains(self) -> int:
        """Number of chains that have an atom here."""
        return len(np.unique(self.chain_index))

    def subset(self, index: ArrayLike) -> Structure:
        """Returns the atoms that ``index`` picks, in its order.

        Nothing is renumbered: ``residue_index``, ``chain_index`` and ``chain_names``
        mean the same before and after, so a reordered structure can be traced back.

        Args:
            index: ``[M]`` integers (repeats and negative values as in NumPy), or
                ``[N]`` booleans.

        Returns:
            A structure of M atoms, or of as many as the mask has true entries.

        Raises:
            TypeError: If ``index`` is neither integer nor boolean.
            ValueError: If ``index`` is not one-dimensional or a mask of other length.
            IndexError: If an integer is out of range.

        Example:
            >>> from jsparse.structure import read_structure
            >>> ubiquitin = read_structure("examples/data/1UBI.pdb.gz")
            >>> trace = ubiquitin.subset(ubiquitin.atom_names == "CA")
            >>> len(trace), trace.num_residues
            (76, 76)
        """
        picks = np.asarray(index)
        if picks.size == 0 and picks.dtype == np.float64:
            picks = picks.astype(np.intp)
        if picks.dtype.kind not in "iub":
            raise TypeError(
                f"subset: index has dtype {picks.dtype}; expected integers (which "
                "atoms, in which order) or one boolean per atom."
            )
        if picks.ndim != 1 or (picks.dtype == np.bool_ and len(picks) != len(self)):
            raise ValueError(
                f"subset: index has shape {picks.shape}; expected [M] integers or "
                f"[{len(self)}] booleans, one per atom."
            )
        if picks.dtype != np.bool_ and len(picks):
            low, high = int(picks.min()), int(picks.max())
            if low < -len(self) or high >= len(self):
                raise IndexError(
                    f"subset: index spans {low} to {high}; the structure has "
                    f"{len(self)} atoms, so expected at most {len(self) - 1}."
                )
        return dataclasses.replace(
            self, **{field: getattr(self, field)[picks] for field in _DTYPES}
        )


def _frozen(values: Any, dtype: np.dtype) -> np.ndarray:
    """Returns a read-only copy in ``dtype``; strings too long for it widen it."""
    array = np.asarray(values)
    if dtype.kind == "U":
        array = array.astype(np.str_) if array.dtype.kind != "U" else array
        dtype = max(dtype, array.dtype, key=lambda d: d.itemsize)
    elif dtype.kind in "iu" and array.size:
        if array.dtype.kind not in "iu":
            raise TypeError(
                f"Structure: got {array.dtype} where {dtype} was expected. Elements "
                "and indices are integers."
            )
        info = np.iinfo(dtype)
        if array.min() < info.min or array.max() > info.max:
            raise ValueError(
                f"Structure: values from {array.min()} to {array.max()} do not fit "
                f"{dtype}; expected {info.min} to {info.max}."
            )
    out = np.array(array, dtype=dtype, order="C")
    out.setflags(write=False)
    return out
