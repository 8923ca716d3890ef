"""How deep in the network each parameter sits, read from its name."""

from __future__ import annotations

import re
from collections.abc import Iterable

_CONTAINERS = frozenset(
    "b backbone block blocks body denseblock denselayer encoder features layer layers model module "
    "network s stage stages trunk visual".split()
)
"""Words that hold numbered blocks, or hold such a word; regnet's are ``s1.b2``."""
_INDEX = re.compile(r"([a-z_]*?)(\d+)")


def block_of(name: str) -> tuple[int, ...] | None:
    """The numbers of the stage and block that a parameter belongs to, or None outside all blocks.

    ``blocks.7.mlp.fc1.weight`` is (7,), ``layer2.1.conv1.weight`` is (2, 1),
    ``stages.0.blocks.1.norm.weight`` is (0, 1): numbers count as long as they stand in or right
    behind a word for a container of blocks.
    """
    found: list[int] = []
    expects = False
    for part in name.split(".")[:-1]:
        match = _INDEX.fullmatch(part)
        word = match[1].rstrip("_") if match else part
        if match and (expects if not word else word in _CONTAINERS):
            found.append(int(match[2]))
            # A number of its own may be followed by one more: blocks.1.0.
            expects = True
        elif part in _CONTAINERS:
            expects = True
        else:
            break
    return tuple(found) or None


def depths(names: Iterable[str]) -> dict[str, float | None]:
    """Relative depth of each parameter: 0 in the first block, 1 in the last, None outside all.

    A network with one block has depth 0 everywhere.
    """
    blocks = {name: block_of(name) for name in names}
    known = {block for block in blocks.values() if block is not None}
    # What stands in a stage beside its blocks (a downsampling layer) belongs to the first of them.
    home = {
        block: min(
            (b for b in known if len(b) > len(block) and b[: len(block)] == block), default=block
        )
        for block in known
    }
    order = {block: rank for rank, block in enumerate(sorted(set(home.values())))}
    last = max(len(order) - 1, 1)
    return {
        name: None if block is None else order[home[block]] / last for name, block in blocks.items()
    }
