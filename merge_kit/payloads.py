"""The tensors of contributions, checked before anything of them is merged."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from merge_kit import statistics, vector
from merge_kit.blocks import in_order, one_thread_each
from merge_kit.contributions import Contribution, Entry, check_policy
from merge_kit.encoding import Decoded
from merge_kit.errors import ContributionError, MergeKitError, TensorFileError, UnreachableError
from merge_kit.federation import Federation
from merge_kit.files import sha256_file
from merge_kit.manifest import Kind
from merge_kit.parameters import Role, roles_of, vector_specs
from merge_kit.remembered import Checked, keep, look, recall
from merge_kit.schema import Digest, Document, SiteName
from merge_kit.tensorfile import TensorFile
from merge_kit.tensorheader import TensorSpec


def check_payloads(
    entries: Sequence[Entry], federation: Federation, base_weights: Path
) -> list[Entry]:
    """Check every payload; an entry whose payload is unsound carries the sentence that says why."""
    with TensorFile(base_weights) as base:
        roles = roles_of(base.specs, federation.classifier)
        expected = vector_specs(base.specs, roles)

    def check(entry: Entry) -> Entry:
        found = entry.contribution
        if found is None:
            return entry
        try:
            checked = check_payload(found, federation, expected, roles)
        except UnreachableError:
            raise
        except MergeKitError as error:
            return Entry(entry.site, entry.id, None, str(error), entry.kind)
        return replace(entry, contribution=replace(found, checked=checked))

    with one_thread_each() as workers:
        return list(in_order(check, entries, workers))


def check_payload(
    contribution: Contribution,
    federation: Federation,
    expected: Mapping[str, TensorSpec],
    roles: Mapping[str, Role],
    *,
    again: bool = False,
) -> Checked:
    """Check the tensors of a contribution: digest first, then format, fit, values and policy.

    The file is read once, or not at all when the very file was read before, unless `again`.

    Raises
    ------
    MergeKitError
        Names what is wrong; nothing of the payload may then be used.
    """
    kind, begun = contribution.kind, time.time_ns()
    stated, where, path = contribution.manifest.payload, contribution.label, contribution.payload
    if path.stat().st_size != stated.size:
        raise _damaged(contribution)
    sound = _Sound(
        contract=federation.contract_hash,
        site=contribution.site,
        kind=kind,
        about=contribution.manifest.about,
        sha256=stated.sha256,
        norm=stated.norm,
    )
    known = None if again else recall(path, _Sound)
    if known and known[0] == sound:
        check_policy(contribution.manifest, federation, where)
        return known[1]
    try:
        file = TensorFile(path)
    except TensorFileError:
        if sha256_file(path) != stated.sha256:
            raise _damaged(contribution) from None
        raise
    with file:
        norm, checked = _check_tensors(contribution, file, federation, expected, roles, again)
    if abs(norm - stated.norm) > 1e-4 * norm:
        raise ContributionError(
            f"{where} has the norm {norm:.4g}, its manifest says {stated.norm:.4g}: it is refused."
        )
    check_policy(contribution.manifest, federation, where)
    keep(path, checked, sound, begun)
    return checked


class _Sound(Document):
    """What a payload was found to be: not even its header is read again for it."""

    contract: Digest
    site: SiteName
    kind: Kind
    about: Digest | None
    sha256: Digest
    norm: float


def _check_tensors(
    contribution: Contribution,
    file: TensorFile,
    federation: Federation,
    expected: Mapping[str, TensorSpec],
    roles: Mapping[str, Role],
    again: bool,
) -> tuple[float, Checked]:
    """The norm of a vector or of statistics, and the file that was checked."""
    kind, several = contribution.kind, federation.multi_label
    try:
        found = _check_form(contribution, file, federation, expected, roles)
    except MergeKitError:
        _check_digest(contribution, sha256_file(file.path))  # else the damage is the fault
        raise
    if isinstance(found, Decoded):
        measured, checked = look(found, vector.Measured, vector.measure, again=again)
        digest, norm = measured.sha256, measured.norm
    else:
        seen, checked = look(found, statistics.Measured, statistics.measure, again=again)
        digest, norm = seen.sha256, seen.norm if kind in seen.sound else None
    _check_digest(contribution, digest)
    if norm is not None:
        return norm, checked
    # Where a value is not finite, or wrong, a second reading finds and names it.
    if isinstance(found, Decoded):
        return vector.norm(found, roles), checked
    return statistics.check(found, kind, expected, roles, multi_label=several), checked


def _check_form(
    contribution: Contribution,
    file: TensorFile,
    federation: Federation,
    expected: Mapping[str, TensorSpec],
    roles: Mapping[str, Role],
) -> Decoded[TensorFile] | TensorFile:
    """What a file says of itself, before any value: a small one could ask for any amount of work.

    Gives a vector's tensors as they are merged, or the file of statistics.
    """
    kind, about, where = contribution.kind, contribution.manifest.about, contribution.label
    if kind == "vector":
        found = vector.decoded(file)
        _check_origin(contribution, vector.read_header(file), federation)
        vector.check_specs(found, expected)
        return found
    _check_origin(contribution, statistics.check_header(file, kind, about, where), federation)
    statistics.check_specs(file, kind, expected, roles, multi_label=federation.multi_label)
    return file


def _check_origin(
    contribution: Contribution, header: vector.Origin, federation: Federation
) -> None:
    where = contribution.label
    vector.check_header(header, federation.base_fingerprint, federation.contract_hash, where)
    if header.site != contribution.site:
        raise ContributionError(f"{where}: the payload is of site '{header.site}': it is refused.")


def _check_digest(contribution: Contribution, found: str) -> None:
    if found != contribution.manifest.payload.sha256:
        raise _damaged(contribution)


def _damaged(contribution: Contribution) -> ContributionError:
    size, stated = contribution.payload.stat().st_size, contribution.manifest.payload
    return ContributionError(
        f"{contribution.label}: the payload is not what the site signed ({size} bytes, "
        f"{stated.size} announced): it is damaged or replaced; remove its folder from the hub "
        "and let the site publish again."
    )
