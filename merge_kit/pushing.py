"""A merged model on the Hugging Face Hub, as a repository that timm loads by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from merge_kit.cards import CARD
from merge_kit.checkpoints import WEIGHTS
from merge_kit.configuration import CONFIG, read_config
from merge_kit.contributions import ROOT
from merge_kit.errors import ProvenanceError, UsageError
from merge_kit.federation import FEDERATION_FILE
from merge_kit.hub.commits import Operation
from merge_kit.hub.repository import Repository
from merge_kit.provenance import PROVENANCE, read_provenance
from merge_kit.tensorfile import fingerprint_file

_LOCAL = "local-dir:path/to/this/folder"
"""How a card says that the model is loaded while it lies in a folder."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """What lies in the repository now."""

    fingerprint: str
    files: tuple[str, ...]
    new: bool
    """Whether anything was sent."""
    base_models: tuple[str, ...]
    """The models on the Hub that it was made from, where the card names them."""


def push(
    folder: Path,
    repository: Repository,
    *,
    private: bool = True,
    base_model: str | None = None,
    replace: bool = False,
) -> Pushed:
    """Send a merged model: weights, configuration, provenance and model card, in one commit.

    The card's front matter has the fields by which the Hub finds models and shows where they come
    from: library, task, tags, base model and relation. What else lies in the folder, such as a
    running sum or masks, is not sent. The repository is made if it is not there.

    Parameters
    ----------
    base_model
        Name of the base on the Hub, for a card that does not name it.
    replace
        Another model that lies there gives way; the repository's history keeps it.

    Raises
    ------
    ProvenanceError
        The folder is no merged model, or its weights are not those that its provenance names.
    UsageError
        timm could not load it, or the repository holds something else.
    UnreachableError
        The server cannot be reached, or does not let us.
    """
    record = read_provenance(folder)
    config = read_config(folder)
    if config is None or not config.architecture or not (folder / WEIGHTS).is_file():
        raise UsageError(
            f"{folder} is no model that timm could load: it needs {WEIGHTS} and a {CONFIG} that "
            "names the architecture."
        )
    if fingerprint_file(folder / WEIGHTS) != record.merged:
        raise ProvenanceError(
            f"{folder / WEIGHTS} holds other weights than {PROVENANCE} names: merge again."
        )
    card = _card(folder, repository.name, base_model)
    files: dict[str, Path | bytes] = {name: folder / name for name in (WEIGHTS, CONFIG, PROVENANCE)}
    files[CARD] = str(card).encode()
    repository.create(private=private)
    new = _send(repository, files, record.merged, replace)
    assert isinstance(card.data, ModelCardData)
    named = card.data.base_model or []
    bases = (named,) if isinstance(named, str) else tuple(named)
    return Pushed(record.merged, tuple(sorted(files)), new, bases)


def _send(
    repository: Repository, files: Mapping[str, Path | bytes], fingerprint: str, replace: bool
) -> bool:
    there = repository.files(repository.head())
    foreign = sorted(name for name in there if name not in files and not name.startswith("."))
    if FEDERATION_FILE in there or any(name.startswith(f"{ROOT}/") for name in there):
        raise UsageError(f"{repository.name} holds a federation: push models to one of their own.")
    if foreign:
        raise UsageError(
            f"{repository.name} holds other files ({foreign[0]}): push to a repository of its own."
        )
    changed = {n: c for n, c in files.items() if n not in there or not there[n].is_of(c)}
    if not changed:
        return False
    if WEIGHTS in there and not replace:
        raise UsageError(
            f"{repository.name} holds a model already: push to another name, or pass --replace; "
            "the repository's history keeps what gives way."
        )
    with repository.additions(changed) as additions:

        def plan(head: str) -> Sequence[Operation] | None:
            now = repository.files(head, deep=False)
            done = all(name in now and now[name].is_of(it) for name, it in changed.items())
            return None if done else additions

        repository.change(f"Merged model {fingerprint.removeprefix('sha256:')[:12]}", plan)
    return True


def _card(folder: Path, name: str, base_model: str | None) -> ModelCard:
    """The model card, told that it lies on the Hub."""
    path = folder / CARD
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False)
    except (OSError, ValueError, TypeError, YAMLError) as error:
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        raise ProvenanceError(
            f"{path} cannot be read as a model card ({detail}): merge again."
        ) from error
    assert isinstance(card.data, ModelCardData)
    card.text = card.text.replace(_LOCAL, f"hf-hub:{name}")
    if base_model:
        card.data.base_model = base_model
        if card.data.get("base_model_relation") is None:
            card.data["base_model_relation"] = "merge"
    return card
