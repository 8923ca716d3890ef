"""Merges the same models with installed peers and with the engine, and prints how far they differ.

    PYTHONPATH=. PEERS/bin/python tests/benchmarks/peers.py > table.md

PEERS is an environment with merge-kit's requirements and any of mergekit, sd-mecha, fusion_bench
and peft; what is missing is named and left out. Random methods draw the engine's masks in both.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import logging
import platform
import sys
import warnings
from types import ModuleType

import numpy as np
import torch
from comparison import Inputs, Row, compare, known, made_inputs, named, quiet

PEERS = ("peer_mergekit", "peer_fusion_bench", "peer_sd_mecha", "peer_peft")
EQUAL = 1e-5
"""Relative difference up to which float32 arithmetic is the reason."""


def load(names: list[str]) -> list[ModuleType]:
    """The modules of the peers that are installed."""
    found = []
    for name in names:
        try:
            found.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            print(f"left out: {name.removeprefix('peer_')}, no module named {error.name}")
    return found


def line(row: Row, label: str, inputs: Inputs) -> tuple[str, str, bool]:
    """One row of the table, and whether it is explained."""
    head = f"| {row.method} | {label} `{row.call}` | {row.asked} |"
    try:
        found = compare(row, inputs)
    except Exception as error:
        why = row.why and f": {row.why}"
        return row.method, f"{head} – | – | {named(error)}{why} |", bool(row.why)
    apart = found.relative > EQUAL
    why = row.why if apart else ""
    body = f"{head} {found.absolute:.1e} | {found.relative:.1e} | {why} |"
    return row.method, body, bool(why) or not apart


def main() -> int:
    """Run it; the exit status says whether a difference was found that no row explains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=PEERS, choices=PEERS, help="peers to run")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    inputs, lines, waiting, good = made_inputs(), [], set(), True
    modules = load(list(chosen.only))
    for module in modules:
        label = f"{module.NAME} {importlib.metadata.version(module.DISTRIBUTION)}"
        for row in module.ROWS:
            if not known(row):
                waiting.add(row.method)
                continue
            method, text, explained = line(row, label, inputs)
            lines.append((method, text))
            if not explained:
                good = False
                print(f"not explained: {text}", file=sys.stderr)
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}.\n"
    )
    print("| method | peer | ours | absolute | relative | why |")
    print("| --- | --- | --- | --- | --- | --- |")
    order = {method: index for index, (method, _) in reversed(list(enumerate(lines)))}
    for _, text in sorted(lines, key=lambda pair: order[pair[0]]):
        print(text)
    if waiting:
        print(f"\nNot in the registry: {', '.join(sorted(waiting))}.")
    print("\n| peer | asked | measured |\n| --- | --- | --- |")
    for module in modules:
        for fault in module.FAULTS:
            with quiet():
                measured = fault.measure(inputs)
            print(f"| {module.NAME} | {fault.what} | {measured} |")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
