"""Records on disk and the tables made of them."""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from jsparse.bench import (
    _records,
    facts,
    markdown,
    read_records,
    records_folder,
    render_into,
    write_record,
)
from jsparse.measure import BadInput


def attention(**changes: Any) -> dict[str, Any]:
    check = {"max_error": 1e-6, "ok": True}
    spread = {"count": 3, "min": 0.1, "median": 0.2, "max": 0.3}
    ratio = {"count": 3, "min": 2.0, "median": 4.0, "max": 8.0}
    side = {
        "seconds": spread,
        "temporary_bytes": 1_000_000,
        "errors": {"out": check},
        "compile_seconds": 1.0,
    }
    return {
        "format": 1,
        "kind": "attention",
        "case": "tiny",
        "about": "a | test",
        "date": "2026-01-02T03:04:05+00:00",
        "device": {"platform": "cpu", "device": "ACME 9000 (TM)", "cores": 2},
        "versions": {"jax": "0.11.2"},
        "ours": "xla",
        "input": {"heads": 1, "head_dim": 64, "dtype": "float32"},
        "mask": {
            "q_len": 1000,
            "blocks": 8,
            "density": 0.5,
            "row_min": 1,
            "row_mean": 2.0,
            "row_max": 3,
            "order": None,
        },
        "left_out": {},
        "forward": {"xla": side, "dense": {**side, "ratio": ratio}},
        "peak_memory_bytes": 2_000_000_000,
        "missed": [],
        **changes,
    }


def build(**changes: Any) -> dict[str, Any]:
    spread = {"count": 3, "min": 1.0, "median": 2.0, "max": 3.0}
    record = attention(kind="mask on the host", case="built", **changes)
    del record["forward"]
    order = {"count": 3, "min": 4.0, "median": 5.0, "max": 6.0}
    return record | {"seconds": {"order": order, "radius": spread}}


def latency(**changes: Any) -> dict[str, Any]:
    times = {
        "count": 100,
        "min": 16e-6,
        "p50": 17e-6,
        "p95": 18e-6,
        "p99": 19e-6,
        "max": 2e-3,
    }
    sides = {
        name: {
            "computes": computes,
            "errors": {"out": {"max_error": 1e-6, "ok": True}},
            "wall": times,
            "kernels": times | {"p50": 9e-6},
            "gflops_per_second": 446_000.0,
        }
        for name, computes in (("mosaic_gpu", "blocks"), ("cudnn", "all"))
    }
    record = attention(kind="latency", forward=sides, ours="mosaic_gpu", **changes)
    return record


def test_latency_stands_beside_the_comparison_of_a_case(tmp_path: Path):
    file = write_record(latency(), tmp_path)
    assert file.name.startswith("tiny-latency.cpu-")
    text = markdown([attention(), latency()])
    rows = [line for line in text.splitlines() if line.startswith("| tiny")]
    assert len(rows) == 1 + 4
    assert "4.00 (2.00 to 8.00)" in rows[0]
    assert rows[1] == (
        "| tiny | 8 | forward | mosaic_gpu | wall clock | 16 µs | 17 µs | 18 µs | "
        "19 µs | 2 ms |  |"
    )
    assert "| cudnn (dense) | kernels | 16 µs | 9 µs |" in rows[4]
    assert rows[4].endswith("| 446 TFLOP/s |")
    (table,) = [t for t in facts(latency()) if "100 calls" in t.title]
    assert [len(row) for row in table.rows] == [len(table.columns)] * 4


def test_gpu_records_show_rates_and_who_is_dense():
    record = copy.deepcopy(attention())
    record["device"] |= {"platform": "gpu", "device": "NVIDIA H100 80GB HBM3"}
    for name, computes, rate in (("xla", "blocks", 400e3), ("dense", "all", 500e3)):
        found = dict(record["forward"][name])
        found |= {"computes": computes, "gflops_per_second": rate}
        record["forward"][name] = found
    record["forward"]["dense"]["temporary_bytes"] = None
    (row,) = [r for r in markdown([record]).splitlines() if r.startswith("| tiny")]
    assert "| xla 200 ms, 400 TFLOP/s | dense (dense) 200 ms, 500 TFLOP/s |" in row
    assert row.endswith("| 1.0 MB /  |")
    (table,) = [t for t in facts(record) if t.title == "tiny: forward"]
    assert "500 TFLOP/s" in table.rows[1]
    assert [len(row) for row in table.rows] == [len(table.columns)] * 2


def test_gpu_records_show_whose_time_power_limits():
    record = copy.deepcopy(attention())
    record["device"] |= {"platform": "gpu", "device": "NVIDIA H100 80GB HBM3"}
    for name, limited in (("xla", 0.9), ("dense", 0.5)):
        found = dict(record["forward"][name])
        clock = {"sm_mhz": {"median": 1515.0}, "power_limited": limited}
        found |= {"computes": "blocks", "gflops_per_second": 4e5, "clock": clock}
        record["forward"][name] = found
    (row,) = [r for r in markdown([record]).splitlines() if r.startswith("| tiny")]
    rate = "200 ms, 400 TFLOP/s"
    assert f"| xla {rate}, power limit | dense {rate} |" in row
    (table,) = [t for t in facts(record) if t.title == "tiny: forward"]
    column = table.columns.index("power limit")
    assert [row[column] for row in table.rows] == ["90 %", "50 %"]
    del record["forward"]["xla"]["clock"]
    record["forward"]["dense"]["clock"] = None  # as older records, as without NVML
    (table,) = [t for t in facts(record) if t.title == "tiny: forward"]
    assert [row[column] for row in table.rows] == ["", ""]


def test_a_folder_taken_away_meanwhile_is_made_again(tmp_path):
    file = write_record(attention(), tmp_path / "away" / "records")
    assert len(read_records(file.parent)) == 1


def test_written_record_is_read_back(tmp_path: Path):
    file = write_record(attention(), tmp_path)
    assert file.name == "tiny.cpu-acme-9000-tm-2cores.20260102T030405Z.json"
    assert read_records(tmp_path) == [attention()]
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_records_of_the_same_second_are_all_kept(tmp_path: Path):
    records = [attention(about=str(n)) for n in range(3)]
    names = [write_record(record, tmp_path).name for record in records]
    stem = "tiny.cpu-acme-9000-tm-2cores.20260102T030405Z"
    assert names == [f"{stem}{more}.json" for more in ("", "-2", "-3")]
    assert sorted(x["about"] for x in read_records(tmp_path)) == ["0", "1", "2"]


def test_records_come_oldest_first(tmp_path: Path):
    late = attention(case="a", date="2026-05-01T00:00:00+00:00")
    write_record(late, tmp_path)
    write_record(attention(), tmp_path)
    assert [record["date"][:7] for record in read_records(tmp_path)] == [
        "2026-01",
        "2026-05",
    ]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 2, "kind": "x"}'])
def test_files_that_are_no_records(tmp_path: Path, text: str):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BadInput, match=r"x\.json"):
        read_records(tmp_path)


def test_missing_folder_of_records(tmp_path: Path):
    with pytest.raises(BadInput, match="no such folder"):
        read_records(tmp_path / "none")


def test_table_shows_ratio_error_and_memory():
    text = markdown([attention(), build()])
    lines = text.splitlines()
    assert lines[0] == "**ACME 9000 (TM), 2 cores**, JAX 0.11.2"
    (row,) = [line for line in lines if line.startswith("| tiny")]
    for part in (
        "a \\| test",
        "H1 D64 float32",
        "0.5000",
        "xla 200 ms",
        "dense 200 ms",
        "4.00 (2.00 to 8.00)",
        "1.0e-06 / 1.0e-06",
        "1.0 MB / 1.0 MB",
    ):
        assert part in row
    (row,) = [line for line in lines if line.startswith("| built")]
    assert "| on the host | 5 s | 2 s (1 s to 3 s) |" in row
    for start in ("| case", "| tiny", "| built"):
        assert any(line.startswith(start) for line in lines)


def test_table_of_a_mask_whose_order_is_not_timed():
    record = build()
    del record["seconds"]["order"]
    assert "| on the host |  | 2 s (1 s to 3 s) |" in markdown([record])


def test_table_takes_the_newest_of_each_case_and_device():
    old, new = attention(about="OLD"), attention(about="NEW")
    other = attention(device=old["device"] | {"cores": 8}, about="OTHER")
    text = markdown([old, other, new])
    assert "OLD" not in text
    assert "NEW" in text
    assert "OTHER" in text


def test_table_keeps_peers_that_only_earlier_records_have():
    old, new = attention(date="2026-01-02T03:04:05+00:00"), attention()
    for record in (old, new):
        record["forward"] = copy.deepcopy(record["forward"])
    old["forward"]["flex"] = dict(old["forward"]["dense"])
    old["forward"]["cutlass"] = dict(old["forward"]["dense"])
    rows = [r for r in markdown([old, new]).splitlines() if " ms | " in r]
    assert [row.split(" | ")[4].split()[0] for row in rows] == ["dense", "flex"]
    assert "| forward | xla 200 ms | dense 200 ms |" in rows[0]
    assert "|  |  |  | xla 200 ms (2026-01-02) | flex 200 ms |" in rows[1]


def test_table_of_a_case_without_peers():
    record = copy.deepcopy(attention())
    del record["forward"]["dense"]
    (row,) = [r for r in markdown([record]).splitlines() if r.startswith("| tiny")]
    assert row.count("|") == 10 - 1 + 1  # with the escaped bar of its text


def test_all_rows_of_a_table_have_as_many_cells_as_the_head():
    record = copy.deepcopy(attention(about="test"))
    del record["forward"]["dense"]
    lines = markdown([record]).splitlines()
    counts = {line.count("|") for line in lines if line.startswith("|")}
    assert len(counts) == 1


def test_render_replaces_only_what_is_between_the_marks(tmp_path: Path):
    file = tmp_path / "README.md"
    file.write_text("a\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nz\n")
    assert not render_into(file, "new", write=False)
    assert "old" in file.read_text()
    assert not render_into(file, "new")
    expected = "a\n<!-- bench:begin -->\nnew\n<!-- bench:end -->\nz\n"
    assert file.read_text() == expected
    assert render_into(file, "new", write=False)


@pytest.mark.parametrize(
    "text", ["", "<!-- bench:begin -->", "<!-- bench:end --> <!-- bench:begin -->"]
)
def test_render_needs_both_marks(tmp_path: Path, text: str):
    file = tmp_path / "README.md"
    file.write_text(text)
    with pytest.raises(BadInput, match="bench:begin"):
        render_into(file, "new")
    assert file.read_text() == text


def test_facts_name_what_was_left_out():
    record = attention(left_out={"dense": "forward: needs 5 GB"})
    tables = {table.title: table.rows for table in facts(record)}
    assert tables["Left out"] == [("dense", "forward: needs 5 GB")]
    assert tables["tiny: forward"][1][4] == "4.00"


def test_times_carry_their_units_and_the_title_names_none():
    half = {"count": 3, "min": 5e-4, "median": 5e-3, "max": 50.0}
    times = facts(build() | {"seconds": {"order": half}})[-1]
    assert times.title == "Time of each step"
    assert times.rows == [("order", "500 µs", "5 ms", "50 s")]


def test_shipped_records_can_be_rendered():
    records = resources.files("jsparse.bench") / "records"
    with resources.as_file(records) as folder:
        found = read_records(folder)
    text = markdown(found)
    shown = [record for record in found if record["kind"] != "tune"]
    assert all(record["case"] in text for record in shown)


def test_folder_of_records(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(_records, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    inside = tmp_path / "a" / "b" / "records"
    assert records_folder() == inside
    assert records_folder(to_write=True) == Path("jsparse-records")
    (tmp_path / "pyproject.toml").touch()
    assert records_folder(to_write=True) == inside
