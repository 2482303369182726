"""The page of a report, and the facts that the page and the terminal both show.

``facts`` turns a job's plain data into labelled text once; the page adds pictures, the
command line prints the same lines. Every text is escaped: names come from files.
"""

from __future__ import annotations

import base64
import html
import json
import math
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from jsparse.patterns import BlockMask
from jsparse.report._files import write_file
from jsparse.report._pictures import DARK, LIGHT, block_map, load_histogram


class Facts(NamedTuple):
    """Rows of text under a title.

    Attributes:
        title: heading.
        columns: names of the columns; empty for a list of labels and values.
        rows: cells; in a list ``(label, value)``.
        chosen: the row that was taken, or None.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    chosen: int | None = None

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, to be aligned on the right."""
        return all(row[column][:1].isdigit() for row in self.rows)


# --------------------------------------------------------------------------- facts


def facts(result: dict[str, Any]) -> list[Facts]:
    """What a job found out, as labelled text; stages that did not run are left out.

    Args:
        result: the data of a job, see `jsparse report.json`.

    Returns:
        Tables in reading order.

    Example:
        >>> result = {"structure": dict(name="X", atoms=1234, residues=9, chains=2)}
        >>> facts(result)[0].rows
        [('name', 'X'), ('atoms', '1,234'), ('residues', '9'), ('chains (groups)', '2')]
    """
    tables = []
    if "structure" in result:
        found = result["structure"]
        rows = [("name", found["name"])]
        rows += [(name, f"{found[name]:,}") for name in ("atoms", "residues")]
        rows.append(("chains (groups)", f"{found['chains']:,}"))
        tables.append(Facts("Structure", (), rows))
    if "mask" in result:
        tables += [_pattern(result), _orders(result)]
    if "backend" in result:
        tables.append(_backends(result))
    for name, title in (
        ("forward", "Forward"),
        ("forward_backward", "Forward + backward"),
    ):
        if name in result:
            tables.append(_speed(title, result[name]))
    if "check" in result:
        tables.append(_check(result))
    if "peak_memory_bytes" in result:
        rows = [
            ("peak memory of the process", format_bytes(result["peak_memory_bytes"]))
        ]
        total = result["seconds"].get("total")
        if total is not None:
            rows.append(("time in all", format_seconds(total)))
        tables.append(Facts("In all", (), rows))
    return tables


def _pattern(result: dict[str, Any]) -> Facts:
    mask, options = result["mask"], result["options"]
    share = f"{mask['q_blocks']:,} × {mask['kv_blocks']:,}"
    rows = [
        ("cut-off", f"{options['cutoff']:g} Å"),
        ("block", f"{mask['block_q']} × {mask['block_kv']} atoms"),
        ("blocks computed", f"{mask['blocks']:,} of {share}"),
        ("partial / full", f"{mask['partial']:,} / {mask['full']:,}"),
        ("density", f"{mask['density']:.4f}"),
        (
            "key blocks of a row, min / mean / max",
            f"{mask['row_min']} / {mask['row_mean']:.1f} / {mask['row_max']}",
        ),
        ("order of the atoms", result["order"]),
        ("memory of the mask", format_bytes(mask["bytes"])),
    ]
    return Facts("Pattern", (), rows)


def _orders(result: dict[str, Any]) -> Facts:
    rows = [
        (
            row["order"],
            f"{row['blocks']:,}",
            f"{row['elements']:,}",
            f"{row['density']:.4f}",
            f"{row['mean_per_row']:.1f}",
            f"{row['max_per_row']:,}",
        )
        for row in result["orders"]
    ]
    chosen = [row["chosen"] for row in result["orders"]].index(True)
    columns = ("order", "blocks", "elements", "density", "row mean", "row max")
    return Facts("Orders of the atoms that were tried", columns, rows, chosen)


def _backends(result: dict[str, Any]) -> Facts:
    backend = result["backend"]
    machine = result["machine"]
    rows = [(backend["implementation"], f"runs, on {machine['device']}")]
    rows += list(backend["why_not"].items())
    return Facts("Implementations", ("implementation", "why not"), rows, 0)


def _speed(title: str, found: dict[str, Any]) -> Facts:
    run = found["run_seconds"]
    percentiles = " / ".join(
        format_seconds(run[name]) for name in ("p50", "p95", "p99")
    )
    rows = [
        ("compile time", format_seconds(found["compile_seconds"])),
        ("run time P50 / P95 / P99", percentiles),
        ("timed calls", str(run["count"])),
        ("useful work at P50", f"{found['gflops_per_second']:,.1f} GFLOP/s"),
        ("temporary memory", format_bytes(found["temporary_bytes"])),
    ]
    return Facts(title, (), rows)


def _check(result: dict[str, Any]) -> Facts:
    rows = []
    for name, what in (("check", "output"), ("gradient_check", "gradient of q")):
        if name not in result:
            continue
        found = result[name]
        rows += [
            (f"{what}: largest error", format_error(found["max_error"])),
            (f"{what}: allowed error", format_error(found["tolerance"])),
            (f"{what}: verdict", "right" if found["ok"] else "WRONG"),
        ]
    count = result["check"]["rows"]
    return Facts(f"{count} rows against dense attention in float64", (), rows)


def verdict(result: dict[str, Any]) -> tuple[str, bool]:
    """One sentence on how the job ended, and whether that is good.

    Example:
        >>> verdict({"status": "interrupted", "completed": ["read", "order"]})
        ('Interrupted. Completed: read, order.', False)
    """
    status = result["status"]
    done = ", ".join(result["completed"]) or "nothing"
    if status == "complete":
        found = result.get("check")
        if found is None:
            return "Complete.", True
        return (
            f"Right: {found['rows']} rows agree with dense attention in float64, "
            f"largest error {format_error(found['max_error'])}.",
            True,
        )
    if status == "wrong":
        checks = [result[n] for n in ("check", "gradient_check") if n in result]
        bad = next(check for check in checks if not check["ok"])
        allowed = format_error(bad["tolerance"])
        return (
            f"WRONG: the largest error of {bad['rows']} rows is "
            f"{format_error(bad['max_error'])}; at most {allowed} is rounding. "
            "Do not use these results, and please report this.",
            False,
        )
    if status == "interrupted":
        return f"Interrupted. Completed: {done}.", False
    reason = result.get("error", "unknown reason")
    return f"Failed: {reason} Completed: {done}.", False


def format_seconds(value: float) -> str:
    """Three digits of a time.

    Example:
        >>> format_seconds(0.01234), format_seconds(12.34), format_seconds(123.4)
        ('12.3 ms', '12.3 s', '123 s')
        >>> format_seconds(12.34e-6)
        '12.3 µs'
    """
    if value >= 100:
        return f"{value:.0f} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def format_bytes(value: int) -> str:
    """A size in MB or GB (powers of ten).

    Example:
        >>> format_bytes(1_234_567), format_bytes(1_234_567_890)
        ('1.2 MB', '1.23 GB')
    """
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def format_error(value: float | None) -> str:
    """An error in two digits.

    Example:
        >>> format_error(1.234e-7), format_error(float("inf"))
        ('1.2e-07', 'not finite')
    """
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.1e}"


# ---------------------------------------------------------------------------- page


def write_report(folder: Path, result: dict[str, Any], mask: BlockMask | None) -> None:
    """Writes ``report.json``, ``report.html`` and, with a mask, ``pattern.png``.

    Args:
        folder: an existing folder; files of these names are replaced.
        result: the data of a job, finished or not.
        mask: its pattern, or None where the job did not come that far.
    """
    # Before the pictures, which take longer and may be interrupted.
    write_file(folder / "report.json", to_json(result) + "\n")
    pictures = ""
    if mask is not None:
        title = map_title(result)
        light = block_map(mask, title, LIGHT)
        write_file(folder / "pattern.png", light)
        dark = block_map(mask, title, DARK)
        pictures = _figure(light, dark, f"Block map: {title}")
        histogram = load_histogram(mask, LIGHT), load_histogram(mask, DARK)
        pictures += _figure(*histogram, "Histogram of the load of query blocks")
    write_file(folder / "report.html", page(result, pictures))


def map_title(result: dict[str, Any]) -> str:
    """Title of the block map: structure, size, cut-off and order."""
    found = result["structure"]
    return (
        f"{found['name']}: {found['atoms']:,} atoms, "
        f"{result['options']['cutoff']:g} Å cut-off, {result['order']} order"
    )


def to_json(result: Any) -> str:
    r"""JSON text; numbers that JSON does not have become null.

    Example:
        >>> to_json({"max_error": float("inf")})
        '{\n  "max_error": null\n}'
    """
    return json.dumps(_finite(result), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def page(result: dict[str, Any], pictures: str = "") -> str:
    """The whole page.

    Args:
        result: the data of a job.
        pictures: HTML of the figures.

    Returns:
        HTML that refers to nothing outside itself.
    """
    name = result.get("structure", {}).get("name") or result["options"]["file"]
    text, good = verdict(result)
    tables = facts(result)
    lists = "".join(_list(table) for table in tables if not table.columns)
    wide = "".join(_table(table) for table in tables if table.columns)
    template = resources.files("jsparse.report").joinpath("page.html")
    machine = result.get("machine", {})
    versions = ", ".join(
        f"{key} {value}" for key, value in result["versions"].items() if value
    )
    options = ", ".join(f"{key}={value}" for key, value in result["options"].items())
    footer = [f"Options: {options}.", f"Versions: {versions}."]
    if machine:
        footer.insert(0, f"{machine['processor']}, {machine['cores']} cores.")
    return Template(template.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"jsparse: {name}"),
        subtitle=html.escape(
            "Block-sparse attention on the neighbourhoods of a structure's atoms, "
            f"{result['date']}"
        ),
        verdict=html.escape(text),
        verdict_class="good" if good else "bad",
        body=f'<div class="columns">{lists}</div>{pictures}{wide}',
        footer="<br>".join(html.escape(line) for line in footer),
    )


def _list(table: Facts) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(label)}</th>'
        f'<td class="number">{html.escape(value)}</td></tr>'
        for label, value in table.rows
    )
    return (
        f"<section><h2>{html.escape(table.title)}</h2><table>{rows}</table></section>"
    )


def _table(table: Facts) -> str:
    kinds = [
        ' class="number"' if column and table.numeric(n) else ""
        for n, column in enumerate(table.columns)
    ]
    head = "".join(
        f'<th scope="col"{kind}>{html.escape(column)}</th>'
        for column, kind in zip(table.columns, kinds, strict=True)
    )
    rows = []
    for n, row in enumerate(table.rows):
        cells = "".join(
            f"<td{kind}>{html.escape(cell)}</td>"
            for cell, kind in zip(row, kinds, strict=True)
        )
        rows.append(f"<tr{' class="chosen"' if n == table.chosen else ''}>{cells}</tr>")
    return (
        f'<h2>{html.escape(table.title)}</h2><div class="wide"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figure(light: bytes, dark: bytes, alt: str) -> str:
    """A picture that follows the reader's colour scheme."""
    sources = [
        f"data:image/png;base64,{base64.b64encode(data).decode()}"
        for data in (light, dark)
    ]
    return (
        "<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
        f'<img src="{sources[0]}" alt="{html.escape(alt)}">'
        "</picture></figure>"
    )
