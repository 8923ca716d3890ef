"""Classifier heads: each row is merged from the sites that know its class."""

from __future__ import annotations

from torch import Tensor


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
