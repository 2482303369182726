"""The kernels on a CPU: Pallas interprets them, jnp stands in for one warpgroup's work.

What runs for real is all that a kernel does above the registers: roles, the walk over
the schedule, copies, barriers, stages, positions, stores. Each stand-in states what the
instructions it replaces must compute; the GPU tests hold those to the same results.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from unittest import mock

import jax
import jax.core
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src import callback as jax_callback
from jax._src.pallas.mosaic_gpu.interpret import shared_memory

from jsparse.backends import _score as programs
from jsparse.pallas_kernels.mosaic_gpu import (
    _bias,
    _distance,
    _elements,
    _entries,
    _gradient,
    _registers,
    _score,
    _softmax,
    _tiles,
    bwd_dbias_sm90,
    bwd_dkv_sm90,
    bwd_dq_sm90,
    fwd_sm90,
    neighbors_sm90,
)

F32 = jnp.float32


def io_callback(*args, callback, **_):
    """The interpreter's call out of a computation, with NumPy arrays.

    JAX's own puts them on a device first, where threads that wait for one another can
    come to wait for ever, and what a callback computes is compiled and launched.
    """
    return jax.tree.map(np.asarray, callback(*map(np.array, args)))


def to_int(x):
    """The interpreter's, which takes arrays of JAX alone."""
    return x if isinstance(x, jax.core.Tracer) else int(x)


def _value(x):
    """An array, or what a reference holds."""
    is_array = isinstance(x, jax.Array) and not hasattr(x.aval, "inner_aval")
    return x if is_array else x[...]


def _untiled(x):
    """The rows and columns of a tile, of its parts; or of registers."""
    return x if x.ndim == 2 else jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)


def start(*products):
    def f(*args):
        rest, out = list(args), []
        for p in products:
            acc = rest.pop(0) if p.accumulate else 0.0
            a, b = (_untiled(_value(rest.pop(0))).astype(F32) for _ in range(2))
            out.append(acc + a @ (b.T if p.b_transposed else b))
        return tuple(out) if len(out) > 1 else out[0]

    return f


def wait(shape, pending):
    del pending
    return lambda x: x.reshape(shape)


def await_all(*columns, but=0):
    del columns, but
    return lambda *tiles: tiles


def softmax_step(tile_kv, scale_log2, lazy):
    del tile_kv

    def f(s, m, total):
        top = jnp.maximum(m, s.max(1) * scale_log2)
        if lazy:
            top = jnp.where(top - m > lazy, top, m)
        shift = jnp.where(top == -jnp.inf, 0, top)
        alpha = jnp.exp2(m - shift)
        p = jnp.exp2(s * scale_log2 - shift[:, None])
        return p, top, total * alpha + p.sum(1), alpha

    return f


def operand(columns, dtype):
    del columns
    return lambda x: x.astype(dtype)


def end_step(tile_kv, value_dim, dtype, lazy):
    del tile_kv, value_dim, lazy
    return lambda acc, p, alpha: (acc * alpha[:, None], p.astype(dtype))


def finish(value_dim, dtype):
    del value_dim

    def f(acc, m, total):
        inverse = jnp.where(total == 0, 0, 1 / total)
        lse = (m + jnp.log2(total)) * jnp.log(2.0)
        return (acc * inverse[:, None]).astype(dtype), lse

    return f


def probabilities_by_row(columns, scale_log2):
    del columns
    return lambda s, lse2: jnp.exp2(s * scale_log2 - lse2[:, None])


def logits_gradient_by_row(columns, partial):
    del columns

    def f(p, dp, delta):
        ds = p * (dp - delta[:, None])
        return jnp.where(p == 0, 0, ds) if partial else ds

    return f


def probabilities_by_column(columns, scale_log2):
    del columns
    return lambda s, lse2: jnp.exp2(s * scale_log2 - lse2[...])


def logits_gradient_by_column(columns, partial):
    del columns

    def f(p, dp, delta):
        ds = p * (dp - delta[...])
        return jnp.where(p == 0, 0, ds) if partial else ds

    return f


def scaled(columns, factor, dtype):
    del columns
    return lambda x: (x * factor).astype(dtype)


def add_to_rows(columns):
    del columns
    return lambda total, x: total + x.sum(1)


def whole_rows():
    return lambda total: total


def add_logits_gradient(columns, partial):
    ds = logits_gradient_by_row(columns, partial)
    return lambda total, p, dp, delta: total + ds(p, dp, delta)


def named_barrier(text):
    del text
    return lambda index: None


def fence_reads():
    return lambda: None


def await_warpgroup():
    return lambda: None


def rows(values, b, h, first):
    return values[b, h, pl.ds(first, 64)]


def fetch(elements, columns, rows):
    """Nothing: `apply` reads what it tests."""
    return lambda at: _elements.no_words(elements)


def apply(elements, columns, fill, rows):
    """The element test, from its definition."""

    def f(x, at, words):
        del words
        row = at.row + jnp.arange(64)[:, None] % rows
        column = at.column + jnp.arange(columns)[None]
        counts = jnp.ones((64, columns), bool)
        if elements.lengths is not None:
            counts &= row < elements.lengths[2 * at.batch]
            counts &= column < elements.lengths[2 * at.batch + 1]
        if elements.bits is not None:
            words = elements.bits.shape[-1]
            block, first = jnp.divmod(at.bit_word, elements.bits.shape[-2] * words)
            entry, block = jnp.divmod(block, elements.bits.shape[1])
            first_row, first_word = jnp.divmod(first, words)
            bits = elements.bits[
                entry,
                block,
                pl.ds(first_row, rows),
                pl.ds(first_word, -(-columns // 32)),
            ]
            bits = bits[..., None] >> jnp.arange(32, dtype=jnp.int32) & 1
            counts &= _tile(bits.reshape(rows, -1)[:, :columns] == 1)
        for rule in elements.rules:
            counts &= _tile(_allows(rule, at, row[:rows], column))
        return jnp.where(counts, x, fill)

    return f


def _flags(bad, first, columns):
    head, column = jnp.divmod(first, bad.shape[-1])
    b, h = jnp.divmod(head, bad.shape[1])
    return bad[b, h, pl.ds(column, columns)] != 0


def poison(columns):

    def f(x, bad, first):
        seen = x != -jnp.inf
        return jnp.where(seen & _flags(bad, first, columns), jnp.nan, x)

    return f


def zero_columns(columns, dim):
    del dim

    def f(tile, bad, first):
        flags = _flags(bad, first, columns)
        tile[...] = jnp.where(flags[None, :, None], 0, tile[...]).astype(tile.dtype)

    return f


def load(rows, columns, dtype, transposed=False):
    del rows, columns, dtype

    def f(tile):
        values = _untiled(tile[...])
        return values.T if transposed else values

    return f


def store(columns, dtype):
    del columns

    def f(tile, x):
        count, rows, width = tile.shape
        tile[...] = jnp.moveaxis(x.reshape(rows, count, width), 1, 0).astype(dtype)

    return f


def add_tile(columns, scale, dtype):
    del columns, dtype
    return lambda s, values: s + values.astype(F32) / scale


def keep(tile, chunk, scale, dtype):
    del tile, chunk

    def f(room, *chunks):
        values = jnp.stack(chunks).astype(F32) / scale
        room[...] = jax.lax.bitcast_convert_type(values, dtype).reshape(room.shape)

    return f


def kept(chunk, n, dtype):
    words = 4 // jnp.dtype(dtype).itemsize

    def f(room):
        halves = room[...].reshape(-1, 64, chunk, *[words] * (words > 1))
        return jax.lax.bitcast_convert_type(halves, F32)[n]

    return f


def add_columns(columns, scale):
    def f(s, values, first):
        head, column = jnp.divmod(first, values.shape[-1])
        b, h = jnp.divmod(head, values.shape[1])
        return s + values[b, h, pl.ds(column, columns)] / scale

    return f


def add_rows(columns, scale):
    del columns
    return lambda s, values: s + values[:, None] / scale


def _entries_of_tile(sizes, bias, at, listed):
    """Of each entry of a block: its element of the tile, its query and its number.

    The number of the tile's elements where it has none, or does not count.
    """
    count, query_block, start = (listed[n] for n in range(neighbors_sm90.HEADER))
    entry, block = jnp.divmod(at.lists + query_block, bias.lists.shape[1])
    nth = jnp.arange(min(bias.lists.shape[2], 2 * 128 * 128), dtype=jnp.int32)
    there = bias.lists[entry, block][jnp.minimum(start + nth, bias.lists.shape[2] - 1)]
    at_hand = listed[...][jnp.minimum(nth + neighbors_sm90.HEADER, listed.shape[0] - 1)]
    word = jnp.where(nth < _entries.AT_HAND, at_hand, there)
    query, key = word >> 7 & 127, word & 127
    row, column = (query, key) if sizes.rows_are_queries else (key, query)
    row, column = row - at.row, column - at.column
    counts = (nth < count) & (word >= 0) & (row >= 0) & (row < 64)
    counts &= (column >= 0) & (column < sizes.columns)
    place = jnp.where(counts, row * sizes.columns + column, 64 * sizes.columns)
    query += query_block * sizes.blocks[0]
    return place, query, jnp.minimum(word >> 14, bias.count - 1)


def spread(sizes):
    """Elements that do not count become NaN, which must not show."""

    def f(bias, at, listed, tile, own):
        place, query, n = _entries_of_tile(sizes, bias, at, listed)
        b, h = jnp.divmod(at.values, bias.values.shape[1])
        values = bias.values[b, h]
        if own is not None:
            first = listed[1] * sizes.blocks[0] + at.row
            values, query = own[...], query - first
        values = values[jnp.clip(query, 0, len(values) - 1), n].astype(F32)
        found = jnp.full(64 * sizes.columns, jnp.nan)
        found = found.at[place].set(values, mode="drop").reshape(64, -1)
        padding = jnp.full((64, _entries.PADDING), jnp.nan)
        tile[...] = jnp.append(found, padding, 1).reshape(-1)

    return f


def read(columns):
    return lambda tile: tile[...].reshape(64, -1)[:, :columns]


def write(sizes):
    def f(bias, out, at, listed, tile, x):
        del tile
        place, *which = _entries_of_tile(sizes, bias, at, listed)
        b, h = jnp.divmod(at.values, out.shape[1])
        none = 64 * sizes.columns
        own = jnp.argsort(place == none, stable=True)
        x = x.reshape(-1)[jnp.minimum(place[own], none - 1)]
        query, number = (y[own] for y in which)

        # One by one: what is between belongs to others, who write at the same time.
        def store(n, _):
            out[b, h, query[n], number[n]] = x[n].astype(out.dtype)

        total = (place < none).sum(dtype=jnp.int32)
        jax.lax.fori_loop(0, total, store, None)

    return f


def read_columns(columns):
    """The points, in the first numbers of an array as large as the kernels'."""

    def f(points):
        values = _value(points).reshape(-1)
        room = jnp.zeros(64 * columns * 3 // 2 - values.size, F32)
        return jnp.concatenate([values, room]).reshape(64, -1)

    return f


def _difference(bias, read, rows, columns):
    """By axis, of the points of a 64-row tile."""
    batch = read.batch if bias.rows.shape[0] > 1 else 0
    x = bias.rows[batch, :, pl.ds(read.row, rows)]
    y = read.columns.reshape(-1)[: 3 * columns].reshape(3, columns)
    return [_tile(a[:, None]) - b[None] for a, b in zip(x, y, strict=True)]


def read_table(count):
    """Nothing: the table is read where it is used."""
    del count
    return lambda bias, entry: jnp.zeros((64, 8), F32)


def _weights(bias, entry):
    count = bias.weights.shape[-1]
    return [bias.weights[entry.batch, entry.head, n] for n in range(count)]


def _hats(d, bias, entry):
    """Of each entry of a table, which part of it a distance takes."""
    last = bias.weights.shape[-1] - 1
    u = jnp.minimum(d * bias.inverse[entry.points], last)
    return [jnp.maximum(0, 1 - jnp.abs(u - n)) for n in range(last + 1)]


def add_distance(columns, scale, form, rows, count, slopes):
    del count, slopes

    def f(s, bias, entry, read):
        d = distances(columns, rows)(bias, read)
        weights = _weights(bias, entry)
        if form == "table":
            hats = _hats(d, bias, entry)
            value = sum(w * x for w, x in zip(weights, hats, strict=True))
        else:
            value = -weights[0] * (d * d if form == "quadratic" else d)
        return s + value / scale

    return f


def distances(columns, rows):
    def f(bias, read):
        difference = _difference(bias, read, rows, columns)
        return jnp.sqrt(sum(x * x for x in difference))

    return f


def add_gaussian(columns, scale):
    del columns

    def f(x, d, weight, center, inverse):
        u = (d - center) * inverse
        return x + weight / scale * jnp.exp(-u * u / 2)

    return f


def _table_slope(d, bias, entry):
    """By distance in widths."""
    weights, u = _weights(bias, entry), d * bias.inverse[entry.points]
    steps = enumerate(itertools.pairwise(weights))
    return sum(jnp.where((n <= u) & (u < n + 1), y - x, 0) for n, (x, y) in steps)


def add_distance_sums(columns, form, rows, every, count, partial):
    del count

    def f(sums, p, ds, bias, entry, read, slopes, lanes):
        difference = _difference(bias, read, rows, columns)
        square = sum(x * x for x in difference)
        d, more = jnp.sqrt(square), []
        factor = jnp.where(square > 0, 1 / d, 0)
        if form == "quadratic":
            d, factor = square, 2.0
        elif form == "gaussian":
            factor *= slopes
        elif form == "table":
            factor *= _table_slope(d, bias, entry)
            for n, hat in enumerate(_hats(d, bias, entry) if every else []):
                _add_to_lanes(lanes, n, jnp.where(p == 0, 0, ds * hat))
        if every and form in ("linear", "quadratic"):
            more = [ds * d, ds, p * d]
        terms = [ds * factor * x for x in difference] + more
        if partial:
            terms = [jnp.where(p == 0, 0, x) for x in terms]
        terms = [x.sum(1) for x in terms]
        return [x + y for x, y in zip(sums, terms, strict=True)]

    return f


def _add_to_lanes(lanes, n, x):
    """Some lane's: the first 64 take a row each."""
    lanes[n, pl.ds(0, 64)] = lanes[n, pl.ds(0, 64)] + x.sum(1)


def seen_distances(columns, rows):
    def f(p, ds, bias, read):
        d = distances(columns, rows)(bias, read)
        return jnp.where(p == 0, 0, d), jnp.where(p == 0, 0, ds)

    return f


def add_gaussian_slope(columns, count, every):
    del columns

    def f(slopes, d, ds, scalars, lanes, n):
        weight, center, inverse = scalars
        u = (d - center) * inverse
        e = jnp.exp(-u * u / 2)
        if every:
            _add_to_lanes(lanes, n, ds * e)
            _add_to_lanes(lanes, count + n, ds * e * u)
            _add_to_lanes(lanes, 2 * count, weight * ds * e * u * u)
        return slopes - weight * e * u

    return f


def _scores(score, x, scale, head, at, rows, rows_are_queries):
    """The place of a tile's logits, and what the program loads there."""
    row = at.row + jnp.arange(64, dtype=jnp.int32)[:, None] % rows
    column = at.column + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    q_kv = (row, column) if rows_are_queries else (column, row)
    arrays = [x[at.batch if x.shape[0] > 1 else 0] for x in score.arrays]
    found = programs.load(score.program, arrays, (*q_kv, head))
    return (x * F32(scale), *q_kv, head), [value for value, _ in found]


def new_logits(score, columns, scale, rows, rows_are_queries):
    del columns

    def f(x, head, at):
        place, loaded = _scores(score, x, scale, head, at, rows, rows_are_queries)
        (out,) = score.program.evaluate(place, programs.Numbers(loaded))
        return jnp.broadcast_to(out, x.shape) / F32(scale)

    return f


def store_lane_sums(count):
    def f(lanes, out, first):
        place, index = [], first // count
        for n in reversed(out.shape[:-1]):
            index, at = jnp.divmod(index, n)
            place.insert(0, at)
        out[(*place, slice(None))] = lanes[...].sum(1)

    return f


def products_gradient(score, columns, scale, rows, rows_are_queries):
    del columns

    def f(sums, x, p, ds, head, at):
        place, loaded = _scores(score, x, scale, head, at, rows, rows_are_queries)
        by_score, *by_element = score.program.slopes.evaluate(
            (*place, *loaded), programs.Numbers(())
        )
        slopes = [by_element[n] for n in score.summed(rows_are_queries)]
        terms = [ds * slope for slope in slopes]
        if rows_are_queries and slopes:
            terms += [*(p * slope for slope in slopes), ds]
        sums = [
            total + jnp.where(p == 0, 0, term).sum(1)
            for total, term in zip(sums, terms, strict=True)
        ]
        return sums, jnp.where(p == 0, 0, ds * by_score)

    return f


def _tile(x):
    """64 rows: those of a block of 32 twice."""
    return jnp.tile(x, (64 // len(x), 1))


def _allows(rule, at, row, column):
    rows, columns = row.size, column.size

    def entry(x):
        return at.batch if x.shape[0] > 1 else 0

    def by_row(x):
        return x[entry(x), ..., pl.ds(at.row, rows)][..., :, None]

    def by_column(x):
        return x[entry(x), ..., pl.ds(at.column, columns)][..., None, :]

    if isinstance(rule, _elements.SameLabel):
        return by_row(rule.rows) == by_column(rule.columns)
    if isinstance(rule, _elements.RowInterval):
        return (by_row(rule.start) <= column) & (column < by_row(rule.stop))
    if isinstance(rule, _elements.ColumnInterval):
        return (by_column(rule.start) <= row) & (row < by_column(rule.stop))
    square = 0.0
    for axis in range(3):
        x = rule.rows[entry(rule.rows), axis, pl.ds(at.row, rows)][:, None]
        y = rule.columns[entry(rule.columns), axis, pl.ds(at.column, columns)][None]
        square += (x - y) * (x - y)
    return square <= rule.cutoff2[entry(rule.cutoff2)]


def _listed(index, row, first, end, keys):
    """Some entries of lists, which query has each, and whether it exists."""
    count = index.shape[-1]
    at = first + jnp.arange(neighbors_sm90.THREADS * neighbors_sm90.AT_ONCE)
    key = index[...].reshape(-1).at[row * count + at].get(mode="clip")
    return key, at // count, (at < end) & (key >= 0) & (key < keys)


def add_to_blocks(count, block_kv):
    del count

    def f(index, counts, row, first, end, keys):
        key, _, exists = _listed(index, row, first, end, keys)
        block = jnp.where(exists, key // block_kv, counts.size)
        counts[...] = counts[...].at[block].add(1, mode="drop")

    return f


def count_entries(count):
    del count

    def f(index, extra, row, first, end, keys):
        _, q, exists = _listed(index, row, first, end, keys)
        q = jnp.where(exists, q, extra.size)
        extra[...] = extra[...].at[q].add(1, mode="drop")

    return f


def take_off_bits(block_q, words):
    def f(bits, extra, block):
        counts = jax.lax.population_count(bits[block]).reshape(block_q, words).sum(1)
        extra[...] = extra[...].at[:block_q].add(-counts)

    return f


def place_entries(count, block_kv, size):
    def f(index, ends, extra, lists, counted, own, row, first, end, keys):
        key, q, exists = _listed(index, row, first, end, keys)
        at = first + jnp.arange(len(key))
        number, others = at % count, jnp.arange(count)
        same = index[...][jnp.minimum(row + q, len(index) - 1)] == key[:, None]
        earlier = (same & (others < number[:, None])).any(1)
        counts = exists & ~(earlier & (extra[...][jnp.minimum(q, extra.size - 1)] > 0))
        word = jnp.where(counts, number << 14 | q << 7 | key % block_kv, -1)
        block = jnp.where(exists, key // block_kv, ends.size)
        before = (block[:, None] == block) & (at < at[:, None])
        place = ends[...].at[block].get(mode="clip") + before.sum(1)
        lists[own] = (
            lists[own].at[jnp.where(exists, place, size)].set(word, mode="drop")
        )
        counted[own] = counted[own].at[at].set(counts.astype(jnp.int8), mode="drop")
        ends[...] = ends[...].at[block].add(1, mode="drop")

    return f


def close_lists(room, size):
    del room, size

    def f(starts, ends, lists, own, block):
        start, found = starts[own], lists[own]
        count = ends[...] - start
        for n, x in enumerate((count, jnp.full_like(count, block), start)):
            found = found.at[start - neighbors_sm90.HEADER + n].set(x)
        lists[own] = found

    return f


def add_bits(count, block_q, block_kv, at_once):
    del count

    def f(index, numbers, tile, row, of_row, block, first, end, keys):
        key, q, exists = _listed(index, row, first, end, keys)
        place = numbers[...].at[of_row + key // block_kv].get(mode="clip") - block
        exists &= (place >= 0) & (place < at_once)
        place = jnp.where(exists, place, at_once)
        shape = at_once, block_q, block_kv // 32, 32
        bits = jnp.arange(32, dtype=jnp.uint32)
        old = tile[...].reshape(*shape[:3], 1).astype(jnp.uint32) >> bits & 1
        word, bit = jnp.divmod(key % block_kv, 32)
        new = old.at[place, q, word, bit].set(1, mode="drop")
        words = (new << bits).sum(-1, dtype=jnp.uint32)
        tile[...] = jax.lax.bitcast_convert_type(words, jnp.int32).reshape(tile.shape)

    return f


_STAND_INS = {
    _softmax: (softmax_step, operand, end_step, finish),
    _gradient: (
        *(await_all, rows, scaled, add_logits_gradient, add_to_rows, whole_rows),
        *(probabilities_by_row, logits_gradient_by_row),
        *(probabilities_by_column, logits_gradient_by_column),
    ),
    _elements: (fetch, apply, poison, zero_columns),
    _registers: (named_barrier, fence_reads, await_warpgroup),
    _tiles: (load, store),
    _bias: (add_tile, add_columns, add_rows, keep, kept),
    _entries: (spread, read, write),
    _distance: (
        *(
            read_columns,
            read_table,
            add_distance,
            distances,
            add_gaussian,
            add_distance_sums,
        ),
        *(seen_distances, add_gaussian_slope, store_lane_sums),
    ),
    _score: (new_logits, products_gradient),
    neighbors_sm90: (
        *(add_to_blocks, add_bits, count_entries, take_off_bits),
        *(place_entries, close_lists),
    ),
    fwd_sm90: (start, wait),
    bwd_dbias_sm90: (start,),
    bwd_dq_sm90: (start, wait, operand),
    bwd_dkv_sm90: (start, wait, operand),
}


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Runs kernels as described above."""
    with contextlib.ExitStack() as stack:
        for module, functions in _STAND_INS.items():
            for f in functions:
                stack.enter_context(mock.patch.object(module, f.__name__, f))
        stack.enter_context(
            mock.patch.object(jax_callback, "io_callback_impl", io_callback)
        )
        stack.enter_context(mock.patch.object(shared_memory, "_to_int", to_int))
        stack.enter_context(plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()))
        yield
