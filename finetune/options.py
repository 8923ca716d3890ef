"""How a site trains: one checked document, from defaults, a YAML file and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from merge_kit.errors import UsageError
from merge_kit.schema import Document, Place, parse


class TrainingOptions(Document):
    """Head first, then the whole network at a low learning rate (LP-FT, arXiv 2202.10054)."""

    steps: int = Field(default=160, ge=0)
    """Steps of the whole network; 0 trains the head alone. Sites that take the same number drift
    alike, which merges better than the same number of epochs. Fewer are as good as done sooner, and
    lose a few points (docs/results.md)."""
    epochs: float | None = Field(default=None, ge=0)
    """Length in epochs instead of steps."""
    validations: int = Field(default=4, ge=1)
    """How often the site's validation images are looked at during training."""
    batch_size: int = Field(default=32, ge=1)
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients are added before a step."""
    learning_rate: float = Field(default=1e-4, gt=0)
    layer_decay: float = Field(default=0.9, gt=0, le=1)
    """Factor of the learning rate from one block to the one before it."""
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises; then it falls as a cosine."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    head: Literal["auto", "federation", "own"] = "auto"
    """Classifier to start from: the federation's, solved from the moments on the hub and kept as it
    is, so that classifiers of several sites do not conflict; or the site's own, trained on the
    frozen backbone and then with it; auto takes the federation's where there is one."""
    head_steps: int = Field(default=300, ge=0)
    """Steps of the site's own head on the frozen backbone's features."""
    head_learning_rate: float = Field(default=0.01, gt=0)
    head_decay: float = Field(default=0.02, ge=0)
    """Factor of the squared norm of the head's weights in its loss: large heads merge badly."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd has momentum, and wants a larger learning rate."""
    blocks: float = Field(default=1.0, gt=0, le=1)
    """Share of the backbone's blocks that are trained, counted from the last one."""
    lora: int = Field(default=0, ge=0)
    """Rank of LoRA: the linear layers of the blocks learn products of two thin matrices, all else
    of the body stays, and the vector is sent as these; 0 for none. Wants a learning rate ten times
    as large; distance is that of the products, sharpness climbs in the matrices."""
    lora_alpha: float = Field(default=16.0, gt=0)
    """Over the rank the factor of LoRA's products."""
    mutual: str | None = None
    """A private teacher that learns beside the network and teaches it (FedKD): a timm folder, or a
    name of timm's, whose pretrained weights are taken. It never leaves the site."""
    mutual_rate: float = Field(default=1e-4, gt=0)
    """Learning rate of the private teacher."""
    mutual_features: float = Field(default=1.0, ge=0)
    """Weight of the distance between the teacher's features and a linear map of the network's."""
    soup: int = Field(default=0, ge=0)
    """Members of a local superior soup (LSS), which share the steps; their mean is published. 0 for
    none."""
    soup_affinity: float = Field(default=3.0, ge=0)
    """Pull of a soup's members towards the base, by their distance from it. The paper's 3 goes with
    its learning rate of 5e-4; with 1e-4 it all but holds them there, and 0.1 lets them go."""
    soup_diversity: float = Field(default=3.0, ge=0)
    """Push of a soup's members away from each other, by their mean distance."""
    distance: float = Field(default=0.0, ge=0)
    """Pull of the trained weights towards the base's (L2-SP, FedProx)."""
    sharpness: float = Field(default=0.0, ge=0)
    """Radius of sharpness-aware minimisation; 0 for none. Doubles the time of a step."""
    average: float = Field(default=0.0, ge=0, lt=1)
    """Share of the last steps whose weights are averaged (SWA); 0 for none."""
    norm: Literal["frozen", "update", "fixed"] = "frozen"
    """Batch norm: running statistics of the base, or updated from the site's batches; or fixed, the
    weights of all norm layers, too."""
    balance: Literal["none", "weights", "sampling"] = "sampling"
    """Against class imbalance: nothing, weights in the loss, or classes drawn alike."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the moving average of the weights that is published; 0 for none."""
    augment: Literal["none", "light", "strong"] = "light"
    flip: Literal["none", "horizontal", "both"] = "horizontal"
    select: Literal["balanced_accuracy", "macro_auroc", "last"] = "last"
    """Which weights are kept: the last, or the best on the site's validation images. The best of a
    site with few of them may be those before the first step, which add nothing to a merge."""
    patience: int = Field(default=3, ge=1)
    """Validations without a better figure before training stops."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = Field(default=0, ge=0, lt=2**63)

    def identity(self) -> dict[str, Any]:
        """By what a run is told from others: runs of before there were private teachers are those
        without one."""
        return self.model_dump(mode="json", exclude=set() if self.mutual else _OF_A_TEACHER)


_OF_A_TEACHER = {"mutual", "mutual_rate", "mutual_features"}
_DEFAULTS = {name: field.default for name, field in TrainingOptions.model_fields.items()}
_APART = (
    ("mutual", ("soup", "sharpness"), "a private teacher goes with one network, and one pass back"),
    ("lora", ("ema", "average", "soup"), "a mean of LoRA's factors is not the mean of its weights"),
    ("soup", ("ema", "average"), "a soup is a mean of weights already"),
)


def make_options(data: Mapping[str, Any], where: str | Place) -> TrainingOptions:
    """Check training options.

    Raises
    ------
    UsageError
        An unknown key (with the nearest known one), a value out of its range, or options that do
        not go together.
    """
    options = parse(TrainingOptions, data, where, UsageError)
    for first, others, reason in _APART:
        for other in others:
            # Everything that is apart is off by default.
            if all(getattr(options, n) != _DEFAULTS[n] for n in (first, other)):
                raise UsageError(
                    f"{where}: '{first}' and '{other}' do not go together: {reason}; "
                    "leave one of them out."
                )
    if options.soup and options.norm == "update":
        raise UsageError(
            f"{where}: 'soup' and 'norm: update' do not go together: the mean of the members would "
            "have the statistics of the last one; leave one of them out."
        )
    return options
