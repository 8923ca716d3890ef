"""merge-kit merge."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console

from merge_kit import choosing, devices, merging, plain
from merge_kit.checkpoints import WEIGHTS
from merge_kit.commands.merging_options import (
    contribution_options,
    device_option,
    gather,
    recipe_of,
    recipe_options,
    weights_of,
)
from merge_kit.commands.options import next_step, opened_federation, shown
from merge_kit.contributions import Entry, list_entries, read_local
from merge_kit.devices import CPU, Device
from merge_kit.errors import RecipeError, UsageError
from merge_kit.estimate import estimate
from merge_kit.federation import BASE_WEIGHTS, FEDERATION_FILE, Federation
from merge_kit.homes import unasked
from merge_kit.hub import Hub
from merge_kit.material import Material
from merge_kit.material import opened as opened_material
from merge_kit.recipe import DISTILL, Recipe, read_document
from merge_kit.reheading import find_model
from merge_kit.remembered import Checked
from merge_kit.settling import settled
from merge_kit.writing import Written, check_keeps, check_target, expected_reads


class _Merge(click.Command):
    """Leaves a recipe of distillation, which takes images, to the command for it."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """The context of the command that runs."""
        if parent is not None and _is_distillation(args):
            group = parent.command
            assert isinstance(group, click.Group)  # or it would have no commands
            other = group.get_command(parent, DISTILL)
            assert other is not None
            return other.make_context(DISTILL, args, parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


def _is_distillation(arguments: Sequence[str]) -> bool:
    """Whether the recipe that a command line names is one of distillation."""
    for place, text in enumerate(arguments):
        name, separator, value = text.partition("=")
        if name == "--recipe" and (separator or place + 1 < len(arguments)):
            path = Path(value if separator else arguments[place + 1])
            with suppress(RecipeError):  # which the merge will say
                return bool(read_document(path).data.get("method") == DISTILL)
    return False


@click.command(cls=_Merge)
@click.argument("hub", metavar="HUB_OR_BASE")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@recipe_options
@click.option("--scale", type=float, help="Factor of the merged vector.")
@contribution_options
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the merged model.")
@click.option("--replace", is_flag=True, help="Replace an existing merged model.")
@click.option(
    "--keep-sum",
    is_flag=True,
    help="Keep the exact running sum beside the model: who comes or goes is then all that is read.",
)
@device_option
@click.option("--print-recipe", is_flag=True, help="Show the recipe with all defaults, and stop.")
@click.option("--dry-run", is_flag=True, help="Show what would be merged and what it takes, stop.")
def merge(
    hub: str,
    folders: tuple[Path, ...],
    method: str | None,
    recipe: Path | None,
    scale: float | None,
    weights: str | None,
    option: tuple[str, ...],
    norm: str | None,
    head: str | None,
    out: Path | None,
    sites: tuple[str, ...],
    exclude: tuple[str, ...],
    skip_refused: bool,
    allow_unsigned: bool,
    replace: bool,
    keep_sum: bool,
    device: str,
    print_recipe: bool,
    dry_run: bool,
) -> None:
    """Merge what has arrived on a hub into one model; or only the contributions in FOLDERS.

    A recipe of distillation merges what the sites' models know instead: see 'merge-kit distill'.
    Without a federation: merge the checkpoints or task vectors in FOLDERS, made from a base.

    \b
    merge-kit merge hub --out merged
    merge-kit merge hub --method auto --out merged
    merge-kit merge hub --method ties --option density=0.3 --out merged-ties
    merge-kit merge base a b=run/model.safetensors --weights a=2,b=1 --out merged
    """
    alone = _is_plain(hub, folders)
    settings = {"scale": scale, "weights": weights_of(weights), "norm": norm, "head": head}
    because = arrived = None
    if method == choosing.AUTO:
        if alone or recipe or weights or option:
            raise UsageError(
                "--method auto chooses method and weights by what lies on a hub: leave --recipe, "
                "--weights and --option out, or name a method."
            )
        arrived = _arrived(hub, folders, sites, exclude)
        picked, because = _automatic(arrived, sites, exclude, allow_unsigned)
        method, settings["weights"] = picked["method"], picked["weights"]
    chosen = recipe_of(method, recipe, option, settings, plain.DEFAULTS if alone else {})
    if because:
        what = f"{chosen.method} with the weights '{chosen.weights}'"
        click.echo(f"Chosen: {what}: {because}.", err=print_recipe)
    if print_recipe:
        click.echo(chosen.to_yaml(), nl=False)
        return
    target = out or Path(f"merged-{chosen.method}")
    check_target(target, replace=replace)
    on = devices.choose(device)
    if alone:
        if skip_refused or allow_unsigned:
            raise UsageError(
                "--skip-refused and --allow-unsigned are for contributions on a hub: leave them "
                "out, a checkpoint carries no signature."
            )
        _merge_plain(
            Path(hub), folders, chosen, target, sites, exclude, replace, keep_sum, on, dry_run
        )
        return
    opened, federation, entries = arrived or _arrived(hub, folders, sites, exclude)
    base = opened.fetch(BASE_WEIGHTS)
    found = gather(
        entries,
        federation,
        base,
        chosen,
        sites=sites,
        exclude=exclude,
        skip_refused=skip_refused,
        allow_unsigned=allow_unsigned,
    )
    if dry_run:
        beside = merging.beside_of(found.chosen, chosen, found.statistics)
        with opened_material(federation, base, found.chosen, found.others, beside) as material:
            chosen = settled(chosen, material)
            names = [f"{source.site} {source.id[:12]}" for source in material.sources]
            _show(material, chosen, names, target, keep_sum, on)
        return
    with Console(stderr=True).status(f"merging {len(found.chosen)} contributions"):
        merged = merging.merge(
            federation,
            base,
            found.chosen,
            chosen,
            target,
            statistics=found.statistics,
            refused=found.refused,
            gone=found.others,
            replace=replace,
            keep_sum=keep_sum,
            device=on,
        )
    click.echo(f"Merged model in {target}: {chosen.method} of {len(found.chosen)} contributions")
    for contribution, weight in zip(merged.contributions, merged.weights, strict=True):
        click.echo(
            f"  {contribution.site:<20} {contribution.id[:12]}  weight {weight:.3f}  "
            f"{contribution.trust.value}"
        )
    _end(merged.written)
    again = f"merge-kit verify {shown(target)} --hub {shown(hub)}"
    checks = [merged.base, *(c.checked for c in merged.contributions)]
    click.echo(f"  {_relied(checks, 'payload')} ({again} checks all again)")
    next_step(f"evaluate it with\n  merge-kit evaluate {shown(target)} --data <labels.csv>")


class _Arrived(NamedTuple):
    """A hub, and what is there to be merged."""

    hub: Hub
    federation: Federation
    entries: list[Entry]


def _arrived(
    hub: str, folders: tuple[Path, ...], sites: tuple[str, ...], exclude: tuple[str, ...]
) -> _Arrived:
    """All of a hub and of the hubs that sites have of their own, but for those that are left out;
    or the contributions in local folders."""
    opened, federation = opened_federation(hub)
    if not folders:
        left_out = unasked(federation, sites, exclude)
        return _Arrived(opened, federation, list_entries(opened, federation, without=left_out))
    local = [read_local(folder, federation) for folder in folders]
    entries = [Entry(c.site, c.id, c, None, c.kind) for c in local]
    return _Arrived(opened, federation, entries)


def _automatic(
    arrived: _Arrived,
    sites: tuple[str, ...],
    exclude: tuple[str, ...],
    allow_unsigned: bool,
) -> tuple[dict[str, str], str]:
    """Method and weights by what manifests say, and why; what is unsound is refused later on."""
    vectors, _ = merging.choose(
        arrived.entries,
        allow_unsigned=allow_unsigned,
        skip_refused=True,
        sites=sites,
        exclude=exclude,
        unasked=unasked(arrived.federation, sites, exclude),
    )
    base = find_model(arrived.hub, arrived.federation, None).backbone
    return choosing.choose(choosing.facts_of(vectors, arrived.entries, base))


def _is_plain(first: str, folders: tuple[Path, ...]) -> bool:
    """Whether the first argument is a base with checkpoints after it, and no hub."""
    if "://" in first or (not Path(first).exists() and not folders):
        return False
    if (Path(first) / FEDERATION_FILE).is_file():
        return False
    if not folders:
        raise UsageError(
            f"{first} is no hub, it has no {FEDERATION_FILE}: merge a hub with 'merge-kit merge "
            "HUB', or checkpoints with 'merge-kit merge BASE CHECKPOINT...'."
        )
    return True


def _merge_plain(
    base: Path,
    folders: tuple[Path, ...],
    recipe: Recipe,
    target: Path,
    sites: tuple[str, ...],
    exclude: tuple[str, ...],
    replace: bool,
    keep_sum: bool,
    device: Device,
    dry_run: bool,
) -> None:
    with ExitStack() as stack:
        with Console(stderr=True).status(f"checking {len(folders)} checkpoints"):
            job = stack.enter_context(
                plain.gather(base, folders, recipe, sites=sites, exclude=exclude)
            )
        for note in job.notes:
            click.echo(note)
        if dry_run:
            names = [f"{one.name} {one.id[:12]}" for one in job.inputs]
            _show(plain.material(job), job.recipe, names, target, keep_sum, device)
            return
        with Console(stderr=True).status(f"merging {len(job.inputs)} checkpoints"):
            merged = plain.merge(job, target, give_way=replace, keep_sum=keep_sum, device=device)
    click.echo(f"Merged model in {target}: {recipe.method} of {len(job.inputs)} checkpoints")
    for one, weight in zip(job.inputs, merged.weights, strict=True):
        click.echo(f"  {one.name:<20} {one.id[:12]}  weight {weight:.3f}  {one.path}")
    _end(merged.written)
    again = f"merge-kit verify {shown(target)} --base {shown(base)} <checkpoints>"
    relied = _relied([checked for _, checked in job.files], "checkpoint")
    click.echo(f"  {relied} ({again} checks all again)")
    if job.config:
        next_step(f"evaluate it with\n  merge-kit evaluate {shown(target)} --data <labels.csv>")
    else:
        next_step(f"load {shown(target / WEIGHTS)} into your model.")


def _relied(checks: Sequence[Checked | None], what: str) -> str:
    """How much was read now; the base's check comes first."""
    base, *others = (check is not None and check.remembered for check in checks)
    old = sum(others)
    new = len(others) - old
    now = [f"{new} {what}{'s' * (new > 1)}"] * bool(new) + ["the base"] * (not base)
    before = [f"{old} {what}{'s' * (old > 1)}"] * bool(old) + ["the base"] * base
    parts = [f"checked now: {' and '.join(now)}"] * bool(now)
    parts += [f"checked before and unchanged since: {' and '.join(before)}"] * bool(before)
    return "; ".join(parts)


def _end(written: Written) -> None:
    if written.sum_kept:
        click.echo(f"  {written.read} vector(s) read, the running sum is kept beside the model")
    elif written.sum_lost:
        click.echo(f"  no running sum is kept: {written.sum_lost}")
    for part in written.partly:
        click.echo(f"  {part}")
    click.echo(f"  fingerprint {written.fingerprint}")


def _show(
    material: Material,
    recipe: Recipe,
    names: Sequence[str],
    target: Path,
    keep_sum: bool,
    device: Device,
) -> None:
    check_keeps(recipe, keep_sum=keep_sum)
    found = estimate(material.base, material.sources, material.roles, recipe, device)
    kept, read = expected_reads(target, material, recipe, keep_sum=keep_sum)
    click.echo(f"{len(names)} vectors: {', '.join(names)}")
    for row in found.rows:
        click.echo(f"  {row.what:<14} {row.tensors:>5} tensors {row.values:>12,}  {row.treatment}")
    if read < len(names):
        click.echo(f"Reads  {read} vector(s), the running sum there stands for the others")
    else:
        less = " (less, where an earlier merge noted its first pass)"
        noted = less if found.readings > 1 and material.notes else ""
        click.echo(f"Reads  each vector {found.readings:.1f} times{noted}")
    if found.statistics:
        click.echo(f"       {found.statistics / 2**20:.0f} MiB of statistics beside them")
    where = "above the program itself" if device is CPU else f"of {device.place}"
    click.echo(f"Memory about {found.memory / 2**20:.0f} MiB {where}")
    most = "at most" if read < len(names) else "about"
    click.echo(f"Time   {most} {found.seconds:.1f} s on this machine, from a trial on a part of it")
    click.echo(f"Writes {found.output / 2**20:.0f} MiB to {target}")
    if kept:
        click.echo(f"       {found.running_sum / 2**20:.0f} MiB for the running sum beside it")
    if found.masks:
        click.echo(f"       {found.masks / 2**20:.1f} MiB for the sites' masks beside it")
    next_step("the same command without --dry-run.")
