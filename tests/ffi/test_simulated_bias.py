"""A bias of the CUDA kernels in a simulated CTA, from the public operation down."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.backends import test_contract as contract
from tests.backends.conftest import half_rows as half_rows
from tests.support.cases import biases, cast_bias, make_case, random_mask

OWN = ("dense", "block", "per_key")
"""Those of which the kernels compute the gradient."""


def check_gradients(case, dtype: str = "bfloat16") -> None:
    case = case.cast(dtype)
    found = contract.run_case("cutlass", case)
    contract.check_sixteen_bit(found, case, contract.LIMITS[dtype])
    contract.check_sixteen_bit_bias(case, found[5], contract.LIMITS[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", OWN)
def test_gradients(on_cpu, kind, dtype):
    rng = np.random.default_rng(3)
    mask = random_mask(rng, (200, 333, 128, 64), 7)
    case = make_case(rng, mask, heads=(2, 1))
    bias = cast_bias(biases(rng, mask, 2, 1)[kind], dtype)
    check_gradients(
        dataclasses.replace(case, bias=bias[0] if kind == "dense" else bias)
    )
