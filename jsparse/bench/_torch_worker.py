"""The process in which a kernel of PyTorch is timed.

It is asked over a pipe and answers over it: `serve` is its main function, `Session`
what it can be asked. Started by ``_torch_peers.py``; only here is PyTorch imported.
"""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Tensor = Any


def serve(pipe: Any, kernel: str, device: str) -> None:
    """Answers questions until the other side leaves.

    Args:
        pipe: brings ``(method of Session, arguments)``, takes ``(True, answer)`` or
            ``(False, what went wrong)``.
        kernel: a name in ``KERNELS``.
        device: of PyTorch: ``"cuda"``, or ``"cpu"`` to try the code.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other side's affair
    os.dup2(2, 1)  # what libraries print is no result
    session: Session | None = None
    while True:
        try:
            what, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if session is None:
                session = Session(kernel, device)
            answer = (True, getattr(session, what)(*arguments))
        except Exception as err:  # noqa: BLE001 (told to the other side)
            answer = (False, f"{type(err).__name__}: {err}")
        pipe.send(answer)


class Session:
    """One kernel with one case after another.

    Args:
        kernel: a name in ``KERNELS``.
        device: of PyTorch.
    """

    def __init__(self, kernel: str, device: str):
        self.torch: Any = importlib.import_module("torch")
        self.device = device
        if device == "cuda" and not self.torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no CUDA device")
        self._make = KERNELS[kernel]
        self.drop()

    def drop(self) -> None:
        """Forgets the case and gives its memory back."""
        self.kernel: Any = None
        self.sets: list[list[Tensor]] = []
        self.calls: dict[str, Any] = {}
        if self.device == "cuda":
            self.torch.cuda.empty_cache()

    def start(self, lists: dict[str, Any], sets: int, arrays: int = 4) -> None:
        """Takes the pattern of a case; `take` follows for each array of each set."""
        self.drop()
        self._arrays = arrays
        self.kernel = self._make(self.torch, lists, self.device)
        self.sets = [[] for _ in range(sets)]

    def take(self, bits: np.ndarray, dtype: str) -> None:
        """Takes the next of the inputs and the cotangent of each set in turn."""
        # What came through the pipe may be read-only, which PyTorch warns of.
        bits = np.require(bits, requirements="W")
        tensor = self.torch.from_numpy(bits).view(getattr(self.torch, dtype))
        arrays = next(arrays for arrays in self.sets if len(arrays) < self._arrays)
        arrays.append(self.kernel.arrange(tensor.to(self.device)))

    def ready(self, direction: str) -> tuple[float, int | None]:
        """Compiles a pass; seconds, and bytes that it takes beside what was there."""
        if self.device == "cuda":
            self._wait()
            held = self.torch.cuda.memory_allocated()
            self.torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        make = {"forward": self._forward, "backward": self._backward}[direction]
        self.calls[direction] = [make(*arrays) for arrays in self.sets]
        self.calls[direction][0]()
        self._wait()
        seconds = time.perf_counter() - start
        if self.device != "cuda":
            return seconds, None
        return seconds, self.torch.cuda.max_memory_allocated() - held

    def rows(self, direction: str, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows ``[R, H, D]`` float32 of the output or of dq, for the first set."""
        result = self.calls[direction][0]()
        name, value = ("out", result) if direction == "forward" else ("dq", result[0])
        value = self.kernel.rearrange(value.detach())
        chosen = value[self.torch.from_numpy(rows).to(self.device)]
        return {name: chosen.float().cpu().numpy()}

    def times(self, direction: str, n: int, count: int, kernels: bool) -> list[float]:
        """Seconds of ``count`` calls with the n-th set, after one more to warm up."""
        call = self.calls[direction][n]
        call()
        self._wait()
        if kernels:
            return self._kernel_times(call, count)
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            self._wait()
            seconds.append(time.perf_counter() - start)
        return seconds

    # ------------------------------------------------------------------- private

    def _forward(self, *arrays: Tensor) -> Callable:
        return lambda: self.kernel.attend(*arrays[:-1])

    def _backward(self, *arrays: Tensor) -> Callable:
        """The backward pass alone: the graph of the forward pass is kept."""
        *inputs, dout = arrays
        leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
        out = self.kernel.attend(*leaves)
        options = {"retain_graph": True, "allow_unused": True}
        return lambda: self.torch.autograd.grad(out, leaves, dout, **options)

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def _kernel_times(self, call: Callable, count: int) -> list[float]:
        """Sums of kernel times; call by call where a log of all does not divide."""
        found = self._kernels(call, count)
        if len(found) % count:
            return [sums(self._kernels(call, 1), 1)[0] for _ in range(count)]
        return sums(found, count)

    def _kernels(self, call: Callable, count: int) -> list[tuple[float, float]]:
        """The kernels of ``count`` calls, as CUPTI tells PyTorch's profiler."""
        profiler: Any = importlib.import_module("torch.profiler")
        activities = [profiler.ProfilerActivity.CUDA]
        with profiler.profile(activities=activities) as profile:
            for _ in range(count):
                call()
            self._wait()
        return kernels(profile.events())


def kernels(events: Any) -> list[tuple[float, float]]:
    """Start and duration, in microseconds, of the kernels among a profiler's events.

    Copies and memsets are left out, as `jsparse.measure.kernel_times` does, and ranges
    that a library names, which the profiler draws on the GPU around their kernels.
    """
    found = []
    for event in events:
        on_gpu = event.device_type.name == "CUDA" and not event.is_user_annotation
        if on_gpu and not event.name.startswith(("Memcpy", "Memset")):
            found.append((event.time_range.start, event.time_range.elapsed_us()))
    return sorted(found)


def sums(found: list[tuple[float, float]], count: int) -> list[float]:
    """Seconds of each of ``count`` equal calls, from all their kernels in order.

    Raises:
        RuntimeError: if there is none, or not as many in each call.

    Example:
        >>> sums([(0.0, 1e6), (2.0, 3e6), (9.0, 5e6), (12.0, 7e6)], 2)
        [4.0, 12.0]
    """
    if not found or len(found) % count:
        raise RuntimeError(
            f"the profiler saw {len(found)} kernels in {count} equal calls; expected a "
            "multiple of that."
        )
    each = len(found) // count
    spent = [1e-6 * duration for _, duration in found]
    return [sum(spent[n : n + each]) for n in range(0, len(spent), each)]


# ---------------------------------------------------------------------------- kernels


class Flex:
    """FlexAttention, compiled; arrays are ``[1, H, T, D]``."""

    def __init__(self, torch: Any, lists: dict[str, Any], device: str):
        flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
        counts, indices = lists["kv"]
        rows, columns = lists["shape"]
        block_q, block_kv = lists["blocks"]
        # The width says how many key blocks there are when the lists are transposed.
        full = np.zeros((rows, columns), np.int32)
        full[:, : indices.shape[1]] = indices

        def tensor(array: np.ndarray) -> Tensor:
            return torch.tensor(array, device=device, dtype=torch.int32)[None, None]

        self._mask = flex.BlockMask.from_kv_blocks(
            tensor(np.zeros(rows)),
            tensor(np.zeros((rows, columns))),
            tensor(counts),
            tensor(full),
            BLOCK_SIZE=(block_q, block_kv),
            seq_lengths=(rows * block_q, columns * block_kv),
        )
        self._attend = flex.flex_attention
        if device == "cuda":
            # Shapes of the last case would count as recompilations of this one.
            importlib.import_module("torch._dynamo").reset()
            self._attend = torch.compile(flex.flex_attention, dynamic=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output."""
        return self._attend(q, k, v, block_mask=self._mask)

    def arrange(self, x: Tensor) -> Tensor:
        """From ``[T, H, D]``."""
        return x.transpose(0, 1)[None].contiguous()

    def rearrange(self, x: Tensor) -> Tensor:
        """To ``[T, H, D]``."""
        return x[0].transpose(0, 1)


class FlexDistance(Flex):
    """FlexAttention with ``-slope[h] * distance``, computed from coordinates.

    Its score function reads both; of the two only the slopes get a gradient.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        """The output; ``bias`` is the slopes ``[H]`` and the coordinates ``[T, 3]``."""
        slope, coords = bias[0], bias[1].detach()

        def score(logit: Tensor, b: Any, h: Any, i: Any, j: Any) -> Tensor:
            del b
            d = [coords[i, axis] - coords[j, axis] for axis in range(3)]
            squared = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
            return logit - slope[h] * (squared + 1e-6).sqrt()

        return self._attend(q, k, v, score_mod=score, block_mask=self._mask)

    def arrange(self, x: Tensor) -> Tensor:
        """See `Flex.arrange`; slopes and coordinates stay as they are."""
        return x if x.ndim < 3 else super().arrange(x)


class FlashAttention4:
    """FlashAttention-4's block-sparse kernels in CuTe; arrays are ``[1, T, H, D]``."""

    def __init__(self, torch: Any, lists: dict[str, Any], device: str):
        interface: Any = importlib.import_module("flash_attn.cute.interface")
        sparsity: Any = importlib.import_module("flash_attn.cute.block_sparsity")

        def tensors(counts: np.ndarray, indices: np.ndarray) -> Any:
            def tensor(array: np.ndarray) -> Tensor:
                return torch.tensor(array, device=device, dtype=torch.int32)[None, None]

            width = max(1, indices.shape[1])
            return sparsity.BlockSparseTensorsTorch(
                mask_block_cnt=tensor(np.zeros(len(counts))),
                mask_block_idx=tensor(np.zeros((len(counts), width))),
                full_block_cnt=tensor(counts).contiguous(),
                full_block_idx=tensor(indices).contiguous(),
                block_size=lists["blocks"],
            )

        self._attend = interface.flash_attn_func
        self._lists = {
            "block_sparse_tensors": tensors(*lists["kv"]),
            "block_sparse_tensors_bwd": tensors(*lists["q"]),
        }

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output."""
        found = self._attend(q, k, v, **self._lists)
        return found[0] if isinstance(found, tuple) else found

    def arrange(self, x: Tensor) -> Tensor:
        """From ``[T, H, D]``."""
        return x[None].contiguous()

    def rearrange(self, x: Tensor) -> Tensor:
        """To ``[T, H, D]``."""
        return x[0]


KERNELS: dict[str, Any] = {
    "flex": Flex,
    "flex_distance": FlexDistance,
    "fa4": FlashAttention4,
}
