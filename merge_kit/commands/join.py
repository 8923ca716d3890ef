"""merge-kit join."""

from __future__ import annotations

from pathlib import Path

import click

from merge_kit import signing, site
from merge_kit.commands.options import next_step, shown
from merge_kit.hub import open_hub


@click.command()
@click.argument("hub")
@click.option("--site", "name", required=True, help="The site's name: a-z, 0-9 and hyphens.")
@click.option("--folder", type=click.Path(path_type=Path), help="Working folder [the site's name].")
def join(hub: str, name: str, folder: Path | None) -> None:
    """Join the federation on HUB: copy and check its base, create the site's key pair."""
    joined = site.join(open_hub(hub), name, folder or Path(name))
    key = signing.public_key(joined.key_file)
    click.echo(f"Site '{joined.name}' of the federation '{joined.federation.name}'")
    click.echo(f"  folder    {joined.root}")
    click.echo(f"  classes   {', '.join(joined.federation.classes)}")
    if joined.federation.multi_label:
        click.echo("            (an image has any number of them, or none)")
    for name, members in joined.federation.groups.items():
        click.echo(f"  group     {name}: {', '.join(members)}")
    click.echo(f"  base      {joined.federation.base_fingerprint} (checked)")
    click.echo(f"  contract  {joined.config.federation}")
    click.echo(f"  key       {key}")
    next_step(
        f"send {joined.root / site.PUBLIC_KEY_FILE} to the coordinator, who runs\n"
        f"  merge-kit admit {shown(hub)} {joined.name} {key}\n"
        "Meanwhile train on your own images:\n"
        f"  merge-kit finetune {shown(joined.root)} --data <labels.csv or folder of class folders>"
    )
