"""merge-kit audit-log."""

from __future__ import annotations

import json
from pathlib import Path

import click

from merge_kit import auditlog
from merge_kit.errors import AuditError
from merge_kit.site import open_site

NOTHING = "Nothing has left this site yet."


@click.group(name="audit-log")
def audit_log() -> None:
    """What has left a site, or was taken back: kept at the site, line by line."""


@audit_log.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a program.")
def show(folder: Path, as_json: bool) -> None:
    """Show what has left the site in FOLDER."""
    root = open_site(folder).root
    auditlog.check_there(root)
    records = auditlog.read(root)
    if as_json:
        click.echo(json.dumps([record.model_dump(mode="json") for record in records], indent=2))
        return
    if not records:
        click.echo(NOTHING)
    for record in records:
        click.echo(f"{record.time}  {record.action:<11}  {record.hub}/{record.place}")
        for name, digest in record.files.items():
            click.echo(f"    {name:<22} {digest}")


@audit_log.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--head", metavar="DIGEST", help="What an earlier call has printed.")
def verify(folder: Path, head: str | None) -> None:
    """Check that no line of the log of the site in FOLDER was changed, removed or put in.

    Lines that were cut off at the end show only with --head, the digest that this prints: keep it
    where nobody who may write to the site's folder can change it.
    """
    root = open_site(folder).root
    found = auditlog.heads(root)
    if head and head not in found:
        raise AuditError(
            f"{root / auditlog.LOG} never had the head {head}: lines were cut off or replaced, or "
            "the digest is of another site."
        )
    if auditlog.check_there(root):
        click.echo(f"The chain of {len(found) - 1} lines is whole; its head is {found[-1]}")
    else:
        click.echo(f"{NOTHING} Its log holds no line to check.")
    if auditlog.is_unfinished(root):
        click.echo(
            f"{root / auditlog.LOG} ends in a part of a line, which does not count: whoever wrote "
            "it was killed before anything left the site, or the last line was cut."
        )
