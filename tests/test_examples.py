"""Runs every example as a user would, from another folder, and reads what it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path):
    """A function that runs an example and returns what it printed."""

    def run_example(name: str) -> str:
        done = subprocess.run(
            [sys.executable, EXAMPLES / name],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=os.environ | {"PYTHONIOENCODING": "utf-8", "XLA_FLAGS": ""},
        )
        assert done.returncode == 0, done.stderr
        assert list(tmp_path.iterdir()) == []
        return done.stdout

    return run_example


def numbers(pattern: str, text: str) -> list[float]:
    """What the group of a pattern matches, everywhere in the text, as numbers."""
    found = [float(x.replace(",", "")) for x in re.findall(pattern, text, re.M)]
    assert found, f"{pattern!r} is not in:\n{text}"
    return found


def test_every_example_is_tested_and_short():
    files = sorted(EXAMPLES.glob("*.py"))
    tested = Path(__file__).read_text(encoding="utf-8")
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for number, file in enumerate(files, 1):
        assert file.name.startswith(f"{number:02}_")
        assert f'run("{file.name}")' in tested
        assert f"`{file.name}`" in listed
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 80
        assert not re.search(r"jsparse[\w.]*\._|import _", text), "public names only"
    assert len(files) == 5


def test_first_pattern(run):
    out = run("01_first_pattern.py")
    assert "13,318 atoms" in out
    orders = r"^(?:file|hilbert|bisection) +([\d,]+)"
    (chosen,) = numbers(r"^\w+ +([\d,]+) .*<- chosen", out)
    assert chosen == min(numbers(orders, out))
    assert numbers(r"^blocks +([\d,]+) partial", out) == [chosen]
    assert numbers(r"^grouped +(\d+) problems", out) == [2]


def test_attention(run):
    out = run("02_attention.py")
    errors = numbers(r"relative error of \w+: (\S+)$", out)
    assert len(errors) == 4 and max(errors) < 1e-5
    ((loss, dense),) = re.findall(r"loss (\S+), dense (\S+)$", out, re.M)
    assert float(loss) == pytest.approx(float(dense), rel=1e-5)
    assert "same bits: True" in out


def test_flax_layer(run):
    out = run("03_flax_layer.py")
    assert {"query.kernel", "gate.bias"} < set(re.findall(r"^\w+\.\w+", out, re.M))
    differences = numbers(r"differ by (\S+)$", out)
    assert len(differences) == 4 and max(differences) < 1e-5
    assert numbers(r"^(\d+) compilations for 8 calls", out) == [4]


def test_train_tiny(run):
    out = run("04_train_tiny.py")
    losses = numbers(r"^step +\d+ +loss (\S+)$", out)
    assert max(losses[-3:]) < losses[0] / 2
    (tested,) = numbers(r"^test loss +(\S+)$", out)
    (scrambled,) = numbers(r"^distances scrambled +(\S+)$", out)
    (entropy,) = numbers(r"^elements' entropy +(\S+)$", out)
    assert tested < entropy / 2 < scrambled


def test_pair_bias(run):
    out = run("05_pair_bias.py")
    assert "826 residues in a bucket of 896, 5 samples" in out
    errors = numbers(r"relative error of \w+: (\S+)$", out)
    assert len(errors) == 5 and max(errors) < 1e-5
    ((loss, before),) = re.findall(r"loss (\S+), before (\S+)$", out, re.M)
    assert float(loss) == pytest.approx(float(before), rel=1e-4)
    (before,) = numbers(r"^before +(\S+) MB", out)
    (after,) = numbers(r"^after +(\S+) MB", out)
    assert after < before / 2
