"""Peers that are kernels of PyTorch, each in a process of its own.

Two frameworks in one process would share CUPTI, which has room for one profiler, and a
kernel that fails would take the other's CUDA context with it. The process, see
``_torch_worker.py``, imports PyTorch once and serves case after case; turns alternate
with ours all the same, since each waits for the other. It gets the same input values as
NumPy arrays, and only rows and times come back.
"""

from __future__ import annotations

import atexit
import multiprocessing
from dataclasses import dataclass
from typing import Any

import numpy as np

from jsparse.bench import _torch_worker
from jsparse.bench._contract import BLOCKS, Task
from jsparse.bench._jax_peers import missing, no_gpu
from jsparse.patterns import BlockMask

_PATIENCE = 600.0  # seconds for one answer; compiling takes the longest


class WorkerError(RuntimeError):
    """What went wrong in the process of a peer."""


class TorchPeer:
    """A kernel that `_torch_worker` knows by name.

    Args:
        name: of the peer.
        modules: that must be installed.
        install: what installs them.
        packages: distributions whose versions are recorded.
        kernel: in `_torch_worker`, if it is called otherwise there.
    """

    computes = BLOCKS

    def __init__(
        self,
        name: str,
        modules: tuple[str, ...],
        install: str,
        packages: tuple[str, ...],
        kernel: str | None = None,
    ):
        self.name, self.packages = name, packages
        self._kernel = kernel or name
        self._modules, self._install = modules, install
        self._worker: Worker | None = None

    def available(self) -> str | None:
        """Needs its modules and a GPU."""
        return missing(self._modules, self._install) or no_gpu()

    def why_not(self, mask: BlockMask) -> str | None:
        """Takes whole blocks in one pattern for all heads."""
        return only_whole_blocks(mask)

    def enter(self, task: Task) -> TorchContender:
        """See `Peer.enter`; starts the process if it does not run."""
        if self._worker is None or not self._worker.alive:
            self._worker = Worker(self._kernel, "cuda")
        sizes = len(task.sets), len(task.sets[0])
        self._worker.ask("start", lists_of(task.mask), *sizes)
        for arrays in task.sets:
            for array in arrays:
                # One by one: the bytes of all of them would be held twice.
                self._worker.ask("take", *as_bits(np.asarray(array)))
        return TorchContender(self._worker)


@dataclass
class TorchContender:
    """A `TorchPeer` whose process holds the task: `Contender`."""

    worker: Worker

    def ready(self, direction: str) -> TorchCall:
        """See `Contender.ready`."""
        seconds, peak = self.worker.ask("ready", direction)
        return TorchCall(self.worker, direction, seconds, peak)

    def close(self) -> None:
        """See `Contender.close`; the process stays for the next case."""
        if self.worker.alive:
            self.worker.ask("drop")


@dataclass
class TorchCall:
    """A pass that is ready in the process: `Call`."""

    worker: Worker
    direction: str
    compile_seconds: float
    temporary_bytes: int | None

    def rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """See `Call.rows`."""
        return self.worker.ask("rows", self.direction, rows)

    def times(self, n: int, count: int, kernels: bool) -> list[float]:
        """See `Call.times`."""
        return self.worker.ask("times", self.direction, n, count, kernels)


class Worker:
    """A process that runs `_torch_worker.serve`.

    Args:
        kernel: the name of what it times.
        device: of PyTorch.
    """

    def __init__(self, kernel: str, device: str):
        # Forked, it would share the CUDA context of this process.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_torch_worker.serve,
            args=(theirs, kernel, device),
            name=f"jsparse-{kernel}",
        )
        self._process.start()
        theirs.close()
        self._name = kernel
        # Else this process would wait for that one, and that one for a question.
        atexit.register(self.stop)

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.is_alive()

    def ask(self, what: str, *arguments: Any) -> Any:
        """The answer to a question.

        Raises:
            WorkerError: if it failed, ended or does not answer; it is stopped then,
                since a CUDA context that failed once may fail for ever.
        """
        try:
            self._pipe.send((what, arguments))
            answered = self._pipe.poll(_PATIENCE)
            good, value = self._pipe.recv() if answered else (False, "no answer")
        except (EOFError, OSError) as err:
            self._process.join(5)
            code = self._process.exitcode
            good, value = False, f"its process ended with {code} ({err or 'no answer'})"
        except KeyboardInterrupt:
            self.stop()
            raise
        if not good:
            self.stop()
            raise WorkerError(value)
        return value

    def stop(self) -> None:
        """Ends the process."""
        atexit.unregister(self.stop)
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def only_whole_blocks(mask: BlockMask) -> str | None:
    """Why a peer of whole blocks in one pattern cannot take a mask, or None.

    Example:
        >>> mask = BlockMask.from_blocks([0, 1], [0, 0], q_len=256)
        >>> only_whole_blocks(mask) is None
        True
    """
    partial = int(np.asarray(mask.kv_num_blocks).sum())
    if partial:
        return f"it is given whole blocks only, and {partial:,} here are partial"
    patterns = np.asarray(mask.full_kv_num_blocks).shape[:2]
    if patterns != (1, 1):
        return f"it is given one pattern only, and here are {patterns}"
    return None


def lists_of(mask: BlockMask) -> dict[str, Any]:
    """A mask's whole blocks in plain NumPy.

    Returns:
        ``blocks``: their two sizes; ``shape``: how many there are each way; ``kv`` and
        ``q``: ``(counts [n], indices [n, capacity])`` int32, by row and by column.

    Example:
        >>> mask = BlockMask.from_blocks([0, 1], [0, 0], q_len=256)
        >>> lists_of(mask)["q"]
        (array([2, 0], dtype=int32), array([[0, 1], [0, 0]], dtype=int32))
    """
    lists: dict[str, Any] = {
        "blocks": (mask.block_q, mask.block_kv),
        "shape": (mask.num_q_blocks, mask.num_kv_blocks),
    }
    for side in ("kv", "q"):
        counts = np.asarray(getattr(mask, f"full_{side}_num_blocks"))[0, 0]
        indices = np.asarray(getattr(mask, f"full_{side}_indices"))[0, 0]
        used = np.arange(indices.shape[1]) < counts[:, None]
        indices = np.where(used, indices, 0).astype(np.int32)
        lists[side] = counts.astype(np.int32), indices
    return lists


def as_bits(array: np.ndarray) -> tuple[np.ndarray, str]:
    """An array that any NumPy can read, and the name of its dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> as_bits(np.ones(2, jnp.bfloat16))
        (array([16256, 16256], dtype=int16), 'bfloat16')
    """
    integers = {2: np.int16, 4: np.int32}[array.dtype.itemsize]
    return np.ascontiguousarray(array).view(integers), array.dtype.name


BLOCK_SPARSE = (
    TorchPeer(
        "fa4",
        ("torch", "flash_attn", "cutlass", "quack"),
        "pip install torch flash-attn-4 'nvidia-cutlass-dsl[cu13]'",
        ("torch", "flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels"),
    ),
    TorchPeer("flex", ("torch",), "pip install torch", ("torch", "triton")),
)

FLEX_DISTANCE = TorchPeer(
    *("flex", ("torch",), "pip install torch", ("torch", "triton")),
    kernel="flex_distance",
)
