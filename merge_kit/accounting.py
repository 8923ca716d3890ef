"""The files of a merged model's folder: each is accounted for."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from huggingface_hub import ModelCard
from yaml import YAMLError

from merge_kit.cards import CARD
from merge_kit.checkpoints import WEIGHTS
from merge_kit.checks import Check, Report
from merge_kit.comparing import EQUAL, has_bytes
from merge_kit.configuration import CONFIG
from merge_kit.devices import Device
from merge_kit.errors import MergeKitError
from merge_kit.merging import software
from merge_kit.provenance import PROVENANCE, Versions
from merge_kit.running import FOLDER
from merge_kit.sitemasks import MASKS
from merge_kit.tensorfile import TensorFile, fingerprint, read_all
from merge_kit.writing import METADATA

_CARD_LIMIT = 1 << 20
_MISSING = "is missing, or cannot be read."


def check_weights(model: TensorFile, stated: str) -> Check:
    """Compare the merged model's own file with what the provenance states of it.

    Raises
    ------
    TensorFileError
        The file is cut while it is read.
    """
    found = fingerprint(read_all(model))
    if found != stated:
        return Check(
            WEIGHTS,
            "differs",
            f"has the fingerprint {found}, {PROVENANCE} states {stated}: one of the two was "
            "changed after the merge.",
        )
    if model.metadata != dict([METADATA]):
        return Check(WEIGHTS, "differs", "its header says other things than a merge writes there.")
    return Check(WEIGHTS, "ok", f"has the stated fingerprint {found}")


def check_config(folder: Path, expected: str, source: str) -> Check:
    """Compare the model's configuration with the one that `source` gives."""
    same = has_bytes(folder / CONFIG, expected.encode())
    if same is None:
        return Check(CONFIG, "differs", _MISSING)
    if same:
        return Check(CONFIG, "ok", f"as {source} gives it")
    return Check(
        CONFIG,
        "differs",
        f"is not what {source} gives: architecture, classes or preprocessing were changed, "
        "and right weights may give wrong predictions.",
    )


def check_card(folder: Path, expected: str, *, same_version: bool) -> Check:
    """Compare the model card with the one that merging again writes; people may add lines to it.

    `same_version` says whether the model was merged with this version of merge-kit: another one may
    have written another card.
    """
    path, data = folder / CARD, expected.encode()
    same = has_bytes(path, data)
    if same is None:
        return Check(CARD, "differs", _MISSING)
    if same:
        return Check(CARD, "ok", EQUAL)
    with path.open("rb") as file:
        written = file.read(_CARD_LIMIT)
    if _without_figures(written) == _without_figures(data):
        return Check(CARD, "ok", f"{EQUAL}, with figures that an evaluation added")
    ours, theirs = data.splitlines(), written.splitlines()
    there = iter(theirs)
    odd = next((line for line in ours if line not in there), None)
    if odd is None:
        return Check(CARD, "unknown", "says all that a merge writes, and more that somebody added")
    if not same_version:
        return Check(CARD, "unknown", "another version of merge-kit wrote it, or somebody did")
    return Check(
        CARD,
        "differs",
        f"lacks the line '{odd.decode()}' that a merge writes: what it says of the model may be "
        "wrong.",
    )


def _without_figures(card: bytes) -> tuple[dict[str, object], str] | None:
    """A card's front matter and text, but for what `evaluate --cards` adds; None for no card."""
    try:
        found = ModelCard(card.decode(), ignore_metadata_errors=False)
    except (ValueError, TypeError, YAMLError):
        return None
    stated: dict[str, object] = found.data.to_dict()  # type: ignore[no-untyped-call]
    stated.pop("model-index", None)
    return stated, found.text


def open_weights(folder: Path, stated: str, stack: ExitStack) -> tuple[TensorFile | None, Check]:
    """The merged model's file, open until `stack` closes, and the check of it."""
    try:
        model = stack.enter_context(TensorFile(folder / WEIGHTS))
        return model, check_weights(model, stated)
    except MergeKitError as error:
        return None, Check(WEIGHTS, "differs", str(error))


def report(
    folder: Path,
    stated: Versions,
    checks: Sequence[Check],
    again: Sequence[Check],
    device: Device,
) -> Report:
    """All checks; those of the rebuilt model, `again`, end with the card's where it was rebuilt."""
    rebuilt = any(check.subject == CARD for check in again)
    found = [*checks, *again]
    if rebuilt:
        found.append(_statements(found))
    done = {check.subject for check in again if "/" in check.subject}
    done |= {check.subject for check in checks if check.subject == CONFIG}
    found += check_others(folder, done, rebuilt=rebuilt)
    return Report(tuple(found), tuple(_notes(stated, device)))


def _statements(checks: Sequence[Check]) -> Check:
    if any(check.state == "differs" for check in checks):
        return Check(PROVENANCE, "unknown", "what differs from its statements is said above")
    text = "each statement was compared, but for the versions and what was refused"
    return Check(PROVENANCE, "ok", text)


def check_others(folder: Path, compared: Collection[str], *, rebuilt: bool) -> list[Check]:
    """A check of every file in the folder that was not among the `compared`.

    `rebuilt` says whether the model was merged again; what depends on it is unknown otherwise.
    """
    done = {WEIGHTS, *compared, *((CARD, PROVENANCE) if rebuilt else ())}
    found = []
    for name in _names(folder, ""):
        ours = name in (CARD, PROVENANCE) or name.startswith((f"{MASKS}/", f"{FOLDER}/"))
        if name in done:
            continue
        if ours and not rebuilt:
            found.append(Check(name, "unknown", "was not compared: nothing was merged again"))
        else:
            found.append(Check(name, "unknown", "no merge by this recipe writes it"))
    return found


def _names(folder: Path, under: str) -> Iterator[str]:
    """Files, folders that no merge makes, and what lies in those that a merge makes."""
    try:
        with os.scandir(folder / under) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise MergeKitError(f"{folder / under} cannot be read: {error.strerror}.") from error
    for entry in ordered:
        if not under and entry.name in (MASKS, FOLDER) and entry.is_dir(follow_symlinks=False):
            yield from _names(folder, f"{entry.name}/")
        else:
            yield f"{under}{entry.name}"


def same_version(stated: Versions) -> bool:
    """Whether this version of merge-kit is the one that merged."""
    return stated.merge_kit == software()["merge_kit"]


def _notes(stated: Versions, device: Device) -> list[str]:
    here = {key: str(version) for key, version in software().items()}
    then = {"merge_kit": stated.merge_kit, "torch": stated.torch}
    names = {"merge_kit": "merge-kit", "torch": "torch"}
    notes = [
        f"it was merged with {names[key]} {then[key]}, this is {names[key]} {here[key]}"
        for key in names
        if then[key] != here[key]
    ]
    if stated.device != device.name:
        notes.append(
            f"it was merged on {stated.device}, this is {device.name}: unless the methods are "
            "linear the last digits may differ (--device takes another)"
        )
    return notes
