"""Rows for fusion_bench (https://github.com/tanganke/fusion_bench)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comparison import (
    MATRICES,
    SHAPES,
    Fault,
    Inputs,
    Merge,
    Row,
    StateDict,
    for_site,
    our_uniforms,
    raised,
    statistics,
    swapped,
)
from fusion_bench.method.dare.task_arithmetic import DareTaskArithmetic
from fusion_bench.method.dare.ties_merging import DareTiesMerging
from fusion_bench.method.emr_merging.utils import emr_merge
from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.isotropic_merging import ISO_C_Merge, ISO_CTS_Merge
from fusion_bench.method.linear.linear_interpolation import LinearInterpolationAlgorithm
from fusion_bench.method.magmax import MagMaxAlgorithm
from fusion_bench.method.model_stock.model_stock import ModelStock
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.simple_average import SimpleAverageAlgorithm
from fusion_bench.method.singular_value_calibration.task_arithmetic import (
    SingularValueCalibrationArithmeticTask,
)
from fusion_bench.method.slerp.slerp import SlerpMergeAlgorithm
from fusion_bench.method.tall_mask import utils as tall_mask
from fusion_bench.method.tall_mask.task_arithmetic import (
    TallMaskTaskArithmeticAlgorithm,
    generate_task_masks,
)
from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
from fusion_bench.method.task_singular_vector.TSVM import TaskSingularVectorMerging
from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm
from fusion_bench.method.weighted_average.weighted_average import WeightedAverageAlgorithm
from fusion_bench.method.wudi.wudi import WUDIMerging
from fusion_bench.modelpool import BaseModelPool
from fusion_bench.models.parameter_dict import ParameterDictModel
from torch import Tensor, nn

NAME, DISTRIBUTION = "fusion_bench", "fusion-bench"
NO_KERNEL = tuple(name for name in SHAPES if name != "stem.weight")
_KERNELS = "it takes the mean of a convolution's kernels; here they are a matrix as well"
SHARES = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 5.0}


def module(state: StateDict) -> nn.Module:
    """A module that holds a state dict's tensors under their names."""
    return ParameterDictModel({name: nn.Parameter(v.clone()) for name, v in state.items()})


def pool(inputs: Inputs) -> BaseModelPool:
    """Base and models, as its algorithms take them."""
    models = dict(zip(inputs.sites, map(module, inputs.tuned), strict=True))
    return BaseModelPool({"_pretrained_": module(inputs.base), **models})


def algorithm(build: Callable[[], Any]) -> Merge:
    """The merged model of one of its algorithms; random numbers are ours."""

    def merge(inputs: Inputs) -> StateDict:
        models = pool(inputs)
        names = list(module(inputs.base).state_dict())
        order = [(name, site) for site in inputs.sites for name in names]
        with swapped(torch, "rand_like", our_uniforms(order)):
            found = build().run(models)
        return {name: tensor.detach() for name, tensor in found.state_dict().items()}

    return merge


def pair(build: Callable[[], Any]) -> Merge:
    """The same for algorithms that merge two models and want no base."""

    def merge(inputs: Inputs) -> StateDict:
        models = dict(zip(inputs.sites, map(module, inputs.tuned), strict=True))
        found = build().run(BaseModelPool(models))
        return {name: tensor.detach() for name, tensor in found.state_dict().items()}

    return merge


def ties(scale: float, merge: str) -> Merge:
    """TIES with its threshold of 20 percent."""
    return algorithm(lambda: TiesMergingAlgorithm(scale, 20, [], merge))


def consensus(inputs: Inputs) -> StateDict:
    """Sum where two TALL masks are 1; its code for this reads the masks from a file."""
    found = {}
    for name, start in inputs.base.items():
        vectors = torch.stack(inputs.stacked(name))
        tuned = torch.stack([model[name] for model in inputs.tuned])
        flat = [x.reshape(len(x), -1) for x in (vectors, tuned)]
        masks = tall_mask.generate_task_masks(*flat, start.reshape(-1), tall_mask_lambda=0.4)
        agreed = (masks.sum(dim=0) >= 2).reshape(start.shape)
        found[name] = vectors.sum(dim=0) * agreed
    return inputs.plus(found)


def emr(inputs: Inputs) -> StateDict:
    """The unified model."""
    return inputs.plus(emr_merge(list(inputs.vectors))[0])


def emr_of_first(inputs: Inputs) -> StateDict:
    """The first site's model, as its masks and rescalers give it back."""
    unified, masks, rescalers = emr_merge(list(inputs.vectors))
    kept = {name: unified[name] * masks[name][0] for name in unified}
    return inputs.plus(kept, float(rescalers[0]))


def _listed(inputs: Inputs) -> dict[str, list[Tensor]]:
    return {name: [model[name] for model in inputs.tuned] for name in inputs.base}


def fisher(normalise: bool) -> Merge:
    """Its kernel, on diagonals that sites could publish."""

    def merge(inputs: Inputs) -> StateDict:
        diagonals = list(statistics("fisher", inputs))
        same = torch.full((len(inputs.tuned),), 1 / len(inputs.tuned))
        return merging_with_fisher_weights(_listed(inputs), diagonals, same, normalise)

    return merge


def regmean(ratio: float, dtype: torch.dtype = torch.float32) -> Merge:
    """Its kernel, on Gram matrices that sites could publish."""

    def merge(inputs: Inputs) -> StateDict:
        grams = [
            {name.removesuffix(".weight"): gram.to(dtype) for name, gram in site.items()}
            for site in statistics("gram", inputs)
        ]
        models = {k: [v.to(dtype) for v in values] for k, values in _listed(inputs).items()}
        return merging_with_regmean_weights(models, grams, ratio)

    return merge


ROWS = [
    Row(method="mean", call="SimpleAverage", theirs=algorithm(SimpleAverageAlgorithm)),
    Row(
        method="mean",
        call="WeightedAverage, weights 1 to 5",
        theirs=algorithm(
            lambda: WeightedAverageAlgorithm(True, list(SHARES.values()), verbose=False)
        ),
        recipe={"weights": SHARES},
    ),
    Row(
        method="sum",
        call="TaskArithmetic, 0.3",
        theirs=algorithm(lambda: TaskArithmeticAlgorithm(0.3)),
        recipe={"scale": 0.3},
    ),
    Row(
        method="ties",
        call="TiesMerging, its defaults (20, sum, 0.3)",
        theirs=ties(0.3, "sum"),
        why="its defaults take the sum times 0.3, the paper, and ours, the mean",
    ),
    Row(
        method="ties",
        call="TiesMerging, its defaults (20, sum, 0.3)",
        theirs=ties(0.3, "sum"),
        recipe={"options": {"reduction": "sum"}, "scale": 0.3},
    ),
    Row(method="ties", call="TiesMerging, 20, mean, 1", theirs=ties(1.0, "mean")),
    Row(
        method="ties",
        call="TiesMerging, 20, max, 1",
        theirs=ties(1.0, "max"),
        recipe={"options": {"reduction": "max"}},
    ),
    Row(
        method="dare",
        call="DareTaskArithmetic, sparsity 0.9, 0.3, our mask",
        theirs=algorithm(lambda: DareTaskArithmetic(0.3, 0.9, False)),
        recipe={"scale": 0.3},
    ),
    Row(
        method="dare",
        call="DareTiesMerging, sparsity 0.5, 20, mean, our mask",
        theirs=algorithm(lambda: DareTiesMerging(0.5, False, True, 1.0, 20, [], "mean")),
        recipe={"options": {"density": 0.5, "rule": "ties", "rule_options": {"density": 0.2}}},
    ),
    Row(
        method="magmax",
        call="MagMax, 0.5",
        theirs=algorithm(MagMaxAlgorithm),
        recipe={"scale": 0.5},
    ),
    Row(
        method="consensus",
        call="tall_mask.utils.generate_task_masks, 0.4, two agree",
        theirs=consensus,
    ),
    Row(
        method="slerp",
        call="SlerpMerge, t 0.3",
        theirs=pair(lambda: SlerpMergeAlgorithm(0.3)),
        recipe={"weights": {"a": 0.7, "b": 0.3}},
        sites=2,
    ),
    Row(
        method="model-stock",
        call="ModelStock",
        theirs=algorithm(ModelStock),
        why="it takes the cosine of the mean angle, mergekit, and our default, the mean cosine",
    ),
    Row(
        method="model-stock",
        call="ModelStock",
        theirs=algorithm(ModelStock),
        recipe={"options": {"average": "angles"}},
    ),
    Row(method="emr", call="emr_merge, unified vector", theirs=emr),
    Row(
        method="emr",
        call="emr_merge, model of the first site",
        theirs=emr_of_first,
        by=for_site(0, {"method": "emr"}),
        note="model of the first site",
        why="its rescaler adds up the mean of every tensor, as the authors' code for 8 ViTs; the "
        "paper's, and ours, is of sums over the whole vector",
    ),
    Row(
        method="emr",
        call="emr_merge, model of the first site",
        theirs=emr_of_first,
        by=for_site(0, {"method": "emr", "options": {"rescale": "means"}}),
        note="rescale: means, model of the first site",
    ),
    Row(
        method="tsv-m",
        call="TaskSingularVectorMerging",
        theirs=algorithm(TaskSingularVectorMerging),
        why=_KERNELS,
    ),
    Row(
        method="tsv-m",
        call="TaskSingularVectorMerging",
        theirs=algorithm(TaskSingularVectorMerging),
        note="without the convolution",
        names=NO_KERNEL,
    ),
    Row(
        method="iso-c",
        call="ISO_C_Merge, 1",
        theirs=algorithm(lambda: ISO_C_Merge(1.0)),
        why=_KERNELS,
    ),
    Row(
        method="iso-c",
        call="ISO_C_Merge, 1",
        theirs=algorithm(lambda: ISO_C_Merge(1.0)),
        note="without the convolution",
        names=NO_KERNEL,
    ),
    Row(
        method="iso-cts",
        call="ISO_CTS_Merge, 1, 0.8",
        theirs=algorithm(lambda: ISO_CTS_Merge(1.0, 0.8)),
        why=_KERNELS,
    ),
    Row(
        method="iso-cts",
        call="ISO_CTS_Merge, 1, 0.8",
        theirs=algorithm(lambda: ISO_CTS_Merge(1.0, 0.8)),
        note="without the convolution",
        names=NO_KERNEL,
    ),
    Row(
        method="svc",
        call="SingularValueCalibrationArithmeticTask, 1, 0.2",
        theirs=algorithm(lambda: SingularValueCalibrationArithmeticTask(1.0, 0.2)),
        why="it leaves the sum where a tensor is no matrix, and a convolution is none to it; the "
        "mean is taken here",
    ),
    Row(
        method="svc",
        call="SingularValueCalibrationArithmeticTask, 1, 0.2",
        theirs=algorithm(lambda: SingularValueCalibrationArithmeticTask(1.0, 0.2)),
        note="matrices alone",
        names=MATRICES,
    ),
    Row(method="wudi", call="WUDIMerging, 300", theirs=algorithm(lambda: WUDIMerging(300))),
    Row(
        method="fisher",
        call="merging_with_fisher_weights",
        theirs=fisher(True),
        why="it adds the floor of 1e-6 to every value; the authors' code, and ours, raises what is "
        "lower",
    ),
    Row(
        method="fisher",
        call="merging_with_fisher_weights",
        theirs=fisher(True),
        recipe={"options": {"floored": "add"}},
    ),
    Row(
        method="fisher",
        call="merging_with_fisher_weights, not normalised",
        theirs=fisher(False),
        recipe={"options": {"floored": "add", "normalise": False}},
    ),
    Row(
        method="regmean",
        call="merging_with_regmean_weights, 0.9",
        theirs=regmean(0.9),
        why="it inverts in float32, which loses digits; the next row has the same in float64",
    ),
    Row(
        method="regmean",
        call="merging_with_regmean_weights, 0.9, float64",
        theirs=regmean(0.9, torch.float64),
    ),
]


def _algorithm_masks(inputs: Inputs) -> str:
    model, part = TallMaskTaskArithmeticAlgorithm(0.4), inputs.part(5, ("norm.weight",))
    return raised(lambda: model.run(pool(part)))


def _mask_function(inputs: Inputs) -> str:
    total = {name: sum(inputs.stacked(name), start=torch.zeros(())) for name in inputs.base}
    tau = inputs.vectors[0]
    theirs = generate_task_masks(total, tau, inputs.base, 0.4)
    equal = [
        (theirs[name] > 0) == (tau[name].abs() > 0.4 * (total[name] - tau[name]).abs())
        for name in inputs.base
    ]
    share = torch.cat([x.reshape(-1) for x in equal]).double().mean()
    ones = torch.cat([x.reshape(-1) for x in theirs.values()]).mean()
    return f"{share:.0%} of the masks are the paper's; {ones:.0%} of theirs are 1"


def _many_sites(inputs: Inputs) -> str:
    part = inputs.part(5, ("blocks.0.attn.weight",))
    few = [{k: v[:4].clone() for k, v in model.items()} for model in (part.base, *part.tuned)]
    small = Inputs(few[0], tuple(few[1:]))
    merged = algorithm(TaskSingularVectorMerging)(small)
    moved = max(float((merged[k] - v).abs().max()) for k, v in small.base.items())
    return f"the largest change of the base is {moved:g}"


FAULTS = [
    Fault(
        "`TiesMerging` with threshold 100, which should trim nothing",
        lambda inputs: raised(
            lambda: algorithm(lambda: TiesMergingAlgorithm(1.0, 100, [], "mean"))(inputs)
        ),
    ),
    Fault(
        "`LinearInterpolation` of two models",
        lambda inputs: raised(
            lambda: pair(lambda: LinearInterpolationAlgorithm(0.5))(inputs.part(2, MATRICES))
        ),
    ),
    Fault(
        "`TallMaskTaskArithmetic`, any models",
        _algorithm_masks,
    ),
    Fault(
        "the masks of that algorithm: it takes theta_0 for the vector 0",
        _mask_function,
    ),
    Fault(
        "`TaskSingularVectorMerging` of five sites where a matrix has four rows: each keeps int(4 "
        "/ 5) = 0 directions",
        _many_sites,
    ),
]
