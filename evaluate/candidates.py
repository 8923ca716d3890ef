"""Merged models that are never written: many merges, one network, judged one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from finetune import network
from finetune.pixels import Images
from finetune.scores import Interval, Score, bootstrap_intervals
from merge_kit import engine
from merge_kit.checkpoints import WEIGHTS
from merge_kit.configuration import CONFIG
from merge_kit.devices import CPU, Device
from merge_kit.federation import Federation
from merge_kit.files import write_atomic
from merge_kit.material import Material
from merge_kit.recipe import Recipe

HELD = 2 * 2**30
"""Bytes of merged models that are in memory at once; one model at least."""
RESAMPLES = 1000


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with its scale and those of its groups multiplied by a factor."""
    groups = tuple(g.model_copy(update={"scale": g.scale * factor}) for g in recipe.groups)
    return recipe.model_copy(update={"scale": recipe.scale * factor, "groups": groups})


def states(
    material: Material,
    sources: Sequence[engine.Source],
    recipe: Recipe,
    factors: Sequence[float],
    *,
    held: int = HELD,
    device: Device = CPU,
) -> Iterator[dict[str, Tensor]]:
    """The merged state dict of `scaled(recipe, factor)` for each factor, in their order.

    The vectors are read once for as many factors as fit into `held` bytes. Merged on `device`, the
    models lie on the CPU.
    """
    specs = engine.merged_specs(material.base.specs, recipe)
    size = sum(spec.nbytes for spec in specs.values())
    # A layer scaling without an alpha of its own measures the merged vector at each scale.
    alone = recipe.lines is not None and recipe.lines.alpha is None
    for places in network.chunks(len(factors), 1 if alone else max(1, held // size)):
        chosen = [factors[place] for place in places]
        given, chosen = (scaled(recipe, chosen[0]), [1.0]) if alone else (recipe, chosen)
        models = [
            {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
            for _ in chosen
        ]
        for parts in engine.merge_scales(
            material.base, sources, material.roles, given, chosen, device=device
        ):
            for model, part in zip(models, parts, strict=True):
                flat = model[part.name].view(-1)
                flat[part.begin : part.begin + part.values.numel()] = part.values
        while models:
            yield models.pop(0)


def base_network(federation: Federation, base_weights: Path) -> nn.Module:
    """The federation's network, by its contract: the configuration on a hub is not trusted."""
    with TemporaryDirectory() as place:
        write_atomic(Path(place) / CONFIG, federation.model_config_json)
        (Path(place) / WEIGHTS).symlink_to(base_weights.absolute())
        return network.load(Path(place))


class Judge:
    """Labelled images and one network, which takes the weights of one candidate after the other.

    Parameters
    ----------
    model
        On `device`; its weights are overwritten.
    score
        Labels (n,), or targets (n, C) where an image may have several classes, and probabilities
        (n, C) give a figure.
    groups
        (n,) the patient of each image, for the interval; see `bootstrap_intervals`.
    progress
        Called with the number of images done and of those to do for all candidates.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        device: torch.device,
        score: Score,
        *,
        groups: Sequence[str | None] | None = None,
        candidates: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._model, self._images, self._device = model, images, device
        self._score, self._groups = score, groups
        self._several = any(case.targets is not None for case in images.cases)
        self._labels = (images.targets() if self._several else images.labels()).numpy()
        self._done, self._total = 0, candidates * len(images)
        self._progress = progress or (lambda done, of: None)
        self._progress(0, self._total)

    def __call__(self, state: Mapping[str, Tensor]) -> Interval:
        """The figure of one candidate; nan when its outputs are not finite."""
        self._model.load_state_dict(dict(state))
        outputs = network.logits(
            self._model,
            self._images,
            self._device,
            progress=lambda done, of: self._progress(self._done + done, self._total),
        )
        self._done += len(self._images)
        exact = outputs.double()
        probabilities = (exact.sigmoid() if self._several else exact.softmax(dim=1)).numpy()
        if not np.isfinite(probabilities).all():
            return Interval(float("nan"), float("nan"), float("nan"), len(self._images))
        found = bootstrap_intervals(
            self._labels,
            probabilities,
            {"score": self._score},
            groups=self._groups,
            resamples=RESAMPLES,
            # The draw of `evaluate` for all cases, so that its figures are these.
            seed=[0, 0],
        )
        return found["score"]
