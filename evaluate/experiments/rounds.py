"""Federated training in rounds: the yardstick that needs every hospital online at the same time.

A server loop over our own training: each round every site trains from the common weights, and the
server takes their mean by numbers of training images. FedAvg: McMahan et al. 2017, arXiv
1602.05629, algorithm 1. FedProx: arXiv 1812.06127, equation 2. FedSGD: one step a round. FedBN:
arXiv 2102.07623, batch norm stays at the site.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evaluate.experiments.config import Strategy
from finetune import losses, network, training
from finetune.options import TrainingOptions
from finetune.pixels import Images
from finetune.run import Material
from finetune.starting import StartingHead, put, starting_head
from finetune.tasks import Task
from merge_kit.checkpoints import WEIGHTS
from merge_kit.configuration import CONFIG
from merge_kit.errors import UsageError
from merge_kit.files import new_folder, write_atomic
from merge_kit.heads import merge_rows
from merge_kit.site import Site
from merge_kit.tensorfile import TensorFile, read_all, write_tensors
from merge_kit.writing import METADATA

RECORD = "rounds.json"
PROXIMAL = 0.01
"""mu of FedProx, of the values that its paper tries."""
_LOOKED_AT = 4
"""Validation images that are looked at in a round, for the last weights are taken in any case."""

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Client:
    """A site and its decoded images."""

    site: Site
    material: Material


def run(
    clients: Sequence[Client],
    strategy: Strategy,
    rounds: int,
    options: TrainingOptions,
    device: torch.device,
    out: Path,
    *,
    replace: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Train in rounds and write the common model; with FedBN one model a site.

    All clients train `options.steps` steps in all, in equal parts. Killed, it goes on after the
    last whole round. fedavg-common starts from the closed-form classifier of all sites, and keeps
    it.

    Raises
    ------
    UsageError
        `out` exists, or the steps cannot be shared out.
    """
    if out.exists() and not (replace and (out / RECORD).is_file()):
        raise UsageError(f"{out} exists already: choose another --out, or remove it.")
    rounds = options.steps if strategy == "fedsgd" else rounds
    if options.epochs is not None or options.steps < rounds:
        raise UsageError(
            f"{options.steps} steps cannot be shared out over {rounds} rounds: give --steps, and "
            "at least as many as rounds."
        )
    folder = out.parent / f".{out.name}.rounds"
    server = _Server(clients, strategy, options, device, folder)
    for number in range(server.begin, rounds):
        steps = options.steps * (number + 1) // rounds - options.steps * number // rounds
        server.round(number, steps)
        progress(number + 1, rounds)
    with new_folder(out, replace=replace) as target:
        server.write(target, rounds)
    shutil.rmtree(folder)


class _Server:
    """The common weights, and what stays at each site."""

    def __init__(
        self,
        clients: Sequence[Client],
        strategy: Strategy,
        options: TrainingOptions,
        device: torch.device,
        folder: Path,
    ) -> None:
        self._clients, self._strategy, self._device = clients, strategy, device
        self._folder = folder
        self._model = network.load(clients[0].site.base_folder)
        self._classes = len(clients[0].site.federation.classes)
        self._classifier = clients[0].site.federation.classifier[0]
        changes: dict[str, object] = {"select": "last", "validations": 1, "warmup": 0.0}
        if strategy == "fedprox":
            changes["distance"] = PROXIMAL
        if strategy == "fedsgd":
            changes["optimizer"] = "sgd"
        if strategy == "fedavg-common":
            head = starting_head(clients[0].site, folder, "federation")
            assert isinstance(head, StartingHead)  # or it has been refused
            put(head, self._model)
            changes["head_steps"] = 0
        self._options = options.model_copy(update=changes)
        self._norms = _norms(self._model) if strategy == "fedbn" else set()
        self._state: State = {n: t.clone() for n, t in self._model.state_dict().items()}
        self._own: list[State] = [{} for _ in clients]
        self.begin = self._resume()

    def round(self, number: int, steps: int) -> None:
        """Every site trains from the common weights; then their mean is taken."""
        seed = self._options.seed * 10_007 + number
        head_steps = self._options.head_steps if number == 0 else 0
        options = self._options.model_copy(
            update={"steps": steps, "seed": seed, "head_steps": head_steps}
        )
        found = [self._train(index, options) for index in range(len(self._clients))]
        self._own = [{n: t for n, t in state.items() if n in self._norms} for state in found]
        self._state = self._mean(found)
        kept = {f"common.{n}": t for n, t in self._state.items()}
        for index, own in enumerate(self._own):
            kept |= {f"site{index}.{n}": t for n, t in own.items()}
        write_tensors(self._folder / f"{number + 1}.safetensors", kept)

    def _train(self, index: int, options: TrainingOptions) -> State:
        material = self._clients[index].material
        self._model.load_state_dict({**self._state, **self._own[index]})
        seen = losses.seen_classes(material.train.labels(), self._classes)
        looked_at = _first(material.validation, _LOOKED_AT)
        task = Task(self._model, material.train, looked_at, seen, options, self._device)
        checkpoint = self._folder / "checkpoint.pt"
        checkpoint.unlink(missing_ok=True)
        return training.train(task, checkpoint, lambda event: None).state

    def _mean(self, found: Sequence[State]) -> State:
        counts = torch.stack(
            [
                torch.bincount(c.material.train.labels(), minlength=self._classes)
                for c in self._clients
            ]
        ).double()
        return average(found, self._state, counts, self._classifier)

    def _resume(self) -> int:
        done = [int(path.stem) for path in self._folder.glob("[0-9]*.safetensors")]
        if not done:
            return 0
        with TensorFile(self._folder / f"{max(done)}.safetensors") as file:
            for name, tensor in read_all(file):
                owner, _, rest = name.partition(".")
                kept = self._state if owner == "common" else self._own[int(owner[4:])]
                kept[rest] = tensor
        return max(done)

    def write(self, out: Path, rounds: int) -> None:
        """The models as timm folders, and what it took."""
        federation = self._clients[0].site.federation
        models: Mapping[str, State] = {"": self._state}
        if self._strategy == "fedbn":
            pairs = zip(self._clients, self._own, strict=True)
            models = {client.site.name: {**self._state, **own} for client, own in pairs}
        for name, state in models.items():
            write_tensors(out / name / WEIGHTS, state, METADATA)
            write_atomic(out / name / CONFIG, federation.model_config_json)
        travels = [t for n, t in self._state.items() if n not in self._norms]
        once = sum(t.numel() * t.element_size() for t in travels)
        record = {
            "strategy": self._strategy,
            "rounds": rounds,
            "sites": [client.site.name for client in self._clients],
            "bytes_per_site": 2 * once * rounds,
            "options": self._options.model_dump(mode="json"),
        }
        write_atomic(out / RECORD, json.dumps(record, indent=2))


def average(found: Sequence[State], start: State, counts: Tensor, classifier: str) -> State:
    """The sites' weights by their numbers of images (FedAvg, arXiv 1602.05629, algorithm 1); rows
    of the classifier by those of their class, as no site can speak for a class that it lacks.

    Parameters
    ----------
    found
        The state dict of each site; `start` is what all of them began with.
    counts
        (N, C) float64: training images of each class at each site.
    """
    shares = counts.sum(dim=1) / counts.sum()
    merged: State = {}
    for name, before in start.items():
        values = torch.stack([state[name] for state in found])
        if name.startswith(f"{classifier}."):
            change = merge_rows(values - before, counts)
            merged[name] = (before.double() + change).to(before.dtype)
        elif before.is_floating_point():
            merged[name] = torch.einsum("n...,n->...", values.double(), shares).to(before.dtype)
        else:
            merged[name] = values[0]
    return merged


def _norms(model: nn.Module) -> set[str]:
    """Names of everything that batch norm holds."""
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    if not modules:
        raise UsageError("the backbone has no batch norm, which FedBN keeps at the sites.")
    return {f"{name}.{leaf}" for name, module in modules for leaf in module.state_dict()}


def _first(images: Images, count: int) -> Images:
    return Images(images.cases[:count], images.pixels[:count], images.preprocessing)
