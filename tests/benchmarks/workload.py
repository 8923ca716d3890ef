"""What the programs of the merge benchmark do; each runs in a process of its own.

The bare programs and the literal ones say how long a rule takes that is written down as it stands
in its paper: everything in memory, one step after the other.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import vits

if TYPE_CHECKING:
    from torch import Tensor

DENSITY = {"ties": 0.2, "dare": 0.1}
"""Of the peers and the literal programs; the defaults of the registry, see `engine`."""
PAIRS = ("slerp", "nuslerp")
"""Methods that merge two models."""


def import_torch(folder: Path, sites: int) -> None:
    """Nothing but the import."""
    import torch  # noqa: F401


def numpy_sum(folder: Path, sites: int) -> Path:
    """Read every file once, add in float32, write."""
    import numpy as np

    total = np.fromfile(vits.model(folder, vits.BASE), dtype=np.float32)
    for index in range(sites):
        total += np.fromfile(vits.vector(folder, index), dtype=np.float32)
    out = folder / "numpy.out"
    total.tofile(out)
    return out


def numpy_synced(folder: Path, sites: int) -> None:
    """The same, and wait until it is on the disk, as every file of ours does."""
    import os

    with numpy_sum(folder, sites).open("rb+") as file:
        os.fsync(file.fileno())


def _loaded(folder: Path, sites: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    from safetensors.torch import load_file

    base = load_file(vits.model(folder, vits.BASE))
    return base, [load_file(vits.model(folder, index)) for index in range(sites)]


def _saved(folder: Path, merged: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(merged, folder / "torch.out")


def torch_mean(folder: Path, sites: int) -> None:
    """theta = sum theta_i / N."""
    import torch

    base, models = _loaded(folder, sites)
    _saved(folder, {k: torch.stack([m[k] for m in models]).mean(dim=0) for k in base})


def torch_sum(folder: Path, sites: int) -> None:
    """theta = theta_0 + sum (theta_i - theta_0)."""
    import torch

    base, models = _loaded(folder, sites)
    _saved(
        folder, {k: v + torch.stack([m[k] - v for m in models]).sum(dim=0) for k, v in base.items()}
    )


def torch_median(folder: Path, sites: int) -> None:
    """theta = median of theta_i."""
    import torch

    base, models = _loaded(folder, sites)
    _saved(folder, {k: torch.stack([m[k] for m in models]).median(dim=0).values for k in base})


def torch_dare(folder: Path, sites: int) -> None:
    """theta = theta_0 + sum m_i tau_i / density."""
    import torch

    density = DENSITY["dare"]
    base, models = _loaded(folder, sites)
    merged = {}
    for name, start in base.items():
        total = start.clone()
        for model in models:
            mask = torch.bernoulli(torch.full_like(start, density))
            total += mask * (model[name] - start) / density
        merged[name] = total
    _saved(folder, merged)


def torch_ties(folder: Path, sites: int) -> None:
    """Trim whole vectors, elect signs, disjoint mean."""
    import torch

    base, models = _loaded(folder, sites)
    names = sorted(base)
    vectors = torch.stack([torch.cat([(m[k] - base[k]).flatten() for k in names]) for m in models])
    size = vectors.shape[1]
    rank = size - int(DENSITY["ties"] * size)
    least = vectors.abs().kthvalue(rank, dim=1, keepdim=True).values
    trimmed = vectors * (vectors.abs() >= least)
    signs = trimmed.sum(dim=0).sign()
    signs[signs == 0] = signs.sum().sign()
    agree = torch.where(signs > 0, trimmed > 0, trimmed < 0)
    merged = (trimmed * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
    parts = merged.split([base[k].numel() for k in names])
    _saved(folder, {k: base[k] + p.view_as(base[k]) for k, p in zip(names, parts, strict=True)})


def sd_mecha(method: str) -> Callable[[Path, int], None]:
    """One of sd-mecha's rules, from file to file."""

    def run(folder: Path, sites: int) -> None:
        import sd_mecha
        import torch
        from sd_mecha.extensions.builtin.merge_methods import linear

        models = [sd_mecha.model(vits.model(folder, index)) for index in range(sites)]
        recipe = sd_mecha.n_average(*models)
        if method == "ties":
            base = sd_mecha.model(vits.model(folder, vits.BASE))
            deltas = [linear.subtract(model, base) for model in models]
            tau = sd_mecha.ties_sum(*deltas, k=DENSITY["ties"], vote_sgn=True)
            recipe = linear.add_difference(base, tau)
        out = (folder / "sd-mecha.safetensors").absolute()
        sd_mecha.merge(recipe, output=out, output_dtype=torch.float32)

    return run


def engine(method: str, device: str) -> Callable[[Path, int], None]:
    """The engine on task vectors, from open files to a written one."""

    def run(folder: Path, sites: int) -> None:
        from contextlib import ExitStack

        from merge_kit import devices, engine
        from merge_kit.parameters import roles_of
        from merge_kit.recipe import make_recipe
        from merge_kit.tensorfile import TensorFile, TensorWriter
        from merge_kit.writing import write_parts

        recipe = make_recipe({"method": method}, "the benchmark")
        density = recipe.options.get("density")
        if density != DENSITY.get(method, density):
            raise SystemExit(f"the peers' density of {method} is not our default, {density}")
        count = 2 if method in PAIRS else sites
        with ExitStack() as stack:
            base = stack.enter_context(TensorFile(vits.model(folder, vits.BASE)))
            files = [TensorFile(vits.vector(folder, index)) for index in range(count)]
            sources = [
                engine.Source(f"{i:03}", f"s{i}", stack.enter_context(file), (1.0,), 1)
                for i, file in enumerate(files)
            ]
            specs, on = engine.merged_specs(base.specs, recipe), devices.choose(device)
            started = time.perf_counter()
            with TensorWriter(folder / "ours.out", specs) as writer:
                roles = roles_of(base.specs, ())
                write_parts(writer, engine.merge(base, sources, roles, recipe, device=on))
            print(json.dumps({"inside": time.perf_counter() - started}))

    return run


RUNS: dict[str, Callable[[Path, int], object]] = {
    "import torch": import_torch,
    "numpy": numpy_sum,
    "numpy synced": numpy_synced,
    "torch mean": torch_mean,
    "torch sum": torch_sum,
    "torch median": torch_median,
    "torch dare": torch_dare,
    "torch ties": torch_ties,
    "sd-mecha mean": sd_mecha("mean"),
    "sd-mecha ties": sd_mecha("ties"),
}


def main() -> None:
    """Run one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("sites", type=int)
    parser.add_argument("device", nargs="?", default="cpu", help="of the engine")
    chosen = parser.parse_args()
    kind, _, method = chosen.name.partition(" ")
    run = engine(method, chosen.device) if kind == "engine" else RUNS[chosen.name]
    run(chosen.folder, chosen.sites)


if __name__ == "__main__":
    main()
