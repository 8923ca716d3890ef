"""Fixtures that the tests of all packages share; everything here is real, only small."""

from __future__ import annotations

import gc
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from merge_kit import (
    moments,
    momentsfile,
    publishing,
    reheading,
    signing,
    site,
    statistics,
    vector,
)
from merge_kit.cli import main
from merge_kit.creation import create
from merge_kit.federation import FEDERATION_FILE, Federation, Policy, read_federation
from merge_kit.files import canonical_json, sha256_file
from merge_kit.hub import FolderHub
from merge_kit.manifest import (
    Draft,
    Estimate,
    Payload,
    Software,
    Training,
    Validation,
    read_draft,
    suppress,
)
from merge_kit.methods.base import Statistics
from merge_kit.moments import Moments
from merge_kit.parameters import roles_of, vector_specs
from merge_kit.remembered import VARIABLE
from merge_kit.tensorfile import TensorFile, read_all, write_tensors

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
CLASSES = ("round", "lobed", "granular")
MEMORY = Path("/dev/shm")
ROOM = 4_000_000_000
"""Bytes; a whole run takes a tenth of it."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test by far comes first, so that no worker waits for another that has it last."""
    items.sort(key=lambda item: item.name != "test_the_day_of_each_role_runs_as_written")


def pytest_configure() -> None:
    """Write to memory where there is room, as a disk takes its time for each flush and removal, and
    look for no garbage among what is imported now, which stays."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    gc.disable()


def pytest_collection_finish() -> None:
    """Nor does whoever looks for garbage later."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the tests remember of files is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


def _shared(part: str) -> Path:
    path = SHARED / part
    if not path.exists():
        reason = f"the shared {part} is not beside the repository"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture
def shared_data() -> Path:
    """The folder with real medical images."""
    return _shared("data")


@pytest.fixture
def shared_weights() -> Path:
    """The folder with real pretrained backbones."""
    return _shared("weights")


@pytest.fixture
def run_cli() -> Callable[..., Result]:
    """Run the program in this process; an error of ours gives its exit code and sentence."""

    def run(*arguments: object) -> Result:
        runner = CliRunner()

        @click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
        @click.argument("rest", nargs=-1, type=click.UNPROCESSED)
        def program(rest: tuple[str, ...]) -> None:
            main(rest)

        return runner.invoke(program, ["--", *[str(a) for a in arguments]])

    return run


@pytest.fixture
def ok(run_cli: Callable[..., Result]) -> Callable[..., str]:
    """Run a command that must go through; gives what it said."""

    def run(*arguments: object) -> str:
        result = run_cli(*arguments)
        assert result.exit_code == 0, result.output
        return result.output

    return run


@pytest.fixture(scope="session")
def _federation_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "hub"
    create(
        folder,
        name="cells",
        architecture="test_resnet",
        classes=CLASSES,
        weights="none",
        model_args={},
        preprocessing={"input_size": (3, 32, 32), "crop_pct": 1.0},
        policy=Policy(),
        seed=1,
    )
    return folder


@pytest.fixture
def hub(tmp_path: Path, _federation_template: Path) -> FolderHub:
    """A federation with a small convolutional network with batch norm, on a folder hub."""
    return FolderHub(Path(shutil.copytree(_federation_template, tmp_path / "hub")))


@pytest.fixture
def federation(hub: FolderHub) -> Federation:
    """The contract on `hub`."""
    return read_federation(hub.root)


Contribute = Callable[..., publishing.Parcel]


@pytest.fixture
def contribute(hub: FolderHub, tmp_path: Path) -> Contribute:
    """Join, make a vector by `change`, and publish it: all but the training is the real thing."""

    def make(
        name: str,
        *,
        seed: int = 0,
        counts: Mapping[str, int] | None = None,
        steps: int = 10,
        admit: bool = True,
        change: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
        beside: Sequence[Statistics] = (),
    ) -> publishing.Parcel:
        joined = site.join(hub, name, tmp_path / name)
        if admit:
            federation = read_federation(hub.root).admit(name, signing.public_key(joined.key_file))
            hub.replace(FEDERATION_FILE, federation.to_yaml().encode(), hub.read(FEDERATION_FILE))
        run = tmp_path / name / "runs" / f"seed{seed}"
        write_run(joined, run, seed=seed, counts=counts, steps=steps, change=change)
        for kind in beside:
            write_statistics(joined, run, kind, seed=seed)
        parcels = publishing.prepare_all(joined, run, hub)
        for parcel in parcels:
            publishing.publish(joined, run, hub, parcel)
        return parcels[0]

    return make


def nudge(seed: int) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """A small seeded change of every float tensor; variances stay positive, counters rise."""
    generator = torch.Generator().manual_seed(seed)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor + seed + 1
        step = torch.randn(tensor.shape, generator=generator) * 0.01
        return tensor + (step.abs() if name.endswith("running_var") else step)

    return change


def write_run(
    joined: site.Site,
    run: Path,
    *,
    seed: int = 0,
    counts: Mapping[str, int] | None = None,
    steps: int = 10,
    change: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """What `finetune` leaves for `publish`: a vector and a manifest draft."""
    federation, change = joined.federation, change or nudge(seed)
    header = vector.VectorHeader(
        base=federation.base_fingerprint, federation=federation.contract_hash, site=joined.name
    )
    with TensorFile(joined.base_folder / "model.safetensors") as base:
        tuned = {name: change(name, tensor) for name, tensor in read_all(base)}
        roles = roles_of(base.specs, federation.classifier)
        path = run / publishing.VECTOR
        vector.subtract(base, tuned, roles, header, path)
    with TensorFile(path) as written:
        norm = vector.norm(written, roles)
    nothing = Estimate(value=0.8, low=0.7, high=0.9)
    draft = Draft(
        site=joined.name,
        federation=federation.contract_hash,
        base=federation.base_fingerprint,
        payload=Payload(sha256=sha256_file(path), size=path.stat().st_size, norm=norm),
        class_counts=suppress(counts or dict.fromkeys(federation.classes, 20), 5),
        training=Training(steps=steps, epochs=1, optimizer="adamw", learning_rate=1e-4, seed=seed),
        preprocessing=federation.preprocessing.hash,
        validation=Validation(balanced_accuracy=nothing, macro_auroc=nothing),
        software=Software(merge_kit="0.1.0", python="3.11.7", torch="2.15.0", timm="1.0.31"),
        created_at="2026-11-23T12:00:00Z",
    )
    (run / publishing.DRAFT).write_text(draft.model_dump_json())


def write_statistics(
    joined: site.Site,
    run: Path,
    kind: Statistics,
    *,
    seed: int = 0,
    created_at: str = "2026-11-23T13:00:00Z",
    alter: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
    header: Mapping[str, str] | None = None,
) -> None:
    """What `statistics` leaves for `publish` beside a run's vector, with random figures.

    Only narrow layers have a Gram matrix here.
    """
    generator, federation = torch.Generator().manual_seed(seed), joined.federation
    told = read_draft(run / publishing.DRAFT)
    with TensorFile(joined.base_folder / "model.safetensors") as base:
        roles = roles_of(base.specs, federation.classifier)
        expected = vector_specs(base.specs, roles)
    specs = {"fisher": statistics.fisher_specs, "gram": statistics.gram_specs}[kind]
    tensors = {}
    for name, spec in specs(expected, roles).items():
        values = torch.rand(spec.shape, generator=generator)
        if kind == "fisher":
            tensors[name] = values
        elif len(values) <= 300:
            tensors[name] = (values + values.T) / 2
    alter(tensors)
    says = {
        "base": told.base, "federation": told.federation, "site": told.site,
        "kind": kind, "about": told.payload.sha256, **(header or {}),
    }  # fmt: skip
    text = canonical_json(statistics.StatisticsHeader.model_validate(says).model_dump())
    path = run / publishing.payload_file(kind)
    write_tensors(path, tensors, (vector.METADATA_KEY, text.decode()))
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
    norm = norm if math.isfinite(norm) else 1.0
    payload = Payload(sha256=sha256_file(path), size=path.stat().st_size, norm=norm)
    changes = {"kind": kind, "about": told.payload.sha256, "payload": payload}
    draft = Draft(**{**told.model_dump(), **changes, "created_at": created_at})
    (run / publishing.draft_file(kind)).write_text(draft.model_dump_json())


def write_moments(
    joined: site.Site,
    folder: Path,
    found: Moments,
    about: str,
    *,
    alter: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
    header: Mapping[str, str] | None = None,
) -> None:
    """What `calibrate` leaves for `publish`, of any features."""
    federation = joined.federation
    origin = {
        "base": federation.base_fingerprint, "federation": federation.contract_hash,
        "site": joined.name, "kind": "moments", "about": about,
    }  # fmt: skip
    told = statistics.StatisticsHeader.model_validate({**origin, **(header or {})}).model_dump()
    path, tensors = folder / publishing.payload_file("moments"), momentsfile.to_tensors(found)
    alter(tensors)
    write_tensors(path, tensors, (vector.METADATA_KEY, canonical_json(told).decode()))
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
    counts = dict(zip(federation.classes, found.counts.long().tolist(), strict=True))
    norm = norm if math.isfinite(norm) else 1.0
    payload = Payload(sha256=sha256_file(path), size=path.stat().st_size, norm=norm)
    draft = {
        **origin, "payload": payload, "class_counts": counts,
        "preprocessing": federation.preprocessing.hash, "created_at": "2026-11-23T14:00:00Z",
        "software": {"merge_kit": "0.1.0", "python": "3.11.7", "torch": "2.15.0", "timm": "1.0.31"},
    }  # fmt: skip
    text = Draft.model_validate(draft).model_dump_json()
    (folder / publishing.draft_file("moments")).write_text(text)


Measure = Callable[..., publishing.Parcel]


@pytest.fixture
def measured(hub: FolderHub, tmp_path: Path) -> Measure:
    """Join, draw features around each class's mean, and publish their moments."""

    def make(
        name: str,
        *,
        about: str | None = None,
        seed: int = 0,
        counts: Sequence[int] = (20, 20, 20),
        admit: bool = True,
        spread: float = 1.0,
        **changes: object,
    ) -> publishing.Parcel:
        joined = site.join(hub, name, tmp_path / name)
        if admit:
            federation = read_federation(hub.root).admit(name, signing.public_key(joined.key_file))
            hub.replace(FEDERATION_FILE, federation.to_yaml().encode(), hub.read(FEDERATION_FILE))
        base = reheading.find_model(hub, read_federation(hub.root), None)
        features, labels = drawn(counts, seed=seed, spread=spread)
        folder = tmp_path / name / "calibrations" / f"seed{seed}"
        found = moments.measure(features, labels, len(counts))
        write_moments(joined, folder, found, about or base.backbone, **changes)  # type: ignore[arg-type]
        (parcel,) = publishing.prepare_all(joined, folder, hub)
        publishing.publish(joined, folder, hub, parcel)
        return parcel

    return make


def drawn(
    counts: Sequence[int], *, seed: int, features: int = 96, spread: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of images of three classes, float32 (n, d), and their labels; as wide as the tests'
    backbone has them. The classes have the same means whatever the seed, `spread` apart.
    """
    means = torch.randn(len(counts), features, generator=torch.Generator().manual_seed(99))
    means *= 2 * spread
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return means[labels] + torch.randn(len(labels), features, generator=generator), labels
