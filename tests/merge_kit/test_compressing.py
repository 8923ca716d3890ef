"""Smaller vectors: what is kept, what is lost, and that everybody reads them as dense ones."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_kit import compressing, forms, publishing, vector
from merge_kit.contributions import list_entries
from merge_kit.errors import NonFiniteError, UsageError, VectorError
from merge_kit.federation import read_federation
from merge_kit.files import canonical_json
from merge_kit.forms import Factors
from merge_kit.parameters import Role
from merge_kit.site import open_site
from merge_kit.status import survey
from merge_kit.tensorfile import write_tensors
from tests.conftest import write_run, write_statistics
from tests.merge_kit.helpers import load, quick, says

ORIGIN = {"base": "sha256:" + "0" * 64, "federation": "sha256:" + "1" * 64, "site": "north"}
HEADER = vector.VectorHeader.model_validate(ORIGIN)
WAYS = (
    "svd:0.9", "svd:0.9+bf16", "svd:0.9+int8", "topk:0.1", "topk:0.1+bf16", "topk:0.1+int8",
    "bf16", "int8",
)  # fmt: skip


def drawn(*shape, seed=0, scale=1e-3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def roles_in(tensors):
    return {name: Role.HEAD if name.startswith("head") else Role.WEIGHT for name in tensors}


@pytest.fixture
def compressed(tmp_path):
    """Compress a vector of these tensors; gives the error, the dense tensors and those stored."""

    def make(tensors, how, told=None, roles=None):
        header = HEADER.model_copy(update={"encoding": told or {}})
        text = canonical_json(header.model_dump()).decode()
        write_tensors(tmp_path / "whole", tensors, (vector.METADATA_KEY, text))
        way = compressing.parse_compression(how)
        names = roles or roles_in([*tensors, *(told or {})])
        error = compressing.compress(tmp_path / "whole", tmp_path / "small", names, way)
        with vector.opened(tmp_path / "small") as file:
            dense = {name: file.read(name) for name in file.specs}
        return error, dense, load(tmp_path / "small")

    return make


def test_topk_keeps_the_largest_of_all_weights_together(compressed):
    tensors = {"a": torch.zeros(10, 10), "b": torch.zeros(10, 10), "c": torch.zeros(10, 30)}
    tensors["a"].view(-1)[:50] = torch.arange(1.0, 51.0)
    tensors["b"].view(-1)[:50] = -torch.arange(1.0, 51.0) * 2
    error, dense, stored = compressed(tensors, "topk:0.1")
    # The 50 largest of 500 by size: 52 to 100 in steps of two (25), and of both 26 to 50 (38).
    kept = sorted((t.abs()[t != 0]).tolist() for t in dense.values())
    flat = sorted((v for part in kept for v in part), reverse=True)
    sizes = sorted((t.abs().view(-1) for t in tensors.values()), key=len)
    largest = torch.cat(sizes).sort(descending=True).values[:50]
    assert flat[:50] == largest.tolist()
    assert all(v >= largest[-1] for v in flat)
    assert stored.keys() == {f"{n}@{p}" for n in "ab" for p in ("counts", "places", "values")}
    lost = sum(float((tensors[n] - dense[n]).double().square().sum()) for n in tensors)
    whole = sum(float(t.double().square().sum()) for t in tensors.values())
    assert error == pytest.approx(math.sqrt(lost / whole))


def test_what_would_take_more_room_with_its_places_stays_whole(compressed):
    """All that is large lies in one small tensor."""
    tensors = {"a": torch.ones(4, 4), "b": drawn(40, 40, scale=1e-6)}
    error, dense, stored = compressed(tensors, "topk:0.0099")
    assert torch.equal(dense["a"], tensors["a"])
    assert stored.keys() == {"a"}  # nothing of b is left: it is stored as zeros
    assert 0 < error < 1e-4


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_svd_keeps_the_fewest_singular_values_that_hold_the_energy(compressed, energy):
    values = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625])
    left, _ = torch.linalg.qr(drawn(40, 8, seed=1, scale=1))
    right, _ = torch.linalg.qr(drawn(60, 8, seed=2, scale=1))
    error, dense, stored = compressed({"w": left @ torch.diag(values) @ right.T}, f"svd:{energy}")
    squares = values.square()
    shares = squares.cumsum(0) / squares.sum()
    rank = int((shares < energy).sum()) + 1
    assert stored["w@left"].shape == (40, rank)
    assert stored["w@right"].shape == (rank, 60)
    expected = math.sqrt(float(squares[rank:].sum() / squares.sum()))
    assert error == pytest.approx(expected, rel=1e-4)
    assert torch.linalg.matrix_rank(dense["w"], tol=1e-3) == rank


def test_a_kernel_counts_as_a_matrix_and_full_rank_stays_dense(compressed):
    tensors = {"conv": drawn(8, 1, 3, 3) @ torch.eye(3), "full": torch.eye(6)}
    tensors["conv"] = drawn(8, 1)[:, :, None, None] * torch.ones(1, 1, 3, 3)  # of rank 1
    error, dense, stored = compressed(tensors, "svd:1.0")
    assert stored["conv@left"].shape == (8, 1)
    assert torch.equal(dense["full"], tensors["full"])
    assert dense["conv"].shape == (8, 1, 3, 3)
    assert error < 1e-6


def test_eight_bits_lose_at_most_half_a_step_of_each_row(compressed):
    tensor = drawn(20, 50) * torch.logspace(0, 6, 20)[:, None]
    _, dense, stored = compressed({"w": tensor}, "int8")
    steps = tensor.abs().amax(1, keepdim=True) / 127
    assert bool(((dense["w"] - tensor).abs() <= steps * 0.5001).all())
    assert stored["w@values"].dtype == torch.int8
    assert stored["w@scales"].shape == (20, 1)


def test_a_row_that_is_too_small_for_a_scale_becomes_zero(compressed):
    tensor = torch.stack([torch.full((4,), 1e-45), torch.ones(4)])
    _, dense, _ = compressed({"w": tensor}, "int8")
    assert dense["w"].tolist() == [[0.0] * 4, [1.0] * 4]


def test_halves_are_the_nearest_bfloat16(compressed):
    tensor = drawn(30, 30)
    error, dense, _ = compressed({"w": tensor}, "bf16")
    assert torch.equal(dense["w"], tensor.to(torch.bfloat16).float())
    assert 0 < error < 2**-8


@pytest.mark.parametrize("how", WAYS)
def test_only_weights_of_the_body_are_touched(compressed, how):
    """The head's rows, statistics and counters are small, and precious."""
    tensors = {
        "body": drawn(64, 64), "bias": drawn(64, seed=1), "head.weight": drawn(3, 64, seed=2),
        "bn.running_mean": drawn(64, seed=3), "bn.num_batches_tracked": torch.tensor(7),
        "still": torch.zeros(64, 64),
    }  # fmt: skip
    roles = roles_in(tensors) | {
        "bn.running_mean": Role.NORM_MEAN, "bn.num_batches_tracked": Role.COUNTER,
    }  # fmt: skip
    error, dense, stored = compressed(tensors, how, roles=roles)
    for name in ("head.weight", "bn.running_mean", "bn.num_batches_tracked", "still"):
        assert torch.equal(dense[name], tensors[name]), name
    assert "still" not in {name.split("@")[0] for name in stored}
    bits = tensors["bias"].to(torch.bfloat16).float() if "8" in how or "16" in how else None
    assert torch.equal(dense["bias"], tensors["bias"] if bits is None else bits)
    lost = sum(float((tensors[n] - dense[n]).double().square().sum()) for n in ("body", "bias"))
    counted = ("body", "bias")
    whole = sum(float(tensors[n].double().square().sum()) for n in counted)
    assert error == pytest.approx(math.sqrt(lost / whole), rel=1e-9)


@pytest.mark.parametrize("how", ["int8", "bf16", "topk:0.1+int8", "svd:0.5+bf16"])
def test_factors_stay_factors_of_smaller_numbers(compressed, how):
    pair = Factors(drawn(30, 4, seed=1), drawn(4, 40, seed=2))
    told = {"w": {"form": "factors", "dtype": "F32", "shape": [30, 40]}}
    told = {"w": compressing.Encoded.model_validate(told["w"])}
    error, dense, stored = compressed({"w@left": pair.left, "w@right": pair.right}, how, told)
    whole = forms.product(pair)
    assert {name.split("@")[1] for name in stored} == {"left", "right"}
    lost = (dense["w"] - whole).double().norm() / whole.double().norm()
    assert error == pytest.approx(float(lost), rel=1e-9)
    assert 0 < error < 0.02


@quick
@given(st.data())
def test_a_compressed_tensor_has_the_same_bits_however_it_is_cut(compressed, tmp_path, data):
    shape = data.draw(st.sampled_from([(3, 5), (70, 3), (2, 3, 4), (300, 400)]))
    tensor = drawn(*shape, seed=data.draw(st.integers(0, 99)))
    compressed({"w": tensor}, data.draw(st.sampled_from(WAYS)))
    begin = data.draw(st.integers(0, tensor.numel()))
    out = torch.empty(data.draw(st.integers(0, tensor.numel() - begin)))
    with vector.opened(tmp_path / "small") as file:
        whole = file.read("w")
        file.read_into("w", begin, out)
        assert vector.measure(file).norm == pytest.approx(float(whole.double().norm()), rel=1e-12)
    assert torch.equal(out, whole.reshape(-1)[begin:][: out.numel()])


@pytest.mark.parametrize("how", WAYS)
def test_the_same_vector_gives_the_same_bytes(compressed, tmp_path, how):
    thin = drawn(300, 4, seed=1) @ drawn(4, 300, seed=3, scale=1)
    tensors = {"a": drawn(80, 90), "b": thin, "c": drawn(5, seed=2)}
    compressed(tensors, how)
    first = (tmp_path / "small").read_bytes()
    compressed(tensors, how)
    assert (tmp_path / "small").read_bytes() == first
    assert len(first) < (tmp_path / "whole").stat().st_size


@pytest.mark.parametrize("keep", ["topk:0.1", "svd:0.5"])
def test_smaller_numbers_make_smaller_files(compressed, tmp_path, keep):
    sizes = []
    thin = drawn(300, 8, seed=1) @ drawn(8, 300, seed=3, scale=1)
    for how in (keep, f"{keep}+bf16", f"{keep}+int8"):
        error, _, _ = compressed({"a": drawn(200, 200), "b": thin}, how)
        sizes.append((tmp_path / "small").stat().st_size)
        assert error < 1
    assert sizes[0] > sizes[1] * 1.2
    assert sizes[1] > sizes[2] * 1.2


def test_the_bytes_do_not_depend_on_threads(compressed, tmp_path):
    tensors, found = {"a": drawn(200, 300)}, []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        compressed(tensors, "svd:0.9")
        found.append((tmp_path / "small").read_bytes())
    torch.set_num_threads(1)
    assert found[0] == found[1]


def test_what_was_sent_stays_what_it_was(hub, published, tmp_path):
    """As if another machine's linear algebra gave other last digits."""
    first = published("north", "svd:0.9")
    run = tmp_path / "north" / "runs" / "seed5"
    (run / "vector.svd-0.9.safetensors").stat()
    way = compressing.parse_compression("svd:0.9")
    made = compressing.compress
    try:
        compressing.compress = None
        publishing_compress, publishing.compress = publishing.compress, None
        (again,) = publishing.prepare_all(open_site(tmp_path / "north"), run, hub, how=way)
    finally:
        compressing.compress, publishing.compress = made, publishing_compress
    assert again.manifest == first.manifest


def nested(form, inner):
    """A matrix whose part is stored in a form that has parts itself."""
    parts = {"left": (2, 2), "right": (2, 3)}
    told = {"w": spec(form)}
    tensors = {"w@left": torch.ones(parts["left"])}
    told["w@right"] = spec(inner, parts["right"])
    return tensors, told


def test_deeper_forms_are_refused_before_any_value_is_read(tmp_path):
    tensors, told = nested("factors", "factors")
    tensors |= {"w@right@left": torch.ones(2, 1), "w@right@right": torch.ones(1, 3)}
    sentences = {
        "factors": "tensor 'w@right' is a part of another and stored as 'factors': parts are "
        "dense, bf16 or int8; it is refused.",
        "scales": "tensor 'w@scales' is a part of numbers, which are dense: it is refused.",
    }
    scales = {
        "w@values": torch.ones(2, 3, dtype=torch.int8),
        "w@scales@values": torch.ones(2, 1).bfloat16(),
    }
    for tensors_, told_, key in (
        (tensors, told, "factors"),
        (scales, {"w": spec("int8"), "w@scales": spec("bf16", (2, 1))}, "scales"),
    ):
        header = canonical_json({**ORIGIN, "format": 1, "encoding": told_}).decode()
        path = tmp_path / key
        write_tensors(path, tensors_, (vector.METADATA_KEY, header))
        with says(VectorError, f"{path}: {sentences[key]}"), vector.opened(path):
            pass


def test_a_vector_of_zeros_loses_nothing(compressed):
    error, dense, stored = compressed({"w": torch.zeros(5, 5)}, "topk:0.5")
    assert (error, stored) == (0.0, {})
    assert not dense["w"].any()


def test_numbers_too_large_for_bfloat16_are_refused(compressed, tmp_path):
    """The largest float32 rounds up to infinity."""
    with pytest.raises(NonFiniteError, match="tensor 'w' holds 4"):
        compressed({"w": torch.full((2, 2), torch.finfo(torch.float32).max)}, "bf16")


BAD = {
    "": "'' is no way",
    "zip": "'zip' is no way to compress a vector: svd:0.95, topk:0.1, int8, bf16, svd:0.95+bf16, "
    "topk:0.1+int8 or none.",
    "svd": "'svd' is no way",
    "int8+bf16": "'int8+bf16' is no way",
    "svd:0.9+topk:0.1": "'svd:0.9+topk:0.1' is no way",
    "+int8": "'+int8' is no way",
    "svd:0.9bf16": "'svd:0.9bf16' is no way",
    "svd:0.9+": "'svd:0.9+' is no way",
    "topk:0": "'topk:0': what is kept must lie above 0 and up to 1, as in topk:0.1.",
    "svd:1.5": "'svd:1.5': what is kept must lie above 0",
    "topk:1.2.3": "'topk:1.2.3': what is kept must lie above 0",
}


@pytest.mark.parametrize(("text", "sentence"), BAD.items(), ids=list(BAD))
def test_what_is_no_way_to_compress_gives_its_sentence(text, sentence):
    with pytest.raises(UsageError) as caught:
        compressing.parse_compression(text)
    assert str(caught.value).startswith(sentence)


def test_none_compresses_nothing():
    assert compressing.parse_compression("none") is None


def spec(form, shape=(2, 3)):
    return {"form": form, "dtype": "F32", "shape": list(shape)}


I8, I16, I32 = torch.int8, torch.int16, torch.int32
FAULTS = {
    "half of another shape": (
        {"w@values": torch.ones(3, 2).bfloat16()},
        spec("bf16"),
        "has the values BF16 [3, 2], and needs BF16 [2, 3]",
    ),
    "scales of no row": (
        {"w@values": torch.ones(2, 3, dtype=I8), "w@scales": torch.ones(2)},
        spec("int8"),
        "has the values I8 [2, 3] and the scales F32 [2], and needs I8 [2, 3] and F32 [2, 1] or "
        "F32 [1, 3]",
    ),
    "more values than places": (
        {"w@counts": torch.ones(1, dtype=I32), "w@places": torch.zeros(1, dtype=I16),
         "w@values": torch.ones(2)},
        spec("sparse"),
        "has the counts I32 [1], the places I16 [1] and the values F32 [2], and needs I32 [1], "
        "I16 [k] and F32 [k] of one k up to 6",
    ),
    "counts that do not add up": (
        {"w@counts": torch.tensor([2], dtype=I32), "w@places": torch.zeros(1, dtype=I16),
         "w@values": torch.ones(1)},
        spec("sparse"),
        "has counts that do not add up to its values",
    ),
    "a negative count": (
        {"w@counts": torch.tensor([-1, 2], dtype=I32), "w@places": torch.zeros(1, dtype=I16),
         "w@values": torch.ones(1)},
        spec("sparse", (300, 300)),
        "has counts that do not add up to its values",
    ),
    "a place twice": (
        {"w@counts": torch.tensor([2], dtype=I32), "w@places": torch.zeros(2, dtype=I16) - 32768,
         "w@values": torch.ones(2)},
        spec("sparse"),
        "has places that do not rise, or lie outside of it",
    ),
    "a place outside": (
        {"w@counts": torch.tensor([1], dtype=I32),
         "w@places": torch.full((1,), 6 - 32768, dtype=I16), "w@values": torch.ones(1)},
        spec("sparse"),
        "has places that do not rise, or lie outside of it",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "told", "fault"), FAULTS.values(), ids=list(FAULTS))
def test_a_broken_form_gives_its_sentence(tmp_path, tensors, told, fault):
    header = canonical_json({**ORIGIN, "format": 1, "encoding": {"w": told}}).decode()
    path = tmp_path / "v"
    write_tensors(path, tensors, (vector.METADATA_KEY, header))
    sentence = f"{path}: tensor 'w' {fault}: it is refused."
    with says(VectorError, sentence), vector.opened(path) as file:
        file.read("w")


@pytest.fixture
def published(hub, contribute, tmp_path):
    """Publish the run of a site again, compressed; gives the parcel."""

    def make(name, how):
        contribute(name, seed=len(name))
        site = open_site(tmp_path / name)
        run = site.root / "runs" / f"seed{len(name)}"
        way = compressing.parse_compression(how)
        (parcel,) = publishing.prepare_all(site, run, hub, how=way)
        publishing.publish(site, run, hub, parcel)
        return parcel

    return make


@pytest.mark.parametrize("how", WAYS)
def test_a_compressed_vector_merges_as_the_dense_one_that_it_stands_for(
    hub, published, merge, tmp_path, how
):
    """Weights of the merge are, byte for byte, base plus the mean of what is read."""
    parcels = [published(name, how) for name in ("no", "south")]
    merge(method="sum", weights="uniform")
    base, found = (
        load(hub.root / "base" / "model.safetensors"),
        load(tmp_path / "merged" / "model.safetensors"),
    )
    federation = read_federation(hub.root)
    for name, tensor in base.items():
        if not tensor.is_floating_point() or "running" in name or name.startswith("fc."):
            continue
        total = tensor.double()
        for parcel in parcels:
            with vector.opened(parcel.payload) as file:
                total = total + file.read(name).double()
        assert torch.equal(found[name], total.float()), name
    assert federation.classifier == ("fc",)


def test_status_shows_what_was_given_up(hub, published, run_cli):
    parcel = published("north", "topk:0.1+int8")
    note = parcel.manifest.compression
    assert note.method == "topk:0.1+int8"
    assert 0.1 < note.error < 1
    assert parcel.manifest.payload.size == parcel.payload.stat().st_size
    rows = {row["id"]: row for row in survey(hub, read_federation(hub.root))}
    assert rows[parcel.manifest.id]["compression"] == note.model_dump()
    printed = run_cli("status", hub.root).output
    line = f"Compressed north {parcel.manifest.id[:8]}: topk:0.1+int8, an error of "
    assert f"{line}{note.error:.1%} against the whole vector" in printed
    told = json.loads(run_cli("status", hub.root, "--json").output)
    assert {row["id"]: row["compression"] for row in told["contributions"]} == {
        parcel.manifest.id: note.model_dump(),
        parcel.replaces.id: None,
    }


def test_publishing_compressed_twice_gives_one_contribution(hub, published, run_cli, tmp_path):
    parcel = published("north", "svd:0.9")
    again = run_cli("publish", tmp_path / "north", "--run", tmp_path / "north/runs/seed5",
                    "--compress", "svd:0.9")  # fmt: skip
    assert again.exit_code == 0, again.output
    assert "Already published" in again.output
    assert "compressed   svd:0.9, which leaves an error of" in again.output
    assert len(list_entries(hub, read_federation(hub.root))) == 2
    assert parcel.replaces is not None


def test_statistics_speak_of_the_whole_vector(hub, run_cli, contribute, tmp_path):
    contribute("north")
    site = open_site(tmp_path / "north")
    run = site.root / "runs" / "seed0"
    write_statistics(site, run, "fisher")
    done = run_cli("publish", site.root, "--run", run, "--compress", "int8")
    assert done.exit_code == 2
    assert done.output == (
        f"Error: {run} holds fisher, and only a vector can be compressed: hold statistics, which "
        "speak of the whole vector, back with --no-statistics, or publish without --compress.\n"
    )
    done = run_cli("publish", site.root, "--run", run, "--compress", "int8", "--no-statistics")
    assert done.exit_code == 0, done.output


def test_the_norm_of_the_policy_is_that_of_what_is_sent(hub, published, tmp_path):
    parcel = published("north", "topk:0.05")
    whole = load(tmp_path / "north/runs/seed5" / publishing.VECTOR)
    assert parcel.manifest.payload.norm < math.sqrt(
        sum(float(t.double().square().sum()) for n, t in whole.items() if t.is_floating_point())
    )
    with vector.opened(parcel.payload) as file:
        assert vector.measure(file).norm == parcel.manifest.payload.norm


def test_a_run_is_left_as_it_was(hub, tmp_path, contribute):
    contribute("north")
    site = open_site(tmp_path / "north")
    run = site.root / "runs" / "other"
    write_run(site, run, seed=3)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    publishing.prepare_all(site, run, hub, how=compressing.parse_compression("bf16"))
    after = {path.name: path.read_bytes() for path in run.iterdir()}
    assert after.pop("vector.bf16.safetensors")
    assert after == before
