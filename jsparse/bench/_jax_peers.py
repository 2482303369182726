"""Peers that are functions of JAX arrays, and ourselves.

The pattern, where a peer needs one, is an argument of the compiled call, and so are the
residuals of a backward pass that is timed alone. Third-party packages are imported when
a call is compiled, never before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse import measure
from jsparse.bench._contract import (
    BLOCKS,
    CALLS,
    EVERY,
    MASKED,
    Array,
    DoesNotFit,
    Task,
)
from jsparse.ops import block_sparse_attention
from jsparse.patterns import BlockMask
from jsparse.report import format_bytes

_PLANNED = ("mosaic_gpu", "cutlass", "auto")
"""Those that plan on the host; ``"auto"`` is theirs where their passes differ."""


class JaxPeer:
    """What JAX peers have in common; a class below adds `forward`."""

    name = ""
    computes = BLOCKS
    packages: tuple[str, ...] = ()
    static = False
    """Whether the mask is closed over: the pattern is known when it is compiled."""
    part = slice(None)
    """Which gradients a backward pass has, of those of all inputs."""

    def available(self) -> str | None:
        """Runs wherever JAX does."""
        return None

    def why_not(self, mask: BlockMask) -> str | None:
        """Takes every mask."""
        del mask
        return None

    def describe(self, mask: BlockMask) -> Any:
        """Shapes of what `prepare` returns, to ask for memory before it is taken."""
        del mask
        return ()

    def prepare(self, mask: BlockMask) -> Any:
        """The pattern in the peer's own form, a pytree of arrays; not timed."""
        del mask
        return ()

    def arrange(self, *inputs: Array) -> tuple[Array, ...]:
        """The inputs, cotangent included, in the peer's own layout; not timed."""
        return inputs

    def rearrange(self, x: Array) -> Array:
        """The output or dq, from the peer's own layout; not timed."""
        return x

    def forward(self, *arrays: Any) -> Array:
        """The output ``[T, H, D]`` of inputs and pattern; traced under ``jit``."""
        raise NotImplementedError

    def backward(self, *arrays: Any) -> tuple[Array, ...]:
        """The output and the gradients of all inputs; traced under ``jit``.

        ``arrays`` are the inputs, the pattern and the cotangent.
        """
        *inputs, pattern, dout = arrays
        out, pull = jax.vjp(lambda *x: self.forward(*x, pattern), *inputs)
        return out, *pull(dout)

    def gradients(self, pull: Any, dout: Array) -> Any:
        """Those of inputs, from the pullback of `forward`; traced under ``jit``."""
        return pull(dout)[self.part]

    def enter(self, task: Task) -> JaxContender:
        """See `Peer.enter`."""
        return JaxContender(self, task)


class Ours(JaxPeer):
    """`block_sparse_attention` with one implementation.

    Args:
        implementation: its name.
        traced: whether the mask is an argument of the compiled call, as where one
            compilation serves many structures. Implementations that do not plan on the
            host always get it so: it makes no difference to them.
    """

    def __init__(self, implementation: str, traced: bool = True):
        self.name, self.traced = implementation, traced
        self.static = implementation in _PLANNED and not traced

    def describe(self, mask: BlockMask) -> BlockMask:
        """Shapes of the mask's own arrays."""
        return jax.tree_util.tree_map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), mask
        )

    def prepare(self, mask: BlockMask) -> BlockMask:
        """The mask, on the device."""
        return jax.device_put(mask)

    def forward(self, *arrays: Any) -> Array:
        """See `JaxPeer.forward`."""
        q, k, v, pattern = arrays
        implementation: Any = self.name
        return block_sparse_attention(q, k, v, pattern, implementation=implementation)


class Rival(Ours):
    """Ours with another implementation than the one that the record is about.

    Args:
        implementation: its name.
        traced: see `Ours`.
        refusal: why it cannot take the problem, or None if it can.
    """

    def __init__(self, implementation: str, traced: bool, refusal: str | None):
        super().__init__(implementation, traced)
        self._refusal = refusal

    def available(self) -> str | None:
        """Runs what it does not refuse."""
        return self._refusal


class Dense(JaxPeer):
    """Plain dense attention in jnp with the same mask as a boolean ``[T, S]`` array."""

    name = "dense"
    computes = MASKED

    def describe(self, mask: BlockMask) -> jax.ShapeDtypeStruct:
        """One boolean for each element."""
        return jax.ShapeDtypeStruct((mask.q_len, mask.kv_len), np.bool_)

    def prepare(self, mask: BlockMask) -> Array:
        """The mask's elements."""
        return jnp.asarray(mask.to_dense()[0, 0])

    def forward(self, *arrays: Any) -> Array:
        """``softmax(q k^T / sqrt(D)) v`` over the elements, softmax in float32."""
        q, k, v, pattern = arrays
        logits = jnp.einsum("thd,shd->hts", q, k, preferred_element_type=jnp.float32)
        logits = jnp.where(pattern, logits * (q.shape[-1] ** -0.5), -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out = jnp.einsum("hts,shd->thd", weights, v, preferred_element_type=jnp.float32)
        return out.astype(q.dtype)


class DenseKernel(JaxPeer):
    """A dense kernel on the same shape: every pair, so another result than ours.

    Args:
        name: of the peer.
        attend: the kernel, of q, k and v with a batch axis.
        modules: that must be installed, beside JAX.
        install: what installs them.
        packages: distributions whose versions are recorded.
    """

    computes = EVERY

    def __init__(
        self,
        name: str,
        attend: Callable[..., Array],
        modules: tuple[str, ...],
        install: str,
        packages: tuple[str, ...],
    ):
        self.name, self.packages = name, packages
        self._attend, self._modules, self._install = attend, modules, install

    def available(self) -> str | None:
        """Needs its modules and a GPU."""
        return missing(self._modules, self._install) or no_gpu()

    def forward(self, *arrays: Any) -> Array:
        """See `JaxPeer.forward`."""
        q, k, v, _ = arrays
        return self._attend(q[None], k[None], v[None])[0]


def cudnn(q: Array, k: Array, v: Array) -> Array:
    """NVIDIA's kernel, through JAX; ``[B, T, H, D]``."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def tokamax(q: Array, k: Array, v: Array) -> Array:
    """Tokamax's Mosaic GPU kernel; ``[B, T, H, D]``."""
    library: Any = importlib.import_module("tokamax")
    return library.dot_product_attention(q, k, v, implementation="mosaic")


def fa3(q: Array, k: Array, v: Array) -> Array:
    """FlashAttention-3, through flash_attn3_jax; ``[B, T, H, D]``."""
    library: Any = importlib.import_module("flash_attn3_jax")
    return library.flash_mha(q, k, v)


def missing(modules: tuple[str, ...], install: str) -> str | None:
    """Names what is not installed, and how to install it; None if nothing is.

    Example:
        >>> missing(("jax", "nonesuch"), "pip install nonesuch")
        'nonesuch is not installed: pip install nonesuch'
    """
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    verb = "is" if len(absent) == 1 else "are"
    return f"{', '.join(absent)} {verb} not installed: {install}"


def no_gpu() -> str | None:
    """Why kernels for GPUs cannot run, or None where JAX computes on one."""
    platform = jax.default_backend()
    if platform == "gpu":
        return None
    return f"it needs an NVIDIA GPU, and JAX computes on {platform}"


# ---------------------------------------------------------------------------- contest


@dataclass
class JaxContender:
    """A `JaxPeer` with a task: `Contender`."""

    peer: JaxPeer
    task: Task
    _pattern: list[Any] = field(default_factory=list)  # once it was prepared
    _sets: list[Any] = field(default_factory=list)  # once they were arranged

    def ready(self, direction: str) -> JaxCall:
        """See `Contender.ready`."""
        given = [_shape(x) for x in self.task.sets[0]]
        *inputs, dout = jax.eval_shape(self.peer.arrange, *given)
        shape = () if self.peer.static else self.peer.describe(self.task.mask)
        if direction == "backward":
            return self._ready_backward((*inputs, shape))
        if direction == "forward":
            arguments, function = (*inputs, shape), self._forward
        else:
            arguments, function = (*inputs, shape, dout), self._both
        compiled = self._compile(function, arguments)
        pattern = self._prepared()
        sets = [
            (*inputs, pattern, *(() if direction == "forward" else (dout,)))
            for *inputs, dout in self._arranged()
        ]
        names = ("out",) if direction == "forward" else ("out", "dq")
        return JaxCall(compiled, sets, names, self.peer.rearrange)

    def _ready_backward(self, shapes: Any) -> JaxCall:
        """The backward pass alone: what the forward pass keeps is an argument."""
        compiled = self._compile(self._pullback, shapes)
        pattern = self._prepared()
        sets = []
        for *inputs, dout in self._arranged():
            _, pull = measure.time_call(compiled.call, *inputs, pattern)
            sets.append((pull, dout))
        backward = self._compile(self.peer.gradients, sets[0])
        return JaxCall(backward, sets, ("dq",), self.peer.rearrange)

    def close(self) -> None:
        """See `Contender.close`."""
        self._pattern.clear()
        self._sets.clear()

    def _forward(self, *arrays: Any) -> Array:
        *inputs, pattern = arrays
        return self.peer.forward(*inputs, self._known(pattern))

    def _both(self, *arrays: Any) -> Any:
        *inputs, pattern, dout = arrays
        return self.peer.backward(*inputs, self._known(pattern), dout)

    def _pullback(self, *arrays: Any) -> Any:
        *inputs, pattern = arrays
        pattern = self._known(pattern)
        return jax.vjp(lambda *x: self.peer.forward(*x, pattern), *inputs)[1]

    def _known(self, pattern: Any) -> Any:
        return self.task.mask if self.peer.static else pattern

    def _compile(
        self, function: Callable[..., Any], arguments: Any
    ) -> measure.Compiled:
        """Compiles from shapes alone, and asks for memory before it is taken."""
        compiled = measure.compile_call(function, *arguments)
        needed, free = compiled.total_bytes, measure.available_memory()
        if not self._pattern:
            # The pattern exists on the host and on the device for a moment.
            needed += compiled.total_bytes - compiled.temporary_bytes
        if free is not None and needed > free:
            raise DoesNotFit(
                f"needs {format_bytes(needed)}, {format_bytes(free)} are free"
            )
        return compiled

    def _arranged(self) -> list[Any]:
        if not self._sets:
            self._sets += [self.peer.arrange(*one) for one in self.task.sets]
        return self._sets

    def _prepared(self) -> Any:
        if not self._pattern:
            made = () if self.peer.static else self.peer.prepare(self.task.mask)
            self._pattern.append(made)
        return self._pattern[0]


@dataclass
class JaxCall:
    """A compiled pass with its arguments: `Call`."""

    compiled: measure.Compiled
    sets: list[Any]
    names: tuple[str, ...]
    rearrange: Callable[[Array], Array] = lambda x: x

    @property
    def compile_seconds(self) -> float:
        """To trace and compile, of a backward pass without the forward pass."""
        return self.compiled.seconds

    @property
    def temporary_bytes(self) -> int:
        """What XLA allocates beside arguments and results."""
        return self.compiled.temporary_bytes

    def rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """See `Call.rows`; only the rows leave the device."""
        _, result = measure.time_call(self.compiled.call, *self.sets[0])
        results = result if isinstance(result, tuple) else (result,)
        found = {}
        for name, value in zip(self.names, results, strict=False):
            value = self.rearrange(value)
            found[name] = np.asarray(value.reshape(-1, *value.shape[-2:])[rows])
        return found

    def times(self, n: int, count: int, kernels: bool) -> list[float]:
        """See `Call.times`."""
        call, arguments = self.compiled.call, self.sets[n]
        if not kernels:
            return [measure.time_call(call, *arguments)[0] for _ in range(count)]
        seconds: list[float] = []
        while len(seconds) < count:
            # All results of a batch are held at once.
            batch = min(CALLS, count - len(seconds))
            seconds += measure.kernel_times(call, *arguments, count=batch)
        return seconds


def _shape(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


DENSE_KERNELS = (
    DenseKernel("cudnn", cudnn, (), "", ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")),
    DenseKernel("tokamax", tokamax, ("tokamax",), "pip install tokamax", ("tokamax",)),
    DenseKernel(
        *("fa3", fa3, ("flash_attn3_jax", "einops")),
        *("pip install flash-attn3-jax", ("flash-attn3-jax",)),
    ),
)
