"""The labels that images may have: the classes of a model, and groups of them as a tree.

A label that names a group says that the image is of one of its classes, not of which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LabelSpace:
    """Classes in the order of the head's rows, and groups of classes or of other groups.

    A label is counted by its place among `names`: the classes come first, then the groups.

    Raises
    ------
    ValueError
        A group's name is that of a class or of another group, a group has fewer than two members
        or an unknown one, a name is in two groups or in itself, or a group holds every class.
    """

    classes: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        folded = [name.casefold() for name in self.classes]
        for group in self.groups:  # labels are matched without regard to case
            if group.casefold() in folded:
                raise ValueError(f"the group '{group}' has the name of a class or of another group")
            folded.append(group.casefold())
        parents = self._parents()
        for group in self.groups:
            above, name = {group}, parents.get(group)
            while name is not None:
                if name in above:
                    raise ValueError(f"the group '{group}' is within itself")
                above.add(name)
                name = parents.get(name)
        for group in self.groups:
            if len(self.members(group)) == len(self.classes):
                raise ValueError(f"the group '{group}' holds every class, which tells nothing")

    def _parents(self) -> dict[str, str]:
        parents: dict[str, str] = {}
        for group, members in self.groups.items():
            if len(members) < 2:
                raise ValueError(f"the group '{group}' has fewer than two members")
            for name in members:
                if name not in self.classes and name not in self.groups:
                    raise ValueError(f"the group '{group}' names '{name}', which is no class")
                if name in parents:
                    raise ValueError(f"'{name}' is named twice in groups")
                parents[name] = group
        return parents

    @property
    def names(self) -> tuple[str, ...]:
        """Every label: the C classes, then the groups."""
        return (*self.classes, *self.groups)

    def members(self, name: str) -> tuple[str, ...]:
        """The classes that a label stands for, in their order; of a class itself."""
        if name not in self.groups:
            return (name,)
        found = {c for member in self.groups[name] for c in self.members(member)}
        return tuple(c for c in self.classes if c in found)

    @property
    def top(self) -> tuple[str, ...]:
        """Groups and classes that are in no group: each class is in one of them."""
        inner = {name for members in self.groups.values() for name in members}
        outer = [name for name in self.names if name not in inner]
        return tuple(sorted(outer, key=lambda name: self.classes.index(self.members(name)[0])))

    @property
    def meaning(self) -> Tensor:
        """(L, C) bool: which classes each label stands for."""
        rows = [[c in self.members(name) for c in self.classes] for name in self.names]
        return torch.tensor(rows, dtype=torch.bool)


def cells_of(labels: Tensor, meaning: Tensor) -> Tensor:
    """The finest parts of the classes that every one of these labels can tell apart.

    Groups that occur are whole; a class that is in none of them is a part by itself.

    Parameters
    ----------
    labels
        (n,) int64 in [0, L).
    meaning
        (L, C) bool: see `LabelSpace.meaning`.

    Returns
    -------
    Tensor
        (C,) int64: the part of each class, numbered from 0 in the order of their first classes.
    """
    part = torch.arange(meaning.shape[1])
    present = torch.unique(labels)
    sizes = meaning.sum(dim=1)
    for label in present[sizes[present].argsort(stable=True)].tolist():  # what is larger wins
        row = meaning[label]
        if int(sizes[label]) > 1:
            part[row] = int(row.nonzero()[0])
    numbered: Tensor = torch.unique(part, return_inverse=True)[1]
    return numbered
