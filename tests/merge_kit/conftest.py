"""Real file systems that are full or read-only, a reader of blocks, and the tests' merge job."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from merge_kit import merging
from merge_kit.blocks import BlockReader
from merge_kit.contributions import Entry, current, list_entries
from merge_kit.federation import read_federation
from merge_kit.hub import FolderHub
from merge_kit.payloads import check_payloads
from merge_kit.recipe import make_recipe
from merge_kit.surveys import Survey
from merge_kit.tensorfile import TensorFile, write_tensors
from tests.merge_kit.auditing import Bench


def _mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except OSError as error:
        pytest.skip(f"there is no mount command: {error}")
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    _mount(folder, "size=64k")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that nothing can be written to."""
    folder = tmp_path / "fixed"
    folder.mkdir()
    _mount(folder, "ro,size=64k")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


@pytest.fixture
def merge(hub: FolderHub, tmp_path: Path) -> Callable[..., merging.Merged]:
    """Merge what lies on `hub` as the command does; keywords of a recipe, `choose` or `merge`."""

    def run(
        out: str = "merged",
        *,
        entries: list[Entry] | None = None,
        allow_unsigned: bool = False,
        skip_refused: bool = False,
        replace: bool = False,
        **recipe: object,
    ) -> merging.Merged:
        federation = read_federation(hub.root)
        base = hub.fetch("base/model.safetensors")
        found = list_entries(hub, federation) if entries is None else entries
        found = check_payloads(found, federation, base)
        chosen, refused = merging.choose(
            found, allow_unsigned=allow_unsigned, skip_refused=skip_refused
        )
        there = [entry.contribution for entry in current(found) if entry.contribution]
        complete = make_recipe({"method": "mean", **recipe}, "test")
        return merging.merge(
            federation,
            base,
            chosen,
            complete,
            tmp_path / out,
            statistics=there,
            refused=refused,
            replace=replace,
        )

    return run


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[Callable[[Mapping[str, torch.Tensor]], TensorFile]]:
    """Write tensors and open them until the test ends."""
    opened: list[TensorFile] = []

    def make(tensors: Mapping[str, torch.Tensor]) -> TensorFile:
        path = tmp_path / f"{len(opened)}.safetensors"
        write_tensors(path, tensors)
        opened.append(TensorFile(path))
        return opened[-1]

    yield make
    for file in opened:
        file.close()


@pytest.fixture
def read(
    open_file: Callable[[Mapping[str, torch.Tensor]], TensorFile],
) -> Callable[..., BlockReader]:
    """A reader of vectors given as dictionaries of tensors, over a base of ones."""

    def make(vectors: Sequence[Mapping[str, torch.Tensor]], workers: int = 1) -> BlockReader:
        base = open_file({name: torch.ones_like(tensor) for name, tensor in vectors[0].items()})
        files = tuple(open_file(v) for v in vectors)
        return BlockReader(base, files, tuple(vectors[0]), workers)

    return make


@pytest.fixture
def survey(read: Callable[..., BlockReader]) -> Callable[..., Survey]:
    """First passes over vectors given as dictionaries of tensors."""
    return lambda vectors, workers=1: Survey(read(vectors, workers))


@pytest.fixture
def bench(hub, contribute, run_cli, tmp_path):
    return Bench(hub, contribute, run_cli, tmp_path)


@pytest.fixture
def merged(bench):
    """The bench with a merged model."""
    bench.merge()
    return bench
