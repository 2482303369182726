"""Grouped block-sparse attention for protein-structure models in JAX."""

from __future__ import annotations

from jsparse import patterns as patterns
from jsparse._version import __version__ as __version__
from jsparse.bias import BlockBias as BlockBias
from jsparse.bias import DistanceBias as DistanceBias
from jsparse.ops import block_sparse_attention as block_sparse_attention
from jsparse.patterns import BlockMask as BlockMask
from jsparse.patterns import CapacityError as CapacityError
