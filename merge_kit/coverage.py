"""How many tensors a method merges itself: some are for matrices, or for what sites measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_kit.methods.base import ByValue
from merge_kit.recipe import Rule
from merge_kit.tensorheader import TensorSpec
from merge_kit.weighing import Source

_OTHERS = {"mean": "the weighted mean", "base": "the base's values"}


@dataclass(frozen=True, slots=True)
class Coverage:
    """The tensors of one rule."""

    method: str
    own: tuple[str, ...]
    """Merged by the method."""
    rest: tuple[str, ...]
    others: str
    """What the rest gets."""

    def __str__(self) -> str:
        count = len(self.own) + len(self.rest)
        return (
            f"{self.method} merged {len(self.own)} of {count} tensors itself, the others got "
            f"{self.others}"
        )


def coverage(
    rule: Rule, names: Sequence[str], specs: Mapping[str, TensorSpec], sources: Sequence[Source]
) -> Coverage:
    """Which of a rule's tensors its method merges itself."""
    method, options = rule.merging_rule
    if not isinstance(method.rule, ByValue):
        return Coverage(method.name, tuple(names), (), _OTHERS["mean"])
    taken = {name for name in names if method.rule.takes(name, specs[name].shape, options)}
    if method.statistics:
        taken &= {name for s in sources for name in s.statistics[method.statistics].specs}
    return Coverage(
        method.name,
        tuple(name for name in names if name in taken),
        tuple(name for name in names if name not in taken),
        _OTHERS[method.rule.others(options)],
    )
