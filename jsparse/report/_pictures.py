"""The two pictures of a mask: its block map and the load of its rows.

Drawn with matplotlib's Agg canvas through its object interface: no display, no global
state, safe in a thread. Called by the report and by ``jsparse pattern``.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from jsparse.patterns import BlockMask, BlockState

MAX_BLOCKS = 1500
"""Blocks on a side that are drawn one by one; larger maps show averages."""

_SIDE = 6.0  # inches of a map's longer side


@dataclass(frozen=True)
class Theme:
    """Colours of a picture.

    Attributes:
        paper: background.
        ink: text, ticks and frame.
        states: empty, partial and full blocks.
        ramp: matplotlib's name of the colours for shares between 0 and 1.
        accent: mean and maximum lines.
    """

    paper: str
    ink: str
    states: tuple[str, str, str]
    ramp: str
    accent: str


LIGHT = Theme(
    "#ffffff", "#1c2430", ("#eef1f5", "#2f6db3", "#e07b1f"), "Blues", "#c2410c"
)
DARK = Theme(
    "#161b22", "#d7dee8", ("#232b36", "#5aa2f0", "#f2a154"), "Blues_r", "#fb923c"
)


def block_map(mask: BlockMask, title: str, theme: Theme = LIGHT) -> bytes:
    """Draws which blocks are computed, as a PNG.

    Up to `MAX_BLOCKS` on a side each block is coloured by its state; beyond, each cell
    shows the share of computed blocks in a square of blocks.

    Args:
        mask: of its patterns, the first batch entry and head are drawn.
        title: what the structure is.
        theme: colours.

    Returns:
        The PNG file's bytes.

    Example:
        >>> import jsparse.patterns as patterns
        >>> mask = patterns.window(1024, left=64, right=64)
        >>> block_map(mask, "window")[1:4]
        b'PNG'
    """
    nq, nk = mask.num_q_blocks, mask.num_kv_blocks
    longer = max(nq, nk)
    step = -(-longer // MAX_BLOCKS)
    height, width = (_SIDE * max(n / longer, 0.25) for n in (nq, nk))
    # At least one pixel for each cell, or single blocks would vanish.
    dpi = int(min(300, max(150, 1.05 * longer / step / _SIDE)))
    figure, axes = new_figure(width + 2.7, height + 2.0, theme)
    _place(figure, axes, (1.0, 1.0, width, height))
    extent = (-0.5, nk - 0.5, nq - 0.5, -0.5)
    style = {"extent": extent, "aspect": "auto", "interpolation_stage": "rgba"}
    if step == 1:
        _draw_states(axes, mask, theme, style)
        caption = "each cell is one block"
    else:
        _draw_shares(figure, axes, mask, step, theme, style, (width, height))
        caption = (
            f"averaged for drawing: each cell stands for up to {step} × {step} blocks"
        )
    axes.set_xlabel(f"key block ({mask.block_kv} atoms each)", fontsize=9)
    axes.set_ylabel(f"query block ({mask.block_q} atoms each)", fontsize=9)
    _atom_axes(axes, mask, theme)
    head = f"{title}\n{mask.num_blocks:,} of {nq * nk:,} blocks computed, "
    axes.set_title(f"{head}density {mask.density:.4f}; {caption}", pad=12, fontsize=9)
    return to_png(figure, dpi)


def load_histogram(mask: BlockMask, theme: Theme = LIGHT) -> bytes:
    """Draws how many key blocks the query blocks compute, as a PNG.

    Args:
        mask: all its patterns are counted.
        theme: colours.

    Returns:
        The PNG file's bytes.

    Example:
        >>> import jsparse.patterns as patterns
        >>> load_histogram(patterns.window(1024, left=64, right=64))[1:4]
        b'PNG'
    """
    from matplotlib.ticker import MaxNLocator

    load = row_loads(mask)
    low, high, mean = int(load.min()), int(load.max()), float(load.mean())
    step = max(1, -(-(high - low + 1) // 60))
    edges = np.arange(low, high + step + 1, step) - 0.5
    figure, axes = new_figure(8.6, 3.4, theme)
    _place(figure, axes, (1.0, 0.65, 7.2, 2.35))
    axes.hist(load, bins=edges.tolist(), color=theme.states[1], edgecolor=theme.paper)
    axes.axvline(mean, color=theme.accent, label=f"mean {mean:.1f}")
    axes.axvline(high, color=theme.accent, ls="--", label=f"maximum {high}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if high > 4 * mean:
        axes.set_yscale("log")  # else the few heavy rows cannot be seen
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(
        f"key blocks computed for a query block (bins of {step})", fontsize=9
    )
    axes.set_ylabel("query blocks", fontsize=9)
    axes.set_title(
        f"Load of the {len(load):,} query blocks",
        fontsize=10,
        loc="left",
        color=theme.ink,
    )
    above = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 2}
    add_legend(axes, theme, **above)
    return to_png(figure, 150)


def row_loads(mask: BlockMask) -> np.ndarray:
    """Computed blocks of each query block, of all patterns, ``[n]``."""
    counts = np.asarray(mask.kv_num_blocks) + np.asarray(mask.full_kv_num_blocks)
    return counts.reshape(-1)


# ------------------------------------------------------------------------ drawing


def new_figure(width: float, height: float, theme: Theme) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=theme.paper)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=theme.paper)
    paint(axes, theme)
    return figure, axes


def paint(axes: Any, theme: Theme) -> None:
    """Gives ticks, labels and frame of axes the colour of the text."""
    axes.tick_params(colors=theme.ink, labelsize=8)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(theme.ink)
    for spine in axes.spines.values():
        spine.set_color(theme.ink)


def _place(figure: Any, axes: Any, box: tuple[float, float, float, float]) -> None:
    """Puts axes at left, bottom, width, height in inches."""
    width, height = figure.get_size_inches()
    left, bottom, across, up = box
    axes.set_position((left / width, bottom / height, across / width, up / height))


def _draw_states(axes: Any, mask: BlockMask, theme: Theme, style: dict) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    states = mask.block_states()[0, 0]
    axes.imshow(states, cmap=ListedColormap(theme.states), vmin=0, vmax=2, **style)
    counts = np.bincount(states.ravel(), minlength=3)
    handles = [
        Patch(facecolor=theme.states[s], edgecolor=theme.ink, linewidth=0.5)
        for s in BlockState
    ]
    names = [f"{s.name.lower()}: {counts[s]:,}" for s in BlockState]
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": 3}
    add_legend(axes, theme, handles, names, **below)


def _draw_shares(
    figure: Any,
    axes: Any,
    mask: BlockMask,
    step: int,
    theme: Theme,
    style: dict,
    size: tuple[float, float],
) -> None:
    from matplotlib.colors import PowerNorm

    # The square root keeps a single block of a large cell visible.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    picture = axes.imshow(block_shares(mask, step), cmap=theme.ramp, norm=norm, **style)
    bar = figure.add_axes((0, 0, 1, 1))
    _place(figure, bar, (1.0 + size[0] + 0.95, 1.0, 0.15, size[1]))
    figure.colorbar(picture, cax=bar).set_label("share of blocks computed", fontsize=9)
    paint(bar, theme)


def block_shares(mask: BlockMask, step: int) -> np.ndarray:
    """Share of computed blocks in each ``step x step`` square of the block map.

    Args:
        mask: of its patterns, the first batch entry and head count.
        step: blocks on a side of a square; squares at the edge may be smaller.

    Returns:
        float64 ``[ceil(nq / step), ceil(nk / step)]``.

    Example:
        >>> mask = BlockMask.from_blocks([0, 1], [0, 2], q_len=6, block_q=2, block_kv=2)
        >>> block_shares(mask, 2).tolist()
        [[0.25, 0.5], [0.0, 0.0]]
    """
    nq, nk = mask.num_q_blocks, mask.num_kv_blocks
    rows, cols = -(-nq // step), -(-nk // step)
    total = np.zeros(rows * cols, np.int64)
    for name in ("kv", "full_kv"):
        counts = np.asarray(getattr(mask, f"{name}_num_blocks"))[0, 0]
        indices = np.asarray(getattr(mask, f"{name}_indices"))[0, 0]
        row, slot = np.nonzero(np.arange(indices.shape[1]) < counts[:, None])
        cell = row // step * cols + indices[row, slot] // step
        total += np.bincount(cell, minlength=rows * cols)
    high = np.diff(np.minimum(np.arange(rows + 1) * step, nq))
    wide = np.diff(np.minimum(np.arange(cols + 1) * step, nk))
    return total.reshape(rows, cols) / (high[:, None] * wide)


def _atom_axes(axes: Any, mask: BlockMask, theme: Theme) -> None:
    """Atom numbers along the top and the right, beside the blocks'."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    comma = FuncFormatter(lambda x, _: f"{x:,.0f}")
    for make, block in (
        (axes.secondary_xaxis, mask.block_kv),
        (axes.secondary_yaxis, mask.block_q),
    ):
        along_x = make == axes.secondary_xaxis
        other = make(
            "top" if along_x else "right",
            functions=(
                lambda x, b=block: (x + 0.5) * b,
                lambda a, b=block: a / b - 0.5,
            ),
        )
        paint(other, theme)
        axis = other.xaxis if along_x else other.yaxis
        axis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(comma)
        axis.label.set_color(theme.ink)
        (other.set_xlabel if along_x else other.set_ylabel)(
            "key atom" if along_x else "query atom", fontsize=9
        )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(comma)


def add_legend(axes: Any, theme: Theme, *entries: Any, **where: Any) -> None:
    """Puts a legend on axes, or on a figure."""
    legend = axes.legend(*entries, fontsize=8, frameon=False, **where)
    for text in legend.get_texts():
        text.set_color(theme.ink)


def to_png(figure: Any, dpi: int) -> bytes:
    """A figure as the bytes of a PNG file."""
    out = io.BytesIO()
    # Without the software tag the same picture is the same bytes.
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()
