"""Configs worth measuring, by kernel: what ``jsparse bench --tune`` tries.

Short lists, since each is compiled and timed. A config is a candidate where its tile
divides the block, its warpgroups and shared memory fit, and it can run at all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from . import _bias, _persistent, bwd_dkv_sm90, bwd_dq_sm90, fwd_sm90
from ._gradient import BackwardConfig
from ._tables import Key
from .fwd_sm90 import Config

FORWARD = (
    Config(num_stages=2, q_in_registers=True),
    Config(num_stages=2, q_in_registers=True, ping_pong=False),
    Config(num_stages=3),
    Config(num_stages=3, ping_pong=False),
    Config(num_stages=4, num_q_stages=2),
    Config(num_stages=4, num_q_stages=2, lazy=0.0),
    Config(tile_kv=64, num_stages=2),
    Config(tile_kv=64, num_stages=4),
    Config(tile_kv=64, num_stages=4, q_in_registers=True),
    Config(tile_kv=64, num_stages=2, ping_pong=False, teams=2),
    Config(tile_kv=64, num_stages=3, ping_pong=False, teams=2),
    Config(tile_kv=64, num_stages=3, ping_pong=False, teams=2, staged=False),
    Config(tile_kv=64, num_stages=4, ping_pong=False, teams=2),
    Config(64, tile_kv=64, num_stages=4, ping_pong=False, teams=2),
    Config(64, tile_kv=64, num_stages=3, ping_pong=False, teams=3),
    Config(64, tile_kv=64, num_stages=3, ping_pong=False, teams=4),
    Config(64, num_stages=3, num_q_stages=2, ping_pong=False, lazy=0.0),
    Config(64, num_stages=2, num_q_stages=2, ping_pong=False, lazy=0.0, teams=2),
    Config(64, tile_kv=64, num_stages=3, ping_pong=False, lazy=0.0, teams=3),
    Config(64, num_stages=2, ping_pong=False, lazy=0.0, teams=2, share=True),
    Config(
        64, tile_kv=64, num_stages=2, ping_pong=False, lazy=0.0, teams=3, share=True
    ),
)
DQ = (
    BackwardConfig(tile=128, num_stages=3, num_fixed_stages=2),
    BackwardConfig(tile=128, num_stages=3, num_fixed_stages=2, ping_pong=True),
    BackwardConfig(tile=128, num_stages=3),
    BackwardConfig(tile=128, num_stages=3, staged=False),
    BackwardConfig(tile=64, num_stages=3),
    BackwardConfig(tile=64, num_stages=3, ping_pong=True),
    BackwardConfig(tile=64, num_stages=4, num_fixed_stages=2),
    BackwardConfig(tile=64, num_stages=3, teams=2),
    BackwardConfig(tile=64, num_stages=4, teams=2),
    BackwardConfig(tile=64, num_stages=3, teams=3),
    BackwardConfig(tile=64, num_stages=3, teams=3, tile_rows=64),
    BackwardConfig(tile=64, num_stages=3, teams=3, staged=False, tile_rows=64),
    BackwardConfig(tile=32, num_stages=3),
    BackwardConfig(tile=32, num_stages=4, teams=2),
)
DKV = (
    BackwardConfig(tile=128, num_stages=2),
    BackwardConfig(tile=128, num_stages=2, ping_pong=True),
    BackwardConfig(tile=128, num_stages=2, num_fixed_stages=2),
    BackwardConfig(tile=64, num_stages=2),
    BackwardConfig(tile=64, num_stages=2, ping_pong=True),
    BackwardConfig(tile=64, num_stages=3),
    BackwardConfig(tile=64, num_stages=2, teams=2),
    BackwardConfig(tile=64, num_stages=3, teams=2),
    BackwardConfig(tile=64, num_stages=2, teams=3),
    BackwardConfig(tile=64, num_stages=2, num_fixed_stages=2, teams=3),
    BackwardConfig(tile=64, num_stages=2, teams=3, tile_rows=64),
    BackwardConfig(tile=64, num_stages=2, teams=3, staged=False, tile_rows=64),
    BackwardConfig(tile=32, num_stages=2),
    BackwardConfig(tile=32, num_stages=3, teams=2),
)
_LISTS = {"forward": FORWARD, "dq": DQ, "dkv": DKV}
_MODULES = {"forward": fwd_sm90, "dq": bwd_dq_sm90, "dkv": bwd_dkv_sm90}


def chosen(key: Key) -> Any:
    """What the kernel's ``choose`` returns: the table's, or the heuristic's."""
    sizes = key.head_dim, key.value_dim, key.block_q, key.block_kv
    if key.kernel == "forward":
        return Config.choose(*sizes, launch=key.launch or "many", bias=key.bias)
    return _MODULES[key.kernel].choose(*sizes, bias=key.bias)


def candidates(key: Key, dtype: Any) -> list[Any]:
    """The chosen config, then the others that can run.

    Args:
        key: kernel and sizes.
        dtype: of the arrays.
    """
    tile = "tile_kv" if key.kernel == "forward" else "tile"
    columns = key.block_q if key.kernel == "dkv" else key.block_kv
    fitted = [
        dataclasses.replace(config, **{tile: min(getattr(config, tile), columns)})
        for config in _LISTS[key.kernel]
    ]
    runs = [config for config in fitted if _runs(key, config, dtype)]
    return list(dict.fromkeys([chosen(key), *runs]))


def _runs(key: Key, config: Any, dtype: Any) -> bool:
    rows = key.block_kv if key.kernel == "dkv" else key.block_q
    if key.kernel == "forward":
        if rows % config.tile_q:
            return False
        rows = config.tile_q
    elif config.tile_rows >= rows and config.tile_rows < 128:
        return False  # as with 128
    else:
        rows = config.rows(rows)
    wgs = _persistent.warpgroups(rows)
    if wgs * config.teams not in _persistent.COMPUTE_REGISTERS:
        return False
    if config.ping_pong and wgs != 2:
        return False  # there is nobody to take turns with
    scratch = _MODULES[key.kernel].scratch_spec
    of_bias = _bias.kind_in_smem(key.bias)
    if key.kernel == "dkv":
        of_bias = of_bias[:3]  # values are where rows are queries
    try:
        _persistent.check_smem(
            key.kernel,
            config,
            scratch(
                *(config, rows, key.head_dim, key.value_dim),
                *(dtype, *of_bias),
            ),
        )
    except ValueError:
        return False
    return True
