"""A merged model made a site's own: nearer to the site's weights, under its own classifier.

What is best for one site need not be best for all. Candidates lie between the merged model and the
site's own, classifier and all, or with a classifier that is solved from the site's own images, and
with norm statistics measured on them or not; the site's validation images choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from finetune import network, scores
from finetune.calibrating import backbone_at
from finetune.cases import Case
from finetune.labelling import Labelling
from finetune.normalizing import norm_layers, norm_sums
from finetune.objectives import Objective
from finetune.options import TrainingOptions
from finetune.own_head import check_place
from finetune.pixels import Images
from finetune.run import MODEL, Material, prepare
from merge_kit import moments, normstats
from merge_kit.checkpoints import WEIGHTS
from merge_kit.configuration import CONFIG
from merge_kit.errors import TrainingError, UsageError
from merge_kit.files import new_folder, write_atomic
from merge_kit.manifest import read_draft
from merge_kit.publishing import DRAFT
from merge_kit.runs import latest_run
from merge_kit.site import Site
from merge_kit.solving import HeadOptions, solve
from merge_kit.tensorfile import TensorFile, read_all, specs_of, write_tensors
from merge_kit.writing import METADATA

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
Head = Literal["between", "solved"]
Norms = Literal["between", "measured"]


@dataclass(frozen=True, slots=True)
class Choice:
    """One candidate and its figures on the site's validation images."""

    share: float
    """How far from the merged weights (0) to the site's own (1)."""
    head: Head
    """Between the merged classifier and the site's own, or solved from the site's images."""
    norms: Norms
    """Norm statistics: between the two models', or measured on the site's images."""
    balanced_accuracy: float
    loss: float


@dataclass(frozen=True, slots=True)
class Personalised:
    """What was tried and taken."""

    choices: tuple[Choice, ...]
    """Nearest to the merged model first; that itself is the first one."""
    best: Choice
    validation_images: int
    skipped: tuple[str, ...]


def personalise(
    site: Site,
    cases: Sequence[Case],
    model: Path,
    out: Path,
    device: torch.device,
    *,
    shares: Sequence[float] = SHARES,
    skip_unreadable: bool = False,
    stage: Callable[[str, int, int], None] = lambda name, done, of: None,
) -> Personalised:
    """Write the candidate with the best balanced accuracy on the site's validation images.

    Of equal ones that with the least loss is taken, then the one nearest to the merged model.
    Without a finished run of the site there is nothing to come nearer to: the share is 0.

    Raises
    ------
    UsageError
        `out` exists or lies in a federation, or the site has a task of its own.
    ProvenanceError, BaseMismatchError
        The model is of no federation, or of another one.
    """
    check_place(out)
    backbone_at(site, model)
    own = _own_model(site)
    material = prepare(
        site,
        cases,
        skip_unreadable=skip_unreadable,
        progress=lambda done, of: stage("decoding", done, of),
    )
    merged = _state(model)
    theirs = _state(own) if own else None
    labelling = Labelling(site.federation)
    opened = network.load(model).to(device)
    task = labelling.task(opened, material.train, material.validation, TrainingOptions(), device)
    if not labelling.multi_label:
        # As it will be used: a class that the site has not trained may be predicted all the same.
        task = replace(task, seen=torch.ones_like(task.seen))
    objective, choices, kept = task.objective(), list[Choice](), dict[str, Tensor]()
    best: Choice | None = None
    wanted = [share for share in shares if theirs is not None or share == 0]
    norms: tuple[Norms, ...] = ("between", "measured")
    norms = norms if norm_layers(opened) else norms[:1]
    heads: tuple[Head, ...] = ("between", "solved")
    heads = heads[:1] if labelling.multi_label else heads
    tried = list(product(wanted, norms))
    for done, (share, norm) in enumerate(tried, 1):
        opened.load_state_dict(_between(merged, theirs, share))
        if norm == "measured":
            _measure_norms(opened, material.train, device)
        for head in heads:
            if head == "solved":
                _solve_head(opened, material, labelling, device)
            found = _judged(opened, material, objective, share, head, norm, device)
            choices.append(found)
            if best is None or _rank(found) > _rank(best):
                best, kept = found, {n: t.cpu().clone() for n, t in opened.state_dict().items()}
        stage("candidates", done, len(tried))
    assert best is not None  # the merged model itself is one
    with new_folder(out) as folder:
        write_tensors(folder / WEIGHTS, kept, METADATA)
        write_atomic(folder / CONFIG, site.federation.model_config_json)
    return Personalised(tuple(choices), best, len(material.validation), material.skipped)


def _own_model(site: Site) -> Path | None:
    run = latest_run(site.root)
    if run is None:
        return None
    if read_draft(run / DRAFT).other_images:
        raise UsageError(
            f"site '{site.name}' has a task of its own: 'merge-kit calibrate --own-classes' puts "
            "its classifier on the merged backbone."
        )
    return run / MODEL


def _state(folder: Path) -> dict[str, Tensor]:
    with TensorFile(folder / WEIGHTS) as file:
        return dict(read_all(file))


def _between(
    merged: Mapping[str, Tensor], own: Mapping[str, Tensor] | None, share: float
) -> dict[str, Tensor]:
    """(1 - share) merged + share own, in float32; counters and tables are the merged ones."""
    if own is None or not share:
        return dict(merged)
    return {
        name: torch.lerp(tensor.float(), own[name].float(), share)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in merged.items()
    }


def _measure_norms(model: nn.Module, images: Images, device: torch.device) -> None:
    found = normstats.running_statistics(
        norm_sums(model, images, device), specs_of(model.state_dict())
    )
    model.load_state_dict({**model.state_dict(), **found})


def _solve_head(
    model: nn.Module, material: Material, labelling: Labelling, device: torch.device
) -> None:
    """Rows from the features of the site's own images of single classes; those of classes that it
    has none of stay."""
    labels, size = material.train.labels(), len(labelling.space.classes)
    single = [place for place, label in enumerate(labels.tolist()) if label < size]
    if not single:
        return
    features = network.features(model, material.train.take(single), device).flatten(1)
    found = moments.measure(features, labels[single], size)
    solved, _ = solve([found], HeadOptions())
    with torch.no_grad():
        for name, parameter in network.head_of(model).named_parameters():
            rows = getattr(solved, name).reshape(parameter.shape).to(parameter)
            seen = (found.counts > 0).to(parameter.device)
            parameter[seen] = rows[seen]


def _judged(
    model: nn.Module,
    material: Material,
    objective: Objective,
    share: float,
    head: Head,
    norms: Norms,
    device: torch.device,
) -> Choice:
    outputs = network.logits(model, material.validation, device)
    if not torch.isfinite(outputs).all():
        raise TrainingError("the outputs on the validation images are not finite.")
    truth, chances = objective.judged(outputs)
    figure = scores.balanced_accuracy(truth, chances)
    return Choice(share, head, norms, figure, objective.validation_loss(outputs))


def _rank(choice: Choice) -> tuple[float, float]:
    return choice.balanced_accuracy, -choice.loss


def told(choices: Sequence[Choice]) -> Iterator[str]:
    """One line for each candidate."""
    for one in choices:
        yield (
            f"  share {one.share:.2f}  classifier {one.head:<7}  norm statistics {one.norms:<8}  "
            f"balanced accuracy {one.balanced_accuracy:.3f}  loss {one.loss:.3f}"
        )
