"""merge-kit demo: the whole main job on one machine, by the very commands that users type."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from evaluate.experiments import tables
from finetune.options import TrainingOptions
from finetune.progress import Progress
from merge_kit import signing
from merge_kit.cli import cli
from merge_kit.commands.options import next_step, pairs
from merge_kit.errors import DataError, UsageError
from merge_kit.site import KEY_FILE

POOLED = "pooled"


@dataclass(frozen=True, slots=True)
class Stage:
    """What the commands of a demo run on."""

    classes: tuple[str, ...]
    sites: Mapping[str, tuple[str, ...]]
    """Site name -> options of `finetune` that choose its images."""
    union: tuple[str, ...]
    """Options that choose all sites' images."""
    backbone: tuple[str, ...]
    """Options of `init`."""
    training: Mapping[str, str] = field(default_factory=dict)
    """Training options that are not the defaults."""


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="demo", show_default=True)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Your own images: a folder with labels.csv (file,label,site,...) [generated images].",
)
@click.option("--backbone", help="timm backbone, with --data [a small one, pretrained here].")
@click.option("--weights", help="Its weights, as for 'merge-kit init'.")
@click.option("--init", "init_options", default="", help="More options of 'merge-kit init'.")
@click.option("--set", "training", multiple=True, metavar="NAME=VALUE", help="Training options.")
@click.option("--images-only", is_flag=True, help="Write the generated images and backbone, stop.")
@click.option("--seed", default=0, show_default=True)
def demo(
    out: Path,
    data: Path | None,
    backbone: str | None,
    weights: str | None,
    init_options: str,
    training: tuple[str, ...],
    images_only: bool,
    seed: int,
) -> None:
    """Run the whole job for several hospitals on this machine, printing each command.

    Without --data it draws the images of four made-up hospitals, needs no network, and takes a few
    minutes on two cores. Nothing about the result is a statement on real hospitals.
    """
    if out.exists():
        raise UsageError(f"{out} exists already: choose another --out or remove this one.")
    if data is None and (backbone or weights):
        raise UsageError("--backbone and --weights go with --data.")
    started = time.monotonic()
    stage = _own(data, backbone, weights, out, seed) if data else _generate(out, seed)
    if images_only:
        next_step(f"look at {out}, and follow the README from 'init' on.")
        return
    report = _run_all(stage, out, shlex.split(init_options), pairs(training, "--set"), seed)
    click.echo(f"\nThe demo took {time.monotonic() - started:.0f} s.")
    click.echo(f"Report: {report}")


def _generate(out: Path, seed: int) -> Stage:
    from evaluate import demo_backbone, demo_images

    click.echo(f"Drawing the images of four made-up hospitals and a public set in {out}/images")
    folders = demo_images.generate_hospitals(out / "images", seed=seed)
    union = demo_images.write_union(out / "images", folders)
    public = demo_images.generate_public(out / "public", seed=seed)
    click.echo(f"Pretraining a small backbone ({demo_backbone.ARCHITECTURE}) on the public set")
    with Progress() as progress:
        weights = demo_backbone.prepare_backbone(
            public,
            out / "backbone.safetensors",
            seed=seed,
            progress=lambda done, of: progress.stage("pretraining", done, of),
        )
    size = str(demo_backbone.INPUT_SIZE)
    mean, std = (tuple(map(str, v)) for v in (demo_backbone.MEAN, demo_backbone.STD))
    return Stage(
        tuple(demo_images.CLASSES),
        {name: ("--data", str(folder / "labels.csv")) for name, folder in folders.items()},
        ("--data", str(union)),
        (
            *("--backbone", demo_backbone.ARCHITECTURE, "--weights", str(weights)),
            *("--input-size", size, "--mean", *mean, "--std", *std),
        ),
        {"steps": "40"},  # so that the whole takes minutes
    )


def _own(data: Path, backbone: str | None, weights: str | None, out: Path, seed: int) -> Stage:
    if backbone is None:
        raise UsageError("--data needs --backbone, and --weights unless they come from the Hub.")
    path = data / "labels.csv" if data.is_dir() else data
    classes = tables.labels_of(path)
    union = tables.natural(path, classes, out / "all.csv", seed)
    table, images = str(union.path), ("--images", str(union.images))
    return Stage(
        classes,
        {n: ("--data", table, *images, "--where", f"site={n}") for n in union.sites},
        ("--data", table, *images),
        ("--backbone", backbone, *(("--weights", weights) if weights else ())),
    )


def _run_all(
    stage: Stage, out: Path, init_options: Sequence[str], training: Mapping[str, str], seed: int
) -> Path:
    hub = str(out / "hub")
    training = {**stage.training, **training}
    chosen = {"seed": str(seed), **training}
    classes = ",".join(stage.classes)
    _call("init", hub, *stage.backbone, "--classes", classes, *init_options)
    folders = {name: str(out / "sites" / name) for name in stage.sites}
    for name in stage.sites:
        _call("join", hub, "--site", name, "--folder", folders[name])
        _call("admit", hub, name, signing.public_key(Path(folders[name]) / KEY_FILE))
    first = _calibrated(stage, hub, folders, None, out / "first")
    for name, images in stage.sites.items():
        _call("finetune", folders[name], *images, *_flags(chosen))
        _call("publish", folders[name])
    _call("status", hub)
    merged = []
    for method in ("mean", "sum", "ties"):
        merged.append(str(out / f"merged-{method}"))
        _call("merge", hub, "--method", method, "--out", merged[-1])
    click.echo("\nOn any later day each hospital looks at one merged model with its own images.")
    summed = str(out / "merged-sum")
    merged += _calibrated(stage, hub, folders, summed, out / "merged-sum-calibrated")
    click.echo("\nThe yardstick: one model trained on all images, which no hospital could do,")
    click.echo("for as many steps as all hospitals together.")
    pooled = str(out / "sites" / POOLED)
    _call("join", hub, "--site", POOLED, "--folder", pooled)
    steps = int(training.get("steps", TrainingOptions().steps)) * len(stage.sites)
    budget = {} if "epochs" in training else {"steps": str(steps)}
    own = {"head": "own"}  # a yardstick owes nothing to the hospitals
    _call("finetune", pooled, *stage.union, *_flags({**chosen, **own, **budget}))
    report = out / "report"
    models = [hub, *first, *folders.values(), *merged, f"{POOLED}={pooled}"]
    _call("evaluate", *models, "--pooled", POOLED, *stage.union, "--out", str(report))
    return report / "report.html"


def _calibrated(
    stage: Stage, hub: str, folders: Mapping[str, str], model: str | None, out: Path
) -> list[str]:
    """The model with the classifier of all sites that have enough images; nothing of none."""
    measured, of = 0, ("--model", model) if model else ()
    for name, images in stage.sites.items():
        try:
            _call("calibrate", folders[name], *images, *of, "--publish")
            measured += 1
        except DataError as error:
            click.echo(f"{name} has no part in the common classifier: {error}")
    if not measured:
        return []
    _call("head", hub, *of[1:], "--out", str(out))
    return [str(out)]


def _flags(options: Mapping[str, str]) -> list[str]:
    return [
        text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)
    ]


def _call(*arguments: str) -> None:
    click.echo(click.style(f"\n$ merge-kit {shlex.join(arguments)}", bold=True))
    cli.main(args=list(arguments), prog_name="merge-kit", standalone_mode=False)
