"""The programs of the merge benchmark: how each is started, and which files it reads."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vits
import workload

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MERGEKIT: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("linear", {"weight": 1.0}),
    "sum": ("task_arithmetic", {"weight": 1.0}),
    "ties": ("ties", {"weight": 1.0, "density": workload.DENSITY["ties"]}),
    "dare": ("dare_linear", {"weight": 1.0, "density": workload.DENSITY["dare"]}),
    "slerp": ("slerp", {"t": 0.5}),
    "model-stock": ("model_stock", {}),
    "multislerp": ("multislerp", {"weight": 1.0}),
    "karcher": ("karcher", {}),
}
"""Its name of each rule, and its parameters."""
_NO_BASE = ("linear", "karcher")
METHODS = (
    "mean",
    "sum",
    "ties",
    "dare",
    "median",
    "slerp",
    "model-stock",
    "multislerp",
    "karcher",
    "geometric-median",
)


@dataclass(frozen=True, slots=True)
class Setting:
    """On what the programs run."""

    folder: Path
    sites: int
    width: int
    depth: int
    peers: Path | None
    """Interpreter of the environment that has the peers."""
    device: str
    """Where our programs compute."""

    @property
    def values(self) -> int:
        """Of one model."""
        return vits.values(self.width, self.depth)


@dataclass(frozen=True, slots=True)
class Program:
    """One row of the benchmark, such as ``cat``, ``engine ties`` or ``mergekit ties``."""

    name: str

    @property
    def kind(self) -> str:
        """The first word."""
        return self.name.split()[0]

    @property
    def method(self) -> str:
        """Our name of the rule; empty where there is none."""
        return self.name.partition(" ")[2] if self.kind not in ("import", "numpy") else ""

    @property
    def reads(self) -> str:
        """The kind of files."""
        vectors = self.kind in ("cat", "numpy", "engine", "import")
        return vits.VECTORS if vectors else vits.CHECKPOINTS

    @property
    def of_peer(self) -> bool:
        """Whether it needs the peers' interpreter."""
        return self.kind in ("mergekit", "sd-mecha")

    def command(self, setting: Setting) -> list[str]:
        """Make ready what must not be timed, and give the command line."""
        folder, sites = setting.folder, setting.sites
        base, count = vits.model(folder, vits.BASE), 2 if self.method in workload.PAIRS else sites
        models = [vits.model(folder, index) for index in range(count)]
        if self.kind == "cat":
            files = [str(base), *(str(vits.vector(folder, index)) for index in range(sites))]
            return ["sh", "-c", 'exec cat "$@" > /dev/null', "cat", *files]
        if self.kind == "command":
            out = folder / "command.out"
            shutil.rmtree(out, ignore_errors=True)
            start = [sys.executable, "-m", "merge_kit", "merge", str(base.parent)]
            inputs = [str(model.parent) for model in models]
            where = ["--method", self.method, "--device", setting.device, "--out", str(out)]
            return [*start, *inputs, *where]
        python = str(setting.peers) if self.of_peer else sys.executable
        if self.kind == "mergekit":
            config = folder / "mergekit.yaml"
            config.write_text(json.dumps(_mergekit(self.method, base, models)))
            tool = Path(python).parent / "mergekit-pytorch"
            return [str(tool), str(config), str(folder / "mergekit.out"), "--quiet"]
        start = [python, str(HERE / "workload.py"), self.name, str(folder), str(sites)]
        return [*start, setting.device] if self.kind == "engine" else start


def _mergekit(method: str, base: Path, models: list[Path]) -> dict[str, Any]:
    """Its configuration; JSON is YAML."""
    name, parameters = MERGEKIT[method]
    found: dict[str, Any] = {
        "merge_method": name,
        "parameters": parameters,
        "models": [{"model": str(model)} for model in models],
    }
    if name == "slerp":
        found["base_model"] = str(models[0])
    elif name not in _NO_BASE:
        found["base_model"] = str(base)
    return found


PROGRAMS = [
    Program(name)
    for name in (
        "cat",
        "import torch",
        "numpy",
        "numpy synced",
        *(name for name in workload.RUNS if name.startswith("torch ")),
        *(f"mergekit {method}" for method in MERGEKIT),
        *(name for name in workload.RUNS if name.startswith("sd-mecha ")),
        *(f"engine {method}" for method in METHODS),
        *(f"command {method}" for method in METHODS),
    )
]
