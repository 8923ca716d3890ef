"""What a site measured, or what its model says, as `publish` finds it: tensors and a draft."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.run import software
from merge_kit.files import canonical_json, sha256_file, write_atomic
from merge_kit.manifest import Draft, Kind, Payload
from merge_kit.publishing import draft_file, payload_file
from merge_kit.schema import now
from merge_kit.site import Site
from merge_kit.statistics import StatisticsHeader
from merge_kit.tensorfile import write_tensors
from merge_kit.vector import METADATA_KEY


def write_measured(
    site: Site,
    folder: Path,
    kind: Kind,
    about: str,
    tensors: Mapping[str, Tensor],
    counts: Mapping[str, Any],
) -> None:
    """Write the tensors and then the draft of a contribution that is `manifest.OF_A_MODEL`.

    Parameters
    ----------
    about
        The manifest's field of that name.
    counts
        The fields of the manifest that count images.
    """
    federation, path = site.federation, folder / payload_file(kind)
    origin = {
        "base": federation.base_fingerprint,
        "federation": federation.contract_hash,
        "site": site.name,
        "kind": kind,
        "about": about,
    }
    header = StatisticsHeader.model_validate(origin)
    write_tensors(path, tensors, (METADATA_KEY, canonical_json(header.model_dump()).decode()))
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
    draft = Draft.model_validate(
        {
            **origin,
            "payload": Payload(sha256=sha256_file(path), size=path.stat().st_size, norm=norm),
            **counts,
            "preprocessing": federation.preprocessing.hash,
            "software": software(),
            "created_at": now(),
        }
    )
    write_atomic(folder / draft_file(kind), draft.model_dump_json(indent=2))
