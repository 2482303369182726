"""The named cases are the very block lists that peers are measured on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from jsparse.bench import LATENCY_CASES, all_cases, choose_cases
from jsparse.bench._cases import AttentionCase, ball, of_blocks, of_coords
from jsparse.measure import BadInput

DATA = Path(__file__).parents[2] / "examples" / "data"

# Length, heads, head size, dtype, and the first digits of the SHA-256 of the lists
# (counts, then columns row by row, little-endian int32) of the peers' own scripts.
EXPECTED = {
    "ribosome100k_h16_d64": (100096, 16, 64, "bfloat16", "5b30ed0656d9ef92"),
    "ribosome100k_h4_d32": (100096, 4, 32, "bfloat16", "5b30ed0656d9ef92"),
    "seed800": (8064, 1, 64, "float16", "8ee7fd85d53dad7d"),
    "seed100k": (102400, 1, 64, "float16", "2769125dd97a8df0"),
    "diag100k": (102400, 1, 64, "float16", "49a67d0814217e08"),
    "graph32k_h16_d64": (32768, 16, 64, "bfloat16", "5e5e1c515dcd70ff"),
    "graph16k_h16_d128": (16384, 16, 128, "bfloat16", "ed351df0e8c32055"),
}

# Ours alone: the number of blocks, and the same of the lists.
OWN = {
    "seed1600": (1600, "b5e6d4be26dbc657"),
    "seed3200": (3200, "227e1b98422a1fe6"),
    "sweep16k_d64_p01": (163, "ee817b6a678a6eab"),
    "sweep16k_d64_p02": (327, "ce53195d173b34c8"),
    "sweep16k_d64_p05": (819, "d001354504a88f6b"),
    "sweep16k_d64_p10": (1638, "7ba3bcf4f5ba304d"),
    "sweep16k_d64_p20": (3276, "f44c555b5c3a805f"),
    "sweep16k_d64_p50": (8192, "502fa67710a0b54a"),
    "sweep16k_d64_p100": (16384, "039a874aa686c19c"),
}


def digest(mask) -> str:
    counts = np.asarray(mask.full_kv_num_blocks)[0, 0]
    indices = np.asarray(mask.full_kv_indices)[0, 0]
    columns = [row[:n] for row, n in zip(indices, counts, strict=True)]
    data = np.concatenate([counts, *columns]).astype("<i4")
    return hashlib.sha256(data.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", EXPECTED)
def test_lists_are_those_of_the_peers(name: str):
    case = all_cases()[name]
    assert isinstance(case, AttentionCase)
    mask = case.load().mask
    assert mask.kv_num_blocks.sum() == 0
    found = (mask.q_len, case.heads, case.head_dim, case.dtype, digest(mask))
    assert found == EXPECTED[name]


def test_every_attention_case_is_expected():
    cases = all_cases().values()
    names = {case.name for case in cases if isinstance(case, AttentionCase)}
    assert names == {*EXPECTED, *OWN}


@pytest.mark.parametrize("name", OWN)
def test_lists_stay_as_they_are(name: str):
    case = all_cases()[name]
    assert isinstance(case, AttentionCase)
    mask = case.load().mask
    assert (mask.num_blocks, digest(mask)) == OWN[name]


def test_latency_cases_are_as_empty_as_each_other():
    for name in LATENCY_CASES:
        case = all_cases()[name]
        assert isinstance(case, AttentionCase)
        assert round(case.load().mask.density, 2) == 0.2


def test_block_elements_agree_with_the_mask():
    pattern = of_blocks([np.array([0, 2]), np.array([1]), np.array([0, 1, 2])])
    rows = np.array([0, 127, 128, 300])
    (allowed,) = pattern.allowed(rows)
    np.testing.assert_array_equal(allowed, pattern.mask.to_dense()[0, 0][rows])


def test_radius_elements_agree_with_the_mask():
    pattern = of_coords(ball(700))
    rows = np.arange(0, 700, 7)
    allowed = pattern.allowed(rows)[0]
    np.testing.assert_array_equal(allowed, pattern.mask.to_dense()[0, 0][rows])
    assert 0 < allowed.mean() < 1


def test_ball_is_as_dense_as_a_structure():
    points = ball(20_000)
    distances = np.linalg.norm(points, axis=1)
    radius = (3 * 20_000 / (4 * np.pi * 0.04)) ** (1 / 3)
    assert distances.max() <= radius * 1.0001
    inner = (distances < radius / 2).mean()
    assert abs(inner - 1 / 8) < 0.01


def test_structure_cases_name_file_copies_and_order():
    def added(*arguments):
        return list(all_cases(*arguments))[-3:]

    file = DATA / "7CTH.cif.gz"
    assert added(file) == ["7cth_h4_d32", "7cth_mask", "7cth_mask_device"]
    assert added(file, 6)[0] == "7cth_x6_h4_d32"
    assert added(file, None, "file")[1] == "7cth_all_file_mask"


def test_structure_case_keeps_the_order_asked_for():
    case = all_cases(DATA / "1UBI.pdb.gz", 1, "file")["1ubi_file_h4_d32"]
    assert isinstance(case, AttentionCase)
    assert case.load().order == "file"


def test_choice_of_cases():
    known = all_cases(DATA / "1UBI.pdb.gz")
    assert len(choose_cases(known, [], True)) == 3
    assert choose_cases(known, ["all"], False) == list(known.values())
    with pytest.raises(BadInput, match="name at least one case"):
        choose_cases(known, [], False)
    with pytest.raises(BadInput, match="unknown case 'sed800'"):
        choose_cases(known, ["sed800"], False)


def test_bad_structure_and_order_are_bad_input(tmp_path: Path):
    with pytest.raises(BadInput, match="order 'up' is unknown"):
        all_cases(DATA / "1UBI.pdb.gz", 1, "up")
    empty = tmp_path / "empty.cif"
    empty.touch()
    case = all_cases(empty)["empty_h4_d32"]
    assert isinstance(case, AttentionCase)
    with pytest.raises(BadInput, match="the file is empty"):
        case.load()
