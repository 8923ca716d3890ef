"""From a merged model back to the model of one of its sites, as a timm folder."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from merge_kit.checkpoints import WEIGHTS, Checkpoint, fingerprint_checked
from merge_kit.configuration import CONFIG
from merge_kit.errors import BaseMismatchError, UsageError
from merge_kit.files import new_folder, write_atomic
from merge_kit.provenance import read_provenance
from merge_kit.sitemasks import (
    MaskHeader,
    check_masks,
    find_masks,
    read_header,
    unmasked,
)
from merge_kit.tensorfile import TensorFile, TensorWriter
from merge_kit.writing import METADATA, write_parts


@dataclass(frozen=True, slots=True)
class Unmasked:
    """What came back."""

    folder: Path
    fingerprint: str
    header: MaskHeader


def unmask(merged: Path, base_path: Path, site: str, out: Path) -> Unmasked:
    """Write the model of one site, from a merged model's folder that keeps masks.

    Parameters
    ----------
    base_path
        The base as `Checkpoint` opens it: a file or a folder.
    site
        The site's name, or name and contribution where the model has several of one site.
    out
        A new folder, which appears whole or not at all.

    Raises
    ------
    UsageError
        `out` exists.
    ProvenanceError
        `merged` is no merged model, or says nothing sound of itself.
    VectorError
        It keeps no masks of the site, or the masks do not fit.
    BaseMismatchError
        The base or the merged model has another fingerprint than the one it should have.
    """
    if out.exists():
        raise UsageError(f"{out} exists already: choose another --out, or remove it.")
    record = read_provenance(merged)
    path = find_masks(merged, site)
    with ExitStack() as stack:
        model = stack.enter_context(TensorFile(merged / WEIGHTS))
        base = stack.enter_context(Checkpoint(base_path))
        masks = stack.enter_context(TensorFile(path))
        header = read_header(masks)
        if (found := fingerprint_checked(base)) != record.base:
            raise BaseMismatchError(
                f"{base_path} has the fingerprint {found}, {merged} was merged from the base "
                f"{record.base}: give that base with --base."
            )
        if (found := fingerprint_checked(model)) != header.merged:
            raise BaseMismatchError(
                f"{model.path} has the fingerprint {found}, {path} belongs to {header.merged}: "
                "one of them was replaced; merge again."
            )
        check_masks(masks, header, model, base)
        with new_folder(out) as folder:
            with TensorWriter(folder / WEIGHTS, model.specs, METADATA) as writer:
                made = write_parts(writer, unmasked(model, base, masks, header))
            if (merged / CONFIG).is_file():  # a merge of files without one has none
                write_atomic(folder / CONFIG, (merged / CONFIG).read_bytes())
    return Unmasked(out, made, header)
