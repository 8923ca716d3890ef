"""merge-kit init."""

from __future__ import annotations

import os
from pathlib import Path

import click

from merge_kit.commands.options import listed, next_step, pairs, shown, typed_pairs
from merge_kit.creation import create, place_of
from merge_kit.errors import UsageError
from merge_kit.federation import Policy
from merge_kit.schema import parse
from merge_kit.trust import default_key


@click.command()
@click.argument("hub")
@click.option("--name", help="Name of the federation [the last part of HUB].")
@click.option("--backbone", required=True, help="Any timm image classifier.")
@click.option("--classes", required=True, help="Class names in their order, with commas.")
@click.option(
    "--group",
    multiple=True,
    metavar="NAME=CLASS,CLASS",
    help="A coarser label that sites may use (repeatable).",
)
@click.option(
    "--multi-label",
    is_flag=True,
    help="Classes are findings: an image has any number of them, or none.",
)
@click.option(
    "--weights",
    default="pretrained",
    show_default=True,
    help="'pretrained' (Hugging Face Hub), a local safetensors file, or 'none'.",
)
@click.option("--model-arg", multiple=True, metavar="NAME=VALUE", help="Argument of the model.")
@click.option("--input-size", type=click.IntRange(min=16), help="Height and width in pixels.")
@click.option("--mean", type=float, nargs=3, help="Channel means, of values in 0 to 1.")
@click.option("--std", type=float, nargs=3, help="Channel standard deviations.")
@click.option("--interpolation", type=click.Choice(["bilinear", "bicubic", "nearest", "lanczos"]))
@click.option("--crop-pct", type=float, help="Share of the image that the centre crop keeps.")
@click.option(
    "--sixteen-bit",
    type=click.Choice(["full", "minmax"]),
    help="Range of 16-bit images: all 65536 values, or each image's own.",
)
@click.option(
    "--minimum-count",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help='Class counts below this are published as "<N".',
)
@click.option("--maximum-norm", type=float, help="Largest norm of a vector that is accepted.")
@click.option("--minimum-examples", type=int, help="Fewest training images of a contribution.")
@click.option(
    "--maximum-epsilon",
    type=float,
    help="Largest epsilon of differential privacy; what states none is refused.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="For --weights none.",
)
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    help="The coordinator's private key, made if it is not there "
    "[<folder>-coordinator.pem beside a folder, else <name>-coordinator.pem].",
)
@click.option("--allow-pickle", is_flag=True, help="Convert a pickled checkpoint (tensors only).")
def init(
    hub: str,
    name: str | None,
    backbone: str,
    classes: str,
    group: tuple[str, ...],
    multi_label: bool,
    weights: str,
    model_arg: tuple[str, ...],
    input_size: int | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    interpolation: str | None,
    crop_pct: float | None,
    sixteen_bit: str | None,
    minimum_count: int,
    maximum_norm: float | None,
    minimum_examples: int | None,
    maximum_epsilon: float | None,
    seed: int,
    key: Path | None,
    allow_pickle: bool,
) -> None:
    """Create a federation on HUB, a new folder or the address of a hub elsewhere: the contract and
    the base that all sites share.

    \b
    merge-kit init hub --backbone vit_tiny_patch16_224 --classes benign,malignant
    """
    names = listed(classes)
    if len(names) < 2:
        raise UsageError("--classes: name at least two classes, with commas between them.")
    model_args = typed_pairs(model_arg, "--model-arg")
    policy = {
        "minimum_class_count": minimum_count,
        "maximum_norm": maximum_norm,
        "minimum_examples": minimum_examples,
        "maximum_epsilon": maximum_epsilon,
    }
    name = name or os.path.abspath(hub).rpartition("/")[2].lower().replace("_", "-")
    key = key or default_key(hub, name)
    with place_of(hub) as folder:
        federation = create(
            folder,
            name=name,
            architecture=backbone,
            classes=names,
            weights=weights,
            model_args=model_args,
            preprocessing={
                "input_size": (3, input_size, input_size) if input_size else None,
                "mean": mean or None,
                "std": std or None,
                "interpolation": interpolation,
                "crop_pct": crop_pct,
                "sixteen_bit": sixteen_bit,
            },
            policy=parse(Policy, policy, "policy", UsageError),
            groups={name: listed(text) for name, text in pairs(group, "--group").items()},
            multi_label=multi_label,
            seed=seed,
            allow_pickle=allow_pickle,
            key_file=key,
        )
    size = federation.preprocessing.input_size[1]
    click.echo(f"Federation '{federation.name}' in {hub}")
    click.echo(
        f"  backbone  {federation.architecture}, {size} px, from {federation.weights_source}"
    )
    several = " (an image has any number of them)" if federation.multi_label else ""
    click.echo(f"  classes   {', '.join(federation.classes)}{several}")
    for name, members in federation.groups.items():
        click.echo(f"  group     {name}: {', '.join(members)}")
    click.echo(f"  base      {federation.base_fingerprint}")
    click.echo(f"  contract  {federation.contract_hash}")
    click.echo(f"  key       {key}: keep it safe, it alone admits and revokes sites")
    next_step(
        f"let the sites reach this hub; each runs\n  merge-kit join {shown(hub)} --site <name>"
    )
