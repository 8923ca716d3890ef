"""What a merge reads: files that are opened once, and are the very files that were checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from merge_kit import vector
from merge_kit.contributions import Contribution
from merge_kit.errors import MergeKitError
from merge_kit.federation import Federation, check_base
from merge_kit.heads import group_shares
from merge_kit.manifest import Manifest, count_of
from merge_kit.methods.base import Statistics
from merge_kit.notes import Notes
from merge_kit.parameters import Role, roles_of, vector_specs
from merge_kit.payloads import check_payload
from merge_kit.remembered import Checked, Identified, cache_folder, check_unchanged
from merge_kit.tensorfile import TensorFile, Tensors
from merge_kit.weighing import Source

Beside = Mapping[Statistics, Sequence[Contribution]]
"""Statistics of each kind, one for each vector in the order of the ids."""


@dataclass(frozen=True, slots=True)
class Material:
    """What the engine needs, open."""

    base: Tensors
    base_fingerprint: str
    sources: tuple[Source, ...]
    """Sorted by id."""
    roles: Mapping[str, Role]
    gone: tuple[Source, ...] = ()
    """Vectors that are not merged, but may have been when a running sum was made."""
    files: tuple[tuple[Identified, Checked], ...] = ()
    """Every file with what was checked of it; the base's comes first."""
    contributions: tuple[Contribution, ...] = ()
    """What the sources are, each checked; empty without a federation."""

    @property
    def notes(self) -> Notes | None:
        """What earlier merges noted of vectors of this base; None where nothing is remembered."""
        folder = cache_folder("notes")
        return Notes(folder, self.base_fingerprint) if folder else None

    def check_unchanged(self) -> None:
        """Refuse what is not, or not any more, what was checked: ask once all has been read.

        Raises
        ------
        TensorFileError
            Names the file.
        """
        for file, checked in self.files:
            check_unchanged(file, checked)


@contextmanager
def opened(
    federation: Federation,
    base_weights: Path,
    contributions: Sequence[Contribution],
    gone: Sequence[Contribution] = (),
    beside: Beside = MappingProxyType({}),
    *,
    base_checked: Checked | None = None,
) -> Iterator[Material]:
    """Open the base and the payloads; what has not been checked before is checked now.

    Raises
    ------
    MergeKitError
        The base is not the federation's, a contribution is unsound, or a file changed after it was
        checked.
    """
    with ExitStack() as stack:
        base = stack.enter_context(TensorFile(base_weights))
        files = [(base, base_checked or check_base(federation, base_weights, str(base_weights)))]
        roles = roles_of(base.specs, federation.classifier)
        expected = vector_specs(base.specs, roles)

        def ready(found: Contribution) -> tuple[Tensors, Contribution]:
            checked = found.checked or check_payload(found, federation, expected, roles)
            file = stack.enter_context(TensorFile(found.payload))
            files.append((file, checked))
            tensors = vector.decoded(file) if found.kind == "vector" else file
            return tensors, replace(found, checked=checked)

        ordered = [ready(c) for c in sorted(contributions, key=lambda c: c.id)]
        statistics: dict[Statistics, list[Tensors]] = {
            kind: [ready(c)[0] for c in those] for kind, those in beside.items()
        }
        sources = [
            replace(
                _source(found, file, federation),
                statistics={kind: those[index] for kind, those in statistics.items()},
            )
            for index, (file, found) in enumerate(ordered)
        ]
        material = Material(
            base=base,
            base_fingerprint=federation.base_fingerprint,
            sources=tuple(sources),
            roles=roles,
            gone=tuple(_source(c, ready(c)[0], federation) for c in gone),
            files=tuple(files),
            contributions=tuple(found for _, found in ordered),
        )
        material.check_unchanged()
        try:
            yield material
        except MergeKitError:
            material.check_unchanged()  # otherwise the fault is the change, whatever came of it
            raise


def _source(contribution: Contribution, file: Tensors, federation: Federation) -> Source:
    manifest, training = contribution.manifest, contribution.manifest.training
    assert training is not None  # every vector's manifest tells it
    coarse = {name: count_of(count) for name, count in (manifest.group_counts or {}).items()}
    return Source(
        id=contribution.id,
        site=contribution.site,
        file=file,
        class_counts=tuple(count_of(_learnt(manifest, name)) for name in federation.classes),
        steps=training.steps,
        score=_score(contribution),
        group_shares=group_shares(federation.labels, coarse) if coarse else (),
        other_images=sum(coarse.values()) + count_of(manifest.other_images or 0),
        images=None if manifest.images is None else count_of(manifest.images),
    )


def _learnt(manifest: Manifest, name: str) -> int | str:
    """Images of a class that its head row was trained on: none where none is known to lack it, for
    then there was nothing to tell it from."""
    if manifest.absent_counts is not None and manifest.absent_counts[name] == 0:
        return 0
    return manifest.class_counts[name]


def _score(contribution: Contribution) -> float | None:
    """How far above chance a site's own model is for certain, on its own validation images.

    (b - 1/K) / (1 - 1/K), b the lower end of the 95 % interval of its balanced accuracy, or the
    figure itself where it has none, K the classes that the site knows, or 2 where an image has or
    lacks each; 0 where it is negative.
    """
    manifest = contribution.manifest
    found = manifest.validation.balanced_accuracy if manifest.validation else None
    known = sum(1 for count in manifest.class_counts.values() if count != 0)
    known = known if manifest.absent_counts is None else 2
    if found is None or found.value is None or known < 2:
        return None
    figure = found.value if found.low is None else found.low
    return max(0.0, (figure - 1 / known) / (1 - 1 / known))
