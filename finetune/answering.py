"""What a site's private model says of images that everybody has, in a folder to be published."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from finetune.cases import Case, content_key
from finetune.drafting import write_measured
from finetune.ensembling import spread
from finetune.outputs import Outputs, Stage, check_outputs
from finetune.run import alone
from finetune.teachers import Teacher
from merge_kit import predictionsfile
from merge_kit.errors import DataError
from merge_kit.files import canonical_json, sha256_bytes
from merge_kit.manifest import suppress
from merge_kit.predictionsfile import Predictions
from merge_kit.publishing import payload_file
from merge_kit.site import Site

ANSWERS = "predictions"
KIND: Literal["predictions"] = "predictions"


@dataclass(frozen=True, slots=True)
class Answered:
    """What has been written."""

    folder: Path
    images: int
    about: str
    """Digest of the set of images."""
    size: int
    """Bytes that would leave the site."""


def thinned(logits: Tensor, known: Tensor, top: int) -> Tensor:
    """Logits that tell the `top` most probable classes of each image alone: the others that are
    known share what is left of the probability evenly.

    Parameters
    ----------
    logits
        (n, C) float64.
    known
        (C,) bool; what is said of the others is 0.
    """
    size = int(known.sum())
    if top >= size:
        return logits
    logs = logits[:, known].log_softmax(dim=1)
    kept = torch.zeros_like(logs, dtype=torch.bool)
    kept.scatter_(1, logs.topk(top, dim=1).indices, True)
    rest = logs.masked_fill(kept, -torch.inf).logsumexp(dim=1, keepdim=True)
    even = (rest - math.log(size - top)).expand_as(logs)
    out = torch.zeros_like(logits)
    out[:, known] = torch.where(kept, logs, even)
    return out


def noised(logits: Tensor, known: Tensor, scale: float, seed: int) -> Tensor:
    """Logits with normal noise of a standard deviation, drawn by a seed; no privacy is promised.

    Whoever knows the seed can take the noise away again: see `secret_seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(logits.shape, generator=generator, dtype=logits.dtype) * scale
    return logits + noise.masked_fill(~known, 0.0)


def secret_seed(site: Site, about: str, key: str) -> int:
    """A seed that only the site knows, and the same for the same images and model: noise that was
    drawn anew for each publication could be averaged away."""
    secret = site.key_file.read_bytes()
    told = b"merge-kit-noise-v1\n" + canonical_json([about, key]) + b"\n" + secret
    return int(sha256_bytes(told).removeprefix("sha256:")[:15], 16)


def answer(
    site: Site,
    teacher: Teacher,
    cases: Sequence[Case],
    device: torch.device,
    cache: Path | None,
    *,
    top: int | None = None,
    noise: float = 0.0,
    counts: Mapping[str, int] | None = None,
    progress: Stage | None = None,
) -> Answered:
    """Ask a model about every image, once, and write what it says for `publish`.

    Images with the same content count once. The folder's name is a hash of all that the answers
    depend on.

    Parameters
    ----------
    top
        Tell so many classes of each image alone; see `thinned`.
    noise
        See `noised`.
    counts
        Training images of each class that the model has seen, where the site tells them.

    Raises
    ------
    DataError
        An image cannot be read.
    """
    federation = site.federation
    keys = [content_key(case) for case in cases]
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    images = sorted(first)
    about = predictionsfile.digest_of(images)
    network = teacher.network
    assert network is not None  # a model that is here
    told = [about, federation.contract_hash, network.key, top, noise, dict(counts or {})]
    folder = site.root / ANSWERS / sha256_bytes(canonical_json(told))[7:19]
    with alone(folder):
        run = Outputs(cases, keys, device, cache, progress=progress)
        run.complete([network], run.batches)
        if not np.all(run.readable):
            raise DataError(next(iter(run.problems.values())))
        said = network.logits()
        check_outputs(said, str(network.place))
        logits = spread(said, teacher.rows, len(federation.classes))
        logits = logits[[first[image] for image in images]]
        if noise:
            seed = secret_seed(site, about, network.key)
            logits = noised(logits, teacher.known, noise, seed)
        if top is not None:
            logits = thinned(logits, teacher.known, top)
        found = Predictions(tuple(images), logits.float(), teacher.known)
        told_counts = {name: (counts or {}).get(name, 0) for name in federation.classes}
        hidden = suppress(told_counts, federation.policy.minimum_class_count)
        tensors = predictionsfile.to_tensors(found)
        write_measured(site, folder, KIND, about, tensors, {"class_counts": hidden})
        size = (folder / payload_file(KIND)).stat().st_size
        return Answered(folder, len(images), about, size)
