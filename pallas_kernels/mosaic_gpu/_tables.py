"""Measured configs: what each kernel's ``choose`` asks before its heuristic.

``tables.json`` beside this file has them; ``jsparse bench CASE --tune`` measures and
writes them. An entry is a `Key`, the ``config`` (its fields without ``num_ctas``, which
is the device's) and what was ``measured``, for people.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

FILE = Path(__file__).with_name("tables.json")
FORMAT = 1

Fields = dict[str, Any]


class Key(NamedTuple):
    """What a config depends on.

    Attributes:
        family: of devices.
        kernel: ``"forward"``, ``"dq"`` or ``"dkv"``.
        head_dim: padded, as the kernel sees it.
        value_dim: padded.
        block_q: queries of a block.
        block_kv: keys of a block.
        launch: of the forward kernel, one of `fwd_sm90.LAUNCHES`.
        bias: what is known of the bias, see `_bias.kind`; None without one.
    """

    family: str
    kernel: str
    head_dim: int
    value_dim: int
    block_q: int
    block_kv: int
    launch: str | None = None
    bias: str | None = None


Answer = Callable[[Key], Fields | None]
_trying: list[Answer] = []


def find(
    kernel: str, *sizes: int, launch: str | None = None, bias: str | None = None
) -> Fields | None:
    """The fields of the measured config, or None where the heuristic decides.

    Args:
        kernel: see `Key`.
        sizes: head_dim, value_dim, block_q, block_kv.
        launch: see `Key`.
        bias: see `Key`.
    """
    key = Key("sm90", kernel, *sizes, launch=launch, bias=bias)
    for answer in (*_trying, shipped().get):
        fields = answer(key)
        if fields is not None:
            return fields
    return None


@functools.cache
def shipped() -> dict[Key, Fields]:
    """The table beside this file."""
    return {key_of(entry): entry["config"] for entry in parse(FILE.read_text("utf-8"))}


def parse(text: str) -> list[dict[str, Any]]:
    """The entries of a table.

    Raises:
        ValueError: for text that is no table, or has two entries of one key.
    """
    table = json.loads(text)
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise ValueError(f"expected a table of configs with format {FORMAT}")
    seen = set()
    for entry in table["entries"]:
        if key_of(entry) in seen:
            raise ValueError(f"two entries of {key_of(entry)}; expected one")
        seen.add(key_of(entry))
    return table["entries"]


def key_of(entry: dict[str, Any]) -> Key:
    """The key of an entry."""
    return Key(**{name: entry[name] for name in Key._fields})


def entry_of(key: Key, config: Any, measured: dict[str, Any]) -> dict[str, Any]:
    """An entry of a table."""
    return {**key._asdict(), "config": fields_of(config), "measured": measured}


def fields_of(config: Any) -> Fields:
    """What a table keeps of a config."""
    fields = dataclasses.asdict(config)
    del fields["num_ctas"]
    return fields


@contextlib.contextmanager
def trying(answer: Answer) -> Iterator[None]:
    """Asks ``answer`` before the table, in all threads; for whoever measures configs.

    What was traced before is traced anew, and so is afterwards what is traced here.
    """
    jax.clear_caches()
    _trying.append(answer)
    try:
        yield
    finally:
        _trying.remove(answer)
        jax.clear_caches()
