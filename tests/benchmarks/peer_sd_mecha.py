"""Rows for sd-mecha (https://github.com/ljleb/sd-mecha)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import sd_mecha
import torch
from comparison import (
    MATRICES,
    VECTORS,
    Fault,
    Inputs,
    Merge,
    Row,
    StateDict,
    each_tensor,
    our_numbers,
    ours,
    raised,
    swapped,
    turns,
)
from sd_mecha.extensions.builtin.merge_methods import linear, ties
from torch import Tensor

from merge_kit.methods.sparsify import drawn, uniform_bits

NAME, DISTRIBUTION = "sd-mecha", "sd-mecha"
RANK = 8
SHARES = {"a": 0.7, "b": 0.3}


def run(recipe: object, **options: Any) -> StateDict:
    """Its result, in float32 and in the order of the tensors; random numbers are ours."""
    return dict(sd_mecha.merge(recipe, output_dtype=torch.float32, threads=0, **options))


def on_models(build: Callable[..., object], **options: Any) -> Merge:
    """A recipe made of the base and the models."""

    def merge(inputs: Inputs) -> StateDict:
        models = map(sd_mecha.model, inputs.tuned)
        return run(build(sd_mecha.model(inputs.base), *models), **options)

    return merge


def on_deltas(build: Callable[..., object], **options: Any) -> Merge:
    """A recipe of its methods made of the task vectors; the base is added by sd-mecha."""

    def merge(inputs: Inputs) -> StateDict:
        deltas = [sd_mecha.model(tau, merge_space="delta") for tau in inputs.vectors]
        base = sd_mecha.model(inputs.base)
        with (
            swapped(torch, "bernoulli", our_numbers(turns(inputs))),
            swapped(np.random, "default_rng", _generator(inputs)),
        ):
            return run(linear.add_difference(base, build(*deltas, **options)))

    return merge


def _generator(inputs: Inputs) -> Callable[[object], object]:
    """Stands in for numpy.random.default_rng: keeps what the engine keeps."""
    order = iter(turns(inputs))

    class Ours:
        def binomial(self, n: int, p: float, size: tuple[int, ...]) -> np.ndarray[Any, Any]:
            tensor, site = next(order)
            count = int(np.prod(size))
            bits = uniform_bits(0, tensor, site, 0, count)
            return (bits < np.rint(p * 2.0**32)).reshape(size).astype(np.int64)

    return lambda seed: Ours()


def _kept(size: int) -> float:
    """Our density for the number of values that it keeps at k = 0.2."""
    count = size - max(int((1 - 0.2) * size), 1) + 1
    return min(1.0, (count - 0.5) / size)


def _as_many(**options: Any) -> Merge:
    return each_tensor(
        lambda size: {
            "method": "ties",
            "options": {"density": _kept(size), "scope": "tensor", **options},
        }
    )


def decided(inputs: Inputs, name: str) -> Tensor:
    """Where the signs of the largest values do not cancel out."""
    kept = []
    for tau in inputs.stacked(name):
        flat = tau.abs().reshape(-1)
        least = flat.kthvalue(max(int((1 - 0.2) * flat.numel()), 1)).values
        kept.append(tau.sign() * (tau.abs() >= least))
    return torch.stack(kept).sum(dim=0) != 0


def shared_out(inputs: Inputs) -> StateDict:
    """What is left of the vectors by the engine's masks, over its number and the density."""
    found = {}
    for name in inputs.base:
        kept = []
        for site, tau in zip(inputs.sites, inputs.stacked(name), strict=True):
            bits = uniform_bits(0, name, site, 0, tau.numel())
            kept.append(drawn(bits, 0.1).reshape(tau.shape))
        masks = torch.stack(kept)
        total = (masks * torch.stack(inputs.stacked(name))).sum(dim=0)
        found[name] = total / masks.sum(dim=0).clamp(min=1) / 0.1
    return inputs.plus(found)


def low_rank_of_rank(inputs: Inputs) -> StateDict:
    """Our low-rank change with the energy that the 8 largest singular values have."""
    found: StateDict = {}
    for name, tau in inputs.vectors[0].items():
        part, energy = inputs.part(1, (name,)), 1.0
        if tau.dim() > 1 and min((matrix := tau.flatten(start_dim=1).double()).shape) > RANK:
            reached = torch.linalg.svdvals(matrix).square().cumsum(dim=0)
            energy = float((reached[RANK - 2] + reached[RANK - 1]) / 2 / reached[-1])
        found |= ours(part, {"method": "low-rank", "options": {"energy": energy}})
    return found


def _sum_of(base: object, *models: object) -> object:
    total = base
    for model in models:
        total = linear.add_difference(total, linear.subtract(model, base))
    return total


_COUNTED = "scope: tensor, vote: counts, as many values"

ROWS = [
    Row(method="mean", call="n_average", theirs=on_models(lambda b, *m: sd_mecha.n_average(*m))),
    Row(
        method="mean",
        call="weighted_sum, alpha 0.3",
        theirs=on_models(lambda b, *m: sd_mecha.weighted_sum(*m, alpha=0.3)),
        recipe={"weights": SHARES},
        sites=2,
    ),
    Row(
        method="interpolate",
        call="weighted_sum of the base and n_average",
        theirs=on_models(lambda b, *m: sd_mecha.weighted_sum(b, sd_mecha.n_average(*m))),
    ),
    Row(method="sum", call="add_difference, one model after another", theirs=on_models(_sum_of)),
    Row(
        method="ties",
        call="ties_sum",
        theirs=on_deltas(sd_mecha.ties_sum),
        why="its defaults are k = 1, which trims nothing, and signs by counting",
    ),
    Row(
        method="ties",
        call="ties_sum",
        theirs=on_deltas(sd_mecha.ties_sum),
        recipe={"options": {"density": 1.0, "vote": "counts"}},
    ),
    Row(
        method="ties",
        call="ties_sum, k 0.2, vote_sgn",
        theirs=on_deltas(sd_mecha.ties_sum, k=0.2, vote_sgn=True),
        recipe={"options": {"scope": "tensor"}},
        why="its threshold is the int(0.8 n)-th smallest magnitude of a tensor, the authors' and "
        "ours the (n - int(0.2 n))-th: one value differs where 0.2 n is no whole number",
    ),
    Row(
        method="ties",
        call="ties_sum, k 0.2, vote_sgn",
        theirs=on_deltas(sd_mecha.ties_sum, k=0.2, vote_sgn=True),
        by=_as_many(),
        note="scope: tensor, as many values",
    ),
    Row(
        method="ties",
        call="ties_sum, k 0.2",
        theirs=on_deltas(sd_mecha.ties_sum, k=0.2),
        by=_as_many(vote="counts"),
        note=_COUNTED,
        why="a tied count gives 0; in the paper, and here, the sign of the majority of all values",
    ),
    Row(
        method="ties",
        call="ties_sum, k 0.2; where the count is not tied",
        theirs=on_deltas(sd_mecha.ties_sum, k=0.2),
        by=_as_many(vote="counts"),
        note=_COUNTED,
        where=decided,
    ),
    Row(
        method="dare",
        call="dropout, probability 0.9, our mask",
        theirs=on_deltas(ties.dropout),
        why="it divides the sum of what is left by the number of sites that kept the value and "
        "then by the density again, which is neither the sum nor the mean of the paper",
    ),
    Row(
        method="dare",
        call="dropout, probability 0.9, our mask",
        theirs=on_deltas(ties.dropout),
        by=shared_out,
        note="that formula, written out",
    ),
    Row(
        method="dare",
        call="ties_sum_with_dropout, k 1, vote_sgn, our mask",
        theirs=on_deltas(sd_mecha.ties_sum_with_dropout, k=1.0, vote_sgn=True),
        recipe={"options": {"rule": "ties"}},
        why="apply_stock is the wrong way round: False, the default, multiplies by Model Stock's "
        "ratio",
    ),
    Row(
        method="dare",
        call="ties_sum_with_dropout, k 1, vote_sgn, apply_stock, our mask",
        theirs=on_deltas(sd_mecha.ties_sum_with_dropout, k=1.0, vote_sgn=True, apply_stock=True),
        recipe={"options": {"rule": "ties"}},
    ),
    Row(
        method="della",
        call="ties_sum_with_dropout, della_eps 0.14, probability 0.5, apply_stock, our mask",
        theirs=on_deltas(
            sd_mecha.ties_sum_with_dropout,
            k=1.0,
            vote_sgn=True,
            apply_stock=True,
            probability=0.5,
            della_eps=0.14,
        ),
        why="it ranks within the tensor instead of a row, in steps of 1 / n instead of "
        "1 / (n - 1), and divides all values by the mean probability instead of each by its own",
    ),
    Row(
        method="della",
        call="the same, tensors of one row",
        theirs=on_deltas(
            sd_mecha.ties_sum_with_dropout,
            k=1.0,
            vote_sgn=True,
            apply_stock=True,
            probability=0.5,
            della_eps=0.14,
        ),
        by=each_tensor(
            lambda size: {
                "method": "della",
                "options": {"window": 0.14 * (size - 1) / size, "rescale": "none"},
                "scale": 2.0,
            }
        ),
        note="rescale: none, scale: 2, window for its steps",
        names=VECTORS,
    ),
    Row(
        method="slerp",
        call="slerp",
        theirs=on_models(lambda b, *m: sd_mecha.slerp(*m, alpha=0.3)),
        recipe={"weights": SHARES},
        sites=2,
        why="it turns directions and interpolates lengths even between nearly parallel models, "
        "where mergekit's rule, which is ours, takes the straight line above a cosine of 0.9995; "
        "nuslerp is its rule",
    ),
    Row(
        method="nuslerp",
        call="slerp of the task vectors, alpha 0.3",
        theirs=on_deltas(lambda *deltas: sd_mecha.slerp(*deltas, alpha=0.3)),
        recipe={"weights": SHARES},
        sites=2,
    ),
    Row(
        method="model-stock",
        call="model_stock",
        theirs=on_deltas(sd_mecha.model_stock),
        why="it takes the cosines of rows instead of whole tensors, and only those of consecutive "
        "sites",
    ),
    Row(
        method="model-stock",
        call="model_stock, tensors of one row",
        theirs=on_deltas(sd_mecha.model_stock),
        sites=2,
        names=VECTORS,
    ),
    Row(
        method="low-rank",
        call="truncate_rank, 8",
        theirs=on_deltas(
            lambda delta: sd_mecha.truncate_rank(delta, rank=RANK, approximate_basis_seed=0)
        ),
        by=low_rank_of_rank,
        note="energy of rank 8",
        sites=1,
        why="its default finds the singular vectors in a random sketch",
    ),
    Row(
        method="low-rank",
        call="truncate_rank, 8, exact basis",
        theirs=on_deltas(
            lambda delta: sd_mecha.truncate_rank(delta, rank=RANK, use_approximate_basis=False)
        ),
        by=low_rank_of_rank,
        note="energy of rank 8",
        sites=1,
    ),
    Row(
        method="geometric-median",
        call="geometric_median",
        theirs=on_models(lambda b, *m: sd_mecha.geometric_median(*m)),
        why="it takes the median of each tensor by itself; the paper, and ours, of whole vectors",
    ),
    Row(
        method="geometric-median",
        call="geometric_median",
        theirs=on_models(lambda b, *m: sd_mecha.geometric_median(*m)),
        recipe={"options": {"scope": "tensor"}},
        why="it stops when the sum of distances no longer changes, and in float32 that is early",
    ),
    Row(
        method="geometric-median",
        call="geometric_median, merge_dtype float64",
        theirs=on_models(lambda b, *m: sd_mecha.geometric_median(*m), merge_dtype=torch.float64),
        recipe={"options": {"scope": "tensor"}},
    ),
]


def _length(inputs: Inputs) -> str:
    part = inputs.part(5, MATRICES)
    total = part.plus({n: sum(part.stacked(n), start=torch.zeros(())) for n in MATRICES})
    merged = on_deltas(ties.dropout)(part)
    products = [
        sum(float(((x[n] - part.base[n]) * (total[n] - part.base[n])).sum()) for n in MATRICES)
        for x in (merged, total)
    ]
    return f"{products[0] / products[1]:.2f} of the sum along its direction; 0.82 is expected"


def _stock(inputs: Inputs) -> str:
    lengths = []
    for stock in (False, True):
        merged = on_deltas(sd_mecha.ties_sum_extended, k=1.0, apply_stock=stock)(inputs)
        lengths.append(sum(float((merged[n] - v).square().sum()) for n, v in inputs.base.items()))
    plain = on_deltas(sd_mecha.ties_sum, k=1.0)(inputs)
    wanted = sum(float((plain[n] - v).square().sum()) for n, v in inputs.base.items())
    off, on = ((length / wanted) ** 0.5 for length in lengths)
    return f"{off:.2f} times as long as plain TIES with False, {on:.2f} times with True"


FAULTS = [
    Fault(
        "`add_difference_ties` of models whose architecture it infers from their keys",
        lambda inputs: raised(
            lambda: on_models(lambda b, *m: sd_mecha.add_difference_ties(b, *m, k=0.2))(inputs)
        ),
    ),
    Fault("`ties_sum_extended`, apply_stock", _stock),
    Fault("`dropout` of five vectors at probability 0.9, beside their sum", _length),
    Fault(
        "storage type of the merged model unless output_dtype is given",
        lambda inputs: (
            "float32 in, "
            + str(sd_mecha.merge(sd_mecha.model(inputs.base))["norm.weight"].dtype).split(".")[1]
            + " out"
        ),
    ),
]
