"""What lies on a hub, as figures: the rows of `merge-kit status`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from typing import Any

import torch

from merge_kit import vector
from merge_kit.contributions import Contribution, Entry, Trust, list_entries, live, speaks_of
from merge_kit.federation import BASE_WEIGHTS, Federation
from merge_kit.hub import Hub
from merge_kit.manifest import Kind
from merge_kit.parameters import Role, roles_of
from merge_kit.payloads import check_payloads
from merge_kit.tensorfile import TensorFile


def checked(hub: Hub, federation: Federation) -> list[Entry]:
    """All that lies on a hub, every payload read and checked as `merge` would check it."""
    return check_payloads(list_entries(hub, federation), federation, hub.fetch(BASE_WEIGHTS))


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
        roles = roles_of(base.specs, federation.classifier)
    counted = live(entries)
    vectors = [c for c in counted if c.kind == "vector"]
    beside = [c for c in counted if c.kind != "vector"]
    cosines = dict(zip([c.id for c in vectors], cosines_to_mean(vectors, roles), strict=True))
    shown = [entry for entry in entries if entry.problem or entry.kind == "vector"]
    rows = [_row(entry, cosines, beside, now) for entry in shown]
    return sorted(rows, key=lambda row: (row["problem"] is not None, row["site"], row["created"]))


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
    contributions: Sequence[Contribution], roles: Mapping[str, Role]
) -> list[float]:
    """Cosine of each vector's weights to the plain mean of all, from one pass over the files.

    With the Gram matrix G_ij = tau_i . tau_j the cosine is sum_j G_ij / sqrt(G_ii sum_jk G_jk), so
    no vector is held in memory. nan for a vector of zeros.
    """
    size = len(contributions)
    gram = torch.zeros((size, size), dtype=torch.float64)
    with ExitStack() as stack:
        files = [stack.enter_context(vector.opened(c.payload)) for c in contributions]
        for name, role in roles.items():
            if role is Role.WEIGHT and files:
                block = torch.stack([file.read(name).reshape(-1) for file in files]).double()
                gram += block @ block.T
    total = float(gram.sum())
    scales = [math.sqrt(max(float(gram[i, i]) * total, 0.0)) for i in range(size)]
    return [float(gram[i].sum()) / scale if scale else math.nan for i, scale in enumerate(scales)]
