"""Which of the kernels for Hopper GPUs is faster: what ``auto`` asks where both can.

``measured.json`` beside this file says it, pass by pass; ``jsparse bench CASE --tune``
measures and writes it. An entry is a `Key`, the ``fastest`` implementation and what was
``measured``, for people.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jsparse.backends._contract import Problem

FILE = Path(__file__).with_name("measured.json")
FORMAT = 2

RIVALS = ("mosaic_gpu", "cutlass")
"""The first is taken where nothing was measured."""
PASSES = ("forward", "backward")

Entry = dict[str, Any]


class Key(NamedTuple):
    """What the faster implementation depends on.

    Attributes:
        device: kind of GPU, as JAX names it.
        direction: one of `PASSES`.
        head_dim: padded to a multiple of 16.
        value_dim: likewise.
        block_q: queries of a block.
        block_kv: keys of a block.
        launch: one of `fwd_sm90.LAUNCHES`.
        bias: what kind, as `Problem` names it, ``"by_key"`` or None.
        bias_bits: of a value, as the CUDA kernels read it; 0 for none.
        bias_tested: whether elements are tested beside a bias, but for lengths.
        gradient_launches: of the CUDA kernels, whose launch of all gradients is another
            kernel than the two; 0 for the forward pass.
    """

    device: str
    direction: str
    head_dim: int
    value_dim: int
    block_q: int
    block_kv: int
    launch: str
    bias: str | None = None
    bias_bits: int = 0
    bias_tested: bool = False
    gradient_launches: int = 0

    @classmethod
    def of(cls, problem: Problem, direction: str) -> Key:
        """The key of a pass of a problem on this machine's GPU."""
        # Only once a backend was asked: they import Pallas.
        from jsparse.backends import _hopper, cutlass
        from jsparse.pallas_kernels.mosaic_gpu.fwd_sm90 import launch_of

        lists = problem.batch * problem.num_heads
        launch = launch_of(
            lists * -(-problem.q_len // problem.block_q),
            lists * problem.most_blocks,
            "Distance" in problem.rules,
            _hopper.num_multiprocessors(),
        )
        return cls(
            device_kind(),
            direction,
            *(-(-dim // 16) * 16 for dim in (problem.head_dim, problem.value_dim)),
            block_q=problem.block_q,
            block_kv=problem.block_kv,
            launch=launch,
            bias="by_key" if problem.bias_by_key else problem.bias,
            bias_bits=cutlass.bias_bits(problem),
            bias_tested=problem.bias is not None and problem.tested,
            gradient_launches=(
                cutlass.gradient_launches(problem) if direction == "backward" else 0
            ),
        )


@functools.cache
def device_kind() -> str:
    """Of the GPU, such as ``"NVIDIA H100 80GB HBM3"``."""
    return jax.devices("gpu")[0].device_kind


@functools.cache
def shipped() -> Mapping[Key, Entry]:
    """The table beside this file."""
    return {key_of(entry): entry for entry in parse(FILE.read_text("utf-8"))}


def find(table: Mapping[Key, Entry], key: Key) -> Entry | None:
    """The entry of a pass, measured on this kind of GPU, or else on another.

    Multiprocessors of all Hopper GPUs are alike: another's word is better than none.
    """
    others = (entry for other, entry in table.items() if other[1:] == key[1:])
    return table.get(key) or next(others, None)


def parse(text: str) -> list[Entry]:
    """The entries of a table.

    Raises:
        ValueError: for text that is no table, or names no rival.
    """
    table = json.loads(text)
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise ValueError(f"expected a table of implementations with format {FORMAT}")
    for entry in table["entries"]:
        key = key_of(entry)
        if entry["fastest"] not in RIVALS:
            raise ValueError(
                f"{entry['fastest']!r} is fastest for {key}; expected one of {RIVALS}"
            )
    return table["entries"]


def key_of(entry: Entry) -> Key:
    """The key of an entry."""
    return Key(**{name: entry[name] for name in Key._fields})


def entry_of(key: Key, fastest: str, measured: dict[str, Any]) -> Entry:
    """An entry of a table."""
    return {**key._asdict(), "fastest": fastest, "measured": measured}
