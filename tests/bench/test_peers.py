"""Peers of other libraries: what they are given, and what they say if they cannot."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.bench import PEERS, _torch_peers, _torch_worker
from jsparse.bench._cases import of_blocks, of_coords
from jsparse.bench._contract import Task
from jsparse.bench._patterns import uniform
from jsparse.bench._torch_peers import Worker, WorkerError, as_bits, lists_of
from jsparse.measure import expect_rows

PATTERN = of_blocks(uniform(4, 2))
ROWS = np.arange(0, 512, 5)


def arrays(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [
        np.asarray(jnp.asarray(rng.standard_normal((512, 2, 16)), dtype))
        for _ in range(4)
    ]


@pytest.mark.parametrize(
    "name, modules, install",
    [
        ("fa4", ["torch", "flash_attn"], "pip install torch flash-attn-4"),
        ("flex", ["torch"], "pip install torch"),
        ("tokamax", ["tokamax"], "pip install tokamax"),
        ("fa3", ["flash_attn3_jax", "einops"], "pip install flash-attn3-jax"),
    ],
)
def test_peers_say_what_is_not_installed(monkeypatch, name, modules, install):
    def find(module):
        return None if module in modules else module

    monkeypatch.setattr("importlib.util.find_spec", find)
    verb = "is" if len(modules) == 1 else "are"
    reason = PEERS[name].available()
    assert reason is not None
    assert reason.startswith(f"{', '.join(modules)} {verb} not installed: {install}")


@pytest.mark.parametrize("name", ["fa4", "flex", "cudnn", "tokamax", "fa3"])
def test_peers_need_a_gpu(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: module)
    assert PEERS[name].available() == (
        "it needs an NVIDIA GPU, and JAX computes on cpu"
    )


def test_block_sparse_peers_take_whole_blocks_of_one_pattern():
    rng = np.random.default_rng(0)
    partial = of_coords(rng.uniform(0, 40, (500, 3)).astype(np.float32)).mask
    for name in ("fa4", "flex"):
        assert PEERS[name].why_not(PATTERN.mask) is None
        reason = PEERS[name].why_not(partial)
        assert reason is not None
        assert "whole blocks only" in reason


def test_lists_hold_the_mask_both_ways():
    lists = lists_of(PATTERN.mask)
    states = PATTERN.mask.block_states()[0, 0] != 0
    for side, table in (("kv", states), ("q", states.T)):
        counts, indices = lists[side]
        assert counts.tolist() == table.sum(1).tolist()
        for row, count, some in zip(table, counts, indices, strict=True):
            assert some[:count].tolist() == np.flatnonzero(row).tolist()
    assert (lists["blocks"], lists["shape"]) == ((128, 128), (4, 4))


def test_kernels_of_a_profile():
    def event(name, device, start, stop, is_user_annotation=False):
        return SimpleNamespace(
            name=name,
            is_user_annotation=is_user_annotation,
            device_type=SimpleNamespace(name=device),
            time_range=SimpleNamespace(
                start=start, elapsed_us=lambda: float(stop - start)
            ),
        )

    found = _torch_worker.kernels(
        [
            event("second", "CUDA", 20, 25),
            event("first", "CUDA", 1, 4),
            event("cudaLaunchKernel", "CPU", 0, 1),
            event("flash_attn::forward", "CUDA", 0, 26, is_user_annotation=True),
            event("Memset (Device)", "CUDA", 5, 9),
            event("Memcpy DtoD (Device -> Device)", "CUDA", 5, 9),
        ]
    )
    assert found == [(1, 3.0), (20, 5.0)]
    assert _torch_worker.sums(found, 2) == pytest.approx([3e-6, 5e-6])
    assert _torch_worker.sums(found, 1) == pytest.approx([8e-6])
    for count in (3, 4):
        with pytest.raises(RuntimeError, match=f"2 kernels in {count} equal calls"):
            _torch_worker.sums(found, count)
    with pytest.raises(RuntimeError, match="0 kernels"):
        _torch_worker.sums([], 1)


@pytest.mark.parametrize("logs", [[4], [3, 2, 2]])
def test_kernels_that_do_not_divide_are_timed_call_by_call(monkeypatch, logs):
    given = iter(logs)

    def found(self, call, count):
        return [(float(n), 1e6) for n in range(next(given))]

    session = object.__new__(_torch_worker.Session)
    monkeypatch.setattr(_torch_worker.Session, "_kernels", found)
    assert session._kernel_times(lambda: None, 2) == [2.0, 2.0]


# ------------------------------------------------------------------------ the process


def test_process_says_what_failed_and_ends():
    worker = Worker("nonesuch", "cpu")
    with pytest.raises(WorkerError, match=r"(KeyError|ModuleNotFoundError): .*"):
        worker.ask("start", lists_of(PATTERN.mask), 1)
    assert not worker.alive


def test_process_that_was_killed_is_said():
    worker = Worker("flex", "cpu")
    worker._process.kill()
    with pytest.raises(WorkerError, match="its process ended with -9"):
        worker.ask("drop")
    assert not worker.alive


def test_process_that_does_not_answer_is_ended(monkeypatch):
    monkeypatch.setattr(_torch_peers, "_PATIENCE", 0.0)
    worker = Worker("flex", "cpu")
    with pytest.raises(WorkerError, match="no answer"):
        worker.ask("drop")
    assert not worker.alive


class Plain:
    """Block-sparse attention in plain PyTorch, as a session takes it for a kernel."""

    def __init__(self, torch, lists, device):
        counts, indices = lists["kv"]
        blocks = np.zeros(lists["shape"], bool)
        for row, count, some in zip(blocks, counts, indices, strict=True):
            row[some[:count]] = True
        block_q, block_kv = lists["blocks"]
        self.torch = torch
        self.mask = torch.from_numpy(blocks.repeat(block_q, 0).repeat(block_kv, 1)).to(
            device
        )

    def attend(self, q, k, v):
        functional = self.torch.nn.functional
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)

    arrange = _torch_worker.Flex.arrange
    rearrange = _torch_worker.Flex.rearrange


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_session_gives_rows_and_gradients(monkeypatch, dtype):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setitem(_torch_worker.KERNELS, "plain", Plain)
    session = _torch_worker.Session("plain", "cpu")
    session.start(lists_of(PATTERN.mask), 2)
    sets = [arrays(dtype), arrays(dtype)[::-1]]
    for one in sets:
        for array in one:
            session.take(*as_bits(array))
    q, k, v, dout = sets[0]
    allowed = PATTERN.allowed(ROWS)
    for direction, what, cotangent in (
        ("forward", "out", None),
        ("backward", "dq", dout),
    ):
        seconds, memory = session.ready(direction)
        assert seconds > 0
        assert memory is None
        found = session.rows(direction, ROWS)
        expected = expect_rows(ROWS, q, k, v, allowed, q.dtype, dout=cotangent)
        assert list(found) == [what]
        check = expected.check(found[what])
        assert check.norm_error < (1e-5 if dtype == jnp.float32 else 2e-2)
        times = session.times(direction, 1, 3, False)
        assert len(times) == 3
        assert min(times) > 0
    session.drop()
    assert session.calls == {}


def test_torch_contest_asks_the_process(monkeypatch):
    asked = []

    class Echo:
        alive = True

        def __init__(self, kernel, device):
            asked.append(("made", kernel, device))

        def ask(self, what, *arguments):
            asked.append((what, *arguments))
            answers = {"ready": (1.5, 100), "rows": {"out": ROWS}, "times": [2.0]}
            return answers.get(what)

    monkeypatch.setattr(_torch_peers, "Worker", Echo)
    peer = _torch_peers.TorchPeer("flex", ("torch",), "pip install torch", ())
    q, k, v, dout = map(jnp.asarray, arrays())
    task = Task(PATTERN.mask, [(q, k, v, dout)] * 2)
    contender = peer.enter(task)
    assert asked[0] == ("made", "flex", "cuda")
    assert [question[0] for question in asked[1:]] == ["start", *["take"] * 8]
    call = contender.ready("backward")
    assert (call.compile_seconds, call.temporary_bytes) == (1.5, 100)
    assert call.rows(ROWS)["out"] is ROWS
    assert call.times(1, 10, True) == [2.0]
    contender.close()
    assert asked[-3:] == [
        ("rows", "backward", ROWS),
        ("times", "backward", 1, 10, True),
        ("drop",),
    ]
    peer.enter(task)
    assert sum(question[0] == "made" for question in asked) == 1
