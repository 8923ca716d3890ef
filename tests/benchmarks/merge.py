"""How long a merge takes, and how much memory, beside programs that do nothing but read and add.

    python tests/benchmarks/merge.py --folder /tmp/vectors

Writes a base and task vectors of the size of ViT-B/16 (86 million float32 values each), then runs,
interleaved and each in a process of its own: reading every file once, importing torch, a bare
numpy program that reads, sums and writes, and the engine with several methods. Prints medians,
ranges and ratios; memory is the peak of the process, and the part of it above `import torch`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

WIDTH, DEPTH = 768, 12


def shapes(width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a vision transformer."""
    found: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "pos_embed": (1, 197, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in range(DEPTH):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            found[f"blocks.{block}.{name}.weight"] = (rows, columns)
            found[f"blocks.{block}.{name}.bias"] = (rows,)
    return found


def make(folder: Path, sites: int, width: int) -> None:
    """A base and one vector a site."""
    import torch

    from merge_kit.tensorfile import TensorSpec, TensorWriter

    specs = {name: TensorSpec(torch.float32, shape) for name, shape in shapes(width).items()}
    for index in range(sites + 1):
        path = folder / ("base" if index == 0 else f"vector{index}")
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(index)
        with TensorWriter(path, specs) as writer:
            for name, spec in specs.items():
                writer.write(name, torch.randn(spec.shape, generator=generator) * 0.01)


def read_all(folder: Path, sites: int) -> None:
    """Read every file once into one buffer."""
    buffer = bytearray(1 << 20)
    for path in [folder / "base", *(folder / f"vector{i + 1}" for i in range(sites))]:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def import_torch(folder: Path, sites: int) -> None:
    """Nothing but the import."""
    import torch  # noqa: F401


def bare_numpy(folder: Path, sites: int) -> None:
    """Read every file once, add in float32, write."""
    import numpy as np

    total = np.fromfile(folder / "base", dtype=np.float32)
    for index in range(sites):
        total += np.fromfile(folder / f"vector{index + 1}", dtype=np.float32)
    total.tofile(folder / "numpy.out")


def ours(method: str) -> Callable[[Path, int], None]:
    """The engine, from open files to a written one."""

    def run(folder: Path, sites: int) -> None:
        from contextlib import ExitStack

        from merge_kit import engine
        from merge_kit.parameters import roles_of
        from merge_kit.recipe import make_recipe
        from merge_kit.tensorfile import TensorFile, TensorWriter
        from merge_kit.writing import write_parts

        with ExitStack() as stack:
            base = stack.enter_context(TensorFile(folder / "base"))
            sources = [
                engine.Source(
                    f"{i}",
                    f"s{i}",
                    stack.enter_context(TensorFile(folder / f"vector{i + 1}")),
                    (float(i + 1),),
                    1,
                )
                for i in range(sites)
            ]
            recipe = make_recipe({"method": method}, "benchmark")
            specs = engine.merged_specs(base.specs, recipe)
            started = time.perf_counter()
            with TensorWriter(folder / "ours.out", specs) as writer:
                write_parts(writer, engine.merge(base, sources, roles_of(base.specs, ()), recipe))
            print(json.dumps({"inside": time.perf_counter() - started}))

    return run


METHODS = ("mean", "sum", "ties", "median", "multislerp", "model-stock", "geometric-median")
PROGRAMS: dict[str, Callable[[Path, int], None]] = {
    "read": read_all,
    "import torch": import_torch,
    "bare numpy": bare_numpy,
    **{method: ours(method) for method in METHODS},
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=list(PROGRAMS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        PROGRAMS[chosen.one](chosen.folder, chosen.sites)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"peak": peak}))
        return
    chosen.folder.mkdir(parents=True, exist_ok=True)
    make(chosen.folder, chosen.sites, chosen.width)
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    inside: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    peaks: dict[str, float] = dict.fromkeys(PROGRAMS, 0.0)
    for _ in range(chosen.rounds):
        for name in PROGRAMS:
            command = [sys.executable, __file__, "--folder", str(chosen.folder), "--one", name]
            started = time.perf_counter()
            done = subprocess.run(
                [*command, "--sites", str(chosen.sites)], check=True, capture_output=True, text=True
            )
            times[name].append(time.perf_counter() - started)
            said = {k: v for line in done.stdout.splitlines() for k, v in json.loads(line).items()}
            peaks[name] = max(peaks[name], said["peak"])
            inside[name].append(said.get("inside", times[name][-1]))
    floor, bare = peaks["import torch"], statistics.median(times["bare numpy"])
    print(f"{'program':<18}{'process s':>10}{'range':>14}{'inside s':>10}{'/ numpy':>9}{'MB':>7}")
    for name in PROGRAMS:
        middle, within = statistics.median(times[name]), statistics.median(inside[name])
        spread = f"{min(times[name]):.2f}-{max(times[name]):.2f}"
        above = f"{peaks[name] - floor:.0f}" if name in METHODS else f"{peaks[name]:.0f}"
        ratio = within / bare
        print(f"{name:<18}{middle:>10.2f}{spread:>14}{within:>10.2f}{ratio:>9.2f}{above:>7}")
    print("MB: peak of the process; of the methods, what is above 'import torch'.")


if __name__ == "__main__":
    main()
