"""BlockMask: which blocks of the attention matrix are computed, and which elements.

A `BlockMask` is a pytree of index lists, built on the host (`_builders.py`,
`_structure.py`) or on the device (`device.py`). Everything downstream (`jsparse.ops`,
`jsparse.backends`) reads the lists; nothing downstream builds them.

The file is long because it is one class with its public docstrings; the array work is
in `_parts.py`.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import numpy as np

from jsparse.patterns._arguments import as_numpy, count, refuse_traced
from jsparse.patterns._export import exportable
from jsparse.patterns._parts import (
    Grid,
    Part,
    Sizes,
    block_lists,
    chunks,
    fold,
    join,
    pack,
    unique,
    unpack,
    whole_blocks,
)
from jsparse.patterns._rules import (
    ElementRule,
    Segments,
    check_rules,
    join_rules,
    same_rules,
    stack_rules,
)

Array = Any
NO_CAPACITY = np.iinfo(np.int32).max  # needed where no width of a list would do
_STATIC = {"static": True}


class BlockState(enum.IntEnum):
    """State of one block of the attention matrix."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


class CapacityError(ValueError):
    """A block list needed more entries than its capacity."""


class Capacity(NamedTuple):
    """Static widths of the four block lists."""

    kv: int
    full_kv: int
    q: int
    full_q: int


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Which ``block_q x block_kv`` blocks are computed, per ``[B or 1, H or 1]``.

    Query block ``i`` computes the *partial* key blocks ``kv_indices[..., i, :n]`` with
    ``n = kv_num_blocks[..., i]``, where each element is tested, and the *full* key
    blocks ``full_kv_indices[..., i, :m]`` with ``m = full_kv_num_blocks[..., i]``,
    where none is. The ``q_*`` fields are the same pattern by key block, for the
    backward pass.

    An element (t, s) of a partial block is allowed if ``t < q_lengths``,
    ``s < kv_lengths``, every rule allows it and its bit is set. A block is full only if
    all its ``block_q * block_kv`` elements exist and are allowed.

    Arrays are pytree leaves and sizes are static. Closed over by a jitted function the
    pattern is static; passed as an argument it is traced, and every mask with the same
    sizes, rules and capacities shares one compilation (see `pad_to`).

    Attributes:
        kv_num_blocks: ``[B or 1, H or 1, nq]`` int32, partial blocks of each query
            block.
        kv_indices: ``[B or 1, H or 1, nq, capacity]`` int32, ascending; entries beyond
            the count are padding and are never read as blocks.
        full_kv_num_blocks: as ``kv_num_blocks``, for full blocks.
        full_kv_indices: as ``kv_indices``, for full blocks.
        q_num_blocks: ``[B or 1, H or 1, nk]`` int32, partial blocks of each key block.
        q_indices: ``[B or 1, H or 1, nk, capacity]`` int32.
        full_q_num_blocks: as ``q_num_blocks``, for full blocks.
        full_q_indices: as ``q_indices``, for full blocks.
        q_lengths: ``[B or 1]`` int32, queries that really exist.
        kv_lengths: ``[B or 1]`` int32, keys that really exist.
        rules: element rules (`Segments`, `Window`, `Distance`), all of which must
            allow.
        bits: ``[B or 1, n, block_q, ceil(block_kv / 32)]`` uint32 or None; bit
            ``s % 32`` of word ``s // 32``. Entry ``n`` counts the partial blocks in
            list order, heads outermost.
        groups: ``[G, 4]`` int32 or None: query start and length, key start and length
            of each problem joined by `concatenate`.
        needed_capacity: ``[B or 1, 4]`` int32 or None: the `Capacity` that a device
            builder would have needed; what did not fit gives NaN (see `check`). The
            ``kv`` entry is ``2**31 - 1`` where the lists fit but their bits did not.
        q_len: static T.
        kv_len: static S.
        block_q: queries per block.
        block_kv: keys per block.

    Example:
        >>> import jsparse.patterns as patterns
        >>> mask = patterns.window(1024, left=64, right=64, block_q=128, block_kv=128)
        >>> mask.num_q_blocks, round(mask.density, 3)
        (8, 0.344)

    References:
        The list names are those of FlexAttention's BlockMask
        (torch.nn.attention.flex_attention); the full / partial split is also Splash
        attention's (JAX).
    """

    kv_num_blocks: Array
    kv_indices: Array
    full_kv_num_blocks: Array
    full_kv_indices: Array
    q_num_blocks: Array
    q_indices: Array
    full_q_num_blocks: Array
    full_q_indices: Array
    q_lengths: Array
    kv_lengths: Array
    rules: tuple[ElementRule, ...] = ()
    bits: Array | None = None
    groups: Array | None = None
    needed_capacity: Array | None = None
    q_len: int = dataclasses.field(default=0, metadata=_STATIC)
    kv_len: int = dataclasses.field(default=0, metadata=_STATIC)
    block_q: int = dataclasses.field(default=128, metadata=_STATIC)
    block_kv: int = dataclasses.field(default=128, metadata=_STATIC)

    # ---------------------------------------------------------------- building

    @classmethod
    def from_blocks(
        cls,
        rows: Array,
        cols: Array,
        *,
        q_len: int,
        kv_len: int | None = None,
        block_q: int = 128,
        block_kv: int = 128,
        full: Array | None = None,
        elements: Array | None = None,
        rules: Sequence[ElementRule] = (),
    ) -> BlockMask:
        """Makes a mask from the set of block pairs ``(rows[n], cols[n])``.

        Pairs are a set: order does not matter and duplicates count once.

        Args:
            rows: ``[n]`` integer, query block of each pair.
            cols: ``[n]`` integer, key block of each pair.
            q_len: number of queries T.
            kv_len: number of keys S; T if not given.
            block_q: queries per block.
            block_kv: keys per block.
            full: ``[n]`` bool, pairs computed without any element test; ``rules`` must
                allow all their elements. By default every pair is full if there are
                neither ``elements`` nor ``rules``, and none otherwise. Blocks that
                reach beyond T or S are always partial.
            elements: ``[n, block_q, block_kv]`` bool, allowed elements of each pair.
            rules: element rules for the partial blocks.

        Returns:
            A mask with one batch entry and one head.

        Raises:
            TypeError: for rules that are none, or what is traced.
            ValueError: for sizes below 1, indices out of range, shapes that disagree,
                rules for other lengths, or a full pair with an element that a rule
                forbids.

        Example:
            >>> mask = BlockMask.from_blocks([0, 1, 1], [0, 0, 1], q_len=256)
            >>> mask.block_states()[0, 0].tolist()
            [[2, 0], [2, 2]]
        """
        sizes = check_sizes("from_blocks", q_len, kv_len, block_q, block_kv)
        rows, cols = _check_pairs(rows, cols, sizes)
        rules = check_rules("from_blocks", rules, sizes)
        if full is None:
            full = np.full(rows.shape, elements is None and not rules)
        is_full = as_numpy("from_blocks: full", full).astype(bool)
        if is_full.shape != rows.shape:
            raise ValueError(
                f"from_blocks: full has shape {is_full.shape}; expected {rows.shape}, "
                "one flag for each block pair."
            )
        words = None
        if elements is not None:
            elements = as_numpy("from_blocks: elements", elements)
            expected = (*rows.shape, sizes.block_q, sizes.block_kv)
            if elements.shape != expected:
                raise ValueError(
                    f"from_blocks: elements has shape {elements.shape}; expected "
                    f"{expected}, one block for each pair."
                )
            words = pack(elements.astype(bool, copy=False))
            words[is_full] = ~np.uint32(0)  # may yet become partial at the edge
        is_full = is_full & whole_blocks(rows, cols, sizes)
        if rules and is_full.any():
            _check_full(Part(rows, cols, is_full).take(is_full), sizes, rules)
        part = unique(Part(rows, cols, is_full, words), sizes.grid[1])
        return from_parts([[part]], sizes, rules=rules)

    @classmethod
    def concatenate(cls, masks: Sequence[BlockMask]) -> BlockMask:
        """Joins several problems into one block-diagonal launch (a *grouped* launch).

        Each group starts at a multiple of the block. `jsparse.patterns.join_groups` and
        `split_groups` move arrays between the groups and the joined layout.

        Args:
            masks: masks of one batch entry and one head with equal block sizes; lengths
                and patterns may differ. Rules of different kinds become bits.

        Returns:
            A mask whose ``groups`` says where each problem lies.

        Raises:
            TypeError: for what is no sequence of masks.
            ValueError: for no masks, unequal block sizes, or batch or head patterns.

        Example:
            >>> a = BlockMask.from_blocks([0], [0], q_len=100)
            >>> b = BlockMask.from_blocks([0, 1], [0, 1], q_len=200)
            >>> BlockMask.concatenate([a, b]).groups.tolist()
            [[0, 100, 0, 100], [128, 200, 128, 200]]
        """
        masks = _check_compatible("concatenate", masks, lengths=False)
        for n, m in enumerate(masks):
            if (m.batch_size, m.num_heads) != (1, 1):
                raise ValueError(
                    f"concatenate: mask {n} has {m.batch_size} batch entries and "
                    f"{m.num_heads} heads; expected 1 and 1. Concatenate one pattern "
                    "per group, then combine the results with BlockMask.stack."
                )
        joined = join_rules([m.rules for m in masks], [m._sizes for m in masks])
        if joined is None:
            masks, joined = [m.to_bits() for m in masks], ()
        block_q, block_kv = masks[0].block_q, masks[0].block_kv
        first_q = np.cumsum([0, *(m.num_q_blocks for m in masks)])
        first_kv = np.cumsum([0, *(m.num_kv_blocks for m in masks)])
        sizes = Sizes(
            int(first_q[-1]) * block_q, int(first_kv[-1]) * block_kv, block_q, block_kv
        )
        parts, groups = [], []
        with_bits = any(m.bits is not None for m in masks)
        for m, i, j in zip(masks, first_q[:-1], first_kv[:-1], strict=True):
            part = m._part(0, 0, with_bits)
            rows, cols = part.rows + np.int32(i), part.cols + np.int32(j)
            parts.append(part._replace(rows=rows, cols=cols))
            q_length, kv_length = int(m.q_lengths[0]), int(m.kv_lengths[0])
            groups.append((i * block_q, q_length, j * block_kv, kv_length))
        # Entries between two groups exist in the arrays but belong to no problem.
        ids_q, ids_kv = np.full((1, sizes.q_len), -1), np.full((1, sizes.kv_len), -2)
        for n, (q0, q_length, kv0, kv_length) in enumerate(groups):
            ids_q[0, q0 : q0 + q_length] = n
            ids_kv[0, kv0 : kv0 + kv_length] = n
        padding = Segments(ids_q.astype(np.int32), ids_kv.astype(np.int32))
        mask = from_parts([[join(parts)]], sizes, rules=(padding, *joined))
        return dataclasses.replace(mask, groups=np.asarray(groups, np.int32))

    @classmethod
    def stack(
        cls, masks: Sequence[BlockMask], axis: Literal["batch", "head"]
    ) -> BlockMask:
        """Gives every batch entry, or every head, a pattern of its own.

        Args:
            masks: masks of equal lengths and block sizes, each with one entry on
                ``axis``.
            axis: ``"batch"`` or ``"head"``.

        Returns:
            A mask ``[len(masks), H or 1]`` or ``[B or 1, len(masks)]``, of the groups
            that the masks have in common. Rules that cannot be stacked become bits.

        Raises:
            TypeError: for what is no sequence of masks.
            ValueError: for no masks, other axes, or masks that do not fit together, or
                have other groups.

        Example:
            >>> near = BlockMask.from_blocks([0, 1], [0, 1], q_len=256)
            >>> far = BlockMask.from_blocks([0, 1], [1, 0], q_len=256)
            >>> BlockMask.stack([near, far], "head").num_heads
            2
        """
        if axis not in ("batch", "head"):
            raise ValueError(f"stack: axis={axis!r}; expected 'batch' or 'head'.")
        masks = _check_compatible("stack", masks)
        for n, m in enumerate(masks):
            size = m.batch_size if axis == "batch" else m.num_heads
            if size != 1:
                raise ValueError(
                    f"stack: mask {n} already has {size} entries on axis {axis!r}; "
                    "expected 1."
                )
        others = {m.num_heads if axis == "batch" else m.batch_size for m in masks}
        if len(others - {1}) > 1:
            raise ValueError(
                f"stack: on the axis that is not {axis!r}, the masks have "
                f"{sorted(others)} entries; expected equal numbers, or 1."
            )
        groups = _common_groups("stack", *masks)
        batch = max(m.batch_size for m in masks)
        lengths = [_lengths(m, batch) for m in masks]
        if axis == "batch":
            rules = stack_rules([m.rules for m in masks])
            lengths = np.concatenate(lengths, axis=1)
        else:
            rules = masks[0].rules if same_rules([m.rules for m in masks]) else None
            if any(np.any(x != lengths[0]) for x in lengths):
                rules = None
            lengths = np.max(lengths, axis=0)
        if rules is None:
            masks, rules = [m.to_bits() for m in masks], ()
        with_bits = any(m.bits is not None for m in masks)
        if axis == "batch":
            heads = range(max(m.num_heads for m in masks))
            grid = [[m._part(0, h, with_bits) for h in heads] for m in masks]
        else:
            grid = [[m._part(b, 0, with_bits) for m in masks] for b in range(batch)]
        mask = from_parts(grid, masks[0]._sizes, rules=rules, lengths=lengths)
        return dataclasses.replace(mask, groups=groups)

    # ------------------------------------------------------------------- sizes

    @property
    def batch_size(self) -> int:
        """Number of batch patterns: 1 when all batch entries share one."""
        return self.kv_num_blocks.shape[-3]

    @property
    def num_heads(self) -> int:
        """Number of head patterns: 1 when all heads share one."""
        return self.kv_num_blocks.shape[-2]

    @property
    def num_q_blocks(self) -> int:
        """Number of query blocks, ``ceil(q_len / block_q)``."""
        return self.kv_num_blocks.shape[-1]

    @property
    def num_kv_blocks(self) -> int:
        """Number of key blocks, ``ceil(kv_len / block_kv)``."""
        return self.q_num_blocks.shape[-1]

    @property
    def capacity(self) -> Capacity:
        """Static widths of the block lists."""
        return Capacity(
            self.kv_indices.shape[-1],
            self.full_kv_indices.shape[-1],
            self.q_indices.shape[-1],
            self.full_q_indices.shape[-1],
        )

    @property
    def num_blocks(self) -> int:
        """Number of computed blocks, partial and full, of all patterns (host only)."""
        return int(
            self._host("kv_num_blocks").sum() + self._host("full_kv_num_blocks").sum()
        )

    @property
    def density(self) -> float:
        """Computed blocks divided by all blocks (host only)."""
        every = math.prod(self.kv_num_blocks.shape) * self.num_kv_blocks
        return self.num_blocks / every

    @property
    def _sizes(self) -> Sizes:
        return Sizes(self.q_len, self.kv_len, self.block_q, self.block_kv)

    # ----------------------------------------------------------------- reading

    def block_states(self) -> np.ndarray:
        """`BlockState` of each block, ``[B or 1, H or 1, nq, nk]`` int8 (host only)."""
        out = np.zeros(
            (*self._host("kv_num_blocks").shape, self.num_kv_blocks), np.int8
        )
        for b, h in self._patterns():
            part = self._part(b, h)
            state = np.where(part.full, BlockState.FULL, BlockState.PARTIAL)
            out[b, h, part.rows, part.cols] = state
        return out

    def to_dense(self) -> np.ndarray:
        """The element mask, ``[B or 1, H or 1, T, S]`` bool (host only).

        Example:
            >>> mask = BlockMask.from_blocks([0], [1], q_len=3, block_q=2, block_kv=2)
            >>> mask.to_dense()[0, 0].astype(int).tolist()
            [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
        """
        nb, nh, nq = self._host("kv_num_blocks").shape
        tiles = (nb, nh, nq, self.block_q, self.num_kv_blocks, self.block_kv)
        out = np.zeros(tiles, bool)
        for b, h in self._patterns():
            part = self._part(b, h, with_bits=self.bits is not None)
            for n in chunks(len(part.rows), self.block_q * self.block_kv):
                rows, cols = part.rows[n], part.cols[n]
                out[b, h, rows, :, cols, :] = self._elements(b, part, n)
        out = out.reshape(nb, nh, nq * self.block_q, -1)
        return out[..., : self.q_len, : self.kv_len]

    def check(self) -> BlockMask:
        """Returns the mask, or raises if a device builder ran out of capacity.

        It needs the values (host only).

        Raises:
            CapacityError: names each list that was too narrow and the width it needs.
        """
        if self.needed_capacity is None:
            return self
        needed = self._host("needed_capacity").reshape(-1, 4).max(0)
        short = [
            f"{name} has {have} and needs {need}"
            for name, have, need in zip(
                Capacity._fields, self.capacity, needed, strict=True
            )
            if have < need < NO_CAPACITY
        ]
        if self.bits is not None:
            have = self.bits.shape[-3]
            need = int(self._host("kv_num_blocks").sum((-1, -2)).max())
            if need > have:
                short.append(f"bits has {have} and needs {need}")
        if short:
            raise CapacityError(
                f"BlockMask: block lists are too narrow: {'; '.join(short)}. Build the "
                "mask again with at least that capacity; device builders call it "
                "capacity (kv), q_capacity (q) and num_bits (bits)."
            )
        return self

    def summary(self) -> dict[str, Any]:
        """Sizes, counts and load per row, as plain numbers (host only).

        Returns:
            ``q_len, kv_len, block_q, block_kv, batch, heads, groups, q_blocks,
            kv_blocks, blocks, partial, full, density``; ``row_min, row_mean, row_max``
            in blocks per query block; ``capacity``; and ``bytes`` of all arrays.

        Example:
            >>> mask = BlockMask.from_blocks([0, 1, 1], [0, 0, 1], q_len=256)
            >>> mask.summary()["row_max"]
            2
        """
        partial, full = self._host("kv_num_blocks"), self._host("full_kv_num_blocks")
        load = partial + full
        return {
            **self._sizes._asdict(),
            "batch": self.batch_size,
            "heads": self.num_heads,
            "groups": 1 if self.groups is None else len(self.groups),
            "q_blocks": self.num_q_blocks,
            "kv_blocks": self.num_kv_blocks,
            "blocks": int(load.sum()),
            "partial": int(partial.sum()),
            "full": int(full.sum()),
            "density": self.density,
            "row_min": int(load.min()),
            "row_mean": float(load.mean()),
            "row_max": int(load.max()),
            "capacity": self.capacity._asdict(),
            "bytes": int(sum(x.nbytes for x in jax.tree_util.tree_leaves(self))),
        }

    def __repr__(self) -> str:
        fields = [f"{k}={v}" for k, v in self._sizes._asdict().items()]
        if _is_host(self.kv_num_blocks) and _is_host(self.full_kv_num_blocks):
            fields += [f"blocks={self.num_blocks}", f"density={self.density:.4f}"]
        rules = [type(r).__name__ for r in self.rules] + ["bits"] * (
            self.bits is not None
        )
        fields += [
            f"capacity={tuple(self.capacity)}",
            f"elements={'+'.join(rules) or None}",
        ]
        return f"BlockMask({', '.join(fields)})"

    # ------------------------------------------------------------ transforming

    def transpose(self) -> BlockMask:
        """The same pattern with queries and keys exchanged (host only if it has bits).

        Example:
            >>> mask = BlockMask.from_blocks([0], [1], q_len=256, kv_len=384)
            >>> mask.transpose().block_states()[0, 0].tolist()
            [[0, 0], [2, 0], [0, 0]]
        """
        swap = [2, 3, 0, 1]
        needed, groups = self.needed_capacity, self.groups
        mask = dataclasses.replace(
            self,
            **{
                f"{new}_{name}": getattr(self, f"{old}_{name}")
                for new, old in zip(
                    Capacity._fields, [Capacity._fields[i] for i in swap], strict=True
                )
                for name in ("num_blocks", "indices")
            },
            q_lengths=self.kv_lengths,
            kv_lengths=self.q_lengths,
            rules=tuple(r.transpose() for r in self.rules),
            bits=None,
            groups=None if groups is None else groups[:, swap],
            needed_capacity=None if needed is None else needed[..., swap],
            q_len=self.kv_len,
            kv_len=self.q_len,
            block_q=self.block_kv,
            block_kv=self.block_q,
        )
        if self.bits is None:
            return mask
        flipped = []
        for b, h in self._patterns():
            part = self._part(b, h, with_bits=True)
            words = np.empty(
                (len(part.rows), mask.block_q, mask._sizes.words), np.uint32
            )
            for n in chunks(len(part.rows), self.block_q * self.block_kv):
                elements = unpack(part.words[n], self.block_kv)
                words[n] = pack(elements.swapaxes(1, 2))
            flip = Part(part.cols, part.rows, part.full, words)
            flipped.append(unique(flip, mask.num_kv_blocks))
        lists = block_lists(fold(flipped, mask.kv_num_blocks.shape), mask._sizes)
        return dataclasses.replace(mask, bits=lists["bits"])

    def pad_to(
        self,
        q_len: int,
        kv_len: int | None = None,
        *,
        capacity: int | Capacity | None = None,
        num_bits: int | None = None,
    ) -> BlockMask:
        """Extends the mask to a bucket: masks of one bucket share a compilation.

        The added queries see nothing and the added keys are seen by nobody (host only).

        Args:
            q_len: new T, at least the old one.
            kv_len: new S; ``q_len`` if not given.
            capacity: new list widths: an int for every list, or a `Capacity`; by
                default they stay as they are.
            num_bits: new number of bit blocks; by default it stays as it is.

        Returns:
            The padded mask; ``q_lengths`` and ``kv_lengths`` keep the real lengths.

        Raises:
            TypeError: for sizes that are traced.
            ValueError: if a length would shrink, for widths that are not integers, or
                if ``num_bits`` is given without bits.
            CapacityError: if a width is less than the lists use.

        Example:
            >>> mask = BlockMask.from_blocks([0, 1], [0, 1], q_len=200)
            >>> mask.pad_to(512, capacity=4).kv_indices.shape
            (1, 1, 4, 4)
        """
        self.check()
        sizes = check_sizes("pad_to", q_len, kv_len, self.block_q, self.block_kv)
        if sizes.q_len < self.q_len or sizes.kv_len < self.kv_len:
            raise ValueError(
                f"pad_to: the mask is {self.q_len} x {self.kv_len} and cannot shrink "
                f"to {sizes.q_len} x {sizes.kv_len}. Choose a larger bucket."
            )
        widths = self.capacity if capacity is None else _check_widths(capacity)
        lists = {}
        lengths = (sizes.grid[0], sizes.grid[0], sizes.grid[1], sizes.grid[1])
        for name, n, width in zip(Capacity._fields, lengths, widths, strict=True):
            counts = self._host(f"{name}_num_blocks")
            indices = self._host(f"{name}_indices")[..., :width]
            if counts.max(initial=0) > width:
                raise CapacityError(
                    f"pad_to: the {name} lists hold up to {counts.max()} blocks and do "
                    f"not fit a capacity of {width}. Pass at least {counts.max()}."
                )
            grow = [(0, 0), (0, 0), (0, n - counts.shape[2])]
            widen = (0, width - indices.shape[3])
            lists[f"{name}_num_blocks"] = np.pad(counts, grow)
            lists[f"{name}_indices"] = np.pad(indices, [*grow, widen])
        return dataclasses.replace(
            self,
            **lists,
            rules=tuple(r.pad_to(sizes.q_len, sizes.kv_len) for r in self.rules),
            bits=self.bits if num_bits is None else self._pad_bits(num_bits),
            q_len=sizes.q_len,
            kv_len=sizes.kv_len,
        )

    def to_bits(self) -> BlockMask:
        """The same mask with every rule written out as bits (host only).

        Example:
            >>> import jsparse.patterns as patterns
            >>> mask = patterns.window(100, left=3, right=3, block_q=32, block_kv=32)
            >>> bits = mask.to_bits()
            >>> bits.rules, bool((bits.to_dense() == mask.to_dense()).all())
            ((), True)
        """
        parts = []
        for b, h in self._patterns():
            part = self._part(b, h, with_bits=True)
            for n in chunks(len(part.rows), self.block_q * self.block_kv):
                part.words[n] = pack(self._elements(b, part, n))
            parts.append(part)
        grid = fold(parts, self.kv_num_blocks.shape)
        lengths = _lengths(self, self.batch_size)
        mask = from_parts(grid, self._sizes, lengths=lengths)
        return dataclasses.replace(mask, groups=self.groups)

    def __and__(self, other: BlockMask) -> BlockMask:
        """Elements allowed by both masks (host only)."""
        _check_compatible("&", [self, other])
        groups = _common_groups("&", self, other)
        with_bits = self.bits is not None or other.bits is not None
        shape, parts = _pattern_shape(self, other), []
        for b, h in np.ndindex(shape):
            x, y = (m._part(b, h, with_bits) for m in (self, other))
            codes = [
                p.rows.astype(np.int64) * self.num_kv_blocks + p.cols for p in (x, y)
            ]
            _, i, j = np.intersect1d(*codes, assume_unique=True, return_indices=True)
            x, y = x.take(i), y.take(j)
            words = x.words & y.words if with_bits else None
            parts.append(Part(x.rows, x.cols, x.full & y.full, words))
        rules = self.rules + tuple(r for r in other.rules if r not in self.rules)
        lengths = np.minimum(_lengths(self, shape[0]), _lengths(other, shape[0]))
        grid = fold(parts, shape)
        mask = from_parts(grid, self._sizes, rules=rules, lengths=lengths)
        return dataclasses.replace(mask, groups=groups)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Elements allowed by either mask; rules become bits (host only)."""
        _check_compatible("|", [self, other])
        groups = _common_groups("|", self, other)
        masks, parts = [m.to_bits() for m in (self, other)], []
        shape = _pattern_shape(self, other)
        for b, h in np.ndindex(shape):
            both = join([m._part(b, h, with_bits=True) for m in masks])
            part = unique(both, self.num_kv_blocks)
            every = pack(np.ones(self.block_kv, bool))
            allowed = (part.words & every == every).all((1, 2))
            parts.append(part._replace(full=part.full | allowed))
        lengths = np.maximum(_lengths(self, shape[0]), _lengths(other, shape[0]))
        mask = from_parts(fold(parts, shape), self._sizes, lengths=lengths)
        return dataclasses.replace(mask, groups=groups)

    # ----------------------------------------------------------------- private

    def _host(self, name: str) -> np.ndarray:
        value = getattr(self, name)
        if not _is_host(value):
            raise TypeError(
                f"BlockMask.{name} is traced here, and this method needs its values. "
                "Call it outside jit, on the mask before it is passed in."
            )
        return np.asarray(value)

    def _patterns(self) -> Iterator[tuple[int, ...]]:
        self.check()
        return np.ndindex(self._host("kv_num_blocks").shape[:2])

    def _part(self, b: int, h: int, with_bits: bool = False) -> Part:
        """One pattern as sorted block pairs; a shared batch or head entry repeats."""
        found = []
        for prefix in ("kv", "full_kv"):
            counts = self._host(f"{prefix}_num_blocks")
            b, h = min(b, counts.shape[0] - 1), min(h, counts.shape[1] - 1)
            indices = self._host(f"{prefix}_indices")[b, h]
            rows, slots = np.nonzero(
                np.arange(indices.shape[1]) < counts[b, h][:, None]
            )
            cols = indices[rows, slots].astype(np.int32)
            full = np.full(len(rows), prefix == "full_kv")
            found.append(Part(rows.astype(np.int32), cols, full))
        if not with_bits:
            return unique(join(found), self.num_kv_blocks)
        found = [p.with_words(self._sizes) for p in found]
        if self.bits is not None:
            first = int(self._host("kv_num_blocks")[b, :h].sum())
            pool = self._host("bits")[min(b, self.bits.shape[0] - 1)]
            found[0] = found[0]._replace(words=pool[first : first + len(found[0].rows)])
        return unique(join(found), self.num_kv_blocks)

    def _elements(self, b: int, part: Part, n: slice) -> np.ndarray:
        """Allowed elements ``[n, block_q, block_kv]`` of the pairs in slice ``n``."""
        rows, cols, full = part.rows[n], part.cols[n], part.full[n]
        t = rows[:, None] * self.block_q + np.arange(self.block_q)
        s = cols[:, None] * self.block_kv + np.arange(self.block_kv)
        q_length, kv_length = _lengths(self, b + 1)[:, b]
        ok = (t < q_length)[:, :, None] & (s < kv_length)[:, None, :]
        at = np.minimum(t, self.q_len - 1), np.minimum(s, self.kv_len - 1)
        for rule in self.rules:
            one = jax.tree_util.tree_map(
                lambda x: np.asarray(x)[min(b, len(x) - 1)], rule
            )
            q = tuple(x[at[0]] for x in one.q_data())
            kv = tuple(x[at[1]] for x in one.kv_data())
            # Coordinates of what does not exist may be anything.
            with np.errstate(over="ignore", invalid="ignore"):
                ok &= one.allowed(q, kv, t, s)
        if part.words is not None:
            ok &= unpack(part.words[n], self.block_kv)
        return ok | full[:, None, None]

    def _pad_bits(self, num_bits: int) -> np.ndarray:
        num_bits = count("pad_to: num_bits", num_bits, 0)
        have = 0 if self.bits is None else self.bits.shape[1]
        if self.bits is None or have > num_bits:
            raise ValueError(
                f"pad_to: num_bits={num_bits}, but the mask has {have} bit blocks. Use "
                "a mask with bits (see to_bits) and num_bits at least that."
            )
        return np.pad(
            self._host("bits"), [(0, 0), (0, num_bits - have), (0, 0), (0, 0)]
        )


def from_parts(
    grid: Grid,
    sizes: Sizes,
    *,
    rules: Sequence[ElementRule] = (),
    lengths: np.ndarray | None = None,
) -> BlockMask:
    """A mask from ``[batch][head]`` parts.

    ``lengths`` is ``[2, B or 1]``, the queries and keys that exist; T and S if None.
    """
    if lengths is None:
        lengths = np.array([[sizes.q_len], [sizes.kv_len]])
    lengths = np.asarray(lengths, np.int32)
    lists = block_lists(grid, sizes)
    return BlockMask(
        **lists,
        rules=tuple(rules),
        q_lengths=lengths[0],
        kv_lengths=lengths[1],
        **sizes._asdict(),
    )


def check_sizes(
    who: str, q_len: int, kv_len: int | None, block_q: int, block_kv: int
) -> Sizes:
    """The sizes of a new mask, or an error that names the one that is wrong."""
    sizes = Sizes(q_len, q_len if kv_len is None else kv_len, block_q, block_kv)
    for name, value in sizes._asdict().items():
        if isinstance(value, jax.core.Tracer):
            raise TypeError(
                f"{who}: {name} is traced; expected an integer that is known when the "
                "function is traced, since sizes are static. Close over it, or name "
                "it in static_argnames of jax.jit."
            )
        if (
            not isinstance(value, int | np.integer)
            or isinstance(value, bool)
            or value < 1
        ):
            raise ValueError(
                f"{who}: {name}={value!r}; expected an integer of at least 1."
            )
    return Sizes(*(int(x) for x in sizes))


def _check_pairs(rows, cols, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    out = []
    for name, x, n in zip(("rows", "cols"), (rows, cols), sizes.grid, strict=True):
        x = as_numpy(f"from_blocks: {name}", x)
        if x.size == 0:
            x = x.astype(np.int32)
        if x.ndim != 1 or not np.issubdtype(x.dtype, np.integer):
            raise ValueError(
                f"from_blocks: {name} has shape {x.shape} and dtype {x.dtype}; "
                "expected one axis of integers."
            )
        if x.size and (x.min() < 0 or x.max() >= n):
            raise ValueError(
                f"from_blocks: {name} spans {x.min()} to {x.max()}; expected 0 to "
                f"{n - 1}, the blocks of this length. Check block size and length."
            )
        out.append(x.astype(np.int32))
    if out[0].shape != out[1].shape:
        raise ValueError(
            f"from_blocks: {len(out[0])} rows but {len(out[1])} cols; expected one of "
            "each for every block pair."
        )
    return out[0], out[1]


def _check_widths(capacity: int | Capacity) -> Capacity:
    """New widths of the block lists."""
    if not isinstance(capacity, tuple | list):
        return Capacity(*[count("pad_to: capacity", capacity, 0)] * 4)
    if len(capacity) != 4:
        raise ValueError(
            f"pad_to: capacity={capacity!r}; expected an integer for every list, or a "
            f"Capacity of four: {', '.join(Capacity._fields)}."
        )
    named = zip(Capacity._fields, capacity, strict=True)
    return Capacity(*(count(f"pad_to: capacity.{k}", x, 0) for k, x in named))


def _check_full(part: Part, sizes: Sizes, rules: Sequence[ElementRule]) -> None:
    refuse_traced("from_blocks: rules", rules)
    tested = part._replace(full=np.zeros_like(part.full))
    mask = from_parts([[unique(tested, sizes.grid[1])]], sizes, rules=rules)
    part = mask._part(0, 0)
    for n in chunks(len(part.rows), sizes.block_q * sizes.block_kv):
        bad = np.flatnonzero(~mask._elements(0, part, n).all((1, 2)))
        if bad.size:
            row, col = part.rows[n][bad[0]], part.cols[n][bad[0]]
            raise ValueError(
                f"from_blocks: block ({row}, {col}) is declared full, but a rule "
                "forbids some of its elements. Leave it out of full to make it partial."
            )


def _check_compatible(
    who: str, masks: Iterable[BlockMask], lengths: bool = True
) -> list[BlockMask]:
    if not isinstance(masks, Iterable):
        raise TypeError(
            f"{who}: masks is a {type(masks).__name__}; expected a sequence of "
            "BlockMasks. Put a single mask into a list."
        )
    masks = list(masks)
    if not masks:
        raise ValueError(f"{who}: no masks were given; expected at least one.")
    for n, m in enumerate(masks):
        if not isinstance(m, BlockMask):
            raise TypeError(
                f"{who}: item {n} is a {type(m).__name__}; expected a BlockMask."
            )
        m.check()
        first = 0 if lengths else 2
        if m._sizes[first:] != masks[0]._sizes[first:]:
            raise ValueError(
                f"{who}: mask {n} is {m!r}, which does not fit {masks[0]!r}. Build "
                "both with the same block sizes" + (" and lengths." if lengths else ".")
            )
    return masks


def _lengths(mask: BlockMask, batch: int) -> np.ndarray:
    """``q_lengths`` and ``kv_lengths`` as ``[2, batch]``."""
    both = (mask._host("q_lengths"), mask._host("kv_lengths"))
    batch = max(batch, *map(len, both))
    return np.stack([np.broadcast_to(x, (batch,)) for x in both])


def _pattern_shape(a: BlockMask, b: BlockMask) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(a.kv_num_blocks.shape[:2], b.kv_num_blocks.shape[:2])
    except ValueError as err:
        raise ValueError(
            f"masks with [batch, head] patterns {a.kv_num_blocks.shape[:2]} and "
            f"{b.kv_num_blocks.shape[:2]} do not combine; expected equal sizes or 1."
        ) from err


def _common_groups(who: str, *masks: BlockMask) -> Array | None:
    """The groups of any of the masks; refuses those that divide the axes otherwise."""
    grouped = [m for m in masks if m.groups is not None]
    if not grouped:
        return None
    first = grouped[0]._host("groups").tolist()
    for mask in grouped[1:]:
        both = first, mask._host("groups").tolist()
        for n, (x, y) in enumerate(itertools.zip_longest(*both)):
            if x != y:
                raise ValueError(
                    f"{who}: group {n} is {x} in one mask and {y} in another (query "
                    "start and length, key start and length); expected equal groups. "
                    "Concatenate masks of the same lengths, in the same order."
                )
    return grouped[0].groups


def _is_host(x: Array) -> bool:
    return isinstance(x, np.ndarray | jax.Array) and not isinstance(x, jax.core.Tracer)
