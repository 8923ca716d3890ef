"""Fixtures of the tests of a site's work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from merge_kit import signing
from merge_kit import site as sites
from merge_kit.federation import FEDERATION_FILE, read_federation
from tests.finetune.pictures import write_table

HOSPITALS = {
    "north": {"round": 7, "lobed": 6, "granular": 0},
    "south": {"round": 5, "lobed": 0, "granular": 9},
}
TRAINING = ("--steps", 4, "--batch-size", 8, "--validations", 1, "--head-steps", 200)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hospitals(hub, tmp_path):
    """Two joined and admitted sites with images."""
    tables = {}
    for seed, (name, counts) in enumerate(HOSPITALS.items()):
        joined = sites.join(hub, name, tmp_path / name)
        federation = read_federation(hub.root).admit(name, signing.public_key(joined.key_file))
        hub.replace(FEDERATION_FILE, federation.to_yaml().encode(), hub.read(FEDERATION_FILE))
        tables[name] = write_table(tmp_path / "images" / name, counts, seed=seed)
    return tables


@pytest.fixture
def calibrate(hub, hospitals, run_cli, tmp_path):
    """`merge-kit calibrate` and `publish`; gives the folder."""

    def go(name, *arguments):
        result = run_cli("calibrate", tmp_path / name, "--data", hospitals[name], *arguments)
        assert result.exit_code == 0, result.output
        folder = max((tmp_path / name / "calibrations").iterdir(), key=lambda p: p.stat().st_mtime)
        result = run_cli("publish", tmp_path / name, "--run", folder)
        assert result.exit_code == 0, result.output
        return folder

    return go


@pytest.fixture
def trained(hub, hospitals, run_cli, tmp_path):
    """A hub with the vectors of two sites, each of which lacks a class."""
    for name, table in hospitals.items():
        tuned = run_cli("finetune", tmp_path / name, "--data", table, *TRAINING)
        assert tuned.exit_code == 0, tuned.output
        assert run_cli("publish", tmp_path / name).exit_code == 0
    return hub
