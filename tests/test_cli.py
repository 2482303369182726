"""The `jsparse` command: what it prints, writes and returns."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import jsparse
from jsparse import _doctor, _job, cli
from jsparse.report import Facts, _page

DATA = Path(__file__).parents[1] / "examples" / "data"
SMALL = str(DATA / "1UBI.pdb.gz")


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, arguments)


# ----------------------------------------------------------------------------- run


def test_run_writes_a_report(here: Path):
    done = call("run", SMALL, "--repeats", "2")
    assert done.exit_code == 0, done.stderr
    names = sorted(path.name for path in (here / "jsparse-report").iterdir())
    assert names == ["pattern.png", "report.html", "report.json"]
    for part in ("602", "bisection", "P50 / P95 / P99", "Right: 256 rows agree"):
        assert part in done.stdout
    assert "Report: jsparse-report/report.html" in done.stderr


def test_run_prints_json_alone(here: Path):
    done = call(
        *("run", SMALL, "--json", "--repeats", "1", "--backward", "--out", "r"),
        *("--block-q", "64", "--block-kv", "32", "--heads", "2", "--head-dim", "16"),
        *("--order", "file", "--cutoff", "6"),
    )
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["status"] == "complete"
    assert found["order"] == "file"
    mask = found["mask"]
    assert (mask["block_q"], mask["block_kv"]) == (64, 32)
    assert mask["density"] < 1
    assert found["options"]["cutoff"] == 6
    assert found["check"]["ok"]
    assert found["gradient_check"]["ok"]
    assert found["forward"]["run_seconds"]["count"] == 1
    flops = 4 * mask["blocks"] * 64 * 32 * 2 * 16
    speed = flops / found["forward"]["run_seconds"]["p50"] / 1e9
    assert found["forward"]["gflops_per_second"] == pytest.approx(speed)
    assert found == json.loads((here / "r" / "report.json").read_text())


def test_run_replaces_an_earlier_report(here: Path):
    folder = here / "r"
    folder.mkdir()
    (folder / "report.json").write_text("old")
    (folder / "mine.txt").write_text("keep")
    done = call("run", SMALL, "--repeats", "1", "--out", "r")
    assert done.exit_code == 0
    assert json.loads((folder / "report.json").read_text())["status"] == "complete"
    assert (folder / "mine.txt").read_text() == "keep"


def test_run_with_the_reference(here: Path):
    done = call("run", SMALL, "--implementation", "reference", "--json")
    found = json.loads(done.stdout)
    assert found["backend"]["implementation"] == "reference"
    assert found["backend"]["why_not"]["xla"] == "it can, but reference was asked for"


@pytest.mark.parametrize("seconds, count", [(0.001, 20), (0.5, 10), (60.0, 3)])
def test_as_many_calls_are_timed_as_fit(here: Path, monkeypatch, seconds, count):
    real = _job.measure.time_call
    monkeypatch.setattr(
        _job.measure, "time_call", lambda *call: (seconds, real(*call)[1])
    )
    found = json.loads(call("run", SMALL, "--json").stdout)
    assert found["forward"]["run_seconds"]["count"] == count


def test_wrong_result_is_said_and_returns_1(here: Path, monkeypatch):
    real = _job.block_sparse_attention
    monkeypatch.setattr(
        _job, "block_sparse_attention", lambda *a, **k: real(*a, **k) * 1.001
    )
    done = call("run", SMALL, "--repeats", "1")
    assert done.exit_code == 1
    assert "WRONG: the largest error" in done.stdout
    result = json.loads((here / "jsparse-report" / "report.json").read_text())
    assert result["status"] == "wrong"


def test_wrong_gradient_returns_1(here: Path, monkeypatch):
    real = _job._backward

    def wrong(name):
        def both(*arguments):
            out, dq, dk, dv = real(name)(*arguments)
            return out, dq * 0.99, dk, dv

        return both

    monkeypatch.setattr(_job, "_backward", wrong)
    done = call("run", SMALL, "--repeats", "1", "--backward", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["check"]["ok"]
    assert not found["gradient_check"]["ok"]


def test_wrong_mask_returns_1(here: Path, monkeypatch):
    real = _job.patterns.radius
    monkeypatch.setattr(
        _job.patterns,
        "radius",
        lambda coords, cutoff, **sizes: real(coords, cutoff * 0.99, **sizes),
    )
    assert call("run", SMALL, "--repeats", "1").exit_code == 1


def test_features_are_the_same_each_time_and_tell_atoms_apart():
    structure = _job.read_file(Path(SMALL))
    first = _job.project(structure, 2, 8)
    again = _job.project(structure, 2, 8)
    assert all((x == y).all() for x, y in zip(first, again, strict=True))
    q = first[0]
    kinds = {
        (int(z), str(r))
        for z, r in zip(structure.elements, structure.residue_names, strict=True)
    }
    rows = np.asarray(q).reshape(len(q), -1).round(4)
    assert len({tuple(row) for row in rows.tolist()}) == len(kinds)


# ----------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.cif"], "nowhere.cif: no such file"),
        (["."], ".: is a folder"),
        (["text.cif"], "text.cif: is not a structure file"),
        (["empty.pdb"], "empty.pdb: the file is empty"),
        (["cut.pdb.gz"], "cut.pdb.gz: the gzip data is cut off"),
        ([SMALL, "--cutoff", "-1"], "cutoff is -1.0; expected"),
        ([SMALL, "--cutoff", "nan"], "cutoff is nan; expected"),
        ([SMALL, "--cutoff", "1e9"], "cutoff is 1000000000.0; expected"),
        ([SMALL, "--heads", "0"], "heads is 0; expected"),
        ([SMALL, "--head-dim", "-4"], "head_dim is -4; expected"),
        ([SMALL, "--heads", "99999"], "99999 heads of 32"),
        ([SMALL, "--block", "0"], "block is 0; expected 1 to 1024 atoms"),
        ([SMALL, "--block-q", "0"], "block_q is 0; expected"),
        ([SMALL, "--block-kv", "5000"], "block_kv is 5000; expected"),
        ([SMALL, "--order", "random"], "order 'random' is unknown"),
        ([SMALL, "--implementation", "magic"], "implementation 'magic' is unknown"),
        ([SMALL, "--implementation", "cutlass"], "'cutlass' cannot run this"),
        ([SMALL, "--copies", "none"], "copies is 'none'; expected"),
        ([SMALL, "--copies", "7"], "copies=7"),
        ([SMALL, "--repeats", "0"], "repeats is 0; expected"),
        ([SMALL, "--out", "text.cif"], "text.cif: files cannot be written"),
        ([SMALL, "--out", "text.cif/x"], "text.cif/x: files cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(here: Path, arguments, message):
    (here / "text.cif").write_text("hello :x: [b]world[/b]\n")
    (here / "empty.pdb").touch()
    (here / "cut.pdb.gz").write_bytes(Path(SMALL).read_bytes()[:5000])
    before = sorted(here.iterdir())
    done = call("run", *arguments)
    assert done.exit_code == 2
    lines = [line for line in done.stderr.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("jsparse: ")
    assert message in lines[0]
    assert done.stdout == ""
    assert sorted(here.iterdir()) == before, "nothing is left behind"


def test_unwritable_folder_is_refused_before_the_file_is_read(here: Path, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("the file was read")

    monkeypatch.setattr(_job, "read_structure", forbidden)
    (here / "x").touch()
    assert call("run", SMALL, "--out", "x").exit_code == 2


def test_text_of_files_is_printed_as_it_is(here: Path):
    (here / "text.cif").write_text("hello :x: [b]world[/b]\n")
    assert "hello :x: [b]world[/b]" in call("run", "text.cif").stderr


def test_debug_shows_the_traceback(here: Path):
    done = call("run", SMALL, "--cutoff", "-1", "--debug")
    assert done.exit_code == 2
    with_trace = "Traceback (most recent call last)"
    assert with_trace not in call("run", SMALL, "--cutoff", "-1").stderr
    assert done.stderr.splitlines()[-1].startswith("jsparse: cutoff is -1.0")


def test_dense_problem_that_does_not_fit_is_refused(here: Path, monkeypatch):
    monkeypatch.setattr(_job.measure, "available_memory", lambda: 2_000_000)
    done = call("run", SMALL, "--implementation", "reference")
    assert done.exit_code == 2
    assert "needs" in done.stderr
    assert list(here.iterdir()) == []


def test_features_that_do_not_fit_are_not_made(here: Path, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("the features were made")

    monkeypatch.setattr(_job, "project", forbidden)
    monkeypatch.setattr(_job.measure, "available_memory", lambda: 1_000_000)
    done = call("run", SMALL)
    assert done.exit_code == 2
    assert "602 atoms or tokens: their inputs alone need 1.8 MB" in done.stderr
    assert list(here.iterdir()) == []


def test_failure_in_the_middle_keeps_what_was_found(here: Path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(_job.measure, "time_call", broken)
    done = call("run", SMALL)
    assert done.exit_code == 1
    assert "Failed: RuntimeError: RESOURCE_EXHAUSTED" in done.stdout
    result = json.loads((here / "jsparse-report" / "report.json").read_text())
    assert result["status"] == "failed"
    assert result["completed"][:3] == ["read", "order", "mask"]
    assert (here / "jsparse-report" / "pattern.png").exists()


def test_full_disk_shows_what_was_found(here: Path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jsparse.report._files.os.replace", full)
    done = call("run", SMALL, "--repeats", "1")
    assert done.exit_code == 2
    assert "report.json: cannot be written (No space left on device)" in done.stderr
    assert "Right: 256 rows agree" in done.stdout
    assert list(here.iterdir()) == []


# ---------------------------------------------------------------------------- Ctrl-C


def test_interrupt_keeps_a_partial_report(here: Path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_job.measure, "check_rows", interrupt)
    done = call("run", SMALL, "--repeats", "1")
    assert done.exit_code == 130
    result = json.loads((here / "jsparse-report" / "report.json").read_text())
    assert result["status"] == "interrupted"
    assert result["completed"][-1] == "forward"
    assert "check" not in result
    page = (here / "jsparse-report" / "report.html").read_text()
    assert "Interrupted. Completed: read, order, mask" in page


def test_interrupt_of_the_report_keeps_it(here: Path, monkeypatch):
    draw, calls = _page.block_map, iter([KeyboardInterrupt])

    def interrupt_once(*arguments):
        for error in calls:
            raise error
        return draw(*arguments)

    monkeypatch.setattr(_page, "block_map", interrupt_once)
    assert call("run", SMALL, "--repeats", "1").exit_code == 130
    folder = here / "jsparse-report"
    result = json.loads((folder / "report.json").read_text())
    assert result["status"] == "interrupted"
    assert result["check"]["ok"]
    assert (folder / "report.html").exists()


def test_second_interrupt_leaves_the_numbers(here: Path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_page, "block_map", interrupt)
    assert call("run", SMALL, "--repeats", "1").exit_code == 130
    result = json.loads((here / "jsparse-report" / "report.json").read_text())
    assert result["check"]["ok"]


def test_interrupt_of_pattern_leaves_nothing(here: Path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_job.patterns, "order", interrupt)
    assert call("pattern", SMALL).exit_code == 130
    assert list(here.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_control_c_stops_a_running_job(tmp_path: Path):
    # Whoever started the tests may have had SIGINT ignored.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from jsparse.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", SMALL, "--repeats", "100000000"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    guard = threading.Timer(120, process.kill)
    guard.start()
    try:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith("forward ..."):
                process.send_signal(signal.SIGINT)
                break
        rest = process.communicate()[1]
    finally:
        guard.cancel()
    assert process.returncode == 130, [*seen, rest]
    assert "Traceback" not in rest
    result = json.loads((tmp_path / "jsparse-report" / "report.json").read_text())
    assert result["status"] == "interrupted"
    assert result["completed"][-1] == "warm up forward"
    assert (tmp_path / "jsparse-report" / "report.html").exists()
    assert (tmp_path / "jsparse-report" / "pattern.png").exists()


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_control_c_while_libraries_load_is_one_line():
    code = """if True:
        import signal, sys, time
        from importlib import metadata

        class Slow:
            def find_spec(self, name, *_):
                if name == "jax":
                    print("loading", flush=True)
                    time.sleep(120)

        # Whoever started the tests may have had SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.meta_path.insert(0, Slow())
        (command,) = metadata.entry_points(group="console_scripts", name="jsparse")
        command.load()()
    """
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
    assert (process.returncode, said) == (130, "jsparse: interrupted.\n")


# ------------------------------------------------------------------- other commands


def test_pattern_draws_the_mask_alone(here: Path):
    done = call("pattern", SMALL, "--out", "p", "--json", "--block", "32")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mask"]["block_kv"] == 32
    assert "forward" not in found
    assert [path.name for path in (here / "p").iterdir()] == ["pattern.png"]
    assert (here / "p" / "pattern.png").read_bytes()[:4] == b"\x89PNG"
    assert "density" in call("pattern", SMALL).stdout


def test_doctor_says_what_runs():
    done = call("doctor", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["jsparse"] == jsparse.__version__
    assert found["implementations"]["xla"]["runs"]
    assert found["implementations"]["cutlass"]["reason"]
    assert found["extras"]["flax"]["install"] == "pip install 'jsparse[flax]'"
    auto = {"forward": "xla", "backward": "xla", "reason": "xla comes first"}
    assert found["auto"] == auto
    shown = call("doctor").stdout
    assert "xla" in shown
    assert "xla comes first (in bfloat16)" in shown


def test_doctor_tries_each_implementation_in_a_dtype_that_it_takes(monkeypatch):
    """The kernels for GPUs take none of float32, where others are more exact."""
    real, tried = _doctor.support, []

    def support(q, *arguments):
        halves = None if q.dtype == "bfloat16" else "dtype float32; expected bfloat16"
        return real(q, *arguments) | {"cutlass": halves}

    def attend(q, k, v, mask, *, implementation):
        tried.append((implementation, str(q.dtype)))
        return real_attend(q, k, v, mask, implementation="xla")

    real_attend = _doctor.block_sparse_attention
    monkeypatch.setattr(_doctor, "support", support)
    monkeypatch.setattr(_doctor, "block_sparse_attention", attend)
    found = _doctor.examine()["implementations"]
    assert ("cutlass", "bfloat16") in tried
    assert ("xla", "float32") in tried
    assert ("xla", "bfloat16") not in tried
    assert found["cutlass"]["runs"]
    assert found["cutlass"]["dtype"] == "bfloat16"


def test_doctor_returns_1_when_nothing_runs(monkeypatch):
    real = _doctor.block_sparse_attention

    def wrong(*arguments, implementation):
        if implementation == "reference":
            raise RuntimeError("the device is on fire")
        return real(*arguments, implementation=implementation) + 1

    monkeypatch.setattr(_doctor, "block_sparse_attention", wrong)
    done = call("doctor", "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)["implementations"]
    assert found["xla"]["reason"] == "its results are wrong on this machine"
    assert found["reference"]["reason"] == "RuntimeError: the device is on fire"


@pytest.mark.parametrize(
    "error, reason",
    [
        (RuntimeError("Unknown backend: 'x'"), "Unknown backend: 'x'"),
        (AssertionError(), "no such device"),
    ],
)
def test_jax_that_does_not_start(here: Path, monkeypatch, error, reason):
    def broken():
        raise error

    monkeypatch.setattr("jsparse.measure._machine.jax.devices", broken)
    for code, command in ((1, ["doctor"]), (2, ["run", SMALL])):
        done = call(*command)
        assert done.exit_code == code
        assert f"({reason}). Install what it needs" in done.stderr


def test_bench_lists_its_cases():
    found = json.loads(call("bench", "--list", "--json").stdout)
    assert "63 x 63 blocks" in found["seed800"]
    assert "seed800" in call("bench", "--list").stdout


def test_bench_records_and_renders(here: Path):
    arguments = ("--structure", SMALL, "--repeats", "1", "--record", "--records", "r")
    done = call("bench", "1ubi_h4_d32", "1ubi_mask", *arguments)
    assert done.exit_code == 0, done.stderr
    assert "time / ours" in done.stdout
    assert len(list((here / "r").glob("*.json"))) == 2
    table = call("bench", "--table", "--records", "r").stdout
    assert "1ubi_h4_d32" in table
    (here / "README.md").write_text("<!-- bench:begin -->\n<!-- bench:end -->\n")
    render = ("bench", "--render", "README.md", "--records", "r")
    done = call(*render, "--check")
    assert done.exit_code == 1
    assert "out of date" in done.stderr
    assert call(*render).exit_code == 0
    assert call(*render, "--check").exit_code == 0
    assert "1ubi_mask" in (here / "README.md").read_text()


def test_bench_prints_json_alone():
    done = call(
        *("bench", "1ubi_mask", "--structure", SMALL, "--repeats", "1", "--json")
    )
    (found,) = json.loads(done.stdout)
    assert found["kind"] == "mask on the host"


def test_bench_returns_1_for_a_missed_target():
    done = call(
        *("bench", "1ubi_mask", "--structure", SMALL, "--repeats", "1"),
        *("--max-seconds", "1e-9"),
    )
    assert done.exit_code == 1
    assert "more than the 1e-09 s demanded" in done.stderr


def test_bench_latency(here: Path):
    done = call(
        *("bench", "1ubi_h4_d32", "--structure", SMALL, "--latency"),
        *("--against", "none", "--no-backward"),
    )
    assert done.exit_code == 0, done.stderr
    assert "forward, 100 calls" in done.stdout
    assert "P95" in done.stdout


def test_bench_plots(here: Path):
    done = call("bench", "--plot", "p")
    assert done.exit_code == 0, done.stderr
    assert "Picture: p/rates.png" in done.stderr
    pictures = ["p/rates.png", "p/density.png"]
    for picture in pictures:
        assert (here / picture).read_bytes()[:4] == b"\x89PNG"
    assert json.loads(call("bench", "--plot", "p", "--json").stdout) == pictures


def test_bench_prints_targets():
    done = call("bench", "--targets", "mosaic_forward")
    assert done.exit_code == 1
    assert "mosaic_forward, H100: 0 of 7 met" in done.stdout
    assert "seed800" in done.stdout
    done = call("bench", "--targets", "--json")
    found = json.loads(done.stdout)
    assert {"group", "case", "verdict", "ratio", "limit"} <= set(found[0])
    assert len({line["group"] for line in found}) == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name at least one case"),
        (["seed800", "--profile"], "--profile cannot run here: it needs an NVIDIA"),
        (["seed800", "--profile", "--latency"], "expected one of them"),
        (["seed800", "--tune"], "--tune cannot run here: it needs an NVIDIA GPU"),
        (["seed800", "--tune", "--profile"], "--profile and --tune were given"),
        (["seed800", "--entries", "t.json"], "--entries needs --tune"),
        (["seed800", "--tune", "--entries", "x"], "x: is no table of configs"),
        (["seed800", "--choices", "t.json"], "--choices needs --tune"),
        (["seed800", "--tune", "--choices", "x"], "x: is no table of implementations"),
        (["--targets", "seed800"], "unknown group of targets 'seed800'"),
        (["seed"], "unknown case 'seed'"),
        (["seed800", "--against", "fa9"], "unknown peer 'fa9'; expected dense, fa4"),
        (["seed800", "--against", "cudnn"], "'cudnn' cannot run here: it needs"),
        (["seed800", "--dtype", "int4"], "dtype 'int4' is unknown"),
        (["seed800", "--min-ratio", "nan"], "min_ratio is nan; expected"),
        (["--structure", "none.cif"], "none.cif: no such file"),
        (["--render", "none.md"], "none.md: no such file"),
        (["--check"], "--check needs --render"),
        (["--table", "--records", "none"], "none: there is no such folder"),
        (["seed800", "--record", "--records", "x/r"], "another folder with --records"),
    ],
)
def test_bad_input_of_bench(here: Path, arguments, message):
    (here / "x").touch()
    done = call("bench", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    "tables, configs",
    [
        ([], True),
        (["--entries", "e"], True),
        (["--choices", "c"], False),
        (["--entries", "e", "--choices", "c"], True),
    ],
)
def test_configs_are_timed_but_for_choices_alone(
    here: Path, monkeypatch, tables, configs
):
    seen = []
    monkeypatch.setattr(cli, "_measure", lambda _, x, *rest: seen.append(x) or [])
    assert call("bench", "seed800", "--tune", *tables).exit_code == 0
    assert [options.configs for options in seen] == [configs]


def test_usage_errors_return_2():
    assert call("run").exit_code == 2
    assert call("run", SMALL, "--cutoff", "ten").exit_code == 2
    assert call("nonesuch").exit_code == 2


def test_help_names_every_command():
    done = call("--help")
    assert done.exit_code == 0
    for name in ("run", "pattern", "doctor", "bench"):
        assert name in done.stdout


def test_stdout_without_unicode():
    done = subprocess.run(
        [sys.executable, "-m", "jsparse.cli", "bench", "--list"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "10 ?" in done.stdout


def test_reader_of_stdout_that_leaves():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "jsparse.cli", "doctor", "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "try implementations ...\n")


def test_the_installed_command():
    command = Path(sys.executable).with_name("jsparse")
    done = subprocess.run(
        [command, "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, jsparse.__version__)


def test_no_cell_of_a_table_is_cut_off(monkeypatch, capsys):
    cell = "501 TFLOP/s, as " + "x" * 90
    tables = [Facts("A title", ("who", "rate"), [("ours", cell)])]
    cli._print_tables(tables)
    assert cell in capsys.readouterr().out
    terminal = functools.partial(Console, force_terminal=True, width=40)
    monkeypatch.setattr(cli, "_console", terminal)
    cli._print_tables(tables)
    shown = capsys.readouterr().out
    assert shown.count("x") == 90 and "…" not in shown
