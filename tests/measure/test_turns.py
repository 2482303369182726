"""Runs that share a lock: together while they prepare, one alone while it times."""

from __future__ import annotations

import threading

import pytest

from jsparse.measure import BadInput, Turns


def test_one_is_alone_while_the_others_wait(tmp_path):
    file, log = tmp_path / "lock", []
    together = threading.Barrier(3)

    def run(name):
        with Turns(file) as turns:
            together.wait(10)  # all hold it at once, or this breaks
            with turns.alone():
                log.append(("begins", name))
                threading.Event().wait(0.05)
                log.append(("ends", name))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert [what for what, _ in log] == 3 * ["begins", "ends"]
    assert [name for _, name in log[::2]] == [name for _, name in log[1::2]]


def test_who_prepares_keeps_the_others_from_timing(tmp_path):
    alone = threading.Event()

    def time():
        with Turns(tmp_path / "lock") as turns, turns.alone():
            alone.set()

    with Turns(tmp_path / "lock"):
        thread = threading.Thread(target=time)
        thread.start()
        assert not alone.wait(0.2)
    assert alone.wait(10)
    thread.join(10)


def test_a_lock_that_cannot_be_written(tmp_path):
    wrong = pytest.raises(BadInput, match=r"--lock .*missing.*: No such file")
    with wrong, Turns(tmp_path / "missing" / "lock"):
        pass
