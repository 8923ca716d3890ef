"""What a site's training lowers, and by what its validation images are scored.

Images of one class each, or of a group of classes; or of any number of classes, where a site may
not have annotated all of them: what is not known is in no loss and in no score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from finetune.cases import Case
from finetune.losses import label_weights, loss_on_seen, rarity
from finetune.pixels import Images
from merge_kit.labelspace import cells_of

Truth = NDArray[np.integer[Any]]
"""Labels (n,), or targets (n, C): see `finetune.scores`."""


class Objective(Protocol):
    """A loss on the training images, and what of the outputs on the validation images is judged.

    Attributes
    ----------
    chances
        (n,) float64: by which the training images are drawn so that no class is favoured.
    """

    chances: Tensor

    def masses(self, *, weighted: bool) -> Tensor:
        """(n,) float64: how much each training image counts in the mean loss."""
        ...

    def loss(self, outputs: Tensor, indices: Sequence[int] | None, *, weighted: bool) -> Tensor:
        """The mean loss of outputs (b, C) on these training images, or on all of them; `weighted`
        against class imbalance."""
        ...

    def validation_loss(self, outputs: Tensor) -> float:
        """Of outputs (n, C) on the validation images; 0 where nothing of them is learnt."""
        ...

    def judged(self, outputs: Tensor) -> tuple[Truth, NDArray[np.float64]]:
        """What is known of the validation images, and the probabilities to hold against it."""
        ...


class ClassObjective:
    """Cross-entropy of images of one class, or of a group of classes: see `finetune.losses`."""

    def __init__(
        self, train: Images, validation: Images, seen: Tensor, meaning: Tensor | None = None
    ) -> None:
        self._labels, self._told = train.labels(), validation.labels()
        self._seen, self._meaning = seen, meaning
        self._rarity = rarity(self._labels, meaning)
        self._weights = label_weights(self._labels, seen, meaning)
        self.chances = self._rarity[self._labels]

    def masses(self, *, weighted: bool) -> Tensor:
        """See `Objective`."""
        return self.chances if weighted else torch.ones(len(self._labels), dtype=torch.float64)

    def loss(self, outputs: Tensor, indices: Sequence[int] | None, *, weighted: bool) -> Tensor:
        """See `Objective`."""
        labels = self._labels if indices is None else self._labels[list(indices)]
        return loss_on_seen(
            outputs,
            labels.to(outputs.device),
            self._seen.to(outputs.device),
            self._weights.to(outputs.device) if weighted else None,
            None if self._meaning is None else self._meaning.to(outputs.device),
        )

    def validation_loss(self, outputs: Tensor) -> float:
        """Over the images of classes with training images."""
        labels, seen, meaning = self._told, self._seen, self._meaning
        known = seen[labels] if meaning is None else (meaning[labels] & seen).any(dim=1)
        if not known.any():
            return 0.0
        return float(loss_on_seen(outputs[known], labels[known], seen, None, meaning))

    def judged(self, outputs: Tensor) -> tuple[Truth, NDArray[np.float64]]:
        """Labels (n,) and probabilities (n, K).

        Classes without training images are never predicted. Where a label names a group, its
        classes are one: their probabilities are summed for all images, so that every label can be
        right or wrong (see `labelspace.cells_of`).
        """
        labels, meaning = self._told, self._meaning
        chances = outputs.masked_fill(~self._seen, -torch.inf).softmax(dim=1).double()
        if meaning is not None:
            cells = cells_of(labels, meaning)
            labels = cells[meaning[labels].int().argmax(dim=1)]
            chances = chances.new_zeros(len(chances), int(cells.max()) + 1).index_add_(
                1, cells, chances
            )
        return labels.numpy(), chances.numpy()


class FindingObjective:
    """Binary cross-entropy over the entries that are known, of findings with images that have them
    and images that do not.

    Against imbalance the images with a finding and those without it weigh alike, whatever their
    numbers; drawn, each of these parts of a finding has the same chance.
    """

    def __init__(self, train: Images, validation: Images, seen: Tensor) -> None:
        self._targets, self._told, self._seen = train.targets(), validation.targets(), seen
        self._known = (self._targets >= 0) & seen
        present, absent = ((self._targets == value) & self._known for value in (1, 0))
        sizes = self._known.sum(dim=0).double()
        shares = sum(
            part.double() / part.sum(dim=0).clamp(min=1).double() for part in (present, absent)
        )
        assert isinstance(shares, Tensor)  # of two parts
        self.chances = shares.sum(dim=1)
        self._weights = shares * sizes / 2

    def masses(self, *, weighted: bool) -> Tensor:
        """See `Objective`."""
        return self._entries(None, weighted).sum(dim=1)

    def _entries(self, indices: Sequence[int] | None, weighted: bool) -> Tensor:
        """(b, C) float64: how much each entry counts; 0 for what is not known."""
        entries = self._weights if weighted else self._known.double()
        return entries if indices is None else entries[list(indices)]

    def loss(self, outputs: Tensor, indices: Sequence[int] | None, *, weighted: bool) -> Tensor:
        """See `Objective`."""
        targets = self._targets if indices is None else self._targets[list(indices)]
        return _loss(outputs, targets, self._entries(indices, weighted))

    def validation_loss(self, outputs: Tensor) -> float:
        """Over the known entries of findings that are learnt."""
        known = (self._told >= 0) & self._seen
        return float(_loss(outputs, self._told, known.double()))

    def judged(self, outputs: Tensor) -> tuple[Truth, NDArray[np.float64]]:
        """Targets (n, C), of findings that are learnt, and the probability of each."""
        told = self._told.where(self._seen, -1)
        return told.numpy(), outputs.double().sigmoid().numpy()


def seen_findings(targets: Tensor) -> Tensor:
    """(C,) bool: findings that some images have and some do not, of targets (n, C)."""
    return (targets == 1).any(dim=0) & (targets == 0).any(dim=0)


def _loss(outputs: Tensor, targets: Tensor, entries: Tensor) -> Tensor:
    weights = entries.to(outputs.device, outputs.dtype)
    truth = (targets == 1).to(weights)
    total = functional.binary_cross_entropy_with_logits(
        outputs, truth, weight=weights, reduction="sum"
    )
    return total / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def told_of(case: Case) -> list[Any]:
    """What is known of a case, by which runs and checkpoints tell labels apart."""
    return [case.label] if case.targets is None else [list(case.targets)]
