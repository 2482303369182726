"""Every configuration that the backend may choose lowers for an H100, without a GPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from jsparse.backends import mosaic_gpu
from tests.pallas_kernels.launches import KERNELS, Launch

DIMS = ((16, 16), (32, 32), (48, 48), (64, 64), (80, 80), (96, 96), (128, 128))
DIMS += ((64, 128), (128, 16))
BLOCKS = tuple(itertools.product(mosaic_gpu.BLOCKS, repeat=2))


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_lowers(kernel, blocks, dims):
    assert "mosaic_gpu" in Launch(kernel, dims, blocks, rules=True).lower()


@pytest.mark.parametrize("kernel", KERNELS)
def test_these_are_all_the_configs(kernel):
    choose = KERNELS[kernel][1]
    sizes = range(16, mosaic_gpu.LARGEST_HEAD + 1, 16)
    possible = {
        choose(*dims, *blocks)
        for dims in itertools.product(sizes, repeat=2)
        for blocks in BLOCKS
    }
    assert possible == {choose(*dims, *blocks) for dims in DIMS for blocks in BLOCKS}


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"dtype": "float16", "dims": (128, 128)},
        {"heads": (4, 1)},
        {"bits": False},
        {"bits": False, "rules": True},
        {"rules": True, "on_host": False},
        {"heads": (4, 2), "on_host": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_lowers_with(kernel, changes):
    assert "mosaic_gpu" in Launch(kernel, **changes).lower()


@pytest.mark.parametrize("kernel", KERNELS)
def test_impossible_configs_are_refused(kernel):
    config = Launch(kernel).config()
    tile = "tile_kv" if kernel == "forward" else "tile"
    for change in ({tile: 96}, {"num_stages": 1}, {"teams": 5}):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(config, **change)


def test_steps_that_overlap_need_three_stages(monkeypatch):
    launch = Launch("dq")
    few = dataclasses.replace(launch.config(), num_stages=2)
    monkeypatch.setattr(Launch, "config", lambda self: few)
    with pytest.raises(ValueError, match="num_stages=2; expected at least 3"):
        launch.lower()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_config_that_does_not_fit_is_refused(kernel, monkeypatch):
    launch = Launch(kernel, dims=(128, 128))
    big = dataclasses.replace(launch.config(), num_stages=9)
    monkeypatch.setattr(Launch, "config", lambda self: big)
    with pytest.raises(ValueError, match="bytes of shared memory"):
        launch.lower()
