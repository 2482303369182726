"""Launches of each kernel on arrays of given sizes, for tests that only lower them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jsparse.backends import _score as _programs
from jsparse.pallas_kernels.mosaic_gpu import (
    _bias,
    _distance,
    _score,
    bwd_dbias_sm90,
    bwd_dkv_sm90,
    bwd_dq_sm90,
    fwd_sm90,
    neighbors_sm90,
)
from jsparse.pallas_kernels.mosaic_gpu._elements import (
    ColumnInterval,
    Elements,
    RowInterval,
    SameLabel,
    Within,
)
from jsparse.pallas_kernels.mosaic_gpu._schedule import (
    Blocks,
    schedule_on_device,
    schedule_on_host,
)
from tests.support.scores import FUNCTIONS, shapes_of

KERNELS = {
    "forward": (fwd_sm90.forward, fwd_sm90.Config.choose),
    "dq": (bwd_dq_sm90.backward_dq, bwd_dq_sm90.choose),
    "dkv": (bwd_dkv_sm90.backward_dkv, bwd_dkv_sm90.choose),
    "dbias": (bwd_dbias_sm90.backward_dbias, bwd_dbias_sm90.choose),
}
TUNED = {name: KERNELS[name] for name in ("forward", "dq", "dkv")}
"""Kernels with a table of measured configs."""
DISTANCES = _distance.FORMS
H100 = AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel on 7 query and 5 key blocks, the last of each ragged.

    ``bias`` is None, ``"key"``, ``"block"``, ``"entry"``, a form of `DistanceBias`, the
    name of one of `tests.support.scores.FUNCTIONS`, or the dtype of a dense one; a
    table or Gaussians have ``weights``, as many as may be if None. Heads share a dense
    bias, or one by block or entry, unless ``shared`` is False; of a ``constant`` one no
    gradient is asked for.
    """

    kernel: str
    dims: tuple[int, int] = (64, 64)
    blocks: tuple[int, int] = (128, 128)
    heads: tuple[int, int] = (2, 2)
    dtype: str = "bfloat16"
    bits: bool = True
    rules: bool = False
    on_host: bool = True
    launch: str = "many"
    given: Any = None
    bias: str | None = None
    weights: int | None = None
    shared: bool = True
    constant: bool = False

    def config(self):
        """The given one, or the chosen: what is launched matters to forward only."""
        bias = self.bias_shape()
        options: dict[str, Any] = {"bias": _bias.kind(bias)}
        if self.kernel == "forward":
            computed = options["bias"] in _bias.COMPUTED
            options["launch"] = "distances" if computed else self.launch
        elif self.kernel == "dbias":
            options = {"bias_dtype": self.bias_dtype}
        else:
            options["lane_sums"] = _bias.lane_sums(bias)
        return self.given or KERNELS[self.kernel][1](
            *self.dims, *self.blocks, **options
        )

    @property
    def bias_dtype(self) -> str | None:
        """Of a streamed bias."""
        if self.bias in ("key", "entry", *DISTANCES, *FUNCTIONS):
            return None
        return "float32" if self.bias == "block" else self.bias

    @property
    def rows(self) -> int:
        """Rows of an item."""
        if self.kernel == "forward":
            return self.config().tile_q
        block = self.blocks[self.kernel == "dkv"]
        return block if self.kernel == "dbias" else self.config().rows(block)

    def lower(self) -> str:
        """The text of the program for an H100."""
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
            traced = jax.jit(self).trace(*self.arguments())
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    def arguments(self) -> tuple:
        """Shapes of q, k, v, dout, lse2, delta, the two counts and the bias."""
        block_q, block_kv = self.blocks
        q_len, kv_len = 7 * block_q - 5, 5 * block_kv - 9

        def side(n, h, d):
            return jax.ShapeDtypeStruct((1, n, h, d), self.dtype)

        row = jax.ShapeDtypeStruct((1, self.heads[0], 7 * block_q), "float32")
        rows, _ = self.grid()
        counts = jax.ShapeDtypeStruct((1, 1, rows), "int32")
        return (
            side(q_len, self.heads[0], self.dims[0]),
            side(kv_len, self.heads[1], self.dims[0]),
            side(kv_len, self.heads[1], self.dims[1]),
            side(q_len, self.heads[0], self.dims[1]),
            *(row, row, counts, counts),
            self.bias_shape(),
        )

    def bias_shape(self):
        """Of one batch entry; of a block bias, values of 40 blocks."""
        if self.bias is None:
            return None
        return dataclasses.replace(self.any_bias(), constant=self.constant)

    def any_bias(self):
        block_q, block_kv = self.blocks
        if self.bias == "key":
            shape = jax.ShapeDtypeStruct((1, 1, 5 * block_kv), "float32")
            return _bias.KeyBias(shape)
        if self.bias == "entry":
            return self.entries()
        if self.bias in DISTANCES:
            sides = (7 * block_q, 5 * block_kv)[:: -1 if self.kernel == "dkv" else 1]
            rows, columns = (jax.ShapeDtypeStruct((1, 3, n), "float32") for n in sides)
            most = _distance.MOST.get(self.bias)
            n = self.weights or most or 1
            weights, inverse, centers = (
                jax.ShapeDtypeStruct(shape, "float32")
                for shape in ((1, self.heads[0], n), (1,), (1, n))
            )
            return _distance.DistanceBias(
                *(rows, columns, weights, self.bias),
                inverse if most else None,
                centers if self.bias == "gaussian" else None,
            )
        if self.bias in FUNCTIONS:
            return self.score()
        heads = 1 if self.shared else self.heads[0]
        if self.bias == "block":
            shape = jax.ShapeDtypeStruct((1, heads, 40, block_q, block_kv), "float32")
            return _bias.BlockBias(shape)
        shape = (1, heads, 7 * block_q - 5, 5 * block_kv - 8)
        return _bias.DenseBias(jax.ShapeDtypeStruct(shape, self.bias))

    def entries(self) -> _bias.EntryBias:
        """Of lists of 24, which heads share unless ``shared`` is False."""
        heads = 1 if self.shared else self.heads[0]
        dtype = "bfloat16" if self.shared else "float32"
        count, size = 24, neighbors_sm90.list_size(24, 5, self.blocks[0])
        q_len = 7 * self.blocks[0] - 5
        return _bias.EntryBias(
            jax.ShapeDtypeStruct((1, heads, q_len, count), dtype),
            lists=jax.ShapeDtypeStruct((1, 7, size), "int32"),
            starts=jax.ShapeDtypeStruct((1, 7, 5), "int32"),
            blocks=self.blocks,
        )

    def score(self) -> _score.Score:
        """A score function, of one entry's arrays."""
        block_q, block_kv = self.blocks
        lengths = 7 * block_q - 5, 5 * block_kv - 9
        shapes = shapes_of(str(self.bias), self.heads[0], *lengths)
        found = []

        def traced(*arrays):
            program, arrays = _programs.trace(
                FUNCTIONS[str(self.bias)], "float32", arrays, ""
            )
            found.append(program)
            return [x[None] for x in arrays]

        arrays = jax.eval_shape(traced, *shapes)
        return _score.Score(tuple(arrays), found[0])

    def grid(self) -> tuple[int, int]:
        """Rows and columns in blocks."""
        return (5, 7) if self.kernel == "dkv" else (7, 5)

    def __call__(self, q, k, v, dout, lse2, delta, partial, full, bias):
        run, _ = KERNELS[self.kernel]
        config = self.config()
        rows, columns = self.grid()
        if self.kernel == "dbias":
            return run(
                *(q, k, v, dout, lse2, delta, self.bias_blocks(), self.elements()),
                bias,
                blocks=self.blocks,
                scale=0.125,
                config=config,
            )
        make = schedule_on_device
        if self.on_host:
            make, partial, full = schedule_on_host, *self.counts()
        group = self.heads[0] // self.heads[1] if self.kernel == "dkv" else 1
        tiles = self.blocks[self.kernel == "dkv"] // self.rows
        lists = np.zeros((1, 1, rows, columns), np.int32)
        schedule = make(
            *(Blocks(partial, lists), Blocks(full, lists)),
            batch=1,
            heads=self.heads[0],
            workers=config.num_workers,
            group=group,
            tiles=tiles,
            share=getattr(config, "num_sharing", 1),
        )
        if self.bias == "block":
            numbers = (lists[0, 0], lists[0, 0])
            bias = dataclasses.replace(bias, numbers=numbers)
        arrays = (q, k, v)
        if self.kernel != "forward":
            arrays += (dout, lse2, delta)
        return run(
            *(*arrays, lists, lists, self.elements(), schedule),
            blocks=self.blocks,
            scale=0.125,
            config=config,
            bias=bias,
        )

    def bias_blocks(self) -> bwd_dbias_sm90.Blocks:
        """Of all blocks, or of those of a block bias."""
        count = 40 if self.bias == "block" else 35
        zeros = jnp.zeros((1, count), jnp.int32)
        places = (zeros, zeros) if self.bias == "block" else (None, None)
        return bwd_dbias_sm90.Blocks(zeros[None], *places)

    def counts(self):
        """Blocks of each row, partial and full."""
        rows, columns = self.grid()
        counts = np.arange(rows)[None, None] % columns
        return counts, counts + 1

    def elements(self) -> Elements:
        """Of every kind, or bits alone, or lengths alone."""
        rows, columns = self.blocks[::-1] if self.kernel == "dkv" else self.blocks
        count = self.grid()
        bits = jnp.zeros((1, 40, rows, columns // 32), jnp.int32) if self.bits else None
        row = jnp.zeros((1, rows * count[0]), jnp.int32)
        column = jnp.zeros((1, columns * count[1]), jnp.int32)
        points = [jnp.zeros((1, 3, x.shape[1]), jnp.float32) for x in (row, column)]
        rules = (
            SameLabel(row, column),
            RowInterval(row, row),
            ColumnInterval(column, column),
            Within(points[0], points[1], jnp.ones(1, jnp.float32)),
        )
        heads = self.heads[self.kernel != "dkv"]
        bad = jnp.zeros((1, heads, column.shape[1]), jnp.int32)
        lengths = jnp.zeros(2, jnp.int32)
        if self.rules:
            return Elements(None, bad, bits, rules)
        return Elements(lengths, bad, bits)
