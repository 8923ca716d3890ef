"""Classifier heads: each row is merged from the sites that know its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merge_kit.labelspace import LabelSpace


def merge_rows(rows: Tensor, counts: Tensor) -> Tensor:
    """Mean of each class's head row over the sites that have seen the class, by their counts.

    Parameters
    ----------
    rows
        (N, C, ...): differences of the head's weight or bias, one row a class.
    counts
        (N, C) float64: images of each class at each site.

    Returns
    -------
    Tensor
        (C, ...) float64; zero for a class that no site has seen.
    """
    seen = counts.sum(dim=0)
    shares = counts / seen.where(seen > 0, 1.0)
    return (shares.reshape(*shares.shape, *[1] * (rows.dim() - 2)) * rows.double()).sum(dim=0)


def group_shares(labels: LabelSpace, counts: Mapping[str, float]) -> tuple[float, ...]:
    """(C,) images of each class, where those of a group are shared equally among its classes."""
    shares = dict.fromkeys(labels.classes, 0.0)
    for group, count in sorted(counts.items()):
        members = labels.members(group)
        for name in members:
            shares[name] += count / len(members)
    return tuple(shares.values())


def row_counts(
    class_counts: Sequence[Sequence[float]], shares: Sequence[Sequence[float]]
) -> Tensor:
    """How much each site's row of each class counts.

    Where a site has images of the class itself, the sites count by these; a row that has learnt
    only what several classes share would blur it. A class that no site has told apart from others
    is merged by the shares of the groups' images: see `group_shares`.

    Parameters
    ----------
    class_counts
        N of (C,): images of each class.
    shares
        N of (C,), or of nothing where a site has no image of a group.

    Returns
    -------
    Tensor
        (N, C) float64, for `merge_rows`.
    """
    fine = torch.tensor(class_counts, dtype=torch.float64)
    coarse = [own or (0.0,) * fine.shape[1] for own in shares]
    known = (fine > 0).any(dim=0)
    return torch.where(known, fine, torch.tensor(coarse, dtype=torch.float64))
