"""A federation of an experiment as a list of commands, each known by its content."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evaluate.experiments.config import Experiment
from merge_kit.files import canonical_json, sha256_bytes


@dataclass(frozen=True, slots=True)
class Job:
    """One command of merge-kit."""

    argv: tuple[str, ...]
    key: str
    """A hash of the command and of all that it builds on: done once, it is not done again."""
    after: tuple[str, ...]
    """Keys of the jobs that come first."""
    phase: int
    """Jobs of one phase do not wait for each other."""

    @property
    def told(self) -> str:
        """The command as it can be pasted into a shell."""
        return f"merge-kit {shlex.join(self.argv)}"


@dataclass(slots=True)
class Fold:
    """One federation of an experiment: a seed, and what sets it apart from the other ones."""

    root: Path
    seed: int
    left_out: str | None
    variant: str | None = None
    """Name of the training options, where they are not those of all else."""
    source: Path | None = None
    """What the experiment's own paths start from; its content is part of the root's name."""
    jobs: list[Job] = field(default_factory=list)
    models: dict[str, Path] = field(default_factory=dict)
    """What is evaluated, by name."""
    arrivals: dict[frozenset[str], str] = field(default_factory=dict)
    """Names of the models of parts of the sites."""
    teacher: str | None = None
    """Which of the other backbones learns beside the network at every site."""
    reports: dict[str, Path] = field(default_factory=dict)
    """Folders of the evaluations: of all, and of the arrivals."""

    @property
    def whole(self) -> bool:
        """Whether all sites are there and train as all else says: the one with the yardsticks."""
        return self.left_out is None and self.variant is None

    def add(self, *argv: object, after: Sequence[Job] = (), about: str = "") -> Job:
        """One more command; `about` stands for the content of what it reads from elsewhere."""
        texts = tuple(str(part) for part in argv)
        # The folder's name is a hash of data, backbone and training: it stands for all of them,
        # wherever they lie.
        moved = [self._inside(text) for text in texts]
        told = [
            moved,
            self.root.name,
            sorted(job.key for job in after),
            *([about] if about else []),
        ]
        key = sha256_bytes(canonical_json(told))[7:23]
        if there := next((job for job in self.jobs if job.key == key), None):
            return there
        phase = max((job.phase for job in after), default=0) + 1
        job = Job(texts, key, tuple(job.key for job in after), phase)
        self.jobs.append(job)
        return job

    def _inside(self, text: str) -> str:
        """A path of the experiment's own files without what it starts from."""
        path = Path(text)
        ours = path.is_absolute() and not path.is_relative_to(self.root.parent)
        if ours and self.source and path.is_relative_to(self.source):
            return str(path.relative_to(self.source))
        return text


def fold_folder(
    out: Path,
    experiment: Experiment,
    content: str,
    seed: int,
    *,
    without: str | None = None,
    variant: str | None = None,
) -> Path:
    """Where a federation lives: the name is a hash of all that its vectors depend on.

    `content` stands for the images, their labels, and the backbone's weights.
    """
    teacher = experiment.training_of(variant).get("mutual")
    told = [
        content,
        experiment.classes,
        experiment.backbone.model_dump(mode="json"),
        experiment.options(variant).identity(),
        seed,
        without,
        *([experiment.means] if experiment.means else []),
        *([experiment.others[teacher].model_dump(mode="json")] if teacher else []),
    ]
    name = f"seed-{seed}" + (f"-without-{without}" if without else "")
    name += f"-{variant}" if variant else ""
    return out / f"{name}-{sha256_bytes(canonical_json(told))[7:15]}"


def wire_hub(root: Path, wire: str) -> Path:
    """The hub of a federation for contributions of one `Merge.wire`."""
    return root / (f"hub-{sha256_bytes(wire.encode())[7:15]}" if wire else "hub")
