"""What several models say of one image, made one: each on the classes that it knows.

A model's logits are known up to a constant, and a site's classifier was trained on the classes that
it has seen alone: so each model's logits count relative to their mean over the classes that it
knows, and of a class only those models speak that know it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge_kit.errors import DataError

_STEPS = 100
LOWEST = -30.0
"""Of a log-probability: about that of one in 10^13."""


def combined(logits: Tensor, known: Tensor, weights: Tensor) -> Tensor:
    """The logits of an ensemble: of each class the weighted mean of the models that know it.

    Where every model knows every class it is the weighted mean of the logits, as FedDF's (arXiv
    2006.07242, equation 3), up to a constant for each image.

    Parameters
    ----------
    logits
        (N, n, C) float64, of N models for n images; what a model says of a class that it does not
        know is not read.
    known
        (N, C) bool.
    weights
        (N, n, C) float64 or a shape that broadcasts to it, not negative. Where all that know a
        class have the weight 0 there they count alike.

    Returns
    -------
    Tensor
        (n, C) float64; minus infinity for a class that no model knows.
    """
    there = known[:, None, :].expand_as(logits)
    counted = logits.where(there, 0.0)
    centred = counted - counted.sum(dim=2, keepdim=True) / there.sum(dim=2, keepdim=True).clamp(
        min=1
    )
    given = weights.to(logits).expand_as(logits).where(there, 0.0)
    silent = (given.sum(dim=0) == 0).expand_as(given)
    given = torch.where(silent, there.to(given), given)
    total = given.sum(dim=0)
    mixed = (given * centred.where(there, 0.0)).sum(dim=0) / total.where(total > 0, 1.0)
    return mixed.masked_fill(total == 0, -torch.inf)


def certainty(logits: Tensor, known: Tensor) -> Tensor:
    """How sure each model is of each image: 1 less the entropy of its probabilities over that of
    knowing nothing, (N, n, 1) float64 from 0 to 1; 1 of a model that knows one class.

    Parameters
    ----------
    logits, known
        As for `combined`.
    """
    masked = logits.masked_fill(~known[:, None, :], -torch.inf)
    logs = masked.log_softmax(dim=2)
    entropy = -(logs.exp() * logs.where(logs.isfinite(), 0.0)).sum(dim=2, keepdim=True)
    most = known.sum(dim=1).clamp(min=2).double().log()[:, None, None]
    return (1 - entropy / most).clamp(0, 1)


def stacked(logits: Tensor, known: Tensor, labels: Tensor) -> Tensor:
    """The weight of each model under which the ensemble fits a few labelled images best.

    Minimises the cross-entropy of `combined` over weights that sum to N, with a factor for all
    logits that is fitted along (how sharp the ensemble is must not decide who is in it).

    Parameters
    ----------
    logits, known
        As for `combined`.
    labels
        (n,) int64.

    Returns
    -------
    Tensor
        (N, 1, 1) float64.

    Raises
    ------
    DataError
        No labelled image is of a class that a model knows.
    """
    useful = known.any(dim=0)[labels]
    if not useful.any():
        raise DataError("no labelled image is of a class that a teacher knows: give others.")
    logits, labels = logits[:, useful], labels[useful]
    shares = torch.zeros(len(logits), dtype=torch.float64, requires_grad=True)
    sharpness = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [shares, sharpness], max_iter=_STEPS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        mixed = combined(logits, known, _of(shares)) * sharpness.exp()
        # Few images: a weak pull keeps a model that they say nothing about where it was.
        found = torch.nn.functional.cross_entropy(mixed, labels) + 1e-3 * shares.square().sum()
        torch.autograd.backward(found)
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return _of(shares.detach())


def _of(shares: Tensor) -> Tensor:
    return (shares.softmax(dim=0) * len(shares))[:, None, None]


def bounded(logits: Tensor, known: Tensor) -> Tensor:
    """Log-probabilities over the classes that each model knows, at least `LOWEST`: nobody shouts
    the others down by the size of its numbers.

    Parameters
    ----------
    logits, known
        As for `combined`.
    """
    there = known[:, None, :].expand_as(logits)
    logs = logits.masked_fill(~there, -torch.inf).log_softmax(dim=2)
    return logs.clamp(min=LOWEST).where(there, 0.0)


def spread(found: Tensor, rows: Sequence[int], classes: int) -> Tensor:
    """A model's logits (n, K) under the classes of the federation: (n, C) float64.

    `rows` has for each of its K outputs the federation's class, -1 where that has none.
    """
    told = [index for index, row in enumerate(rows) if row >= 0]
    out = torch.zeros(len(found), classes, dtype=torch.float64)
    out[:, [rows[index] for index in told]] = found[:, told].double()
    return out
