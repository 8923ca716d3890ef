"""kill -9 at any moment: what others see is whole or not there, and the same command goes on."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from merge_kit import publishing, signing
from merge_kit import site as sites
from merge_kit.contributions import list_entries
from merge_kit.creation import create
from merge_kit.federation import FEDERATION_FILE, Policy, read_federation
from merge_kit.hub import FolderHub
from merge_kit.manifest import read_draft
from merge_kit.parameters import roles_of, vector_specs
from merge_kit.payloads import check_payload
from merge_kit.runs import latest_run
from merge_kit.tensorfile import TensorFile
from tests.conftest import CLASSES, write_run
from tests.finetune.pictures import write_table
from tests.forked import Forked

KILLS = 10
PATIENCE = 120.0
Ready = Callable[[], bool]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that are killed: the number of threads may show in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Forked]:
    """Start the program as a process of its own."""
    folder = tmp_path_factory.mktemp("said")
    return lambda *arguments: Forked(arguments, folder / f"{time.monotonic_ns()}.txt")


def kill(process: Forked, ready: Ready, delay: float) -> bool:
    """Kill `delay` seconds after `ready`; False when the process had ended by itself."""
    deadline = time.monotonic() + PATIENCE
    while process.running and not ready() and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    status, said = process.wait(PATIENCE)
    assert status in (0, -signal.SIGKILL), said
    return status != 0


def window(process: Forked, ready: Ready) -> float:
    """Seconds from `ready` to the end of an unbroken run: where kills are worth their while."""
    while process.running and not ready():
        time.sleep(0.0005)
    begun = time.monotonic()
    status, said = process.wait(PATIENCE)
    assert status == 0, said
    return time.monotonic() - begun


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# finetune: each command goes on where the one before was killed

STEPS, EVERY = 60, 10
TRAINING = (
    "--steps", STEPS, "--validations", STEPS // EVERY, "--batch-size", 8, "--head-steps", 20,
    "--ema", 0.9, "--norm", "update", "--select", "last", "--device", "cpu",
)  # fmt: skip


def moments(root: Path, rng: random.Random) -> list[tuple[Ready, float]]:
    """Ten moments of a training in their order, each with a delay after it."""

    def logged(step: int) -> Ready:
        return lambda: any(
            f'"step": {step}' in path.read_text() for path in root.glob("runs/*/metrics.jsonl")
        )

    def exists(pattern: str) -> Ready:
        return lambda: any(root.glob(pattern))

    steps = [rng.randrange(first + 1, first + EVERY) for first in range(0, STEPS, EVERY)]
    return [
        (lambda: True, rng.uniform(0, 0.1)),
        (exists("cache/.*.partial"), rng.uniform(0, 0.01)),
        *[(logged(step), rng.uniform(0, 0.01)) for step in steps],
        (exists("runs/*/model"), rng.uniform(0, 0.01)),
        (exists("runs/*/vector.safetensors"), rng.uniform(0, 0.3)),
    ]


def assert_nothing_half_done(root: Path) -> None:
    finished = latest_run(root)
    for vector in root.glob("runs/*/vector.safetensors"):
        TensorFile(vector).close()
    for draft in root.glob("runs/*/manifest.draft.json"):
        assert (
            read_draft(draft).payload.size == (draft.parent / "vector.safetensors").stat().st_size
        )
    if finished:
        assert {"vector.safetensors", "manifest.draft.json", "curves.png"} <= contents(
            finished
        ).keys()


def test_a_killed_finetune_goes_on_to_the_same_vector(hub, tmp_path, run_cli, start):
    table = write_table(tmp_path / "images", {"round": 11, "lobed": 8, "granular": 0})
    root, whole = (sites.join(hub, "north", tmp_path / name).root for name in ("killed", "whole"))
    killed = 0
    for ready, delay in moments(root, random.Random(20)):
        killed += kill(start("finetune", root, "--data", table, *TRAINING), ready, delay)
        assert_nothing_half_done(root)
    assert killed > KILLS // 2  # the last ones may have come too late
    for folder in (root, whole):
        result = run_cli("finetune", folder, "--data", table, *TRAINING)
        assert result.exit_code == 0, result.output
    found, expected = contents(latest_run(root)), contents(latest_run(whole))
    assert found.keys() == expected.keys()
    for name in ("vector.safetensors", "metrics.jsonl", "model/model.safetensors", "cases.csv"):
        assert found[name] == expected[name], name


# publish and merge: a network that takes a while to write


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FolderHub]:
    """A federation around a ResNet-18; two sites beside it hold a finished run each."""
    place = tmp_path_factory.mktemp("big")
    create(
        place / "hub", name="cells", architecture="resnet18", classes=CLASSES, weights="none",
        model_args={}, preprocessing={"input_size": (3, 32, 32)}, policy=Policy(),
    )  # fmt: skip
    hub = FolderHub(place / "hub")
    for seed, name in enumerate(("north", "south")):
        joined = sites.join(hub, name, place / name)
        federation = read_federation(hub.root).admit(name, signing.public_key(joined.key_file))
        hub.replace(FEDERATION_FILE, federation.to_yaml().encode(), hub.read(FEDERATION_FILE))
        write_run(joined, place / name / "runs" / "a", seed=seed)
        (place / name / "runs" / "a" / "summary.json").write_text("{}")
    yield hub
    shutil.rmtree(place)


def assert_hub_is_whole(hub: FolderHub) -> None:
    federation = read_federation(hub.root)
    with TensorFile(hub.fetch("base/model.safetensors")) as base:
        roles = roles_of(base.specs, federation.classifier)
        expected = vector_specs(base.specs, roles)
    for entry in list_entries(hub, federation):
        assert entry.problem is None
        check_payload(entry.contribution, federation, expected, roles)


def test_a_killed_publish_leaves_a_whole_contribution_or_none(big, run_cli, start):
    rng, root = random.Random(20), big.root.parent / "north"
    place, note = big.root / "contributions", root / "runs" / "a" / "manifest.json"

    def begun() -> bool:
        return any(place.glob("north/.*"))

    shutil.rmtree(place, ignore_errors=True)
    seconds = window(start("publish", root), begun)
    expected = contents(place)
    killed = 0
    for _ in range(3 * KILLS):  # some come too late
        if killed == KILLS:
            break
        shutil.rmtree(place)
        note.unlink()
        killed += kill(start("publish", root), begun, rng.uniform(0, 0.8 * seconds))
        assert_hub_is_whole(big)
        result = run_cli("publish", root)
        assert result.exit_code == 0, result.output
        assert contents(place) == expected
    assert killed > KILLS // 2
    shutil.rmtree(place)


def test_a_killed_merge_leaves_a_whole_model_or_none(big, tmp_path, start):
    rng, out = random.Random(20), tmp_path / "merged"
    for name in ("north", "south"):
        joined = sites.open_site(big.root.parent / name)
        run = joined.root / "runs" / "a"
        publishing.publish(joined, run, big, publishing.prepare(joined, run, big))
    command = ("merge", big.root, "--method", "ties", "--out", out)

    def begun() -> bool:
        return any(tmp_path.glob(".*"))

    seconds = window(start(*command), begun)
    expected = contents(out)
    assert expected.keys() == {"model.safetensors", "config.json", "README.md", "provenance.json"}
    killed = 0
    for _ in range(3 * KILLS):  # some come too late
        if killed == KILLS:
            break
        shutil.rmtree(out, ignore_errors=True)
        killed += kill(start(*command), begun, rng.uniform(0, 0.8 * seconds))
        assert not out.exists() or contents(out) == expected
    assert killed > KILLS // 2
    shutil.rmtree(out, ignore_errors=True)
    status, said = start(*command).wait(PATIENCE)
    assert status == 0, said
    assert contents(tmp_path) == {f"merged/{name}": data for name, data in expected.items()}
