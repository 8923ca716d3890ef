"""Outputs of several networks for the same images: computed once, batch by batch, and kept on disk.

Batch i holds the images from `BATCH` * i on. Its outputs are kept as soon as they are there (see
`finetune.kept`), so that a killed call goes on where it was and a second one runs no network and
decodes nothing. Images that are added at the end leave the batches before them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from finetune import kept, network
from finetune.cases import Case
from finetune.pixels import Images, read_pixels, stored_size
from merge_kit.checkpoints import Checkpoint
from merge_kit.errors import MergeKitError, VectorError
from merge_kit.federation import Preprocessing
from merge_kit.plain import Sound, sound
from merge_kit.remembered import check_unchanged, look

Batch: TypeAlias = Sequence[int]
"""Places of images."""
Stage = Callable[[str, int, int], None]

BATCH = 64
"""Images of a batch: its composition may show in the last bits, so it never changes."""
HELD = 2**30
"""Bytes of decoded images that are in memory at once; a batch at least."""


@dataclass(slots=True)
class Network:
    """One network and its outputs by the first image of each batch, (b, K) float32."""

    name: str
    place: Path
    """Where it lies, for messages."""
    key: str
    """What its outputs depend on but for the images; see `kept.model_key`."""
    size: int
    """K, the number of outputs."""
    preprocessing: Preprocessing
    load: Callable[[], nn.Module]
    """In evaluation mode, on the CPU."""
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def logits(self) -> Tensor:
        """(n, K) float32 of all images; those of unreadable images mean nothing."""
        return torch.cat([self.outputs[start] for start in sorted(self.outputs)])


def load_exactly(folder: Path, fingerprint: str) -> nn.Module:
    """A timm folder, with the very weights of a fingerprint.

    Raises
    ------
    VectorError
        They are not there any more.
    """
    with Checkpoint(folder) as file:
        found, checked = look(file, Sound, sound)
        loaded = network.load(folder)
        check_unchanged(file, checked)
    if found.fingerprint != fingerprint:
        raise VectorError(
            f"{folder} changed while it was used: let whatever writes there finish, "
            "then run the same command again."
        )
    return loaded


def check_outputs(outputs: Tensor, whose: str) -> None:
    """Refuse outputs that say nothing.

    Raises
    ------
    VectorError
        One is NaN or infinite.
    """
    if not bool(outputs.isfinite().all()):
        raise VectorError(
            f"{whose} gives outputs that are NaN or infinite: leave it out, and ask its site to "
            "train again."
        )


class Outputs:
    """The images of one call, and what is known of them so far.

    Parameters
    ----------
    keys
        Content of each image, as `finetune.cases.content_key` gives it.
    cache
        None keeps nothing.
    precision
        float32, bfloat16, or auto: bfloat16 on a GPU that computes in it.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        keys: Sequence[str],
        device: torch.device,
        cache: Path | None,
        *,
        precision: str = "auto",
        skip_unreadable: bool = False,
        progress: Stage | None = None,
    ) -> None:
        self._cases, self._device, self._cache = cases, device, cache
        self.precision = network.resolved(precision, device)
        self._skip = skip_unreadable
        self._report = progress or (lambda name, done, of: None)
        self.batches = list(network.chunks(len(cases), BATCH))
        self._chunks = {
            batch[0]: kept.chunk_key(keys[batch[0] : batch[-1] + 1]) for batch in self.batches
        }
        self.readable = np.ones(len(cases), dtype=bool)
        self.problems: dict[int, str] = {}
        """A sentence for each image that cannot be read, by its place."""

    def complete(self, networks: Sequence[Network], batches: Sequence[Batch]) -> None:
        """Read or compute the outputs of every network for these batches.

        Networks that look at images alike share what is decoded. A batch with an unreadable image
        is not kept.

        Raises
        ------
        MergeKitError
            An image cannot be read and may not be skipped, a network cannot be loaded, or memory
            or storage are too small.
        """
        alike: dict[str, list[Network]] = {}
        for one in networks:
            self._read(one, batches)
            alike.setdefault(one.preprocessing.hash, []).append(one)
        for group in alike.values():
            missing = [b for b in batches if any(b[0] not in one.outputs for one in group)]
            side = stored_size(group[0].preprocessing)
            held = max(1, HELD // (3 * side * side * BATCH))
            for places in network.chunks(len(missing), held):
                self._compute(group, [missing[place] for place in places])

    def _read(self, one: Network, batches: Sequence[Batch]) -> None:
        if self._cache:
            kept.tidy(self._cache, one.key)
        for batch in batches:
            if self._cache and batch[0] not in one.outputs:
                shape = len(batch), one.size
                logits = kept.read(self._cache, one.key, self._chunks[batch[0]], shape)
                if logits is not None:
                    one.outputs[batch[0]] = logits

    def _compute(self, group: Sequence[Network], batches: Sequence[Batch]) -> None:
        """Decode these batches once, and run each network on those that it lacks."""
        preprocessing = group[0].preprocessing
        rows = [row for batch in batches for row in batch]
        cases = [self._cases[row] for row in rows]
        pixels, problems = read_pixels(
            cases,
            preprocessing,
            skip_unreadable=self._skip,
            progress=lambda done, of: self._report("decoding", done, of),
        )
        self.problems |= {rows[place]: told for place, told in problems.items()}
        self.readable[[rows[place] for place in problems]] = False
        images = Images(tuple(cases), pixels, preprocessing)
        at = {row: place for place, row in enumerate(rows)}
        for one in group:
            missing = [batch for batch in batches if batch[0] not in one.outputs]
            if not missing:
                continue
            model = one.load().to(self._device)
            for done, batch in enumerate(missing, 1):
                self._run(one, model, batch, images.take([at[row] for row in batch]))
                self._report(one.name, done, len(missing))

    def _run(self, one: Network, model: nn.Module, batch: Batch, images: Images) -> None:
        places = np.flatnonzero(self.readable[list(batch)])
        logits = torch.zeros(len(batch), one.size)
        if len(places):
            try:
                found = network.logits(
                    model,
                    images.take(places.tolist()),
                    self._device,
                    batch_size=BATCH,
                    precision=self.precision,
                )
            except torch.OutOfMemoryError as error:
                raise MergeKitError(
                    f"{self._device} has too little memory for {BATCH} images of "
                    f"'{one.name}' at once: free some, or use --device cpu."
                ) from error
            if found.shape[1] != one.size:
                raise VectorError(
                    f"{one.place} gives {found.shape[1]} outputs for {one.size} classes: "
                    "correct its config.json."
                )
            logits[places] = found
        one.outputs[batch[0]] = logits
        if self._cache and len(places) == len(batch):
            kept.write(self._cache, one.key, self._chunks[batch[0]], logits)
