"""The page, the pictures and the files of a report."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jsparse import BlockMask, patterns, report
from jsparse.measure import BadInput, Progress
from jsparse.report import _pictures
from jsparse.report._page import page as page_of
from jsparse.report._pictures import DARK, LIGHT, block_shares, row_loads

DATA = Path(__file__).parents[1] / "examples" / "data"


@pytest.fixture(scope="module")
def job():
    from jsparse._job import Job, JobConfig

    job = Job(JobConfig(DATA / "1UBI.pdb.gz", repeats=2, backward=True), Progress())
    job.run()
    return job


@pytest.fixture(scope="module")
def written(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report.write_report(folder, job.result, job.mask)
    return folder


def pixels(png: bytes) -> np.ndarray:
    from matplotlib.image import imread

    return imread(io.BytesIO(png), format="png")[..., :3]


def share_of(png: bytes, colour: str) -> float:
    from matplotlib.colors import to_rgb

    near = np.abs(pixels(png) - np.array(to_rgb(colour))).max(-1) < 0.02
    return float(near.mean())


class Page(HTMLParser):
    """Collects tags with their attributes, and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + " "


# ---------------------------------------------------------------------------- page


def test_three_files_are_written(written: Path):
    names = sorted(path.name for path in written.iterdir())
    assert names == ["pattern.png", "report.html", "report.json"]


def test_page_is_well_formed_and_refers_to_nothing_outside(written: Path):
    text = (written / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset"):
            if name in attributes:
                assert (attributes[name] or "").startswith("data:image/png;base64,")
    assert "@import" not in text
    assert "url(" not in text
    assert "<script" not in text


def test_page_shows_the_picture_that_is_also_a_file(written: Path):
    text = (written / "report.html").read_text(encoding="utf-8")
    images = [tag[1] for tag in Page(text).tags if tag[0] == "img"]
    assert len(images) == 2
    data = (images[0]["src"] or "").partition(",")[2]
    assert base64.b64decode(data) == (written / "pattern.png").read_bytes()
    assert all(image["alt"] for image in images)


def test_page_tells_what_was_found(written: Path, job):
    text = Page((written / "report.html").read_text(encoding="utf-8")).text
    text = re.sub(r"\s+", " ", text)
    for part in (
        "1UBI",
        "602",
        "76",
        "Right: 256 rows agree",
        "density",
        "run time P50 / P95 / P99",
        "GFLOP/s",
        "Forward + backward",
        "gradient of q: verdict right",
        "peak memory of the process",
        "it needs an H100 or H200",
        "bisection",
        "hilbert",
        "10 Å",
    ):
        assert part in text, part


def test_page_follows_the_colour_scheme(written: Path):
    text = (written / "report.html").read_text(encoding="utf-8")
    assert text.count("prefers-color-scheme: dark") == 3  # colours and two pictures


def test_json_is_the_result(written: Path, job):
    found = json.loads((written / "report.json").read_text(encoding="utf-8"))
    assert found["status"] == "complete"
    assert found["structure"] == job.result["structure"]
    assert found["options"]["file"] == "1UBI.pdb.gz"


def test_text_of_files_is_escaped(job, tmp_path: Path):
    result = json.loads(json.dumps(job.result))
    result["structure"]["name"] = "<script>alert('$x')</script>"
    result["options"]["file"] = "<b>&.cif"
    page = Page(page_of(result))
    assert all(tag not in ("script", "b") for tag, _ in page.tags)
    assert "<script>alert('$x')</script>" in page.text


@pytest.mark.parametrize("done", [[], ["read"], ["read", "order", "mask"]])
def test_unfinished_result_makes_a_page(job, done, tmp_path: Path):
    keep = {"structure"} if done else set()
    if "mask" in done:
        keep |= {"mask", "order", "orders"}
    always = {"format", "date", "options", "versions", "seconds", "peak_memory_bytes"}
    result = {k: v for k, v in job.result.items() if k in keep | always}
    result |= {"status": "interrupted", "completed": done}
    mask = job.mask if "mask" in done else None
    report.write_report(tmp_path, result, mask)
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert f"Interrupted. Completed: {', '.join(done) or 'nothing'}." in text
    assert (tmp_path / "pattern.png").exists() == (mask is not None)


def test_wrong_result_is_loud(job):
    result = json.loads(json.dumps(job.result))
    result["status"] = "wrong"
    result["gradient_check"] |= {"ok": False, "max_error": float("inf")}
    text, good = report.verdict(result)
    assert not good
    assert text.startswith("WRONG: the largest error of 256 rows is not finite")
    page = Page(page_of(result))
    classes = [attributes.get("class") for _, attributes in page.tags]
    assert "verdict bad" in classes
    assert "verdict good" not in classes


# ------------------------------------------------------------------------ pictures


def three_states() -> BlockMask:
    dense = np.zeros((32, 32), bool)
    dense[:8, :8] = True  # full
    dense[8:16, 8:12] = True  # partial
    return patterns.from_dense(dense, block_q=8, block_kv=8)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_block_map_shows_each_state_in_its_colour(theme):
    png = _pictures.block_map(three_states(), "t", theme)
    empty, partial, full = (share_of(png, colour) for colour in theme.states)
    assert empty > 8 * partial  # 14 blocks and one
    assert partial == pytest.approx(full, rel=0.2)
    assert full > 0.01


def test_single_blocks_of_a_large_map_do_not_vanish():
    n = _pictures.MAX_BLOCKS
    mask = BlockMask.from_blocks([n // 3], [n // 2], q_len=n, block_q=1, block_kv=1)
    png = _pictures.block_map(mask, "t")
    background = pixels(png)
    inside = background[250:-250, 250:-420]
    spread = np.abs(inside - np.median(inside, axis=(0, 1))).max()
    assert spread > 0.2


def test_map_beyond_the_limit_is_averaged_and_says_so(monkeypatch):
    monkeypatch.setattr(_pictures, "MAX_BLOCKS", 8)
    titles = []
    real = _pictures.new_figure

    def spy(*arguments):
        figure, axes = real(*arguments)
        titles.append(axes)
        return figure, axes

    monkeypatch.setattr(_pictures, "new_figure", spy)
    mask = patterns.window(20 * 4, left=4, right=4, block_q=4, block_kv=4)
    _pictures.block_map(mask, "t")
    text = titles[0].get_title()
    assert "averaged for drawing: each cell stands for up to 3 × 3 blocks" in text


def test_axes_are_named_with_units(monkeypatch):
    seen = []
    real = _pictures.to_png

    def spy(figure, dpi):
        seen.append(figure)
        return real(figure, dpi)

    monkeypatch.setattr(_pictures, "to_png", spy)
    mask = three_states()
    _pictures.block_map(mask, "t")
    _pictures.load_histogram(mask)
    maps, histogram = (figure.axes[0] for figure in seen)
    assert maps.get_xlabel() == "key block (8 atoms each)"
    assert maps.get_ylabel() == "query block (8 atoms each)"
    atoms = {axes.get_xlabel() or axes.get_ylabel() for axes in maps.child_axes}
    assert atoms == {"key atom", "query atom"}
    legend = [text.get_text() for text in maps.get_legend().get_texts()]
    assert legend == ["empty: 14", "partial: 1", "full: 1"]
    assert histogram.get_xlabel().startswith("key blocks computed for a query block")
    assert histogram.get_ylabel() == "query blocks"


def test_nothing_is_cut_off(monkeypatch):
    """Every text lies inside its picture."""
    seen = []
    real = _pictures.to_png
    monkeypatch.setattr(
        _pictures,
        "to_png",
        lambda figure, dpi: seen.append(figure) or real(figure, dpi),
    )
    large = BlockMask.from_blocks([0, 1600], [1600, 3], q_len=128 * 1601)
    for mask in (three_states(), large):
        _pictures.block_map(mask, "3KPR: 13,318 atoms, 10 Å cut-off, bisection order")
        _pictures.load_histogram(mask)
    for figure in seen:
        box = figure.bbox
        for axes in figure.axes:
            tight = axes.get_tightbbox()
            assert box.x0 <= tight.x0
            assert tight.x1 <= box.x1
            assert box.y0 <= tight.y0
            assert tight.y1 <= box.y1


def test_shares_are_the_mean_of_the_blocks():
    rng = np.random.default_rng(0)
    blocks = rng.random((11, 7)) < 0.3
    mask = BlockMask.from_blocks(
        *np.nonzero(blocks), q_len=22, kv_len=14, block_q=2, block_kv=2
    )
    shares = block_shares(mask, 4)
    expected = [
        [blocks[i : i + 4, j : j + 4].mean() for j in range(0, 7, 4)]
        for i in range(0, 11, 4)
    ]
    np.testing.assert_allclose(shares, expected)
    # Partial and full blocks count alike.
    states = three_states().block_states()[0, 0] != 0
    np.testing.assert_array_equal(block_shares(three_states(), 1), states)


def test_loads_count_partial_and_full_blocks():
    assert row_loads(three_states()).tolist() == [1, 1, 0, 0]


def test_histogram_of_very_uneven_rows_is_logarithmic(monkeypatch):
    seen = []
    real = _pictures.to_png
    monkeypatch.setattr(
        _pictures,
        "to_png",
        lambda figure, dpi: seen.append(figure) or real(figure, dpi),
    )
    rows = [0] * 100 + list(range(1, 100))
    cols = [*range(100), *range(1, 100)]
    mask = BlockMask.from_blocks(rows, cols, q_len=200, block_q=2, block_kv=2)
    _pictures.load_histogram(mask)
    _pictures.load_histogram(three_states())
    assert [figure.axes[0].get_yscale() for figure in seen] == ["log", "linear"]


def test_histogram_counts_in_whole_blocks(monkeypatch):
    seen = []
    real = _pictures.to_png
    monkeypatch.setattr(
        _pictures,
        "to_png",
        lambda figure, dpi: seen.append(figure) or real(figure, dpi),
    )
    _pictures.load_histogram(patterns.window(640, left=640, right=640))
    low, high = seen[0].axes[0].get_xlim()
    assert [x for x in seen[0].axes[0].get_xticks() if low <= x <= high] == [5]


def test_same_picture_is_the_same_bytes():
    assert _pictures.block_map(three_states(), "t") == _pictures.block_map(
        three_states(), "t"
    )


# --------------------------------------------------------------------------- files


def test_folder_is_made_and_checked(tmp_path: Path):
    folder = tmp_path / "a" / "b"
    assert report.prepare_folder(folder) == [folder, folder.parent]
    assert list(folder.iterdir()) == []
    assert report.prepare_folder(folder) == []


def test_folder_that_is_a_file(tmp_path: Path):
    (tmp_path / "x").write_text("keep")
    for folder in (tmp_path / "x", tmp_path / "x" / "y"):
        with pytest.raises(BadInput, match="cannot be written there"):
            report.prepare_folder(folder)
    assert (tmp_path / "x").read_text() == "keep"


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch):
    file = tmp_path / "report.html"
    report.write_file(file, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jsparse.report._files.os.replace", full)
    with pytest.raises(BadInput, match="report.html: cannot be written .No space"):
        report.write_file(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_written_file_is_readable_by_others(tmp_path: Path):
    plain = tmp_path / "plain"
    plain.touch()
    report.write_file(tmp_path / "x", b"1")
    assert (tmp_path / "x").stat().st_mode == plain.stat().st_mode


def numbers(table: Any) -> list[bool]:
    return [table.numeric(n) for n in range(len(table.columns))]


def test_columns_of_numbers_are_known():
    table = report.Facts("t", ("name", "count", "why"), [("a", "1,000", "x")])
    assert numbers(table) == [False, True, False]
