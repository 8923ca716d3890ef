"""merge-kit experiment."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import jinja2
import torch

from evaluate.experiments import arrivals, results, running, tables, wires
from evaluate.experiments.config import Experiment, Split, read_experiment
from evaluate.experiments.evaluating import REPORT, evaluate
from evaluate.experiments.jobs import Fold, fold_folder
from evaluate.experiments.plan import Planner
from evaluate.experiments.tables import Union
from evaluate.processes import joined
from finetune.cases import content_key, load_cases
from merge_kit.commands.options import next_step, shown
from merge_kit.files import canonical_json, sha256_bytes, sha256_file, write_atomic

TABLE = "table"


@click.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder [experiments/<name>].")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    help="What the paths in FILE start from [the folder of FILE].",
)
@click.option(
    "--jobs", type=int, default=1, show_default=True, help="Commands that run at the same time."
)
@click.option("--device", help="For every command that computes: cpu, cuda, cuda:1.")
@click.option(
    "--list-jobs", is_flag=True, help="Print the commands that are left, phase by phase, and stop."
)
def experiment(
    path: Path,
    out: Path | None,
    root: Path | None,
    jobs: int,
    device: str | None,
    list_jobs: bool,
) -> None:
    """Run the federation that FILE describes, with its baselines, and write one table.

    Every step is one of merge-kit's commands. What was done is not done again: stopped at any
    moment, the same command goes on, and a file with one more merge trains nothing. Several
    machines that share the folder work together when 'torchrun' starts the command on each of
    them; or run the commands of --list-jobs, phase by phase.

    \b
    torchrun --nproc-per-node 4 -m merge_kit experiment FILE --device cuda
    """
    running.check_jobs(jobs)
    here = Path(os.path.abspath(root or path.parent))
    told = read_experiment(path, here)
    target = out or Path("experiments") / told.name
    unions: dict[Path, Union] = {}
    if list_jobs:
        folds = _folds(told, here, target, unions)
        click.echo("\n".join([*_warning(told), *running.listed(folds)]))
        return
    with joined() as group:
        with group.together():
            folds = _folds(told, here, target, unions) if group.first else []
        if not group.first:  # what it builds on lies there now
            folds = _folds(told, here, target, unions)
        for line in _warning(told) if group.first else ():
            click.echo(line)
        # A name is tried by the commands; 'cuda' alone is every process's own GPU.
        on = str(group.device(torch.device(device))) if device == "cuda" else device
        running.run(folds, jobs, click.echo, on, group)
        evaluate(folds, told, lambda fold: unions[fold.root], jobs, click.echo, on, group)
        if not group.first:
            return
        table = _write(told, path, target, folds, unions)
    click.echo(f"\n{table}")
    next_step(f"open {shown(target / TABLE)}.html; every seed's figures are in {TABLE}.csv")


def _warning(told: Experiment) -> list[str]:
    if not isinstance(told.sites, Split):
        return []
    return [f"# The sites are artificial: {told.sites.kind}, {told.sites.sites} of them."]


def _folds(told: Experiment, here: Path, out: Path, unions: dict[Path, Union]) -> list[Fold]:
    data = here / told.data
    classes = told.classes or tables.labels_of(data)
    content = _content(data, classes, told, here)
    found = []
    for seed in told.seeds:
        first = _union(told, data, classes, out, seed, content)
        # Leaving sites out costs as much again for each site: one seed has to do.
        all_out = told.unseen and seed == told.seeds[0]
        apart: list[tuple[str | None, str | None]] = [(None, None)]
        apart += [(site, None) for site in first.sites] if all_out else []
        apart += [(None, variant) for variant in told.variants]
        for without, variant in apart:
            root = fold_folder(
                out.absolute(), told, content, seed, without=without, variant=variant
            )
            unions[root] = first
            fold = Fold(root, seed, without, variant, here)
            found.append(Planner(told, here, first, fold).plan())
    return found


def _content(data: Path, classes: Sequence[str], told: Experiment, here: Path) -> str:
    """A digest that changes when the table, one of its images or the weights do, not when they
    move.
    """
    keys = sorted(content_key(case) for case in load_cases(data, classes=classes))
    split = told.sites.model_dump() if isinstance(told.sites, Split) else told.sites
    places = (told.backbone.weights, *(other.weights for other in told.others.values()))
    weights = [sha256_file(here / place) if place else None for place in places]
    return sha256_bytes(canonical_json([sha256_file(data), list(classes), split, keys, *weights]))


def _union(
    told: Experiment, data: Path, classes: Sequence[str], out: Path, seed: int, content: str
) -> Union:
    place = out.absolute() / "tables" / f"seed-{seed}-{content[7:15]}" / "all.csv"
    if isinstance(told.sites, Split):
        return tables.artificial(data, classes, told.sites, place, seed)
    return tables.natural(data, classes, place, seed)


def _write(
    told: Experiment,
    path: Path,
    out: Path,
    folds: Sequence[Fold],
    unions: Mapping[Path, Union],
) -> str:
    """The table in three forms, and the picture; gives the Markdown."""
    rows = results.collect(folds, told, unions)
    lines = results.lines_of(rows)
    whole = [fold for fold in folds if fold.whole]
    picture = None
    if told.arrivals:
        drawn = arrivals.curves(whole[0], unions[whole[0].root].sites, told.arrivals.orders)
        picture = arrivals.draw(drawn, told.arrivals.merge)
        write_atomic(out / "arrivals.png", picture)
    sent = None
    if found := wires.curves(told, lines, results.vector_megabytes(whole[0], told)):
        sent = wires.draw(found)
        write_atomic(out / "bytes.png", sent)
    table = results.to_markdown(lines)
    write_atomic(out / f"{TABLE}.csv", results.to_csv(rows))
    write_atomic(out / f"{TABLE}.md", table)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("evaluate"), autoescape=True, trim_blocks=True
    )
    page = environment.get_template("experiment.html.j2").render(
        name=told.name,
        about=_about(told, unions[whole[0].root]),
        headings=results.HEADINGS,
        rows=[results.cells(line) for line in lines],
        ours={line.model for line in lines if results.merge_of(line.model) in told.merges},
        seeds=len(told.seeds),
        arrivals=base64.b64encode(picture).decode() if picture else None,
        wires=base64.b64encode(sent).decode() if sent else None,
        reports=[
            (fold.root.name, os.path.relpath(fold.reports[REPORT] / "report.html", out))
            for fold in folds
        ],
        text=path.read_text(encoding="utf-8"),
    )
    write_atomic(out / f"{TABLE}.html", page)
    return table


def _about(told: Experiment, union: Union) -> str:
    natural = told.sites == "natural"
    kind = "natural sites" if natural else "artificial sites, drawn by the seed"
    return (
        f"{len(union.sites)} {kind}, {len(union.classes)} classes, {told.backbone.name}, "
        f"{len(told.seeds)} seed(s)."
    )
