"""BlockMask and its operations against dense boolean matrices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jsparse import patterns
from jsparse.patterns import (
    BlockMask,
    BlockState,
    Capacity,
    CapacityError,
    Distance,
    Segments,
    Window,
)
from tests.patterns.oracle import (
    RULES,
    SIZES,
    alike,
    check_lists,
    masks,
    states_of,
    untyped,
)


def same(mask, dense):
    np.testing.assert_array_equal(mask.to_dense(), dense)
    check_lists(mask)
    # A block is full only if all its elements exist and are allowed.
    states = states_of(dense, mask.block_q, mask.block_kv)
    assert (states[mask.block_states() == BlockState.FULL] == BlockState.FULL).all()


# -------------------------------------------------------------------- building


@given(masks())
def test_from_blocks_is_the_union_of_its_pairs(case):
    same(*case)


def test_no_pairs_make_an_empty_mask():
    mask = BlockMask.from_blocks([], [], q_len=5, kv_len=7, block_q=2, block_kv=3)
    same(mask, np.zeros((1, 1, 5, 7), bool))
    assert mask.capacity == (0, 0, 0, 0)
    assert mask.density == 0


def test_every_pair_makes_a_full_mask():
    rows, cols = np.divmod(np.arange(6), 2)
    mask = BlockMask.from_blocks(rows, cols, q_len=6, kv_len=6, block_q=2, block_kv=3)
    same(mask, np.ones((1, 1, 6, 6), bool))
    assert (mask.block_states() == BlockState.FULL).all()
    assert mask.bits is None


def test_duplicates_count_once_and_full_wins():
    elements = np.zeros((3, 2, 2), bool)
    elements[0, 0, 0] = elements[2, 1, 1] = True
    mask = BlockMask.from_blocks(
        [0, 1, 0],
        [0, 0, 0],
        q_len=4,
        kv_len=2,
        block_q=2,
        block_kv=2,
        elements=elements,
        full=[False, True, False],
    )
    expected = [[True, False], [False, True], [True, True], [True, True]]
    assert mask.to_dense()[0, 0].tolist() == expected
    assert mask.num_blocks == 2


def test_full_pair_beyond_the_end_ignores_its_elements():
    mask = BlockMask.from_blocks(
        [0],
        [0],
        q_len=3,
        block_q=4,
        block_kv=4,
        elements=np.zeros((1, 4, 4), bool),
        full=[True],
    )
    same(mask, np.ones((1, 1, 3, 3), bool))
    assert mask.block_states()[0, 0, 0, 0] == BlockState.PARTIAL


def test_pair_that_is_partial_and_full_is_full():
    mask = BlockMask.from_blocks([0, 0], [0, 0], q_len=128, full=[False, True])
    assert mask.block_states().tolist() == [[[[BlockState.FULL]]]]


def test_transposed_window_rule_belongs_to_the_keys():
    rule = Window(np.array([[0, 2]]), np.array([[1, 3]]), "kv")
    mask = BlockMask.from_blocks(
        [0], [0], q_len=3, kv_len=2, block_q=3, block_kv=2, rules=[rule]
    )
    assert mask.to_dense()[0, 0].astype(int).tolist() == [[1, 0], [0, 0], [0, 1]]


# ------------------------------------------------------------------ operations


@given(alike())
def test_and_or(cases):
    (a, x), (b, y) = cases
    same(a & b, x & y)
    same(a | b, x | y)


@given(alike(3))
def test_and_or_of_head_and_batch_patterns(cases):
    (a, x), (b, y), (c, z) = cases
    heads = BlockMask.stack([a, b], "head")
    batch = BlockMask.stack([c, a], "batch")
    hx, bx = np.concatenate([x, y], 1), np.concatenate([z, x])
    same(heads & batch, hx & bx)
    same(batch | heads, hx | bx)


def test_or_of_parts_of_a_block_makes_it_full():
    left = np.arange(4) < 2
    elements = np.broadcast_to(left, (1, 4, 4))
    sizes: dict[str, Any] = {"q_len": 4, "block_q": 4, "block_kv": 4}
    a = BlockMask.from_blocks([0], [0], elements=elements, **sizes)
    b = BlockMask.from_blocks([0], [0], elements=~elements, **sizes)
    assert (a | b).block_states().tolist() == [[[[2]]]]
    assert untyped(a | b).bits.size == 0


@given(masks())
def test_transpose(case):
    mask, dense = case
    flipped = mask.transpose()
    same(flipped, dense.swapaxes(2, 3))
    assert (flipped.q_len, flipped.block_q) == (mask.kv_len, mask.block_kv)
    same(flipped.transpose(), dense)


@given(alike(3))
def test_transpose_of_head_and_batch_patterns(cases):
    (a, x), (b, y), (c, z) = cases
    mask = BlockMask.stack(
        [BlockMask.stack([a, b], "head"), BlockMask.stack([c, a], "head")], "batch"
    )
    dense = np.concatenate([np.concatenate([x, y], 1), np.concatenate([z, x], 1)])
    same(mask, dense)
    same(mask.transpose(), dense.swapaxes(2, 3))


@given(masks())
def test_to_bits(case):
    mask, dense = case
    bits = mask.to_bits()
    same(bits, dense)
    assert bits.rules == ()


@given(masks(), st.integers(0, 50), st.integers(0, 50))
def test_pad_to(case, more_q, more_kv):
    mask, dense = case
    padded = mask.pad_to(mask.q_len + more_q, mask.kv_len + more_kv, capacity=80)
    expected = np.pad(dense, [(0, 0), (0, 0), (0, more_q), (0, more_kv)])
    np.testing.assert_array_equal(padded.to_dense(), expected)
    assert padded.capacity == (80, 80, 80, 80)
    assert (padded.q_lengths, padded.kv_lengths) == (mask.q_len, mask.kv_len)
    flipped = mask.transpose().pad_to(padded.kv_len, padded.q_len, capacity=80)
    for other in (padded.transpose(), flipped):
        np.testing.assert_array_equal(other.to_dense(), expected.swapaxes(2, 3))


def test_pad_to_takes_a_width_for_each_list():
    mask = patterns.window(16, left=4, right=4, block_q=4, block_kv=4)
    widths = Capacity(kv=5, full_kv=3, q=6, full_q=2)
    assert mask.pad_to(20, capacity=widths).capacity == widths
    assert mask.pad_to(20, capacity=untyped(np.int64(7))).capacity == (7, 7, 7, 7)


def test_pad_to_a_number_of_bit_blocks():
    dense = np.eye(8, dtype=bool)
    mask = patterns.from_dense(dense, block_q=4, block_kv=4)
    padded = mask.pad_to(8, num_bits=5)
    assert untyped(padded).bits.shape == (1, 5, 4, 1)
    np.testing.assert_array_equal(padded.to_dense()[0, 0], dense)


def test_masks_of_a_bucket_share_a_compilation():
    traces = []

    @jax.jit
    def count(mask):
        traces.append(mask)
        return mask.kv_num_blocks.sum()

    for length in (30, 45, 64):
        mask = patterns.window(length, left=3, right=3, block_q=8, block_kv=8)
        assert int(count(mask.pad_to(64, capacity=4))) == mask.kv_num_blocks.sum()
    assert len(traces) == 1


@given(alike(3))
def test_stack(cases):
    listed, dense = zip(*cases, strict=True)
    same(BlockMask.stack(listed, "head"), np.concatenate(dense, 1))
    same(BlockMask.stack(listed, "batch"), np.concatenate(dense, 0))


def test_stack_keeps_rules_that_agree():
    a = patterns.segments([0, 0, 1, 1], block_q=2, block_kv=2)
    b = patterns.segments([0, 1, 1, 1], block_q=2, block_kv=2)
    assert BlockMask.stack([a, a], "head").bits is None
    batch = BlockMask.stack([a, b], "batch")
    assert batch.bits is None
    assert untyped(batch.rules[0]).q_ids.shape == (2, 4)
    assert BlockMask.stack([a, b], "head").rules == ()


def test_operations_on_padded_masks_keep_their_lengths():
    rows, cols = np.divmod(np.arange(9), 3)
    listed, dense = [], []
    for n in (10, 11):
        mask = BlockMask.from_blocks(rows, cols, q_len=n, block_q=4, block_kv=4)
        listed.append(mask.pad_to(12))
        dense.append(np.zeros((1, 1, 12, 12), bool))
        dense[-1][..., :n, :n] = True
    a, b = listed
    x, y = dense
    same(a & b, x & y)
    same(a | b, x | y)
    same(BlockMask.stack(listed, "head"), np.concatenate(dense, 1))
    batch = BlockMask.stack(listed, "batch")
    same(batch, np.concatenate(dense))
    assert batch.q_lengths.tolist() == [10, 11]
    assert batch.bits is None


@st.composite
def groups(draw):
    _, _, block_q, block_kv = draw(SIZES)
    kinds = draw(st.sets(st.sampled_from(RULES)))
    lengths = st.tuples(st.integers(1, 30), st.integers(1, 50))
    return [
        draw(masks((*n, block_q, block_kv), kinds))
        for n in draw(st.lists(lengths, min_size=1, max_size=4))
    ]


@given(groups(), st.booleans(), st.booleans())
def test_concatenate(cases, pad, transpose):
    listed, dense = zip(*cases, strict=True)
    if transpose:
        listed = [m.transpose() for m in listed]
        dense = [x.swapaxes(2, 3) for x in dense]
    if pad:  # lengths below T and S are what counts
        listed = [m.pad_to(m.q_len + 9, m.kv_len + 9) for m in listed]
    joined = BlockMask.concatenate(listed)
    block_q, block_kv = joined.block_q, joined.block_kv
    assert joined.groups is not None
    everything, expected = joined.to_dense()[0, 0], 0
    q, kv = 0, 0
    for group, mask, one in zip(joined.groups, listed, dense, strict=True):
        assert group.tolist() == [q, one.shape[2], kv, one.shape[3]]
        here = everything[q : q + one.shape[2], kv : kv + one.shape[3]]
        np.testing.assert_array_equal(here, one[0, 0])
        expected += one.sum()
        q += -(-mask.q_len // block_q) * block_q
        kv += -(-mask.kv_len // block_kv) * block_kv
    assert (joined.q_len, joined.kv_len) == (q, kv)
    assert everything.sum() == expected
    check_lists(joined)
    flipped = joined.transpose()
    assert flipped.groups is not None
    np.testing.assert_array_equal(flipped.to_dense()[0, 0], everything.T)
    np.testing.assert_array_equal(flipped.groups, joined.groups[:, [2, 3, 0, 1]])


def test_concatenate_keeps_rules_of_one_kind():
    near = patterns.radius(np.eye(3), 2.0, block_q=2, block_kv=2)
    far = patterns.radius(np.eye(3), 1.0, block_q=2, block_kv=2)
    assert BlockMask.concatenate([near, near]).bits is None
    mixed = BlockMask.concatenate([near, far])
    assert mixed.bits is not None
    window = patterns.window(3, left=1, right=0, block_q=2, block_kv=2)
    assert BlockMask.concatenate([near, window]).bits is not None


# --------------------------------------------------------------------- reading


def test_counts_and_sizes():
    mask = BlockMask.from_blocks([0, 1, 1], [0, 0, 1], q_len=300, kv_len=256)
    assert (mask.num_q_blocks, mask.num_kv_blocks) == (3, 2)
    assert (mask.batch_size, mask.num_heads) == (1, 1)
    assert mask.num_blocks == 3
    assert mask.density == 0.5
    heads = BlockMask.stack([mask, mask], "head")
    assert (heads.num_heads, heads.num_blocks, heads.density) == (2, 6, 0.5)


def test_summary_holds_plain_numbers():
    mask = patterns.window(10, left=2, right=0, block_q=4, block_kv=4)
    summary = mask.summary()
    assert summary.pop("bytes") == sum(x.nbytes for x in jax.tree.leaves(mask))
    assert summary.pop("density") == pytest.approx(5 / 9)
    assert summary.pop("row_mean") == pytest.approx(5 / 3)
    assert summary.pop("capacity") == {"kv": 2, "full_kv": 0, "q": 2, "full_q": 0}
    assert summary == {
        "q_len": 10,
        "kv_len": 10,
        "block_q": 4,
        "block_kv": 4,
        "batch": 1,
        "heads": 1,
        "groups": 1,
        "q_blocks": 3,
        "kv_blocks": 3,
        "blocks": 5,
        "partial": 5,
        "full": 0,
        "row_min": 1,
        "row_max": 2,
    }
    joined = BlockMask.concatenate([mask, mask])
    assert joined.summary()["groups"] == 2


def test_repr_says_what_the_mask_is():
    mask = patterns.window(10, left=2, right=0, block_q=4, block_kv=4)
    assert repr(mask) == (
        "BlockMask(q_len=10, kv_len=10, block_q=4, block_kv=4, blocks=5, "
        "density=0.5556, capacity=(2, 0, 2, 0), elements=Window)"
    )
    assert "elements=Window+bits" in repr(mask & mask.to_bits())
    assert "elements=None" in repr(BlockMask.from_blocks([0], [0], q_len=128))


def test_repr_without_values():
    mask = patterns.window(10, left=2, right=0, block_q=4, block_kv=4)
    seen = []
    jax.eval_shape(lambda m: seen.append(repr(m)), mask)
    seen.append(repr(jax.eval_shape(lambda m: m, mask)))
    for text in seen:
        assert text.startswith("BlockMask(q_len=10, kv_len=10, block_q=4, block_kv=4, ")
        assert "density" not in text


def test_check_names_the_narrow_lists():
    mask = patterns.window(10, left=2, right=0, block_q=4, block_kv=4)
    assert mask.check() is mask
    needed = np.array([[2, 0, 2, 0]], np.int32)
    enough = dataclasses.replace(mask, needed_capacity=needed)
    assert enough.check() is enough
    short = dataclasses.replace(mask, needed_capacity=needed + np.array([3, 0, 0, 1]))
    with pytest.raises(CapacityError, match=r"kv has 2 and needs 5; full_q has 0 and"):
        short.check()
    with pytest.raises(CapacityError):
        _ = short & mask
    flipped = short.transpose().needed_capacity
    np.testing.assert_array_equal(flipped, [[2, 1, 5, 0]])


# ---------------------------------------------------------------------- pytree


@given(masks())
def test_is_a_pytree(case):
    mask, dense = case
    leaves, tree = jax.tree.flatten(mask)
    np.testing.assert_array_equal(jax.tree.unflatten(tree, leaves).to_dense(), dense)


def test_returns_from_jit_unchanged():
    mask = patterns.radius(np.eye(3), 1.5, block_q=2, block_kv=2)
    mask &= patterns.from_dense(np.tri(3, dtype=bool), block_q=2, block_kv=2)
    out = jax.jit(lambda m: m)(mask)
    np.testing.assert_array_equal(out.to_dense(), mask.to_dense())


def test_host_methods_refuse_traced_masks():
    mask = patterns.window(10, left=2, right=0, block_q=4, block_kv=4)
    for method in (
        BlockMask.to_dense,
        BlockMask.summary,
        BlockMask.to_bits,
        BlockMask.block_states,
        lambda m: m & m,
        lambda m: m | m,
        lambda m: m.pad_to(20),
    ):
        with pytest.raises(TypeError, match=r"traced.*outside jit"):
            jax.eval_shape(method, mask)


# ---------------------------------------------------------------------- errors

MASK = patterns.window(10, left=2, right=0, block_q=4, block_kv=4)
LONGER = patterns.window(11, left=2, right=0, block_q=4, block_kv=4)
COARSER = patterns.window(10, left=2, right=0, block_q=8, block_kv=4)
HEADS_2 = BlockMask.stack([MASK] * 2, "head")
HEADS_3 = BlockMask.stack([MASK] * 3, "head")


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"q_len": 0}, r"q_len=0; expected an integer of at least 1"),
        ({"q_len": 8.0}, r"q_len=8.0"),
        ({"q_len": True}, r"q_len=True"),
        ({"kv_len": -1}, r"kv_len=-1"),
        ({"block_q": 0}, r"block_q=0"),
        ({"block_kv": "128"}, r"block_kv='128'"),
        ({"rows": [0, 2]}, r"rows spans 0 to 2; expected 0 to 1"),
        ({"cols": [-1, 0]}, r"cols spans -1 to 0; expected 0 to 1"),
        ({"rows": [0.0, 1.0]}, r"rows has shape \(2,\) and dtype float64"),
        ({"rows": [[0, 1]]}, r"rows has shape \(1, 2\)"),
        ({"rows": [0]}, r"1 rows but 2 cols"),
        ({"full": [True]}, r"full has shape \(1,\); expected \(2,\)"),
        ({"elements": np.ones((2, 4, 3))}, r"elements has shape \(2, 4, 3\); expected"),
        (
            {"full": [True, False], "rules": (Segments(*np.eye(2, 8)[:, None]),)},
            r"block \(0, 1\) is declared full, but a rule forbids",
        ),
    ],
)
def test_from_blocks_refuses(kwargs, message):
    good = {"rows": [0, 1], "cols": [1, 0], "q_len": 8, "block_q": 4, "block_kv": 4}
    with pytest.raises(ValueError, match="from_blocks: .*" + message):
        BlockMask.from_blocks(**(good | kwargs))


LABELS = np.zeros((1, 8), np.int32)


@pytest.mark.parametrize(
    "rules, kind, message",
    [
        (["a"], TypeError, r"rules\[0\] is a str; expected a Segments, a Window or a"),
        ((Segments(LABELS, LABELS), None), TypeError, r"rules\[1\] is a NoneType"),
        (Segments(LABELS, LABELS), TypeError, r"rules is a Segments; expected a tuple"),
        (
            (Segments(LABELS.tolist(), LABELS),),
            TypeError,
            r"a Segments rule holds 0; expected arrays only",
        ),
        (
            (Segments(LABELS[:, :7], LABELS),),
            ValueError,
            r"a Segments rule holds an array of shape \(1, 7\); expected \[B or 1, 8, ",
        ),
        (
            (Window(LABELS[0], LABELS[0]),),
            ValueError,
            r"a Window rule holds an array of shape \(8,\)",
        ),
        (
            (Distance(np.ones((1, 8, 3)), np.ones((1, 9, 3)), np.ones((1, 1))),),
            ValueError,
            r"a Distance rule holds an array of shape \(1, 9, 3\)",
        ),
        (
            (Distance(np.ones((1, 8, 3)), np.ones((1, 8, 3)), np.ones(1)),),
            ValueError,
            r"a Distance rule has a cutoff of shape \(1,\); expected \[B or 1, 1\]",
        ),
    ],
)
def test_from_blocks_refuses_rules_of_other_masks(rules, kind, message):
    with pytest.raises(kind, match="from_blocks: " + message):
        BlockMask.from_blocks([0], [0], q_len=8, block_q=4, block_kv=4, rules=rules)


@pytest.mark.parametrize(
    "name, value",
    [
        ("rows", [0]),
        ("cols", [0]),
        ("full", [True]),
        ("elements", np.ones((1, 8, 8), bool)),
        ("rules", (Segments(LABELS, LABELS),)),
        ("q_len", 8),
    ],
)
def test_from_blocks_refuses_traced_values(name, value):
    good = {"rows": [0], "cols": [0], "q_len": 8, "block_q": 8, "block_kv": 8}

    def build(x):
        return BlockMask.from_blocks(**(good | {"full": [True], name: x}))

    with pytest.raises(TypeError, match=f"from_blocks: {name} is traced; expected"):
        jax.jit(build)(jax.tree.map(np.asarray, value))


def test_rules_of_a_mask_without_full_blocks_may_be_traced():
    def build(ids):
        return BlockMask.from_blocks(
            *([0], [0]), q_len=8, block_q=8, block_kv=8, rules=(Segments(ids, ids),)
        )

    ids = np.arange(8)[None] // 3
    np.testing.assert_array_equal(jax.jit(build)(ids).to_dense(), build(ids).to_dense())


def in_groups(*lengths):
    """A mask of one group for each length, in blocks of 4."""
    return BlockMask.concatenate(
        [
            BlockMask.from_blocks([0], [0], q_len=n, block_q=4, block_kv=4)
            for n in lengths
        ]
    )


def test_masks_of_equal_groups_combine():
    a, b = in_groups(3, 4), in_groups(3, 4)
    np.testing.assert_array_equal(untyped(a & b).groups, a.groups)
    np.testing.assert_array_equal(untyped(a | b).groups, a.groups)
    whole = BlockMask.from_blocks([0], [1], q_len=8, block_q=4, block_kv=4)
    np.testing.assert_array_equal(untyped(whole | a).groups, a.groups)
    for axis in ("batch", "head"):
        stacked = BlockMask.stack([whole, a, b], axis)
        np.testing.assert_array_equal(untyped(stacked).groups, a.groups)
        with pytest.raises(ValueError, match="stack: group 0 is"):
            BlockMask.stack([a, in_groups(4, 4)], axis)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: MASK & LONGER, r"&: mask 1 is .*q_len=11.* does not fit .*q_len=10"),
        (lambda: MASK | COARSER, r"\|: mask 1 is .*block_q=8"),
        (lambda: HEADS_2 & HEADS_3, r"\(1, 2\) and \(1, 3\) do not combine"),
        (lambda: BlockMask.stack([], "head"), r"stack: no masks"),
        (lambda: BlockMask.stack([MASK], untyped("heads")), r"axis='heads'; expected"),
        (lambda: BlockMask.stack([MASK, LONGER], "head"), r"stack: mask 1"),
        (lambda: BlockMask.stack([MASK, HEADS_2], "head"), r"mask 1 already has 2"),
        (lambda: BlockMask.stack([HEADS_2, HEADS_3], "batch"), r"\[2, 3\] entries"),
        (lambda: BlockMask.concatenate([]), r"concatenate: no masks"),
        (lambda: BlockMask.concatenate([MASK, COARSER]), r"concatenate: mask 1 is"),
        (lambda: BlockMask.concatenate([HEADS_2]), r"1 batch entries and 2 heads"),
        (
            lambda: in_groups(3, 4) & in_groups(4, 3),
            r"&: group 0 is \[0, 3, 0, 3\] in one mask and \[0, 4, 0, 4\] in another",
        ),
        (
            lambda: in_groups(3, 4) | in_groups(3).pad_to(8),
            r"\|: group 1 is \[4, 4, 4, 4\] in one mask and None in another",
        ),
        (lambda: MASK.pad_to(12, capacity=untyped(4.0)), r"capacity is 4.0; expected"),
        (lambda: MASK.pad_to(12, capacity=True), r"pad_to: capacity is True"),
        (
            lambda: MASK.pad_to(12, capacity=untyped((4, 4))),
            r"pad_to: capacity=\(4, 4\); expected an integer for every list, or a Cap",
        ),
        (
            lambda: MASK.pad_to(12, capacity=Capacity(4, 4, untyped("4"), 4)),
            r"pad_to: capacity.q is '4'",
        ),
        (
            lambda: MASK.to_bits().pad_to(12, num_bits=untyped(9.0)),
            r"pad_to: num_bits is 9.0; expected an integer",
        ),
        (lambda: MASK.pad_to(9), r"pad_to: .*10 x 10 and cannot shrink to 9 x 9"),
        (lambda: MASK.pad_to(12, 0), r"pad_to: kv_len=0"),
        (lambda: MASK.pad_to(12, num_bits=3), r"num_bits=3, but the mask has 0 bit"),
        (lambda: MASK.to_bits().pad_to(12, num_bits=3), r"num_bits=3, .* has 5 bit"),
    ],
)
def test_operations_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pad_to_refuses_a_capacity_below_use():
    with pytest.raises(CapacityError, match=r"hold up to 2 blocks.*capacity of 1"):
        MASK.pad_to(12, capacity=1)


def test_operations_refuse_other_types():
    with pytest.raises(TypeError, match=r"item 1 is a ndarray; expected a BlockMask"):
        BlockMask.stack(untyped([MASK, MASK.to_dense()]), "head")
    one = r"masks is a BlockMask; expected a sequence .* Put a single mask into a list"
    with pytest.raises(TypeError, match=f"concatenate: {one}"):
        BlockMask.concatenate(untyped(MASK))
    with pytest.raises(TypeError, match=f"stack: {one}"):
        BlockMask.stack(untyped(MASK), "head")


def test_rules_are_pytrees_with_a_static_side():
    rule = Window(np.zeros((1, 3)), np.ones((1, 3)))
    assert len(jax.tree.leaves(rule)) == 2
    assert rule.transpose().side == "kv"
    assert jax.tree.structure(rule) != jax.tree.structure(rule.transpose())
    distance = Distance(np.zeros((1, 2, 3)), np.ones((1, 4, 3)), np.ones((1, 1)))
    assert distance.transpose().q_coords.shape == (1, 4, 3)
