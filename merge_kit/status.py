"""What lies on a hub, as figures: the rows of `merge-kit status`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch

from merge_kit import vector
from merge_kit.blocks import in_order, one_thread_each
from merge_kit.contributions import Contribution, Entry, Trust, list_entries, live, speaks_of
from merge_kit.errors import SiteUnreachableError
from merge_kit.federation import BASE_WEIGHTS, Federation
from merge_kit.files import canonical_json, sha256_bytes
from merge_kit.homes import SiteHub
from merge_kit.hub import Hub
from merge_kit.manifest import Kind
from merge_kit.notes import Notes
from merge_kit.parameters import Role, roles_of
from merge_kit.payloads import check_payloads
from merge_kit.remembered import cache_folder
from merge_kit.tensorfile import TensorFile
from merge_kit.tensorheader import TensorSpec

_TOGETHER = 1 << 23
"""Values of a vector that are held in memory at once, in float64."""


def checked(
    hub: Hub, federation: Federation, missing: MutableMapping[str, str] | None = None
) -> list[Entry]:
    """All that lies on a hub, every payload read and checked as `merge` would check it.

    `missing` takes, by site, a sentence on each site's own hub that cannot be asked, and what the
    others hold is given all the same; None to raise it.
    """
    entries, base = list_entries(hub, federation, missing=missing), hub.fetch(BASE_WEIGHTS)
    while True:
        try:
            return check_payloads(entries, federation, base)
        except SiteUnreachableError as error:  # since it was listed
            if missing is None:
                raise
            missing[error.site] = str(error)
            entries = [entry for entry in entries if not _lies_with(entry, error.site)]


def _lies_with(entry: Entry, site: str) -> bool:
    """Whether an entry lies on the hub that a site has of its own."""
    hub = entry.stated.hub if entry.stated else None
    return isinstance(hub, SiteHub) and hub.site == site


def survey(
    hub: Hub,
    federation: Federation,
    now: datetime | None = None,
    entries: Sequence[Entry] | None = None,
) -> list[dict[str, Any]]:
    """One row for each vector on the hub, whole ones first, then what is refused.

    `entries` are those of `checked`, where they are known. ``statistics`` names the kinds that
    the site has published about this vector. ``cosine`` is the cosine between a
    vector's weights and the plain mean of the current ones: far below the others means that the
    site trained towards something else.
    """
    now = now or datetime.now(timezone.utc)
    weights = hub.fetch(BASE_WEIGHTS)
    entries = checked(hub, federation) if entries is None else entries
    with TensorFile(weights) as base:
        specs, roles = base.specs, roles_of(base.specs, federation.classifier)
    counted = live(entries)
    vectors = [c for c in counted if c.kind == "vector"]
    beside = [c for c in counted if c.kind != "vector"]
    cosines = _cosines(vectors, specs, roles, federation)
    shown = [entry for entry in entries if entry.problem or entry.kind == "vector"]
    rows = [_row(entry, cosines, beside, now) for entry in shown]
    return sorted(rows, key=lambda row: (row["problem"] is not None, row["site"], row["created"]))


def _cosines(
    vectors: Sequence[Contribution],
    specs: Mapping[str, TensorSpec],
    roles: Mapping[str, Role],
    federation: Federation,
) -> dict[str, float]:
    """By the vectors' ids, as measured now or when the same vectors were there before."""
    folder, ids = cache_folder("cosines"), [c.id for c in vectors]
    notes = Notes(folder, federation.base_fingerprint) if folder else None
    subject = ["cosine to the mean", sha256_bytes(canonical_json(sorted(ids)))]
    known = notes.read(subject) if notes else {}
    if known.keys() == set(ids):
        return {name: known[name][0] for name in ids}
    found = dict(zip(ids, cosines_to_mean(vectors, specs, roles), strict=True))
    if notes and len(ids) > 1:
        notes.add(subject, {name: [value] for name, value in found.items()})
    return found


def _row(
    entry: Entry, cosines: Mapping[str, float], beside: Sequence[Contribution], now: datetime
) -> dict[str, Any]:
    found = entry.stated
    if found is None:
        return {
            "site": entry.site,
            "id": entry.id,
            "state": "refused",
            "compatible": False,
            "problem": entry.problem,
            "created": "",
            "public_key": None,
        }
    manifest, own = found.manifest, found.manifest.validation
    assert own is not None  # every vector's manifest tells it
    created = datetime.strptime(manifest.created_at, "%Y-%m-%dT%H:%M:%SZ")
    if entry.withdrawn:
        state = "withdrawn"
    elif entry.id not in cosines:
        state = "replaced"
    else:
        state = "ready" if found.trust is Trust.ADMITTED else "not admitted"
    return {
        "site": entry.site,
        "id": entry.id,
        "state": state,
        "compatible": entry.contribution is not None,
        "problem": None,
        "created": manifest.created_at,
        "age_days": (now - created.replace(tzinfo=timezone.utc)).total_seconds() / 86400,
        "class_counts": manifest.class_counts,
        "absent_counts": manifest.absent_counts or {},
        "group_counts": manifest.group_counts or {},
        "other_images": manifest.other_images or 0,
        "balanced_accuracy": own.balanced_accuracy.model_dump(),
        "macro_auroc": own.macro_auroc.model_dump(),
        "bytes": manifest.payload.size,
        "norm": manifest.payload.norm,
        "compression": manifest.compression and manifest.compression.model_dump(),
        "cosine": cosines.get(entry.id),
        "statistics": sorted({s.kind for s in beside if speaks_of(s, found)}),
        "signature": found.trust.value,
        "public_key": found.key,
    }


def calibrations(
    entries: Sequence[Entry], kind: Kind = "moments"
) -> dict[str, list[dict[str, Any]]]:
    """Which sites have measured which backbone: rows by the backbone's fingerprint.

    Of entries that have been `checked`; what is refused is among the rows of `survey`.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for one in live(entries):
        if one.kind != kind:
            continue
        row = {
            "site": one.site,
            "id": one.id,
            "created": one.manifest.created_at,
            "class_counts": one.manifest.class_counts,
            "bytes": one.manifest.payload.size,
            "signature": one.trust.value,
            "public_key": one.key,
        }
        found.setdefault(str(one.manifest.about), []).append(row)
    return {
        about: sorted(rows, key=lambda row: (row["site"], row["created"], row["id"]))
        for about, rows in sorted(found.items())
    }


def cosines_to_mean(
    contributions: Sequence[Contribution],
    specs: Mapping[str, TensorSpec],
    roles: Mapping[str, Role],
) -> list[float]:
    """Cosine of each vector's weights to the plain mean of all; nan for a vector of zeros.

    Each file is read twice, for the sum of all and for its products with it, so that a thousand
    vectors take no more memory and no more open files than a few.
    """
    products, total = torch.zeros((len(contributions), 2), dtype=torch.float64), 0.0
    weights = [name for name, role in roles.items() if role is Role.WEIGHT]
    with one_thread_each() as workers:
        for names in _groups(weights, specs):
            size = sum(specs[name].elements for name in names)
            mean = torch.zeros(size, dtype=torch.float64)  # but for a factor
            for values in in_order(partial(_values, names), contributions, workers, ahead=1):
                mean += values
            total += float(mean @ mean)
            measured = in_order(partial(_products, names, mean), contributions, workers)
            for row, told in zip(products, measured, strict=True):
                row += told
    with_mean, with_itself = products.unbind(1)
    cosines = with_mean / (with_itself * total).sqrt()
    return [value if math.isfinite(value) else math.nan for value in cosines.tolist()]


def _groups(names: Sequence[str], specs: Mapping[str, TensorSpec]) -> Iterator[list[str]]:
    """Tensors that are held in memory together."""
    group, held = list[str](), 0
    for name in names:
        held += specs[name].elements
        if group and held > _TOGETHER:
            yield group
            group, held = [], specs[name].elements
        group.append(name)
    if group:
        yield group


def _values(names: Sequence[str], one: Contribution) -> torch.Tensor:
    with vector.opened(one.payload) as file:
        return torch.cat([file.read(name).reshape(-1) for name in names]).double()


def _products(names: Sequence[str], mean: torch.Tensor, one: Contribution) -> torch.Tensor:
    """With the mean of all, and with itself."""
    values = _values(names, one)
    return torch.stack([values @ mean, values @ values])
