"""Runs the GPU kernels on small problems, for compute-sanitizer.

``python -m tests.support.launch_kernels [IMPLEMENTATION[:WORD,WORD...] ...]``, of which
the words pick problems by name; `.ci/gpu` calls it. What the sanitizer says is the
result, so only nonsense is looked for here: NaN.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import jax
import numpy as np

from jsparse import BlockMask, ScoreFunction
from jsparse.backends import _turns
from jsparse.patterns import device
from tests.backends import test_contract as contract
from tests.support.cases import (
    CASES,
    Case,
    biases,
    make_case,
    of_all_blocks,
    random_mask,
    uneven_rows,
    with_bias,
    with_entries,
)
from tests.support.scores import alibi

SIZES = (300, 400, 128, 128)
OWN_GRADIENT = ("dense", "block", "per_key")
BIASES = {
    "mosaic_gpu": ("dense_shared_batch", *OWN_GRADIENT, "linear", "table", "gaussian"),
    "cutlass": OWN_GRADIENT,
}
RUNS = {
    "mosaic_gpu": (contract.run_case,),
    # Of a mask that is known before tracing all gradients are one launch.
    "cutlass": (contract.run_case, contract.run_known),
}


def problems(implementation: str) -> Iterator[tuple[str, Case]]:
    """Small problems that take every path through the kernels once."""
    rng = np.random.default_rng(0)
    for dim in (32, 64, 128):
        mask = random_mask(rng, SIZES, 8)
        yield f"bits, D {dim}", make_case(rng, mask, dims=(dim, dim))
    for name in ("window", "distance", "groups", "grouped_query"):
        yield name, CASES[name](rng, SIZES)
    mask = uneven_rows(rng, (1, 12), (200, 1500, 128, 128))
    yield "split rows", make_case(rng, mask, heads=(1, 1))
    for kind in BIASES[implementation]:
        mask = random_mask(rng, SIZES, 8)
        bias = biases(rng, mask, 2, 2)[kind]
        yield f"bias {kind}", make_case(rng, mask, batch=(2,), bias=bias)
    if implementation == "cutlass":
        yield from _of_sixteen_bits(rng)
    if implementation == "mosaic_gpu":
        yield "bias entry", with_entries("entry", SIZES)
        bias = ScoreFunction(alibi, (np.ones(2, np.float32),))
        yield "score function", make_case(rng, random_mask(rng, SIZES, 8), bias=bias)


def _of_sixteen_bits(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    """Biases of the dtype of q, which have kernels of their own."""
    for dim in (32, 64, 128):
        mask = random_mask(rng, SIZES, 8)
        case = make_case(rng, mask, dims=(dim, dim))
        for kind in ("dense", "block"):
            yield f"16 bits, {kind}, D {dim}", with_bias(case, kind, "bfloat16")
    for dim in (24, 64):
        case = make_case(rng, of_all_blocks(600, 400), batch=(2,), dims=(dim, dim))
        yield f"16 bits, all blocks, D {dim}", with_bias(case, "dense", "bfloat16")


def lists() -> BlockMask:
    """The mask of some neighbour lists, made on the device."""
    rng = np.random.default_rng(1)
    index = rng.integers(-5, 420, (2, 300, 24))
    sizes = {"kv_len": 400, "block_q": 64, "block_kv": 64}
    return jax.jit(lambda x: device.neighbors(x, capacity=7, **sizes))(index)


def main(asked: list[str]) -> None:
    """Forward and backward, each problem once."""
    _turns.FEWEST = 0  # also for few blocks
    for words in asked or ["mosaic_gpu"]:
        implementation, _, words = words.partition(":")
        for name, case in problems(implementation):
            if not any(word in name for word in words.split(",")):
                continue
            for run in RUNS[implementation]:
                found = run(implementation, case.cast("bfloat16"))
                bad = [bool(np.isnan(x).any()) for x in jax.tree.leaves(found)]
                print(implementation, name, "NaN" if any(bad) else "ran", flush=True)
                if any(bad):
                    sys.exit(1)
        if "lists" in words or not words:
            jax.block_until_ready(lists())
            print(implementation, "lists ran", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
