"""What the labels of a site's images mean: the federation's classes and groups, or its own classes.

A site of another task trains the shared backbone under a classifier of its own, which never leaves
it: its vector says nothing of the federation's classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune import network
from finetune.losses import seen_classes
from finetune.objectives import seen_findings
from finetune.options import TrainingOptions
from finetune.pixels import Images
from finetune.tasks import Task
from merge_kit.errors import UsageError
from merge_kit.federation import BASE_WEIGHTS, Federation
from merge_kit.labelspace import LabelSpace
from merge_kit.manifest import suppressed_counts
from merge_kit.site import COPY, Site
from merge_kit.tensorfile import TensorFile

LONGEST = 100


@dataclass(frozen=True, slots=True)
class Labelling:
    """The labels of a site's images."""

    federation: Federation
    own_classes: tuple[str, ...] = ()
    """Classes of the site's own task; empty where the federation's are learnt."""

    @property
    def space(self) -> LabelSpace:
        """The classes that the model has, and what labels there are."""
        return LabelSpace(self.own_classes) if self.own_classes else self.federation.labels

    @property
    def multi_label(self) -> bool:
        """An image has any number of the classes, or none."""
        return self.federation.multi_label and not self.own_classes

    def task(
        self,
        model: nn.Module,
        train: Images,
        validation: Images,
        options: TrainingOptions,
        device: torch.device,
    ) -> Task:
        """What the site's images let it learn."""
        if self.multi_label:
            seen = seen_findings(train.targets())
            return Task(model, train, validation, seen, options, device, multi_label=True)
        labels = train.labels()
        meaning = self.meaning(torch.cat([labels, validation.labels()]))
        seen = seen_classes(labels, len(self.space.classes), meaning)
        return Task(model, train, validation, seen, options, device, meaning)

    @property
    def config(self) -> str:
        """The config.json of the site's own model."""
        if not self.own_classes:
            return self.federation.model_config_json
        changes = {"classes": self.own_classes, "groups": {}, "multi_label": False}
        return self.federation.model_copy(update=changes).model_config_json

    def meaning(self, labels: Tensor) -> Tensor | None:
        """(L, C) bool: the classes of each label; None where every label (n,) is a class."""
        space = self.space
        return space.meaning if bool((labels >= len(space.classes)).any()) else None

    def base(self, site: Site) -> nn.Module:
        """The base, with a classifier of zeros where the classes are the site's own."""
        model = network.load(site.base_folder)
        return network.with_classes(model, len(self.own_classes)) if self.own_classes else model

    def shared(self, site: Site, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a model's state is the federation's; a classifier of its own gives way to the
        base's, so that the vector's rows are zero."""
        found = dict(state)
        if self.own_classes:
            with TensorFile(site.root / COPY / BASE_WEIGHTS) as base:
                for name in base.specs:
                    if name.rpartition(".")[0] in self.federation.classifier:
                        found[name] = base.read(name)
        return found

    def truth(self, images: Images) -> Tensor:
        """Labels (n,), or where an image may have several classes targets (n, C)."""
        return images.targets() if self.multi_label else images.labels()

    def counts(self, labels: Tensor) -> dict[str, Any]:
        """The fields of a manifest that count the training images, small numbers hidden.

        Parameters
        ----------
        labels
            What `truth` gives of them.
        """
        federation = self.federation
        minimum = federation.policy.minimum_class_count
        if self.multi_label:
            return suppressed_counts(finding_counts(federation, labels), minimum)
        found = torch.bincount(labels, minlength=len(self.space.names)).tolist()
        if self.own_classes:
            told: dict[str, Any] = {
                "class_counts": dict.fromkeys(federation.classes, 0),
                "other_images": len(labels),
            }
            if federation.multi_label:
                told |= finding_counts(federation, labels.new_empty(0, len(federation.classes)))
        else:
            size = len(federation.classes)
            told = {"class_counts": dict(zip(federation.classes, found[:size], strict=True))}
            if any(found[size:]):
                told["group_counts"] = dict(zip(federation.groups, found[size:], strict=True))
        return suppressed_counts(told, minimum)


def finding_counts(federation: Federation, targets: Tensor) -> dict[str, Any]:
    """The fields of a manifest that count images of findings, from targets (n, C)."""
    present, absent = ((targets == mark).sum(dim=0).tolist() for mark in (1, 0))
    return {
        "class_counts": dict(zip(federation.classes, present, strict=True)),
        "absent_counts": dict(zip(federation.classes, absent, strict=True)),
        "images": len(targets),
    }


def own_labelling(federation: Federation, names: Sequence[str]) -> Labelling:
    """The labelling of a site with classes of its own.

    Raises
    ------
    UsageError
        They are fewer than two, too long, not told apart, or the federation has them all.
    """
    if len(names) < 2 or any(len(name) > LONGEST for name in names):
        raise UsageError(
            "--own-classes: name at least two classes of at most 100 characters, with commas "
            "between them."
        )
    folded = [name.casefold() for name in names]
    if twice := next((n for n in names if folded.count(n.casefold()) > 1), None):
        raise UsageError(f"--own-classes names the class '{twice}' twice: name each once.")
    if set(folded) <= {name.casefold() for name in federation.classes}:
        raise UsageError(
            "--own-classes: the federation has all of these classes: leave it out, and the site's "
            "images count for them."
        )
    return Labelling(federation, tuple(names))
