"""Records on disk, and what is shown of them.

One JSON file for each run of a case, named by case, device and time. Tables show the
newest record of each case on each device.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsparse.backends import IMPLEMENTATIONS
from jsparse.bench._contract import EVERY
from jsparse.measure import BadInput
from jsparse.report import (
    Facts,
    format_bytes,
    format_error,
    format_seconds,
    to_json,
    write_file,
)

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"

Record = dict[str, Any]

DIRECTIONS = {
    "forward": "forward",
    "backward": "backward",
    "forward_backward": "forward + backward",
}


_BESIDE = ("latency", "profile", "tune")
_COUNTERS = ("tensor", "issue", "SM", "memory", "occupancy", "read", "written")
_TIMERS = {"wall": "wall clock", "kernels": "kernels"}


def records_folder(to_write: bool = False) -> Path:
    """The records that the package ships.

    Args:
        to_write: whether new ones shall be added. An installed package is left as it
            is; they then go to ``jsparse-records`` where one stands.

    Example:
        >>> records_folder().name
        'records'
    """
    package = Path(__file__).parent
    if to_write and not (package.parents[1] / "pyproject.toml").exists():
        return Path("jsparse-records")
    return package / "records"


def write_record(record: Record, folder: Path) -> Path:
    """Writes one record and returns its file, which is a new one.

    Args:
        record: made by `run_case`.
        folder: made if it is not there: a run beside this one, which made it and then
            had nothing to keep, may have taken it away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = record["device"]
    stamp = re.sub(r"[^0-9TZ]", "", record["date"].replace("+00:00", "Z"))
    name = _slug(device["device"])
    where = f"{device['platform']}-{name}-{device['cores']}cores"
    # Records of the same case that say something else.
    kind = f"-{record['kind']}" if record["kind"] in _BESIDE else ""
    stem = f"{record['case']}{kind}.{where}.{stamp}"
    again = (f"-{n}" for n in itertools.count(2))
    files = (folder / f"{stem}{more}.json" for more in itertools.chain([""], again))
    file = next(file for file in files if not file.exists())
    write_file(file, to_json(record) + "\n")
    return file


def read_records(folder: Path) -> list[Record]:
    """All records of a folder, the newest of each case and device last.

    Raises:
        BadInput: for a file that is no record.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: there is no such folder of records.")
    records = []
    for file in sorted(folder.glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            known = record["format"] == 1 and record["kind"]
        except (ValueError, KeyError, TypeError) as err:
            raise BadInput(f"{file}: is no benchmark record ({err}).") from err
        if not known:
            raise BadInput(
                f"{file}: has format {record['format']}; expected 1. Update jsparse."
            )
        records.append(record)
    return sorted(records, key=lambda record: record["date"])


def wrong(found: Record) -> list[str]:
    """Which results of a contender are further off than rounding explains.

    Its time says nothing then, and gives no ratio.

    Example:
        >>> wrong({"errors": {"out": {"ok": True}, "dq": {"ok": False}}})
        ['dq']
    """
    return [what for what, check in found["errors"].items() if not check["ok"]]


def facts(record: Record) -> list[Facts]:
    """A record as labelled text, for the terminal."""
    mask = record["mask"]
    rows = [
        ("what", record["about"]),
        ("device", _device(record)),
        ("atoms or tokens", f"{mask['q_len']:,}"),
        ("blocks computed", f"{mask['blocks']:,}, density {mask['density']:.4f}"),
        ("rows min / mean / max", _row_load(mask)),
        ("peak memory", format_bytes(record["peak_memory_bytes"])),
    ]
    if mask["order"] is not None:
        rows.insert(3, ("order", mask["order"]))
    tables = [Facts(record["case"], (), rows)]
    if record["kind"] in _PASS_FACTS:
        tables += [
            _PASS_FACTS[record["kind"]](record, direction, title)
            for direction, title in DIRECTIONS.items()
            if direction in record
        ]
        if record["left_out"]:
            left = list(record["left_out"].items())
            tables.append(Facts("Left out", ("peer", "why"), left))
        return tables
    if record["kind"] == "tune":
        return [*tables, *(_tuned_facts(record, found) for found in record["tuned"])]
    rows = [(name, *_times(spent)) for name, spent in record["seconds"].items()]
    tables.append(Facts("Time of each step", ("step", "min", "median", "max"), rows))
    return tables


def _contest_facts(record: Record, direction: str, title: str) -> Facts:
    with_rate = record["device"]["platform"] != "cpu"
    rows = []
    for name, found in record[direction].items():
        ratio = _ratio(found)
        rate = (format_rate(found["gflops_per_second"]),) if with_rate else ()
        rows.append(
            (
                _label(name, found),
                *_times(found["seconds"]),
                "" if ratio is None else f"{ratio['median']:.2f}",
                *rate,
                *((_held_back(found),) if with_rate else ()),
                f"{_worst(found):.1e}",
                _memory(found),
            )
        )
    columns = (
        *("", "min", "median", "max", "time / ours"),
        *(("useful work", "power limit") if with_rate else ()),
        *("largest error", "memory"),
    )
    return Facts(f"{record['case']}: {title}", columns, rows, 0)


def _profile_facts(record: Record, direction: str, title: str) -> Facts:
    columns = ("kernel", "time", *_COUNTERS)
    rows = [(_short(row[0]), *row[1:]) for row in _profile_rows(record, direction)]
    return Facts(f"{record['case']}: {title}, counters", columns, rows)


def _profile_rows(record: Record, direction: str) -> list[tuple[str, ...]]:
    rows = []
    for found in record.get(direction, []):
        time = found["seconds"]
        percents = [found[f"{n}_percent"] for n in ("tensor", "issue", "sm", "dram")]
        occupancy = found["occupancy_percent"]
        rows.append(
            (
                found["kernel"],
                "" if time is None else format_seconds(time),
                *("" if x is None else f"{x:.1f} %" for x in (*percents, occupancy)),
                *(
                    "" if x is None else format_bytes(x)
                    for x in (found["dram_read_bytes"], found["dram_write_bytes"])
                ),
            )
        )
    return rows


def _tuned_facts(record: Record, found: Record) -> Facts:
    """Configs of a kernel, the chosen one first; the fastest stands out."""
    tried, left_out = found["tried"], found["left_out"]
    rows = [
        (
            _config(one["config"]),
            format_seconds(one["seconds"]["median"]),
            "{median:.3f} ({min:.3f} to {max:.3f})".format(**one["ratio"]),
            f"{one['difference']:.1e}",
        )
        for one in tried
    ]
    rows += [(_config(one["config"]), "", "", one["reason"]) for one in left_out]
    columns = ("config", "time", "time / the first's", "difference")
    best = next(n for n, one in enumerate(tried) if one["best"])
    title = f"{record['case']}: configs of {found['kernel']}"
    return Facts(title, columns, rows, best)


def _config(fields: Record) -> str:
    return " ".join(f"{name}={value}" for name, value in fields.items())


def _short(name: str) -> str:
    """The name of a kernel without its signature."""
    return name.split("(")[0].split("<")[0].removeprefix("void ")[-40:]


def _latency_facts(record: Record, direction: str, title: str) -> Facts:
    columns = ("", "", "min", "P50", "P95", "P99", "max", "useful work")
    rows = _latency_rows(record, direction)
    return Facts(f"{record['case']}: {title}, 100 calls", columns, rows)


def _latency_rows(record: Record, direction: str) -> list[tuple[str, ...]]:
    rows = []
    for name, found in record.get(direction, {}).items():
        for timer, label in _TIMERS.items():
            if timer not in found:
                continue
            times = [found[timer][n] for n in ("min", "p50", "p95", "p99", "max")]
            # The rate is that of the last timer.
            last = timer == [key for key in _TIMERS if key in found][-1]
            rate = format_rate(found["gflops_per_second"]) if last else ""
            rows.append((_label(name, found), label, *map(format_seconds, times), rate))
    return rows


def format_rate(gflops: float) -> str:
    """A rate of useful operations.

    Example:
        >>> format_rate(62.59), format_rate(446_123.0)
        ('62.6 GFLOP/s', '446 TFLOP/s')
    """
    if gflops >= 1e3:
        return f"{gflops / 1e3:.3g} TFLOP/s"
    return f"{gflops:.3g} GFLOP/s"


def _label(name: str, found: Record) -> str:
    """A contender's name; whether it computes every pair, and whether it is right."""
    marks = ["dense"] if found.get("computes") == EVERY else []
    marks += ["wrong"] if wrong(found) else []
    return f"{name} ({', '.join(marks)})" if marks else name


def _ratio(found: Record) -> dict[str, float] | None:
    """A peer's time over ours, if its results are right."""
    return None if wrong(found) else found.get("ratio")


def _memory(found: Record) -> str:
    size = found["temporary_bytes"]
    return "" if size is None else format_bytes(size)


def _held_back(found: Record) -> str:
    """Of how many looks at the GPU its power limit held it back; empty if unknown.

    Example:
        >>> _held_back({"clock": {"power_limited": 0.68}}), _held_back({"clock": None})
        ('68 %', '')
    """
    clock = found.get("clock")
    return "" if clock is None else f"{100 * clock['power_limited']:.0f} %"


def _times(spent: dict[str, float]) -> tuple[str, str, str]:
    low, middle, high = (format_seconds(spent[n]) for n in ("min", "median", "max"))
    return low, middle, high


def _worst(found: Record) -> float:
    errors = [check["max_error"] for check in found["errors"].values()]
    return float("nan") if None in errors else max(errors)


def _row_load(mask: Record) -> str:
    return f"{mask['row_min']} / {mask['row_mean']:.1f} / {mask['row_max']}"


def _device(record: Record) -> str:
    device = record["device"]
    if device["platform"] == "cpu":
        return f"{device['device']}, {device['cores']} cores"
    return device["device"]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


_PASS_FACTS = {
    "attention": _contest_facts,
    "latency": _latency_facts,
    "profile": _profile_facts,
}

# ------------------------------------------------------------------------ Markdown


def markdown(records: Sequence[Record]) -> str:
    """Markdown tables of the newest record of each case, device by device.

    A peer that an earlier record alone has is shown from the newest of those, with its
    date.

    Args:
        records: as `read_records` returns them, oldest first.

    Returns:
        Text without a final newline; a sentence where there is no record.

    Example:
        >>> markdown([])
        'No benchmark was recorded yet.'
    """
    every: dict[str, dict[tuple[str, str], list[Record]]] = {}
    for record in (r for r in records if r["kind"] != "tune"):
        beside = record["kind"] if record["kind"] in _BESIDE else ""
        of_device = every.setdefault(_device(record), {})
        of_device.setdefault((record["case"], beside), []).append(record)
    if not every:
        return "No benchmark was recorded yet."
    parts = []
    for device in sorted(every):
        histories = [every[device][case] for case in sorted(every[device])]
        chosen = [history[-1] for history in histories]
        jax = ", ".join(sorted({record["versions"]["jax"] for record in chosen}))
        parts.append(f"**{device}**, JAX {jax}")
        contests = [h for h in histories if h[-1]["kind"] == "attention"]
        latencies = [r for r in chosen if r["kind"] == "latency"]
        profiles = [r for r in chosen if r["kind"] == "profile"]
        builds = [r for r in chosen if r["kind"].startswith("mask")]
        if contests:
            parts.append(_contest_table(contests))
        if latencies:
            parts.append(_latency_table(latencies))
        if profiles:
            parts.append(_profile_table(profiles))
        if builds:
            parts.append(_build_table(builds))
    return "\n\n".join(parts)


def _contest_table(histories: list[list[Record]]) -> str:
    """Of each case its records, the newest last."""
    head = (
        *("case", "density", "pass", "ours", "peer", "peer / ours (min to max)"),
        *("largest error, ours / peer", "temporary memory, ours / peer"),
    )
    rows = []
    for *earlier, newest in histories:
        for direction, title in DIRECTIONS.items():
            rows += _contest_rows(newest, direction, title)
            shown = {"auto", *IMPLEMENTATIONS, *newest.get(direction, {})}
            for record in reversed(earlier):
                peers = [x for x in record.get(direction, {}) if x not in shown]
                rows += _contest_rows(record, direction, title, peers)
                shown.update(peers)
    return _grid(head, _once(rows, 4))


def _once(rows: list[tuple[str, ...]], leading: int) -> list[tuple[str, ...]]:
    """Rows whose leading cells are empty where they repeat those of the row above.

    Example:
        >>> _once([("a", "b", "x"), ("a", "b", "y"), ("a", "c", "y")], 2)
        [('a', 'b', 'x'), ('', '', 'y'), ('', 'c', 'y')]
    """
    found = []
    for above, row in zip([(), *rows], rows, strict=False):
        same = 0
        while same < leading and row[: same + 1] == above[: same + 1]:
            same += 1
        found.append(("",) * same + row[same:])
    return found


def _contest_rows(
    record: Record, direction: str, title: str, peers: Sequence[str] | None = None
) -> list[tuple[str, ...]]:
    """A row for each peer; of an earlier record for those that are named."""
    results = record.get(direction, {})
    if not results or peers == []:
        return []
    ours = results[record["ours"]]
    time = _time_cell(record, record["ours"], ours)
    if peers is not None:
        time += f" ({record['date'][:10]})"
    shape = "H{heads} D{head_dim} {dtype}".format(**record["input"])
    label = f"{record['case']}: {record['about']}, {shape}"
    start = (label, f"{record['mask']['density']:.4f}", title)
    error = _worst(ours)
    rows = []
    for name, found in results.items():
        if name == record["ours"] or (peers is not None and name not in peers):
            continue
        ratio = _ratio(found)
        span = "{median:.2f} ({min:.2f} to {max:.2f})"
        rows.append(
            (
                *start,
                time,
                _time_cell(record, name, found),
                "" if ratio is None else span.format(**ratio),
                f"{format_error(error)} / {format_error(_worst(found))}",
                f"{_memory(ours)} / {_memory(found)}",
            )
        )
    if not rows:
        rows.append((*start, time, "", "", format_error(error), _memory(ours)))
    return rows


def _time_cell(record: Record, name: str, found: Record) -> str:
    """Name and time; on a GPU also the rate of useful work, and whether power limits.

    The limit is told where it held the GPU back most of the time.
    """
    time = f"{_label(name, found)} {format_seconds(found['seconds']['median'])}"
    if record["device"]["platform"] == "cpu":
        return time
    time += f", {format_rate(found['gflops_per_second'])}"
    clock = found.get("clock")
    limited = clock is not None and clock["power_limited"] > 0.5
    return f"{time}, power limit" if limited else time


def _latency_table(records: list[Record]) -> str:
    head = (
        *("case", "blocks", "pass", "who", "timer", "min", "P50", "P95", "P99"),
        *("max", "useful work"),
    )
    rows = [
        (record["case"], f"{record['mask']['blocks']:,}", title, *row)
        for record in sorted(records, key=lambda r: r["mask"]["blocks"])
        for direction, title in DIRECTIONS.items()
        for row in _latency_rows(record, direction)
    ]
    return _grid(head, rows)


def _profile_table(records: list[Record]) -> str:
    """Shares of the GPU's peaks that our kernels reach."""
    head = ("case", "pass", "kernel", "time", *_COUNTERS)
    rows = [
        (record["case"], title, _short(row[0]), *row[1:])
        for record in records
        for direction, title in DIRECTIONS.items()
        for row in _profile_rows(record, direction)
    ]
    return _grid(head, rows)


def _build_table(records: list[Record]) -> str:
    head = (
        *("case", "atoms", "blocks", "density", "built", "order, median"),
        *("mask, median (min to max)", "peak memory"),
    )
    rows = []
    for record in records:
        mask, spent = record["mask"], record["seconds"]
        order = format_seconds(spent["order"]["median"]) if "order" in spent else ""
        low, middle, high = _times(spent["radius"])
        rows.append(
            (
                f"{record['case']}: {record['about']}",
                f"{mask['q_len']:,}",
                f"{mask['blocks']:,}",
                f"{mask['density']:.4f}",
                record["kind"].removeprefix("mask "),
                order,
                f"{middle} ({low} to {high})",
                format_bytes(record["peak_memory_bytes"]),
            )
        )
    return _grid(head, rows)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
        for line in lines
    )


def render_into(file: Path, text: str, write: bool = True) -> bool:
    r"""Puts text between the two marks of a Markdown file.

    Args:
        file: holds ``<!-- bench:begin -->`` and ``<!-- bench:end -->``.
        text: what shall stand between them.
        write: whether to change the file.

    Returns:
        Whether the file already had that text.

    Raises:
        BadInput: if a mark is missing, or they are the wrong way round.

    Example:
        >>> page = Path("page.md")
        >>> _ = page.write_text("<!-- bench:begin -->\n<!-- bench:end -->\n")
        >>> render_into(page, "table"), render_into(page, "table")
        (False, True)
    """
    old = file.read_text(encoding="utf-8")
    start, stop = old.find(BEGIN), old.find(END)
    if start < 0 or stop < start:
        raise BadInput(f"{file}: expected the lines {BEGIN} and {END}, in this order.")
    new = f"{old[: start + len(BEGIN)]}\n{text}\n{old[stop:]}"
    if write and new != old:
        write_file(file, new)
    return new == old
