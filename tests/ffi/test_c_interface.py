"""The C interface called without XLA, and from two threads on two streams at once."""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools

import numpy as np
import pytest

from jsparse import block_sparse_attention
from jsparse.backends import cutlass
from tests.backends.conftest import cutlass_on_gpu as cutlass_on_gpu
from tests.ffi.c_interface import Launch
from tests.support.cases import Case, make_case, random_mask, uneven_rows

attend = functools.partial(
    block_sparse_attention, return_lse=True, implementation="cutlass"
)


def cases(blocks: int) -> list[Case]:
    """One with bits, one whose rows are split over CTAs, with a bias."""
    rng = np.random.default_rng(blocks)
    random = random_mask(rng, (380, 640, 128, 128), 10)
    uneven = uneven_rows(rng, (9, blocks), (200, 128 * blocks, 128, 128))
    bias = rng.standard_normal((2, 200, 128 * blocks)).astype(np.float32)
    return [
        make_case(rng, mask, heads=(2, 1), dims=(64, 64), bias=bias).cast("bfloat16")
        for mask, bias in ((random, None), (uneven, bias))
    ]


def test_gives_what_the_handler_gives(on_cpu):
    for case in cases(12):
        launch = Launch(case)
        launch.run(on_cpu)
        expected = attend(case.q, case.k, case.v, case.mask, bias=case.bias)
        for x, y in zip(launch.results, expected, strict=False):
            np.testing.assert_array_equal(x[0], y)


class Stream:
    """A CUDA stream that waits for no other; entered by the thread that uses it."""

    def __init__(self):
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.context, self.handle = ctypes.c_void_p(), ctypes.c_void_p()
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), 0)

    def __enter__(self):
        self._do("cuCtxSetCurrent", self.context)
        self._do("cuStreamCreate", ctypes.byref(self.handle), 1)  # non-blocking
        return self

    def __exit__(self, *_):
        self._do("cuStreamDestroy_v2", self.handle)

    def wait(self):
        self._do("cuStreamSynchronize", self.handle)

    def _do(self, name, *arguments):
        assert getattr(self.driver, name)(*arguments) == 0, name


@pytest.mark.gpu
@pytest.mark.usefixtures("cutlass_on_gpu")
def test_two_threads_on_two_streams_give_what_one_gives():
    library = cutlass.library()
    assert isinstance(library, ctypes.CDLL), library

    def repeat(case: Case, times: int) -> list[np.ndarray]:
        """Results of the last launch; all others must equal it."""
        launches = [Launch(case) for _ in range(4)]
        with Stream() as stream:
            for _ in range(times):
                for launch in launches:
                    launch.run(library, stream.handle.value)
            stream.wait()
        found = [[np.asarray(x) for x in one.results[:2]] for one in launches]
        for other in found:
            for x, y in zip(other, found[0], strict=True):
                np.testing.assert_array_equal(x, y)
        return found[0]

    both = cases(30)
    alone = [repeat(case, 1) for case in both]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        together = list(threads.map(repeat, both, [100, 100]))
    for case, one, two in zip(both, alone, together, strict=True):
        # Not in a jitted function: a traced mask may be scheduled otherwise.
        expected = attend(case.q, case.k, case.v, case.mask, bias=case.bias)
        for x, y, z in zip(one, two, expected, strict=True):
            np.testing.assert_array_equal(x, y)
            np.testing.assert_array_equal(y[0], z)
