"""The table of measured configs, and the lists of configs to measure."""

from __future__ import annotations

import dataclasses
import json

import pytest

from jsparse.pallas_kernels.mosaic_gpu import _candidates, _tables
from jsparse.pallas_kernels.mosaic_gpu.fwd_sm90 import LAUNCHES, Config, launch_of
from tests.pallas_kernels.launches import KERNELS, TUNED

KEYS = [
    _tables.Key("sm90", kernel, dim, dim, *blocks, launch, bias)
    for kernel in TUNED
    for bias in (None, "16 bits", "linear")
    for dim in (32, 64, 128)
    for blocks in ((128, 128), (64, 64))
    for launch in (LAUNCHES if kernel == "forward" else [None])
]


def entry(**changes):
    config = Config(num_stages=5)
    return _tables.entry_of(KEYS[0], config, {"case": "a test"}) | changes


def test_shipped_entries_are_configs():
    """And they differ: `parse` sees to it."""
    for key, fields in _tables.shipped().items():
        assert _tables.fields_of(_candidates.chosen(key)) == fields


def test_an_entry_comes_back_from_its_file():
    (found,) = _tables.parse(json.dumps({"format": 1, "entries": [entry()]}))
    assert _tables.key_of(found) == KEYS[0]
    assert Config(**found["config"], num_ctas=7) == Config(num_stages=5, num_ctas=7)


@pytest.mark.parametrize(
    "table, message",
    [
        ([], "expected a table of configs with format 1"),
        ({"format": 2, "entries": []}, "expected a table of configs with format 1"),
        ({"format": 1, "entries": [entry(), entry(config={})]}, "two entries of Key"),
    ],
)
def test_bad_tables_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        _tables.parse(json.dumps(table))


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_the_table_comes_before_the_heuristic(key, monkeypatch):
    heuristic = _candidates.chosen(key)
    measured = dataclasses.replace(heuristic, num_stages=7, num_ctas=114)
    table = {key: _tables.fields_of(measured)}
    monkeypatch.setattr(_tables, "shipped", lambda: table)
    assert _candidates.chosen(key) == dataclasses.replace(measured, num_ctas=132)
    choose = KERNELS[key.kernel][1]
    sizes = key.head_dim, key.value_dim, key.block_q, key.block_kv
    options = {"bias": key.bias} | ({"launch": key.launch} if key.launch else {})
    assert choose(*sizes, num_ctas=114, **options) == measured
    other = key._replace(head_dim=16)
    assert _candidates.chosen(other).num_stages < 7
    with _tables.trying({key: _tables.fields_of(heuristic)}.get):
        assert _candidates.chosen(key) == heuristic
    assert _candidates.chosen(key).num_stages == 7


@pytest.mark.parametrize(
    "rows, blocks, distances, expected",
    [
        (63, 819, False, "few_rows"),
        (63, 819, True, "few_rows"),
        (126, 1638, False, "few_blocks"),
        (800, 800, True, "few_blocks"),
        (60, 2112, False, "few_rows"),
        (132, 8447, True, "few_blocks"),
        (132, 8448, False, "many"),
        (132, 8448, True, "distances"),
        (133, 2112, False, "many"),
        (4096, 100_000, False, "many"),
        (4096, 100_000, True, "distances"),
    ],
)
def test_launches_are_told_apart(rows, blocks, distances, expected):
    assert launch_of(rows, blocks, distances) == expected


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_candidates_begin_with_the_chosen_one(key):
    found = _candidates.candidates(key, "bfloat16")
    assert found[0] == _candidates.chosen(key)
    assert len(set(found)) == len(found)
    assert len(found) > 1 or (key.bias and key.head_dim == 128)
    rows, columns = key.block_q, key.block_kv
    if key.kernel == "dkv":
        rows, columns = columns, rows
    for config in found:
        tile = config.tile_kv if key.kernel == "forward" else config.tile
        assert columns % tile == 0
        forward = key.kernel == "forward"
        tile_rows = config.tile_q if forward else config.rows(rows)
        assert rows % tile_rows == 0
        assert config.teams * tile_rows // 64 <= 4
        assert tile_rows == 128 or not config.ping_pong


def test_candidates_that_need_more_memory_than_there_is_are_left_out():
    narrow, wide = (KEYS[0]._replace(head_dim=n, value_dim=n) for n in (32, 128))
    fewer = _candidates.candidates(wide, "bfloat16")
    assert len(fewer) < len(_candidates.candidates(narrow, "bfloat16"))
    assert Config(num_stages=4, num_q_stages=2) not in fewer
