"""What a case is measured against, by name.

A peer is what a user would take instead of jsparse for the same result, or the best
dense kernel on the same shape. It gets the same input values and its own form of the
pattern. To add one, write a class that is a `Peer` and list it here; the runner, the
records and the tables find it.
"""

from __future__ import annotations

from jsparse.bench._contract import Peer
from jsparse.bench._grouped_gemm import GroupedGemm
from jsparse.bench._jax_peers import DENSE_KERNELS, Dense
from jsparse.bench._torch_peers import BLOCK_SPARSE

PEERS: dict[str, Peer] = {
    peer.name: peer for peer in (Dense(), *BLOCK_SPARSE, GroupedGemm(), *DENSE_KERNELS)
}
