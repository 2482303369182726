"""The public attention operation."""

from __future__ import annotations

from jsparse.ops._attention import block_sparse_attention as block_sparse_attention
from jsparse.ops._attention import choice as choice
from jsparse.ops._attention import gradients as gradients
from jsparse.ops._attention import support as support
from jsparse.ops._dispatch import Choice as Choice
