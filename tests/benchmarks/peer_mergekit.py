"""Rows for mergekit (https://github.com/arcee-ai/mergekit)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from comparison import (
    FLAT,
    Fault,
    Inputs,
    Merge,
    Row,
    StateDict,
    each_tensor,
    our_numbers,
    raised,
    swapped,
    turns,
)
from mergekit.merge_methods.api import merge_state_dicts
from safetensors.torch import load_file, save_file

NAME, DISTRIBUTION = "mergekit", "mergekit"
SHARES = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 5.0}
_KEPT = (
    "mergekit keeps int(density n) values of a tensor; the authors' code, and ours, one more, "
    "because the threshold itself is kept"
)


def with_base(method: str, **parameters: Any) -> Merge:
    """Base and models, as most of its methods want them; random ones draw our masks."""

    def merge(inputs: Inputs) -> StateDict:
        with swapped(torch, "bernoulli", our_numbers(turns(inputs))):
            return _with_base(inputs, method, **parameters)

    return merge


def _with_base(inputs: Inputs, method: str, **parameters: Any) -> StateDict:
    models = {"base": inputs.base, **dict(zip(inputs.sites, inputs.tuned, strict=True))}
    return merge_state_dicts(models, method, base="base", parameters=parameters)


def without_base(
    method: str, *, vectors: bool = False, first_is_base: bool = False, **options: Any
) -> Merge:
    """The models alone, or the task vectors alone, the base added afterwards."""

    def merge(inputs: Inputs) -> StateDict:
        models = dict(zip(inputs.sites, inputs.vectors if vectors else inputs.tuned, strict=True))
        base = inputs.sites[0] if first_is_base else None
        dtype = options.get("dtype")
        parameters = {k: v for k, v in options.items() if k != "dtype"}
        found = merge_state_dicts(models, method, base=base, parameters=parameters, dtype=dtype)
        return inputs.plus(found) if vectors else found

    return merge


def _one_value_less(rest: dict[str, Any]) -> Merge:
    def recipe(size: int) -> dict[str, Any]:
        density = (int(0.2 * size) - 0.5) / size
        return {"method": "ties", "options": {"density": density, "scope": "tensor", **rest}}

    return each_tensor(recipe)


def _sparse(rule: str, then: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return {"options": {"rule": rule, **options, "rule_options": then or {}}}


_WEIGHTED = {"vote": "weighted"}
_SUMMED = {"vote": "weighted", "reduction": "sum"}

ROWS = [
    Row(method="mean", call="linear, weight 1", theirs=without_base("linear", weight=1.0)),
    Row(
        method="mean",
        call="linear, weights 1 to 5",
        theirs=without_base("linear", weight=list(SHARES.values())),
        recipe={"weights": SHARES},
    ),
    Row(
        method="sum",
        call="task_arithmetic, weight 1",
        theirs=with_base("task_arithmetic", weight=1.0),
    ),
    Row(
        method="sum",
        call="task_arithmetic, weights 1 to 5, lambda 0.3",
        theirs=with_base("task_arithmetic", weight=list(SHARES.values()), **{"lambda": 0.3}),
        recipe={"weights": SHARES, "scale": 0.3},
    ),
    Row(
        method="ties",
        call="ties, weight 1",
        theirs=with_base("ties", weight=1.0),
        why="its default is density 1, which trims nothing; the paper's and ours is 0.2",
    ),
    Row(
        method="ties",
        call="ties, weight 1",
        theirs=with_base("ties", weight=1.0),
        recipe={"options": {"density": 1.0}},
    ),
    Row(
        method="ties",
        call="ties, density 0.2",
        theirs=with_base("ties", density=0.2, weight=1.0),
        recipe={"options": {"scope": "tensor"}},
        why=_KEPT,
    ),
    Row(
        method="ties",
        call="ties, density 0.2",
        theirs=with_base("ties", density=0.2, weight=1.0),
        by=_one_value_less({}),
        note="scope: tensor, density for one value less",
    ),
    Row(
        method="ties",
        call="ties, density 0.2, weights 1 to 5",
        theirs=with_base("ties", density=0.2, weight=list(SHARES.values())),
        by=each_tensor(
            lambda size: {
                "method": "ties",
                "weights": SHARES,
                "options": {
                    "density": (int(0.2 * size) - 0.5) / size,
                    "scope": "tensor",
                    "vote": "weighted",
                },
            }
        ),
        note="weights: 1/2/3/4/5, vote: weighted, scope: tensor, one value less",
    ),
    Row(
        method="dare",
        call="dare_linear, density 0.1, our mask",
        theirs=with_base("dare_linear", density=0.1, weight=1.0),
        why="it scales what is left until the L1 norm of the tensor is the same; the paper, and "
        "our default, divides by the density",
    ),
    Row(
        method="dare",
        call="dare_linear, density 0.1, our mask",
        theirs=with_base("dare_linear", density=0.1, weight=1.0),
        recipe=_sparse("sum", rescale="l1"),
    ),
    Row(
        method="dare",
        call="dare_ties, density 0.1, our mask",
        theirs=with_base("dare_ties", density=0.1, weight=1.0),
        recipe=_sparse("ties", _SUMMED, rescale="l1"),
    ),
    Row(
        method="dare",
        call="dare_ties, density 0.1, normalize, our mask",
        theirs=with_base("dare_ties", density=0.1, normalize=True, weight=1.0),
        recipe=_sparse("ties", _WEIGHTED, rescale="l1"),
    ),
    Row(
        method="della",
        call="della, density 0.5, epsilon 0.07, our mask",
        theirs=with_base("della", density=0.5, epsilon=0.07, weight=1.0),
        names=FLAT,
        why="as DARE: it restores the L1 norm, the paper divides each value by its own probability",
    ),
    Row(
        method="della",
        call="della, density 0.5, epsilon 0.07, our mask",
        theirs=with_base("della", density=0.5, epsilon=0.07, weight=1.0),
        recipe=_sparse("ties", _WEIGHTED, rescale="l1"),
        names=FLAT,
    ),
    Row(
        method="della",
        call="della of a convolution, density 0.5, epsilon 0.07, our mask",
        theirs=with_base("della", density=0.5, epsilon=0.07, weight=1.0),
        recipe=_sparse("ties", _WEIGHTED, rescale="l1"),
        names=("stem.weight",),
        why="it ranks a convolution's values along the input channels, we among all weights of an "
        "output channel; where ranks do not count, as in the next row, there is no difference",
    ),
    Row(
        method="della",
        call="della of a convolution, density 0.5, epsilon 1e-9, our mask",
        theirs=with_base("della", density=0.5, epsilon=1e-9, weight=1.0),
        recipe=_sparse("ties", _WEIGHTED, rescale="l1", window=2e-9),
        names=("stem.weight",),
    ),
    Row(
        method="della",
        call="della_linear, density 0.5, epsilon 0.07, our mask",
        theirs=with_base("della_linear", density=0.5, epsilon=0.07, weight=1.0),
        recipe=_sparse("sum", rescale="l1"),
        names=FLAT,
    ),
    Row(
        method="breadcrumbs",
        call="breadcrumbs",
        theirs=with_base("breadcrumbs", weight=1.0),
        why="its default is density 1, which also switches off the removal of the largest values; "
        "ours keeps 0.2 after the largest 0.1, the example of the authors' code",
    ),
    Row(
        method="breadcrumbs",
        call="breadcrumbs, density 0.2, gamma 0.1",
        theirs=with_base("breadcrumbs", density=0.2, gamma=0.1, weight=1.0),
    ),
    Row(
        method="breadcrumbs",
        call="breadcrumbs_ties, density 0.2, gamma 0.1",
        theirs=with_base("breadcrumbs_ties", density=0.2, gamma=0.1, weight=1.0),
        recipe=_sparse("ties", _SUMMED),
    ),
    Row(
        method="slerp",
        call="slerp, t 0.3",
        theirs=without_base("slerp", first_is_base=True, t=0.3),
        recipe={"weights": {"a": 0.7, "b": 0.3}},
        sites=2,
    ),
    Row(
        method="slerp",
        call="slerp of the task vectors, t 0.3",
        theirs=without_base("slerp", vectors=True, first_is_base=True, t=0.3),
        recipe={"options": {"space": "vectors"}, "weights": {"a": 0.7, "b": 0.3}},
        sites=2,
    ),
    Row(
        method="nuslerp",
        call="nuslerp with a base, weights 1 and 2",
        theirs=with_base("nuslerp", weight=[1.0, 2.0]),
        recipe={"weights": {"a": 1.0, "b": 2.0}},
        sites=2,
        why="it turns the vectors as they are, so their lengths shift the angle; ours turns the "
        "directions and interpolates the lengths, as sd-mecha",
    ),
    Row(
        method="slerp",
        call="nuslerp with a base, weights 1 and 2",
        theirs=with_base("nuslerp", weight=[1.0, 2.0]),
        recipe={"options": {"space": "vectors"}, "weights": {"a": 1.0, "b": 2.0}},
        sites=2,
    ),
    Row(
        method="multislerp",
        call="multislerp with a base",
        theirs=with_base("multislerp", weight=1.0),
    ),
    Row(
        method="multislerp",
        call="multislerp with a base, weights 1 to 5",
        theirs=with_base("multislerp", weight=list(SHARES.values())),
        recipe={"weights": SHARES},
    ),
    Row(
        method="karcher",
        call="karcher",
        theirs=without_base("karcher"),
        why="a step shorter than tol ends the search: mergekit does not take it, we do",
    ),
    Row(
        method="karcher",
        call="karcher, tol 1e-9, dtype float64",
        theirs=without_base("karcher", dtype=torch.float64, tol=1e-9),
        recipe={"options": {"tolerance": 1e-9}},
    ),
    Row(
        method="karcher",
        call="karcher of the task vectors",
        theirs=without_base("karcher", vectors=True),
        recipe={"options": {"space": "vectors"}},
    ),
    Row(method="model-stock", call="model_stock", theirs=with_base("model_stock")),
]


def _poisoned(inputs: Inputs) -> str:
    models = [{k: v.clone() for k, v in model.items()} for model in inputs.tuned]
    models[0]["norm.weight"][0] = float("nan")
    found = merge_state_dicts(models, "linear", parameters={"weight": 1.0})
    return f"the merged value is {float(found['norm.weight'][0]):g}, without a word"


def _counters(inputs: Inputs) -> str:
    models = [{"num_batches_tracked": torch.tensor(steps)} for steps in (100, 120)]
    return raised(lambda: merge_state_dicts(models, "linear", parameters={"weight": 1.0}))


def _program(inputs: Inputs, parameters: dict[str, Any]) -> StateDict:
    """The merged model of its program for plain files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for site, model in zip(("base", *inputs.sites), (inputs.base, *inputs.tuned), strict=True):
            save_file(model, folder / f"{site}.safetensors")
        config = {
            "merge_method": "dare_linear",
            "base_model": str(folder / "base.safetensors"),
            "models": [{"model": str(folder / f"{site}.safetensors")} for site in inputs.sites],
            "parameters": {"weight": 1.0, **parameters},
        }
        (folder / "config.yaml").write_text(json.dumps(config))
        tool = Path(sys.executable).with_name("mergekit-pytorch")
        command = [tool, folder / "config.yaml", folder, "--random-seed", "1"]
        subprocess.run(command, check=True, capture_output=True)
        return load_file(folder / "model.safetensors")


def _seeded(inputs: Inputs) -> str:
    found = [_program(inputs, {"density": 0.1}) for _ in range(3)]
    stems = {merged["stem.weight"].numpy().tobytes() for merged in found}
    return f"{len(stems)} different models"


def _misspelt(inputs: Inputs) -> str:
    merged, wanted = _program(inputs, {"densty": 0.1}), with_base("task_arithmetic", weight=1.0)
    plain = wanted(inputs)
    apart = max(float((merged[name] - plain[name]).abs().max()) for name in plain)
    return f"exit status 0; largest difference to task_arithmetic {apart:.0e}"


def _apart(inputs: Inputs) -> str:
    base = {"w": torch.zeros(3)}
    angle = 0.7 * math.pi
    points = [torch.tensor([math.cos(i * angle), math.sin(i * angle), 0.0]) for i in range(2)]
    models = {"base": base, "a": {"w": points[0]}, "b": {"w": points[1]}}
    found = merge_state_dicts(models, "model_stock", base="base")["w"]
    middle = (points[0] + points[1]) / 2
    return f"the merged vector is {float(found @ middle / (middle @ middle)):.2f} times the mean"


FAULTS = [
    Fault(
        "`della` on a class token (1, 1, d), which every ViT has",
        lambda inputs: raised(
            lambda: _with_base(inputs.part(5, ("cls_token",)), "della", weight=1.0, density=0.5)
        ),
    ),
    Fault(
        "two models with batch norm that were trained for different numbers of steps",
        _counters,
    ),
    Fault("three runs of `mergekit-pytorch`, dare_linear, with --random-seed 1", _seeded),
    Fault("`densty: 0.1` in the configuration of `mergekit-pytorch`", _misspelt),
    Fault("one value of one model is NaN", _poisoned),
    Fault(
        "`model_stock` on vectors 126 degrees apart: its ratio has no lower bound, so it walks "
        "away from all of them",
        _apart,
    ),
]
