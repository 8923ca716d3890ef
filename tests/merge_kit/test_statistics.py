"""What files of statistics may hold."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from merge_kit import publishing, site, statistics
from merge_kit.contributions import Entry, list_entries
from merge_kit.errors import ContributionError, VectorError
from merge_kit.federation import BASE_WEIGHTS, read_federation
from merge_kit.files import sha256_file
from merge_kit.parameters import Role, roles_of, vector_specs
from merge_kit.payloads import check_payloads
from merge_kit.tensorfile import TensorFile, write_tensors
from merge_kit.tensorheader import TensorSpec
from tests.conftest import write_run, write_statistics
from tests.merge_kit.helpers import load, says

AGAIN = "the site must make its statistics again."
ZEROS = "sha256:" + "0" * 64


@pytest.fixture
def run(hub, tmp_path):
    """A site's run, and the statistics that `write_statistics` makes of it."""
    joined = site.join(hub, "north", tmp_path / "north")
    write_run(joined, joined.root / "runs" / "a")

    def make(kind, **options):
        write_statistics(joined, joined.root / "runs" / "a", kind, **options)
        return joined.root / "runs" / "a" / publishing.payload_file(kind)

    return make


@pytest.fixture
def check(hub, federation):
    """Check a file against the base as a merge does."""

    def look(path, kind):
        with TensorFile(hub.fetch("base/model.safetensors")) as base:
            roles = roles_of(base.specs, federation.classifier)
            expected = vector_specs(base.specs, roles)
        with TensorFile(path) as file:
            return statistics.check(file, kind, expected, roles)

    return look


def test_a_fisher_is_for_weights_and_heads_a_gram_for_matrices():
    shapes = {
        "conv.weight": (8, 3, 5, 7),
        "fc.weight": (4, 8),
        "fc.bias": (4,),
        "bn.weight": (8,),
        "bn.running_mean": (8,),
        "bn.num_batches_tracked": (),
        "pos_embed": (1, 9, 8),
        "table": (9, 8),
        "conv3d.weight": (8, 3, 1, 1, 1),
    }
    specs = {name: TensorSpec(torch.float32, shape) for name, shape in shapes.items()}
    specs["bn.num_batches_tracked"] = TensorSpec(torch.int64, ())
    roles = roles_of(specs, ("fc",))
    assert roles["fc.weight"] is Role.HEAD
    expected = vector_specs(specs, roles)
    kept = {n for n in shapes if n not in ("bn.running_mean", "bn.num_batches_tracked")}
    assert statistics.fisher_specs(expected, roles) == {n: specs[n] for n in sorted(kept)}
    assert statistics.gram_specs(expected, roles) == {
        "conv.weight": TensorSpec(torch.float32, (105, 105)),
        "fc.weight": TensorSpec(torch.float32, (8, 8)),
    }


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_sound_statistics_give_their_norm(run, check, kind):
    path = run(kind)
    squares = sum(float(t.double().square().sum()) for t in load(path).values())
    assert check(path, kind) == pytest.approx(math.sqrt(squares))


def put(name, *values):
    """Set the first entries of a tensor."""

    def alter(tensors):
        tensors[name].view(-1)[: len(values)] = torch.tensor(values)

    return alter


def set_to(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("kind", "alter", "sentence"),
    [
        (
            "fisher",
            put("fc.bias", -1.0, 0.0, -0.5),
            f": tensor 'fc.bias' holds 2 value(s) below 0, where squares belong: {AGAIN}",
        ),
        (
            "fisher",
            put("fc.bias", math.nan),
            f": tensor 'fc.bias' holds 1 value(s) that are NaN or infinite: {AGAIN}",
        ),
        (
            "fisher",
            lambda tensors: tensors.pop("fc.bias"),
            " lacks the tensor 'fc.bias' that the base has.",
        ),
        (
            "fisher",
            set_to("bn1.running_mean", torch.zeros(32)),
            " has the tensor 'bn1.running_mean' that the base does not have.",
        ),
        (
            "fisher",
            set_to("fc.bias", torch.zeros(3, dtype=torch.float64)),
            ": tensor 'fc.bias' is F64 [3], the base asks for F32 [3].",
        ),
        (
            "gram",
            put("fc.weight", 0.0, 2.0),
            f": tensor 'fc.weight' is not symmetric: {AGAIN}",
        ),
        (
            "gram",
            put("fc.weight", -1.0),
            ": tensor 'fc.weight' holds 1 value(s) below 0 on its diagonal, where squares belong: "
            + AGAIN,
        ),
        (
            "gram",
            put("fc.weight", math.inf),
            f": tensor 'fc.weight' holds 1 value(s) that are NaN or infinite: {AGAIN}",
        ),
        (
            "gram",
            set_to("fc.weight", torch.eye(3)),
            ": tensor 'fc.weight' is F32 [3, 3], the Gram matrix of this weight is F32 [96, 96].",
        ),
        (
            "gram",
            set_to("fc.weight", torch.eye(96, dtype=torch.float16)),
            ": tensor 'fc.weight' is F16 [96, 96], the Gram matrix of this weight is F32 [96, 96].",
        ),
        (
            "gram",
            set_to("fc.bias", torch.eye(1)),
            " has the tensor 'fc.bias', which is no linear or convolutional weight of the base.",
        ),
        ("gram", lambda tensors: tensors.clear(), f" holds no Gram matrix: {AGAIN}"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_the_figures_cannot_be_is_refused_by_name(run, check, kind, alter, sentence):
    path = run(kind, alter=alter)
    with pytest.raises(VectorError) as caught:
        check(path, kind)
    assert str(caught.value) == f"{path}{sentence}"


def test_a_gram_of_some_layers_is_enough(run, check):
    def keep_one(tensors):
        for name in set(tensors) - {"fc.weight"}:
            del tensors[name]

    assert check(run("gram", alter=keep_one), "gram") > 0


def test_a_header_for_another_kind_or_vector_is_refused(run):
    with TensorFile(run("fisher")) as file:
        about = statistics.check_header(file, "fisher", _about(file), "here").about
        with says(ContributionError, "here is announced as gram and holds fisher: it is refused."):
            statistics.check_header(file, "gram", about, "here")
        with says(
            ContributionError,
            f"here is announced for the vector {ZEROS} and holds the fisher of {about}: "
            "it is refused.",
        ):
            statistics.check_header(file, "fisher", ZEROS, "here")


def _about(file):
    return file.metadata["merge-kit"].split('"about":"')[1][:71]


def test_a_file_without_a_header_of_ours_is_refused(tmp_path):
    write_tensors(tmp_path / "odd", {"x": torch.zeros(1)})
    with TensorFile(tmp_path / "odd") as file:
        with says(
            VectorError,
            f"{tmp_path}/odd holds no statistics: its header lacks the metadata 'merge-kit'.",
        ):
            statistics.check_header(file, "fisher", ZEROS, "here")


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_one_reading_finds_digest_and_norm(run, check, kind, monkeypatch, contribute, hub):
    """A payload that is checked is read once, and only a faulty one a second time."""
    path = run(kind)
    with TensorFile(path) as file:
        found = statistics.measure(file)
    assert found.sha256 == sha256_file(path)
    assert found.norm == pytest.approx(check(path, kind))
    assert kind in found.sound
    contribute("east", beside=[kind])
    federation, read = read_federation(hub.root), []
    monkeypatch.setattr(TensorFile, "read_into", spy(TensorFile.read_into, read))
    checked = check_payloads(list_entries(hub, federation), federation, hub.root / BASE_WEIGHTS)
    assert [entry.problem for entry in checked] == [None, None]
    assert len(read) == len(set(read)) > 0


def spy(original, seen):
    def read_into(file, name, begin, out):
        seen.append((file.path, name, begin))
        original(file, name, begin, out)

    return read_into


def test_a_file_of_more_features_is_refused_before_they_are_squared(hub, measured, tmp_path):
    """Squared, 200,000 features would take 320 GB."""
    parcel = measured("north")
    federation = read_federation(hub.root)
    folder = tmp_path / "north" / "calibrations" / "seed0"
    path = folder / "moments.safetensors"
    with TensorFile(path) as file:
        metadata = next(iter(file.metadata.items()))
    tensors = {
        "means": torch.ones(4, 200_000), "labels": torch.tensor([0, 0, 1, 2]),
        "sizes": torch.tensor([20, 20, 20, 20]), "counts": torch.tensor([40, 20, 20]),
    }  # fmt: skip
    write_tensors(path, tensors, metadata)
    stated = parcel.manifest.payload.model_copy(
        update={"sha256": sha256_file(path), "size": path.stat().st_size}
    )
    found = next(e for e in list_entries(hub, federation) if e.contribution).contribution
    found.payload.write_bytes(path.read_bytes())
    forged = replace(
        found,
        manifest=parcel.manifest.model_copy(update={"payload": stated}),
    )
    entry = Entry(forged.site, forged.id, forged, None, "moments")
    (checked,) = check_payloads([entry], federation, hub.fetch("base/model.safetensors"))
    assert checked.contribution is None
    assert "tensor 'means' is F32 [4, 200000], for this backbone it is F32 [4, 96]" in (
        checked.problem
    )
