"""The files that a merge reads: opened once, and the very files that were checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from merge_kit.contributions import Contribution, check_payload
from merge_kit.engine import Source
from merge_kit.errors import MergeKitError
from merge_kit.federation import Federation, check_base
from merge_kit.manifest import count_of
from merge_kit.parameters import Role, roles_of, vector_specs
from merge_kit.remembered import Checked, check_unchanged
from merge_kit.tensorfile import TensorFile


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the engine needs, open."""

    base: TensorFile
    base_checked: Checked
    roles: dict[str, Role]
    contributions: tuple[Contribution, ...]
    """Sorted by id, each checked."""
    sources: tuple[Source, ...]
    """In the order of the contributions."""

    def check_unchanged(self) -> None:
        """Refuse what is not, or not any more, what was checked: ask once all has been read.

        Raises
        ------
        TensorFileError
            Names the file.
        """
        check_unchanged(self.base, self.base_checked)
        for contribution, source in zip(self.contributions, self.sources, strict=True):
            assert contribution.checked
            check_unchanged(source.file, contribution.checked)


@contextmanager
def open_inputs(
    federation: Federation,
    base_weights: Path,
    contributions: Sequence[Contribution],
    *,
    base_checked: Checked | None = None,
) -> Iterator[Inputs]:
    """Open the base and the payloads; what has not been checked before is checked now.

    Raises
    ------
    MergeKitError
        The base is not the federation's, a contribution is unsound, or a file changed after it was
        checked.
    """
    with ExitStack() as stack:
        base = stack.enter_context(TensorFile(base_weights))
        base_checked = base_checked or check_base(federation, base_weights, str(base_weights))
        roles = roles_of(base.specs, federation.classifier)
        expected = vector_specs(base.specs, roles)
        ordered = tuple(
            c if c.checked else replace(c, checked=check_payload(c, federation, expected, roles))
            for c in sorted(contributions, key=lambda c: c.id)
        )
        sources = tuple(_source(c, federation, stack) for c in ordered)
        inputs = Inputs(base, base_checked, roles, ordered, sources)
        inputs.check_unchanged()
        try:
            yield inputs
        except MergeKitError:
            inputs.check_unchanged()  # otherwise the fault is the change, whatever came of it
            raise


def _source(contribution: Contribution, federation: Federation, stack: ExitStack) -> Source:
    counts = contribution.manifest.class_counts
    return Source(
        id=contribution.id,
        site=contribution.site,
        file=stack.enter_context(TensorFile(contribution.payload)),
        class_counts=tuple(count_of(counts[name]) for name in federation.classes),
        steps=contribution.manifest.training.steps,
    )
