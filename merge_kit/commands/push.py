"""merge-kit push."""

from __future__ import annotations

from pathlib import Path

import click

from merge_kit.commands.options import next_step


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("name", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Make the repository one that everybody may read.")
@click.option(
    "--base-model",
    metavar="OWNER/NAME",
    help="The base on the Hub [what the model card says].",
)
@click.option("--replace", is_flag=True, help="Let another model that lies there give way.")
def push(folder: Path, name: str, public: bool, base_model: str | None, replace: bool) -> None:
    """Publish the merged model in FOLDER on the Hugging Face Hub, or on the server HF_ENDPOINT.

    The repository is private unless --public; one that is there stays as it is. timm loads it by
    its name, and the model card says what it was merged from.
    """
    from merge_kit import pushing
    from merge_kit.hub.repository import named

    repository = named(name)
    done = pushing.push(
        folder, repository, private=not public, base_model=base_model, replace=replace
    )
    said = "Pushed" if done.new else "There already"
    click.echo(f"{said}: {repository.endpoint.address}/{repository.name}")
    click.echo(f"  files        {', '.join(done.files)}")
    click.echo(f"  fingerprint  {done.fingerprint}")
    bases = ", ".join(done.base_models) or "not named: give its name on the Hub with --base-model"
    click.echo(f"  base model   {bases}")
    next_step(
        "load it, where HF_TOKEN may read it, with\n"
        f'  timm.create_model("hf-hub:{repository.name}", pretrained=True)'
    )
