"""Every configuration that the backend may choose lowers for an H100, without a GPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from tests.pallas_kernels.launches import KERNELS, Launch

DIMS = ((16, 16), (32, 32), (48, 48), (64, 64), (96, 96), (128, 128), (64, 128))
BLOCKS = tuple(itertools.product((64, 128), repeat=2))


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_lowers(kernel, blocks, dims):
    assert "mosaic_gpu" in Launch(kernel, dims, blocks).lower()


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
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
    for change in ({tile: 96}, {"num_stages": 1}, {"teams": 3}):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(config, **change)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_config_that_does_not_fit_is_refused(kernel, monkeypatch):
    launch = Launch(kernel, dims=(128, 128))
    big = dataclasses.replace(launch.config(), num_stages=9)
    monkeypatch.setattr(Launch, "config", lambda self: big)
    with pytest.raises(ValueError, match="bytes of shared memory"):
        launch.lower()
