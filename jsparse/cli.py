"""The ``jsparse`` command.

Options, printing and exit codes only: 0 all is well, 1 a result is wrong or a target
was missed, 2 the input cannot be served, 130 Ctrl-C. Results go to stdout, everything
else to stderr. The work is done by ``_job.py``, ``_doctor.py``, `jsparse.bench` and
`jsparse.report`.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import jsparse
from jsparse import bench as benchmarks
from jsparse import report
from jsparse._doctor import examine
from jsparse._job import ORDERS, Job, JobConfig, PatternConfig, check_block
from jsparse.backends import IMPLEMENTATIONS
from jsparse.measure import BadInput, Progress
from jsparse.report import Facts, to_json, verdict

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Block-sparse attention on protein structures.",
)

File = Annotated[
    Path, typer.Argument(help="mmCIF, PDB or BinaryCIF, plain or gzipped.")
]
Out = Annotated[Path, typer.Option(help="Folder to write to; files are replaced.")]
Copies = Annotated[
    str,
    typer.Option(help="Copies of the biological assembly: a number or 'all'."),
]
Cutoff = Annotated[
    float, typer.Option(help="Atoms see each other within this distance, in ångström.")
]
Block = Annotated[int, typer.Option(help="Atoms per block.")]
BlockQ = Annotated[
    int | None, typer.Option(help="Atoms per query block; --block if not given.")
]
BlockKv = Annotated[
    int | None, typer.Option(help="Atoms per key block; --block if not given.")
]
Order = Annotated[
    str,
    typer.Option(help=f"Order of the atoms: {', '.join(ORDERS)}."),
]
Heads = Annotated[int, typer.Option(help="Attention heads.")]
HeadDim = Annotated[int, typer.Option(help="Channels of each head.")]
Implementation = Annotated[
    str, typer.Option(help=f"One of auto, {', '.join(IMPLEMENTATIONS)}.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]


def main() -> None:
    """Entry point of the ``jsparse`` command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # "10 ?" where a terminal has no Å, rather than nothing at all.
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except SystemExit as end:
        if end.code == 130:
            # XLA's threads cannot be stopped; an ordinary exit would wait for them.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        raise


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.")
    ] = False,
) -> None:
    """Block-sparse attention on protein structures."""
    if show:
        print(jsparse.__version__)
        raise typer.Exit(0)


@app.command()
def run(
    file: File,
    out: Out = Path("jsparse-report"),
    cutoff: Cutoff = 10.0,
    block: Block = 128,
    block_q: BlockQ = None,
    block_kv: BlockKv = None,
    heads: Heads = 4,
    head_dim: HeadDim = 32,
    order: Order = "auto",
    copies: Copies = "1",
    implementation: Implementation = "auto",
    repeats: Annotated[
        int | None,
        typer.Option(help="Timed calls; as many as fit in 5 seconds if not given."),
    ] = None,
    backward: Annotated[
        bool, typer.Option(help="Time and check forward + backward as well.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Attend over a structure's neighbourhoods, check the result, write a report.

    Reads the atoms, orders them, builds the mask of all pairs within the cut-off,
    computes attention on features made of element and residue type, compares 256
    random rows with dense attention in float64, and writes report.html, pattern.png and
    report.json.
    """
    with _guarded(debug):
        config = JobConfig(
            file=_existing(file),
            copies=_copies(copies),
            cutoff=cutoff,
            **_block_sizes(block, block_q, block_kv),
            order=order,
            heads=heads,
            head_dim=head_dim,
            implementation=implementation,
            repeats=repeats,
            backward=backward,
        )
        job = Job(config, _progress())
        with _folder(out):
            try:
                _run_job(job, out, debug)
            finally:
                # Also where the report cannot be written: the disk may be full.
                if job.result["status"] != "running":
                    _show(job.result, json)
        if not json:
            _say(f"Report: {out / 'report.html'}")
        _leave(job.result["status"])


def _run_job(job: Job, out: Path, debug: bool) -> None:
    """Runs the job and writes its report, whole or not."""
    try:
        job.run()
        _write_report(job, out)
        return
    except KeyboardInterrupt:
        job.finish("interrupted")
    except BadInput:
        raise
    except Exception as err:  # noqa: BLE001 (what was found is kept, whatever failed)
        job.finish("failed", f"{type(err).__name__}: {err}")
        if debug:
            traceback.print_exc()
    _write_report(job, out)


def _write_report(job: Job, out: Path) -> None:
    with job.progress.stage("report"):
        report.write_report(out, job.result, job.mask)


@app.command()
def pattern(
    file: File,
    out: Out = Path("jsparse-report"),
    cutoff: Cutoff = 10.0,
    block: Block = 128,
    block_q: BlockQ = None,
    block_kv: BlockKv = None,
    order: Order = "auto",
    copies: Copies = "1",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Build and draw the mask of a structure, without attention."""
    with _guarded(debug):
        config = PatternConfig(
            file=_existing(file),
            copies=_copies(copies),
            cutoff=cutoff,
            **_block_sizes(block, block_q, block_kv),
            order=order,
        )
        job = Job(config, _progress())
        with _folder(out):
            mask = job.build_pattern()
            job.finish("complete")
            with job.progress.stage("picture"):
                picture = report.block_map(mask, report.map_title(job.result))
                report.write_file(out / "pattern.png", picture)
        _show(job.result, json)
        if not json:
            _say(f"Picture: {out / 'pattern.png'}")


@app.command()
def doctor(json: Json = False, debug: Debug = False) -> None:
    """Say what is installed, which implementation runs here, and why others do not."""
    with _guarded(debug):
        with _progress().stage("try implementations"):
            found = examine()
        if json:
            print(to_json(found))
        else:
            _print_doctor(found)
        raise typer.Exit(0 if found["ok"] else 1)


@app.command()
def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names of cases, or 'all'; see --list. With --targets, names of "
            "their groups."
        ),
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List the cases and leave.")
    ] = False,
    structure: Annotated[
        Path | None,
        typer.Option(help="Makes cases of a structure file: attention and masks."),
    ] = None,
    copies: Copies = "1",
    order: Order = "auto",
    against: Annotated[
        str | None,
        typer.Option(
            help="Peers and our other kernels, separated by commas; 'none' for none. "
            "If not given, all that are available and fit in memory."
        ),
    ] = None,
    backward: Annotated[
        bool,
        typer.Option(
            help="Measure the backward pass as well, on a CPU with the forward pass."
        ),
    ] = True,
    repeats: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    latency: Annotated[
        bool,
        typer.Option(
            "--latency",
            help="Spread of 100 calls in place of ratios; without cases, "
            f"{', '.join(benchmarks.LATENCY_CASES)}.",
        ),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Hardware counters of our kernels, read by Nsight Compute, in place "
            "of ratios.",
        ),
    ] = False,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Time the configs of our kernels, in place of ratios; with "
            "--no-backward of the forward kernel only.",
        ),
    ] = False,
    entries: Annotated[
        Path | None,
        typer.Option(
            help="With --tune: table of configs to put the fastest into; of a "
            "checkout, pallas_kernels/mosaic_gpu/tables.json."
        ),
    ] = None,
    choices: Annotated[
        Path | None,
        typer.Option(
            help="With --tune: table of the faster implementations, which auto asks, "
            "to put the outcome into; of a checkout, jsparse/backends/measured.json. "
            "Without --entries no configs are timed: kernels keep theirs."
        ),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Heads, in place of the case's own.")
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Head size, in place of the case's own.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.")
    ] = None,
    implementation: Implementation = "auto",
    traced: Annotated[
        bool,
        typer.Option(
            "--traced",
            help="Pass our mask into the compiled call, as where one compilation "
            "serves many structures; kernels then cannot plan ahead.",
        ),
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Write a record of each case.")
    ] = False,
    records: Annotated[
        Path | None,
        typer.Option(help="Folder of records, in place of the package's own."),
    ] = None,
    min_ratio: Annotated[
        float | None,
        typer.Option(help="Exit with 1 if a peer's time / ours is less than this."),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(help="Exit with 1 if our median time is more than this."),
    ] = None,
    lock: Annotated[
        Path | None,
        typer.Option(
            help="A file: runs that name the same one prepare side by side, and each "
            "times while no other runs."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the newest records into this folder, and leave: rates.png, "
            "density.png."
        ),
    ] = None,
    targets: Annotated[
        bool,
        typer.Option(
            "--targets",
            help="Print what the newest records say of each target, and leave; exit "
            "with 1 unless all are met.",
        ),
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Print the newest records as Markdown.")
    ] = False,
    render: Annotated[
        Path | None,
        typer.Option(help="Put that table between the bench marks of a Markdown file."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="With --render: change nothing, exit 1 if out of date."
        ),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time named cases against peers, keep records, render them as tables."""
    # Peers in a process of their own need room: XLA would take most of a GPU at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with _guarded(debug):
        folder = records or benchmarks.records_folder(to_write=record)
        if check and render is None:
            raise BadInput("--check needs --render FILE, the file to compare.")
        files = {"entries": entries, "choices": choices}
        tables = {name: file for name, file in files.items() if file is not None}
        for name, file in tables.items():
            if not tune:
                raise BadInput(f"--{name} needs --tune, which measures them.")
            benchmarks.read_entries(file, name)  # refused before the work
        if table or render is not None:
            raise typer.Exit(_render(folder, render, check, json))
        if plot is not None:
            _plot(folder, plot, json)
            return
        if targets:
            raise typer.Exit(_targets(folder, cases or [], json))
        if structure is not None:
            structure = _existing(structure)
        known = benchmarks.all_cases(structure, _copies(copies), order)
        if list_:
            _list_cases(known, json)
            return
        options = benchmarks.Options(
            against=None if against is None else tuple(_names(against)),
            backward=backward,
            repeats=repeats,
            kind=_kind(latency, profile, tune),
            configs=entries is not None or choices is None,
            heads=heads,
            head_dim=head_dim,
            dtype=dtype,
            implementation=implementation,
            traced=traced,
            min_ratio=min_ratio,
            max_seconds=max_seconds,
            lock=lock,
        )
        if latency and not cases and structure is None:
            cases = list(benchmarks.LATENCY_CASES)
        chosen = benchmarks.choose_cases(known, cases or [], structure is not None)
        made = _folder(folder, "--records") if record else contextlib.nullcontext()
        with made:
            found = _measure(chosen, options, folder if record else None, tables, json)
        if json:
            print(to_json(found))
        missed = [line for one in found for line in one["missed"]]
        for line in missed:
            _say(line, style="red")
        raise typer.Exit(1 if missed else 0)


def _measure(
    chosen: list[Any],
    options: Any,
    folder: Path | None,
    tables: dict[str, Path],
    json: bool,
) -> list[dict[str, Any]]:
    """Runs cases one by one, so that each is shown and kept as soon as it is known."""
    found = []
    for case in chosen:
        result = benchmarks.run_case(case, options, _progress())
        found.append(result)
        if folder is not None:
            _say(f"Record: {benchmarks.write_record(result, folder)}")
        for name, file in tables.items():
            benchmarks.write_entries(file, result[name], name)
            _say(f"{name.capitalize()}: {file}")
        if not json:
            _print_tables(benchmarks.facts(result))
    return found


def _render(folder: Path, file: Path | None, check: bool, json: bool) -> int:
    text = benchmarks.markdown(benchmarks.read_records(folder))
    if file is None:
        print(to_json({"markdown": text}) if json else text)
        return 0
    current = benchmarks.render_into(_existing(file), text, write=not check)
    if json:
        print(to_json({"file": str(file), "up_to_date": current or not check}))
    if current or not check:
        return 0
    _say(f"{file}: the table is out of date. Run: jsparse bench --render {file}")
    return 1


def _plot(records: Path, out: Path, json: bool) -> None:
    found = benchmarks.plots(benchmarks.read_records(records))
    with _folder(out, "--plot"):
        for name, picture in found.items():
            report.write_file(out / name, picture)
    if json:
        print(to_json([str(out / name) for name in found]))
        return
    for name in found:
        _say(f"Picture: {out / name}")


def _kind(latency: bool, profile: bool, tune: bool) -> Any:
    asked = {"latency": latency, "profile": profile, "tune": tune}
    given = [kind for kind, wanted in asked.items() if wanted]
    if len(given) > 1:
        options = " and ".join(f"--{kind}" for kind in given)
        raise BadInput(f"{options} were given; expected one of them.")
    return given[0] if given else "attention"


def _targets(folder: Path, groups: list[str], json: bool) -> int:
    chosen = benchmarks.choose_targets(groups)
    found = benchmarks.judge_targets(chosen, benchmarks.read_records(folder))
    if json:
        print(to_json([outcome.to_dict() for outcome in found]))
    else:
        _print_tables(benchmarks.targets_tables(found))
    return 0 if all(outcome.verdict == "met" for outcome in found) else 1


def _list_cases(known: dict[str, Any], json: bool) -> None:
    if json:
        print(to_json({name: case.about for name, case in known.items()}))
        return
    rows = [(name, case.about) for name, case in known.items()]
    _print_tables([Facts("Cases", ("name", "what it is"), rows)])


# ----------------------------------------------------------------------- arguments


def _existing(file: Path) -> Path:
    if not file.exists():
        raise BadInput(f"{file}: no such file.")
    if file.is_dir():
        raise BadInput(f"{file}: is a folder; expected a file.")
    return file


def _copies(text: str) -> int | None:
    if text == "all":
        return None
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise BadInput(f"copies is {text!r}; expected a number of at least 1, or all.")
    return number


def _block_sizes(
    block: int, block_q: int | None, block_kv: int | None
) -> dict[str, int]:
    check_block("block", block)  # or its value would be called block_q
    return {
        "block_q": block if block_q is None else block_q,
        "block_kv": block if block_kv is None else block_kv,
    }


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@contextlib.contextmanager
def _folder(folder: Path, option: str = "--out") -> Iterator[None]:
    """Makes a folder before the work, and takes it away if there is nothing to keep."""
    made = report.prepare_folder(folder, option)
    try:
        yield
    except BaseException:
        for one in made:
            if one.is_dir() and not any(one.iterdir()):
                one.rmdir()
        raise


@contextlib.contextmanager
def _guarded(debug: bool) -> Iterator[None]:
    """Turns exceptions into one line on stderr and an exit code."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):
        raise  # the latter if the reader of stdout has left: typer ends quietly
    except KeyboardInterrupt:
        _say("jsparse: interrupted.")
        raise typer.Exit(130) from None
    except Exception as err:
        if debug:
            traceback.print_exc()
        if isinstance(err, BadInput):
            _say(f"jsparse: {err}")
            raise typer.Exit(2) from err
        _say(
            f"jsparse: this should not have happened: {type(err).__name__}: {err} "
            "(--debug shows where)"
        )
        raise typer.Exit(1) from err


def _leave(status: str) -> None:
    raise typer.Exit({"complete": 0, "interrupted": 130}.get(status, 1))


# ------------------------------------------------------------------------ printing


_WIDEST = 10_000  # characters of a line that is not shown on a terminal


def _console(**options: Any) -> Console:
    """A console that prints text as it is: file names are neither markup nor emoji."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def _progress() -> Progress:
    return Progress(_console(stderr=True))


def _say(line: str, style: str | None = None) -> None:
    """One line on stderr, never wrapped: messages may be searched for."""
    _console(stderr=True, soft_wrap=True).print(line, style=style)


def _show(result: dict[str, Any], json: bool) -> None:
    if json:
        print(to_json(result))
        return
    _print_tables(report.facts(result))
    if "check" in result or result["status"] != "complete":
        text, good = verdict(result)
        style = "bold green" if good else "bold red"
        _console(soft_wrap=True).print(text, style=style)


def _print_tables(tables: list[Facts]) -> None:
    """As wide as they need in a file or a pipe; on a terminal cells are folded."""
    console = _console()
    if not console.is_terminal:
        console.width = _WIDEST
    for facts in tables:
        table = Table(
            title=Text(facts.title),
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD if facts.columns else box.SIMPLE,
            show_header=bool(facts.columns),
        )
        names = facts.columns or ("", "")
        for n, name in enumerate(names):
            numeric = n > 0 and (not facts.columns or facts.numeric(n))
            justify = "right" if numeric else "left"
            table.add_column(Text(name), justify=justify, overflow="fold")
        for n, row in enumerate(facts.rows):
            style = "bold" if n == facts.chosen else None
            table.add_row(*map(Text, row), style=style)
        console.print(table)


def _print_doctor(found: dict[str, Any]) -> None:
    versions = [(name, text or "-") for name, text in found["versions"].items()]
    machine = found["machine"] or {}
    devices = [
        (name.removesuffix("_bytes"), _plain(name, value))
        for name, value in machine.items()
    ]
    implementations = [
        (
            name,
            "runs" if one["runs"] else "no",
            one["reason"] or f"largest error {one['max_error']:.1e} in {one['dtype']}",
        )
        for name, one in found["implementations"].items()
    ]
    if (auto := found["auto"]) is not None:
        names = dict.fromkeys((auto["forward"], auto["backward"]))
        why = f"{auto['reason']} (in bfloat16)"
        implementations.append(("auto", " + ".join(names), why))
    extras = [
        (name, one["version"] or "not installed", one["install"])
        for name, one in found["extras"].items()
    ]
    _print_tables(
        [
            Facts("Versions", (), versions),
            Facts("Machine", (), devices),
            Facts("Implementations", ("name", "", "why"), implementations),
            Facts("Extras", ("name", "installed", "to install"), extras),
        ]
    )
    for line in found["advice"]:
        _say(line)
    if not found["ok"]:
        _say("jsparse: no implementation runs here.")


def _plain(name: str, value: Any) -> str:
    return report.format_bytes(value) if name.endswith("_bytes") else str(value)


if __name__ == "__main__":
    main()
