"""Statistics of a site's run: which images, what is written, and that it is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import run as runs
from finetune import run_statistics, statistics
from finetune.cases import load_cases
from finetune.network import load as load_model
from finetune.options import TrainingOptions
from finetune.pixels import Images
from finetune.splits import assign_splits
from merge_kit import publishing, signing, vector
from merge_kit import site as sites
from merge_kit.contributions import current, list_entries
from merge_kit.errors import ContributionError, DataError, ImageError, NonFiniteError, TrainingError
from merge_kit.federation import FEDERATION_FILE, Policy, read_federation
from merge_kit.files import sha256_file
from merge_kit.manifest import read_draft
from merge_kit.merging import choose, find_statistics
from merge_kit.payloads import check_payloads
from merge_kit.tensorfile import TensorFile, write_tensors
from tests.finetune.pictures import draw, write_csv, write_table
from tests.merge_kit.helpers import listing, load, says

CPU = torch.device("cpu")
QUICK = TrainingOptions(steps=2, validations=1, batch_size=8, head_steps=10, seed=3)
COUNTS = {"round": 7, "lobed": 6, "granular": 0}


def silent(done: int, of: int) -> None:
    """Nobody watches."""


@pytest.fixture
def site(hub, tmp_path: Path) -> sites.Site:
    """A site of the federation."""
    return sites.join(hub, "north", tmp_path / "north")


@pytest.fixture
def finetune(site, tmp_path: Path):
    """Fine-tune on a table, as the command does; gives the run's folder."""

    def go(data: Path, *, images: Path | None = None, name: str = "a", **options) -> Path:
        cases = load_cases(data, classes=site.federation.classes, images=images)
        material = runs.prepare(site, assign_splits(cases, seed=0), **options)
        folder = site.root / "runs" / name
        runs.finetune(
            site, material, QUICK, folder, CPU, lambda event: None, data=data, images=images
        )
        return folder

    return go


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """13 training images of two classes; none of the third."""
    return write_table(tmp_path / "images", COUNTS)


@pytest.fixture
def run(finetune, table) -> Path:
    """A finished run."""
    return finetune(table)


def find(site, run, examples=256, **options) -> Images:
    found, skipped = run_statistics.find_images(site, run, examples, **options)
    assert skipped == []
    return found


def make(site, run, kind, **options) -> run_statistics.Made:
    return run_statistics.make(site, run, kind, find(site, run), CPU, silent, **options)


# Which images


def test_the_images_are_the_runs_own_training_images(site, run, table):
    found = find(site, run)
    assert [case.file for case in found.cases] == sorted(
        f"{name}_train_{n}.png" for name, count in COUNTS.items() for n in range(count)
    )
    again = runs.prepare(site, load_cases(table, classes=site.federation.classes))
    assert (found.pixels == again.train.pixels).all()


def test_few_images_are_drawn_by_the_runs_seed(site, run):
    files = [case.file for case in find(site, run).cases]
    chosen = [case.file for case in find(site, run, 5).cases]
    assert chosen == [files[i] for i in statistics.draw(13, 5, QUICK.seed)]
    assert chosen != files[:5]


def test_class_folders_and_medmnist_files_are_found_again(site, finetune, tmp_path):
    for index, name in enumerate(("round", "lobed")):
        (tmp_path / "cells" / name).mkdir(parents=True)
        for number, pixels in enumerate(draw([index] * 8, seed=index)):
            Image.fromarray(pixels).save(tmp_path / "cells" / name / f"{number}.png")
    labels = np.array([0, 1, 2] * 4)
    arrays = {f"{s}_images": draw(labels, side=28, seed=i) for i, s in enumerate(("train", "val"))}
    np.savez(tmp_path / "cells.npz", **arrays, train_labels=labels, val_labels=labels)
    folders = find(site, finetune(tmp_path / "cells", name="folders"))
    assert {case.file.split("/")[0] for case in folders.cases} == {"round", "lobed"}
    medmnist = find(site, finetune(tmp_path / "cells.npz", name="medmnist"))
    assert sorted(case.file for case in medmnist.cases) == sorted(f"train/{n}" for n in range(12))


def test_moved_images_are_asked_for_and_found_where_they_are(site, run, table, tmp_path):
    before = find(site, run)
    table.parent.rename(tmp_path / "moved")
    with says(
        DataError,
        f"the images of {run} were in {table}, which is not there: say with --data where they "
        "are now.",
    ):
        find(site, run)
    after = find(site, run, data=tmp_path / "moved" / "labels.csv")
    assert (after.pixels == before.pixels).all()


def test_a_moved_image_root_is_asked_for(site, finetune, table, tmp_path):
    lists = write_csv(
        tmp_path / "mine.csv",
        [dict(zip(("file", "label", "split"), line.split(","), strict=True))
         for line in table.read_text().splitlines()[1:]],
    )  # fmt: skip
    run = finetune(lists, images=table.parent)
    assert len(find(site, run)) == 13
    table.parent.rename(tmp_path / "moved")
    with says(
        DataError,
        f"the images of {run} were in {table.parent}, which is not there: say with --data where "
        "they are now.",
    ):
        find(site, run)
    assert len(find(site, run, data=lists, images=tmp_path / "moved")) == 13


@pytest.mark.parametrize("lack", ["row", "file"])
def test_an_image_that_is_gone_is_named(site, run, table, lack):
    if lack == "row":
        kept = [line for line in table.read_text().splitlines() if "round_train_3" not in line]
        table.write_text("\n".join(kept))
    else:
        (table.parent / "round_train_3.png").unlink()
    with says(
        DataError,
        f"round_train_3.png, an image of {run}, is not in {table}: say with --data where the "
        "images of this run are now.",
    ):
        find(site, run)


def test_a_run_that_does_not_say_where_its_images_lie_asks_for_them(site, run, table):
    record = json.loads((run / runs.RECORD).read_text())
    del record["data"]
    (run / runs.RECORD).write_text(json.dumps(record))
    with says(
        DataError,
        f"{run} does not say where its images lie: give --data as for 'merge-kit finetune'.",
    ):
        find(site, run)
    assert len(find(site, run, data=table)) == 13


def test_unreadable_images_are_left_out_only_where_the_run_left_some_out(site, finetune, table):
    broken = table.parent / "round_train_3.png"
    whole = finetune(table, name="whole")
    broken.write_bytes(b"")
    with pytest.raises(ImageError, match=r"round_train_3\.png cannot be read"):
        find(site, whole)
    run = finetune(table, name="skipping", skip_unreadable=True)
    found, skipped = run_statistics.find_images(site, run, 256)
    assert len(found) == 12
    assert len(skipped) == 1
    assert str(broken) in skipped[0]


def test_fewer_images_than_the_policy_hides_are_refused(site, run):
    with says(
        DataError,
        "statistics of 4 images would give them away: the federation's policy hides counts below "
        "5; take at least as many images.",
    ):
        find(site, run, 4)
    assert len(find(site, run, 5)) == 5


def test_an_unfinished_run_is_refused(site, run):
    (run / "summary.json").unlink()
    with says(DataError, f"{run} is no finished run: run 'merge-kit finetune' first."):
        find(site, run)


@pytest.mark.parametrize("name", ["cases.csv", "run.json", "summary.json"])
@pytest.mark.parametrize(
    "content", [b"\xff", b'{"a"', b"[]", b""], ids=["bytes", "cut", "list", "empty"]
)
def test_a_damaged_paper_of_the_run_is_named(site, run, name, content):
    (run / name).write_bytes(content)
    with says(
        DataError, f"{run / name} is not as the run left it: run 'merge-kit finetune' again."
    ):
        find(site, run)


def test_the_run_of_another_site_is_refused(hub, run, tmp_path):
    south = sites.join(hub, "south", tmp_path / "south")
    with says(
        ContributionError,
        f"{run} is a run of site 'north' and not of 'south': "
        "publish it from its own site's folder.",
    ):
        find(south, run)


# What is written


def test_fisher_is_that_of_the_sites_own_model_on_these_images(site, run):
    made = make(site, run, "fisher")
    found = load(made.path)
    seen = torch.tensor([True, True, False])
    images, model = find(site, run), load_model(run / "model")
    expected = statistics.fisher(model, images, seen, CPU, silent)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert (found["fc.weight"][2] == 0).all()
    assert any((values > 0).any() for values in found.values())


def test_grams_are_those_of_the_sites_own_model_on_these_images(site, run):
    made = make(site, run, "gram", max_width=500)
    images, model = find(site, run), load_model(run / "model")
    expected, left_out, few = statistics.grams(model, images, CPU, 500, silent)
    assert made.left_out == tuple(left_out) != ()
    assert made.few_rows == tuple(few) != ()
    found = load(made.path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gram) for name, gram in expected.items())


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_the_draft_speaks_of_the_runs_vector_and_repeats_what_it_says(site, run, kind):
    made = make(site, run, kind, max_width=100)
    of_vector, draft = (
        read_draft(run / "manifest.draft.json"),
        read_draft(run / f"{kind}.manifest.draft.json"),
    )
    assert (draft.kind, draft.about) == (kind, sha256_file(run / "vector.safetensors"))
    assert draft.payload.sha256 == sha256_file(made.path)
    assert draft.payload.size == made.size == made.path.stat().st_size
    squares = sum(float(t.double().square().sum()) for t in load(made.path).values())
    assert draft.payload.norm**2 == pytest.approx(squares)
    for name in ("site", "federation", "base", "class_counts", "training", "preprocessing"):
        assert getattr(draft, name) == getattr(of_vector, name)
    assert draft.created_at >= of_vector.created_at
    with TensorFile(made.path) as file:
        assert list(file.metadata) == [vector.METADATA_KEY]
        assert json.loads(file.metadata[vector.METADATA_KEY]) == {
            "format": 1,
            "base": site.federation.base_fingerprint,
            "federation": site.federation.contract_hash,
            "site": "north",
            "kind": kind,
            "about": draft.about,
        }


def test_privacy_of_the_training_is_not_claimed_for_statistics(site, run):
    path = run / "manifest.draft.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "privacy": {"epsilon": 2.0, "delta": 1e-5}}))
    make(site, run, "fisher")
    assert read_draft(path).privacy.epsilon == 2.0
    assert read_draft(run / "fisher.manifest.draft.json").privacy is None


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_statistics_are_the_same_bytes_on_every_run(site, run, kind):
    first = make(site, run, kind, max_width=500).path.read_bytes()
    (run / f"{kind}.safetensors").unlink()
    assert make(site, run, kind, max_width=500).path.read_bytes() == first


def test_what_is_there_is_known_only_whole_and_about_the_vector(site, run):
    assert not run_statistics.is_made(run, "fisher")
    path = make(site, run, "fisher").path
    assert run_statistics.is_made(run, "fisher")
    assert not run_statistics.is_made(run, "gram")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert not run_statistics.is_made(run, "fisher")
    path.write_bytes(content)
    draft = run / "manifest.draft.json"
    told = json.loads(draft.read_text())
    told["payload"]["sha256"] = "sha256:" + "0" * 64
    draft.write_text(json.dumps(told))
    assert not run_statistics.is_made(run, "fisher")


class Killed(Exception):
    """Stands for a kill."""


def test_a_kill_in_the_middle_leaves_nothing_and_the_next_one_works(site, run):
    def die(done: int, of: int) -> None:
        if done == 7:
            raise Killed

    before = listing(run)
    with pytest.raises(Killed):
        run_statistics.make(site, run, "fisher", find(site, run), CPU, die)
    assert listing(run) == before
    make(site, run, "fisher")
    assert set(listing(run)) - set(before) == {"fisher.safetensors", "fisher.manifest.draft.json"}


def test_a_model_that_is_not_finite_gives_no_statistics(site, run):
    place = run / "model" / "model.safetensors"
    tensors = load(place)
    tensors["conv1.0.weight"][0] = float("nan")
    write_tensors(place, tensors, ("format", "pt"))
    with pytest.raises(NonFiniteError) as caught:
        make(site, run, "fisher")
    assert str(caught.value).endswith(
        "that are NaN or infinite: the run's model is not sound; run 'merge-kit finetune' again."
    )
    assert not (run / "fisher.safetensors").exists()


def test_two_at_once_are_kept_apart(site, run):
    with runs.alone(run):
        with says(
            TrainingError,
            f"{run} is being worked on by another process: wait for it, or stop it.",
        ):
            make(site, run, "fisher")


def test_too_few_rows_for_a_layers_width_are_said(site, run, table, run_cli):
    """13 images give the head 13 rows for its 96 columns."""
    options = ["--kind", "gram", "--run", run, "--data", table, "--device", "cpu"]
    result = run_cli("statistics", site.root, *options)
    assert result.exit_code == 0, result.stderr
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("Few rows")]
    assert said.startswith("Few rows: 13 images give ")
    assert said.endswith(
        "RegMean then leans on its 'alpha', which shrinks entries off the diagonal, and its "
        "'ridge', and takes the mean where nothing is known; more --examples help."
    )


# From images to a merge


def test_from_the_run_to_the_vectors_side_at_a_merge(hub, finetune, site, tmp_path):
    """Two runs of a site, the second in the place of the first, and another site without any."""
    federation = read_federation(hub.root).admit("north", signing.public_key(site.key_file))
    hub.replace(FEDERATION_FILE, federation.to_yaml().encode(), hub.read(FEDERATION_FILE))
    base = hub.fetch("base/model.safetensors")
    for number in (1, 2):
        run = finetune(write_table(tmp_path / f"{number}", COUNTS, seed=number), name=f"r{number}")
        make(site, run, "fisher")
        make(site, run, "gram", max_width=300)
        for parcel in publishing.prepare_all(site, run, hub):
            assert publishing.publish(site, run, hub, parcel)
    entries = check_payloads(list_entries(hub, federation), federation, base)
    assert [entry.problem for entry in entries] == [None] * 6
    there = [entry.contribution for entry in current(entries)]
    (chosen,), _ = choose(entries, allow_unsigned=False, skip_refused=False)
    assert chosen.manifest.payload.sha256 == sha256_file(run / "vector.safetensors")
    for kind in ("fisher", "gram"):
        (found,) = find_statistics([chosen], kind, there)
        assert found.manifest.payload.sha256 == sha256_file(run / f"{kind}.safetensors")


def test_a_stricter_policy_does_not_make_statistics_of_few_images(site, run, federation):
    """The site's own copy of the contract is asked: this needs no network."""
    strict = federation.model_copy(update={"policy": Policy(minimum_class_count=20)})
    (site.root / "federation" / FEDERATION_FILE).write_text(strict.to_yaml())
    with pytest.raises(DataError, match="hides counts below 20"):
        find(sites.open_site(site.root), run)
