"""merge-kit status."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from merge_kit.commands.options import next_step, opened_federation, shown
from merge_kit.federation import Federation
from merge_kit.manifest import count_of
from merge_kit.proposals import proposals
from merge_kit.reheading import find_model
from merge_kit.status import calibrations, checked, survey

_ABREAST = 8
"""Contributions whose counts stand side by side; of more, they are added up."""


@click.command()
@click.argument("hub")
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A model merged from HUB: say who has calibrated it (repeatable).",
)
@click.option(
    "--pull-requests",
    is_flag=True,
    help="Say of each open pull request whether it adds one site's own signed files alone.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a program.")
def status(hub: str, models: tuple[Path, ...], pull_requests: bool, as_json: bool) -> None:
    """Show what lies on HUB: who has contributed what, and whether it may be merged."""
    opened, federation = opened_federation(hub)
    if pull_requests:
        waiting_in = list(proposals(opened, federation))
        if as_json:
            click.echo(json.dumps([asdict(one) for one in waiting_in], indent=2))
            return
        for one in waiting_in:
            click.echo(
                f"Do not merge {one.address}: {one.problem}."
                if one.problem
                else f"May be merged: {one.address} adds {', '.join(one.places)}"
            )
        if not waiting_in:
            click.echo("No pull request is open.")
        return
    missing: dict[str, str] = {}
    entries = checked(opened, federation, missing)
    rows, measured = survey(opened, federation, entries=entries), calibrations(entries)
    norms = calibrations(entries, "norms")
    names = {find_model(opened, federation, None).backbone: "the base"}
    for model in models:
        names[find_model(opened, federation, model).backbone] = str(model)
    if as_json:
        clean = [{k: _finite(v) for k, v in row.items()} for row in rows]
        facts = {
            "federation": federation.name,
            "contract": federation.contract_hash,
            "base": federation.base_fingerprint,
            "multi_label": federation.multi_label,
            "admitted": [site.name for site in federation.sites],
            "not_asked": missing,
            "contributions": clean,
            "calibrations": [
                {"backbone": about, "model": names.get(about), "sites": measured.get(about, [])}
                for about in sorted({*measured, *names})
            ],
            "predictions": [
                {"images": about, "sites": sites}
                for about, sites in calibrations(entries, "predictions").items()
            ],
            "norm_statistics": [
                {"backbone": about, "model": names.get(about), "sites": sites}
                for about, sites in norms.items()
            ],
        }
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    console = Console()
    heard = {row["site"] for row in [*rows, *(r for those in measured.values() for r in those)]}
    admitted = {site.name for site in federation.sites}
    waiting = sorted(admitted - heard - missing.keys())
    console.print(_table(federation.name, rows))
    sound = [row for row in rows if not row["problem"]]
    if sound:
        console.print(_counts(federation, sound))
    for row in sound:
        if lost := row["compression"]:
            error = f"an error of {lost['error']:.1%} against the whole vector"
            click.echo(f"Compressed {row['site']} {row['id'][:8]}: {lost['method']}, {error}")
        if row["statistics"]:
            kinds = " and ".join(row["statistics"])
            click.echo(f"Statistics of {row['site']} {row['id'][:8]}: {kinds}")
    for about in sorted({*measured, *names}, key=lambda about: (about not in names, about)):
        sites = [row["site"] for row in measured.get(about, [])]
        if sites or names.get(about) != "the base":
            click.echo(_calibrated(_name(about, names), sites, admitted))
    for about, told in norms.items():
        sites = [row["site"] for row in told]
        click.echo(f"Norm statistics of {_name(about, names)}: {', '.join(sites)}")
    for about, told in calibrations(entries, "predictions").items():
        sites = [row["site"] for row in told]
        click.echo(f"Predictions of the images {about[7:19]}: {', '.join(sites)}")
    for row in rows:
        if row["problem"]:
            click.echo(f"Refused: {row['problem']}")
    if waiting:
        click.echo(f"Admitted and not heard of yet: {', '.join(waiting)}")
    for sentence in missing.values():
        click.echo(f"Not asked: {sentence}")
    next_step(_next(hub, rows, sorted(missing)))


def _name(about: str, names: Mapping[str, str]) -> str:
    return names.get(about, f"backbone {about[7:19]}")


def _calibrated(model: str, sites: Sequence[str], admitted: Collection[str]) -> str:
    by = f"Calibrated {model}: {', '.join(dict.fromkeys(sites)) or 'nobody'}"
    left = sorted(set(admitted) - set(sites))
    return f"{by}; not yet: {', '.join(left)}" if left else by


def _next(hub: str, rows: Sequence[Mapping[str, Any]], missing: Sequence[str]) -> str:
    """What is to be done before a merge, or the merge; without sites that could not be asked."""
    command = f"merge-kit merge {shown(hub)}" + "".join(f" --exclude {name}" for name in missing)
    ready = sum(row["state"] == "ready" for row in rows)
    unknown = [row for row in rows if row["state"] == "not admitted"]
    keys = {row["site"]: row["public_key"] for row in unknown if row["public_key"]}
    again = sorted({row["site"] for row in rows if row["problem"]} | {r["site"] for r in unknown})
    if keys:
        admit = [f"\n  merge-kit admit {shown(hub)} {site} {key}" for site, key in keys.items()]
        first = "ask each site that is not admitted whether the key is its own, and admit it with"
        first += "".join(admit)
    elif again:
        first = f"ask {', '.join(again)} to publish again"
    elif ready:
        return f"merge the {ready} that are ready with\n  {command} --out merged"
    else:
        return "admit sites with 'merge-kit admit', then wait for them to publish."
    between = "\n" if keys else ", "
    if not ready:
        return first if keys else f"{first}."
    return (
        f"{first}{between}or merge the {ready} that are ready without with\n"
        f"  {command} --skip-refused --out merged"
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(name: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title=f"Federation '{name}'",
        title_justify="left",
        caption="own acc.: balanced accuracy of the site's own model on its own images\n"
        "cosine: between a vector and the mean of all",
        caption_justify="left",
        box=box.SIMPLE,
    )
    for column in ("site", "id", "state"):
        table.add_column(column)
    for column in ("age", "own acc.", "MiB", "norm", "cosine"):
        table.add_column(column, justify="right")
    for row in rows:
        if row["problem"]:
            table.add_row(row["site"], row["id"][:8], "refused")
            continue
        own = row["balanced_accuracy"]
        signed = row["signature"] if row["state"] != row["signature"] else "signed"
        table.add_row(
            row["site"],
            row["id"][:8],
            f"{row['state']}, {signed}",
            _age(row["age_days"]),
            f"{own['value']:.3f}" if own["value"] is not None else "-",
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['norm']:.3g}",
            f"{row['cosine']:.2f}" if _finite(row["cosine"]) is not None else "-",
        )
    return table


def _counts(federation: Federation, rows: list[dict[str, Any]]) -> Table:
    of = " that have / lack" if federation.multi_label else " of"
    table = Table(title=f"training images{of} each class", title_justify="left", box=box.SIMPLE)
    table.add_column("class")
    if len(rows) > _ABREAST:
        _add_up(table, federation, rows)
        return table
    for row in rows:
        table.add_column(f"{row['site']} {row['id'][:4]}", justify="right")
    for name in federation.classes:
        table.add_row(name, *[_count(row, name) for row in rows])
    for name in federation.groups:
        table.add_row(f"{name} (group)", *[str(row["group_counts"].get(name, 0)) for row in rows])
    if any(row["other_images"] for row in rows):
        table.add_row("of other classes", *[str(row["other_images"]) for row in rows])
    return table


def _add_up(table: Table, federation: Federation, rows: list[dict[str, Any]]) -> None:
    """Of many contributions: how many images there are of each class, and who has any."""
    for column in ("images", "contributions with any", "most in one"):
        table.add_column(column, justify="right")
    for name in federation.classes:
        counts = [row["class_counts"][name] for row in rows]
        about = "~" if any(isinstance(count, str) for count in counts) else ""
        total = f"{about}{sum(map(count_of, counts)):.0f}"
        if federation.multi_label:
            total += f" / {sum(count_of(row['absent_counts'].get(name, 0)) for row in rows):.0f}"
        some = f"{sum(count_of(count) > 0 for count in counts)} of {len(rows)}"
        table.add_row(name, total, some, str(max(counts, key=count_of)))


def _count(row: Mapping[str, Any], name: str) -> str:
    """Images of a class, and where one may have several those that lack it."""
    count, absent = row["class_counts"][name], row["absent_counts"].get(name)
    if absent is None:
        return str(count)
    return f"{count} / {absent}" if count or absent else "-"


def _age(days: float) -> str:
    if days < 1 / 24:
        return f"{days * 24 * 60:.0f} min"
    return f"{days * 24:.0f} h" if days < 2 else f"{days:.0f} d"
