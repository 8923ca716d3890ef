"""Rows for peft.utils.merge_utils (https://github.com/huggingface/peft), on task vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comparison import (
    Fault,
    Inputs,
    Merge,
    Row,
    StateDict,
    each_tensor,
    our_numbers,
    swapped,
    turns,
)
from peft.utils import merge_utils
from torch import Tensor

NAME, DISTRIBUTION = "peft", "peft"


def by_tensor(function: Callable[..., Tensor], weights: list[float], **options: Any) -> Merge:
    """One of its functions, tensor by tensor, on the task vectors."""

    def merge(inputs: Inputs) -> StateDict:
        shares = torch.tensor(weights)
        with swapped(torch, "bernoulli", our_numbers(turns(inputs))):
            found = {n: function(inputs.stacked(n), shares, **options) for n in inputs.base}
        return inputs.plus(found)

    return merge


def trimmed(inputs: Inputs, name: str) -> Tensor:
    """The vectors with the int(0.2 n) largest values of each left."""
    kept = []
    for tau in inputs.stacked(name):
        flat = tau.reshape(-1)
        chosen = flat.abs().topk(int(0.2 * flat.numel())).indices
        kept.append(torch.zeros_like(flat).scatter(0, chosen, flat[chosen]).reshape(tau.shape))
    return torch.stack(kept)


def decided(inputs: Inputs, name: str) -> Tensor:
    """Where the signs of what is left after trimming do not cancel out."""
    return trimmed(inputs, name).sign().sum(dim=0) != 0


def one_value_less(**options: Any) -> Merge:
    """Our TIES over each tensor, with as many values as int(0.2 n) says."""
    return each_tensor(
        lambda size: {
            "method": "ties",
            "options": {
                "density": (int(0.2 * size) - 0.5) / size,
                "scope": "tensor",
                **options,
            },
        }
    )


_ONES = [1.0] * 5
_SHARES = [1.0, 2.0, 3.0, 4.0, 5.0]

ROWS = [
    Row(
        method="sum",
        call="task_arithmetic, weights 1 to 5",
        theirs=by_tensor(merge_utils.task_arithmetic, _SHARES),
        recipe={"weights": dict(zip("abcde", _SHARES, strict=True))},
    ),
    Row(
        method="breadcrumbs",
        call="magnitude_prune, density 0.2",
        theirs=by_tensor(merge_utils.magnitude_prune, _ONES, density=0.2),
        recipe={"options": {"top": 0.0}},
    ),
    Row(
        method="ties",
        call="ties, density 0.2",
        theirs=by_tensor(merge_utils.ties, _ONES, density=0.2),
        recipe={"options": {"scope": "tensor"}},
        why="it keeps int(density n) values of a tensor; the authors' code, and ours, one more",
    ),
    Row(
        method="ties",
        call="ties, density 0.2",
        theirs=by_tensor(merge_utils.ties, _ONES, density=0.2),
        by=one_value_less(),
        note="scope: tensor, density for one value less",
    ),
    Row(
        method="ties",
        call="ties, density 0.2, frequency",
        theirs=by_tensor(merge_utils.ties, _ONES, density=0.2, majority_sign_method="frequency"),
        by=one_value_less(vote="counts"),
        note="vote: counts, scope: tensor, one value less",
        why="it takes a tied count for +1; the paper, and ours, for the sign of the majority of "
        "all values",
    ),
    Row(
        method="ties",
        call="ties, density 0.2, frequency; where the count is not tied",
        theirs=by_tensor(merge_utils.ties, _ONES, density=0.2, majority_sign_method="frequency"),
        by=one_value_less(vote="counts"),
        note="vote: counts, scope: tensor, one value less",
        where=decided,
    ),
    Row(
        method="ties",
        call="ties, density 1, weights 1 to 5",
        theirs=by_tensor(merge_utils.ties, _SHARES, density=1.0),
        recipe={
            "options": {"density": 1.0},
            "weights": dict(zip("abcde", _SHARES, strict=True)),
        },
        why="it divides the weighted sum by the number of those who agree, not by their weights: "
        "unless the weights are 1 the result is no mean",
    ),
    Row(
        method="dare",
        call="dare_linear, density 0.1, our mask",
        theirs=by_tensor(merge_utils.dare_linear, _ONES, density=0.1),
    ),
    Row(
        method="dare",
        call="dare_ties, density 0.1, our mask",
        theirs=by_tensor(merge_utils.dare_ties, _ONES, density=0.1),
        recipe={"options": {"rule": "ties"}},
    ),
]


def _doubled(inputs: Inputs) -> str:
    part = inputs.part(5, ("norm.weight",))
    once = part.stacked("norm.weight")
    ones = torch.ones(5)
    plain = merge_utils.ties(once, ones, density=1.0)
    double = merge_utils.ties(once, 2 * ones, density=1.0)
    return f"the merged vector is {float(double.norm() / plain.norm()):.2f} times as long"


FAULTS = [
    Fault("`ties` with all weights doubled, which leaves a mean unchanged", _doubled),
    Fault(
        "`ties` of a bias of 4 values at density 0.2",
        lambda inputs: (
            "the merged bias has "
            f"{int(merge_utils.ties([torch.ones(4)] * 5, torch.ones(5), 0.2).count_nonzero())}"
            " values that are not 0: it is dropped"
        ),
    ),
]
