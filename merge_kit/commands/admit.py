"""merge-kit admit."""

from __future__ import annotations

from pathlib import Path

import click

from merge_kit import site
from merge_kit.commands.options import next_step, shown
from merge_kit.federation import FEDERATION_FILE
from merge_kit.hub import open_hub


@click.command()
@click.argument("hub")
@click.argument("name", metavar="SITE")
@click.argument("key")
def admit(hub: str, name: str, key: str) -> None:
    """Let SITE contribute to the federation on HUB with the public KEY that it printed at join.

    KEY may be the file that holds it. Ask the site on another channel (a telephone) whether the key
    is theirs.
    """
    if Path(key).is_file():
        key = Path(key).read_text(encoding="utf-8").strip()
    opened = open_hub(hub)
    before = opened.read(FEDERATION_FILE) if opened.has(FEDERATION_FILE) else None
    federation = site.federation_on(opened)
    extended = federation.admit(name, key)
    if extended is federation:
        click.echo(f"Site '{name}' is admitted already.")
    else:
        opened.replace(FEDERATION_FILE, extended.to_yaml().encode(), before)
        click.echo(f"Site '{name}' is admitted; {len(extended.sites)} in all.")
    next_step(f"see what has arrived with\n  merge-kit status {shown(hub)}")
