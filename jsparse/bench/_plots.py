"""Two pictures of the records: useful rates by case, and time against density.

Of one device: that of the newest comparison on a GPU, else of the newest. Called by
``jsparse bench --plot``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jsparse.bench._cases import SWEEP, all_cases
from jsparse.bench._contract import EVERY
from jsparse.bench._records import DIRECTIONS, Record, wrong
from jsparse.measure import BadInput
from jsparse.report import LIGHT, Theme, add_legend, paint, to_png

_COLOURS = {
    "mosaic_gpu": "#5b8fc9",
    "cutlass": "#2f8f9a",
    "no_bias": "#9dbde0",
    "fa4": "#e07b1f",
    "flex": "#4f8a45",
    "grouped_gemm": "#c9a227",
    "cudnn": "#76808d",
    "tokamax": "#7b5ea7",
    "tokamax_triton": "#b39ad1",
    "cuequivariance": "#2e5d34",
    "fa3": "#b0455a",
    "gather": "#d98c9a",
    "einsum": "#c7b8a3",
    "dense": "#a9b2bd",
}
_HATCHED = {"hatch": "////", "alpha": 0.75}  # another result: every pair
_OURS = "ours"
_LEGEND_COLUMN = 1.5
"""Inches; as wide as the longest label."""


def plots(records: Sequence[Record], theme: Theme = LIGHT) -> dict[str, bytes]:
    """Draws what the records allow.

    Args:
        records: as `read_records` returns them, oldest first.
        theme: colours.

    Returns:
        PNG files by name: ``rates.png``, and ``density.png`` if cases that differ in
        density only were recorded.

    Raises:
        BadInput: if no comparison was recorded.
    """
    contests = [record for record in records if record["kind"] == "attention"]
    on_gpu = [r for r in contests if r["device"]["platform"] != "cpu"]
    if not contests:
        raise BadInput(
            "--plot: there is no record of an attention case. Make some with jsparse "
            "bench CASE --record."
        )
    device = (on_gpu or contests)[-1]["device"]["device"]
    newest = {r["case"]: r for r in contests if r["device"]["device"] == device}
    sweep = [r for case, r in newest.items() if case.startswith(SWEEP)]
    others = [r for case, r in newest.items() if not case.startswith(SWEEP)]
    found = {}
    if others:
        found["rates.png"] = draw_rates(others, theme)
    if sweep:
        found["density.png"] = draw_density(sweep, theme)
    return found


def draw_rates(records: Sequence[Record], theme: Theme = LIGHT) -> bytes:
    """Draws useful operations a second of every contender, case by case, as a PNG.

    Args:
        records: one for each case, of one device.
        theme: colours.
    """
    order = list(all_cases())
    known = {name: n for n, name in enumerate(order)}
    records = sorted(
        records, key=lambda r: (known.get(r["case"], len(order)), r["case"])
    )
    directions = _directions(records)
    names = _contenders(records)
    width = max(7.0, 1.6 + 0.17 * len(records) * (len(names) + 1.5))
    figure, panels = _panels(len(directions), 1, (width, 2.9), theme)
    top = max(
        rate for r in records for d in directions for rate in _rates(r, d).values()
    )
    unit, size = ("TFLOP/s", 1e3) if top >= 1e3 else ("GFLOP/s", 1.0)
    step = 0.84 / len(names)
    for axes, direction in zip(panels, directions, strict=True):
        shown = [record for record in records if direction in record]
        for n, name in enumerate(names):
            for place, record in enumerate(shown):
                rate = _rates(record, direction).get(name)
                if rate is None:
                    continue
                at = place + (n - (len(names) - 1) / 2) * step
                style: dict[str, Any] = {"edgecolor": theme.paper, "lw": 0}
                if _is_dense(record, direction, name):
                    style |= _HATCHED
                axes.bar(
                    *(at, rate / size, step * 0.92),
                    **{"color": _colour(name, theme), **style},
                )
        axes.set_xticks(
            range(len(shown)), [_tick(record) for record in shown], fontsize=8
        )
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.6, len(shown) - 0.4)
        axes.set_ylabel(f"useful {unit}", fontsize=9)
        axes.grid(axis="y", color=theme.states[0], zorder=0)
        axes.set_axisbelow(True)
        axes.set_title(DIRECTIONS[direction], fontsize=9, loc="left", color=theme.ink)
    _finish(figure, records, "Useful work by case", theme)
    _shared_legend(figure, _handles(_bar, names, records, directions, theme), theme)
    return to_png(figure, 150)


def draw_density(records: Sequence[Record], theme: Theme = LIGHT) -> bytes:
    """Draws the time of a pass against the share of blocks computed, as a PNG.

    Dense kernels compute every pair whatever the pattern: they are level lines, and
    where a curve meets them sparse attention ceases to pay.

    Args:
        records: of cases that differ in density only, of one device.
        theme: colours.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator

    records = sorted(records, key=lambda r: r["mask"]["density"])
    directions = _directions(records)
    figure, panels = _panels(1, len(directions), (4.6, 3.6), theme)
    names = _contenders(records)
    for axes, direction in zip(panels, directions, strict=True):
        for name in names:
            points = [
                (100 * r["mask"]["density"], _seconds(r, direction, name))
                for r in records
                if name in _named(r, direction)
            ]
            if not points:
                continue
            colour = _colour(name, theme)
            if any(_is_dense(r, direction, name) for r in records):
                level = float(np.median([seconds for _, seconds in points]))
                axes.axhline(1e3 * level, color=colour, ls="--", lw=1.2)
            else:
                x, y = np.array(points).T
                axes.plot(x, 1e3 * y, "o-", color=colour, ms=3.5, lw=1.5)
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = [100 * r["mask"]["density"] for r in records]
        axes.set_xticks(ticks, [_percent(x) for x in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.grid(color=theme.states[0], zorder=0)
        axes.set_axisbelow(True)
        axes.set_xlabel("blocks computed, % of all", fontsize=9)
        axes.set_ylabel("time of a pass, ms", fontsize=9)
        axes.set_title(DIRECTIONS[direction], fontsize=9, loc="left", color=theme.ink)
    first = records[0]
    shape = "{q_len:,} tokens, ".format(**first["mask"])
    shape += "H{heads} D{head_dim} {dtype}".format(**first["input"])
    _finish(figure, records, f"Time against density: {shape}", theme)
    _shared_legend(figure, _handles(_line, names, records, directions, theme), theme)
    return to_png(figure, 150)


# --------------------------------------------------------------------------- records


def _directions(records: Iterable[Record]) -> list[str]:
    return [d for d in DIRECTIONS if any(d in record for record in records)]


def _named(record: Record, direction: str) -> dict[str, Any]:
    """Results by contender, without wrong peers; ours is called so whichever it is."""
    ours = record["ours"]
    return {
        _OURS if name == ours else name: found
        for name, found in record.get(direction, {}).items()
        if name == ours or not wrong(found)
    }


def _contenders(records: Sequence[Record]) -> list[str]:
    """Ours first, then the peers in the order of their colours."""
    directions = _directions(records)
    seen = {name for r in records for d in directions for name in _named(r, d)}
    order = [_OURS, *_COLOURS]
    return sorted(seen, key=lambda name: (order.index(name), name))


def _rates(record: Record, direction: str) -> dict[str, float]:
    """Useful GFLOP/s of each; older records have those of ours only."""
    named = _named(record, direction)
    if _OURS not in named:
        return {}
    ours = named[_OURS]
    work = ours["gflops_per_second"] * ours["seconds"]["median"]
    return {
        name: found.get("gflops_per_second", work / found["seconds"]["median"])
        for name, found in named.items()
    }


def _seconds(record: Record, direction: str, name: str) -> float:
    return _named(record, direction)[name]["seconds"]["median"]


def _is_dense(record: Record, direction: str, name: str) -> bool:
    return _named(record, direction).get(name, {}).get("computes") == EVERY


def _tick(record: Record) -> str:
    """The name of a case on lines short enough to stand beside others."""
    name = record["case"].replace("_", "\n", 1)
    return f"{name}\n{_percent(100 * record['mask']['density'])} %"


def _percent(x: float) -> str:
    return f"{x:.2g}" if x < 9.95 else f"{x:.0f}"


def _colour(name: str, theme: Theme) -> str:
    return theme.states[1] if name == _OURS else _COLOURS[name]


# --------------------------------------------------------------------------- drawing


def _panels(
    rows: int, columns: int, size: tuple[float, float], theme: Theme
) -> tuple[Any, list[Any]]:
    """A figure with room for what stands outside of its axes, and the axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(
        figsize=(columns * size[0], 0.8 + rows * size[1]),
        facecolor=theme.paper,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    grid = figure.subplots(rows, columns, squeeze=False)
    panels = list(grid.ravel())
    for axes in panels:
        axes.set_facecolor(theme.paper)
        paint(axes, theme)
    return figure, panels


def _finish(figure: Any, records: Sequence[Record], title: str, theme: Theme) -> None:
    newest = max(records, key=lambda record: record["date"])
    where = newest["device"]["device"]
    ours = ", ".join(sorted({record["ours"] for record in records}))
    figure.suptitle(
        f"{title}\n{where}, JAX {newest['versions']['jax']}, ours: {ours}",
        fontsize=10,
        color=theme.ink,
    )
    for axes in figure.axes:
        paint(axes, theme)


def _handles(
    draw: Callable[[str, bool, Theme], Any],
    names: Sequence[str],
    records: Sequence[Record],
    directions: Sequence[str],
    theme: Theme,
) -> list[Any]:
    """What the legend shows of each contender, as ``draw`` draws it."""
    handles = []
    for name in names:
        takes_part = [
            (r, d) for d in directions for r in records if name in _named(r, d)
        ]
        dense = [_is_dense(record, direction, name) for record, direction in takes_part]
        handle = draw(_colour(name, theme), any(dense), theme)
        mark = " (dense)" if all(dense) else " (dense if hatched)"
        handle.set_label(name + mark * any(dense))
        handles.append(handle)
    return handles


def _bar(colour: str, dense: bool, theme: Theme) -> Any:
    from matplotlib.patches import Patch

    style: dict[str, Any] = _HATCHED if dense else {}
    return Patch(facecolor=colour, edgecolor=theme.paper, lw=0, **style)


def _line(colour: str, dense: bool, _: Theme) -> Any:
    from matplotlib.lines import Line2D

    style: dict[str, Any] = {"ls": "--"} if dense else {"marker": "o", "ms": 3.5}
    return Line2D([], [], color=colour, **style)


def _shared_legend(figure: Any, handles: list[Any], theme: Theme) -> None:
    """Below the panels, in as many columns as the figure has room for."""
    fit = int(figure.get_figwidth() / _LEGEND_COLUMN)
    add_legend(
        *(figure, theme),
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), max(1, fit)),
    )
