"""The commands of an experiment: their order, and when one is another."""

from __future__ import annotations

import pytest

from evaluate.experiments.config import Experiment
from evaluate.experiments.jobs import Fold, fold_folder
from evaluate.experiments.orders import arrival_orders, stages
from evaluate.experiments.plan import Planner
from evaluate.experiments.tables import Union
from merge_kit.errors import UsageError
from tests.merge_kit.helpers import says

SITES = ("a", "b", "c")
TOLD = {
    "name": "t", "data": "x.csv", "backbone": {"name": "test_resnet"},
    "merges": {"mean": {}, "sum": {"options": "--method sum", "calibrate": True}},
    "unseen": ["sum"], "arrivals": {"merge": "sum", "orders": 2}, "strategies": ["fedavg"],
}  # fmt: skip


@pytest.fixture
def plan(tmp_path):
    """The fold of an experiment with changes."""

    def go(left_out=None, variant=None, source=tmp_path / "data", **changes):
        told = Experiment.model_validate({**TOLD, **changes})
        root = fold_folder(tmp_path / "out", told, "sha256:0", 0, without=left_out, variant=variant)
        union = Union(tmp_path / "out" / "all.csv", source / "images", SITES, ("x", "y"))
        fold = Fold(root, 0, left_out, variant, source)
        return Planner(told, source, union, fold).plan()

    return go


def commands(fold, name):
    return [job for job in fold.jobs if job.argv[0] == name]


def test_nothing_comes_before_what_it_builds_on(plan):
    fold = plan()
    seen = {}
    for job in fold.jobs:
        assert set(job.after) <= set(seen)
        assert job.phase == max((seen[key] for key in job.after), default=0) + 1
        seen[job.key] = job.phase
    assert len(seen) == len(fold.jobs)


def test_sites_train_from_the_common_classifier_and_yardsticks_do_not(plan):
    fold = plan()
    shared = {job.key for job in commands(fold, "calibrate") if "--model" not in job.argv}
    for job in commands(fold, "finetune"):
        if "/sites/" in job.argv[1]:
            assert set(job.after) == shared
            assert "own" not in job.argv
        else:
            assert ("--head", "own") == job.argv[job.argv.index("--head") :][:2]


def test_the_pooled_model_has_the_steps_of_all_sites(plan):
    (pooled,) = [job for job in commands(plan(), "finetune") if job.argv[1].endswith("pooled")]
    assert pooled.argv[pooled.argv.index("--steps") + 1] == "480"


def test_admissions_wait_for_each_other(plan):
    first, second, third = commands(plan(), "admit")
    assert first.key in second.after
    assert second.key in third.after


def test_one_more_merge_changes_no_other_command(plan):
    before = {job.key for job in plan().jobs}
    merges = {**TOLD["merges"], "ties": {"options": "--method ties"}}
    more = plan(merges=merges)
    new = [job for job in more.jobs if job.key not in before]
    assert [job.argv[0] for job in new] == ["merge"]
    assert before < {job.key for job in more.jobs}


def test_other_training_is_another_federation(plan):
    assert plan().root != plan(training={"steps": 3}).root
    assert plan().root == plan(training={"steps": 160}).root  # the default, written out


def test_what_has_moved_is_not_done_again(plan, tmp_path):
    before = {job.key for job in plan().jobs}
    assert {job.key for job in plan(source=tmp_path / "elsewhere").jobs} == before


def test_a_variant_trains_otherwise_and_has_no_yardsticks(plan):
    fold = plan(variant="long", variants={"long": {"steps": 80}}, training={"seed": 3})
    trained = commands(fold, "finetune")
    assert {job.argv[job.argv.index("--steps") + 1] for job in trained} == {"80"}
    assert len(trained) == len(SITES)
    assert set(fold.models) == {"mean", "sum", "sum-uncalibrated"}
    assert fold.root.name.startswith("seed-0-long-")


@pytest.mark.parametrize("whose", ["sites", "site=a"])
def test_norm_statistics_come_before_the_classifier(plan, whose):
    merge = {"options": "--method sum", "calibrate": True, "restore": whose}
    fold = plan(merges={"sum": merge}, unseen=[], arrivals=None)
    (restored,) = commands(fold, "restore")
    (merged,) = commands(fold, "merge")
    norms = [job for job in commands(fold, "calibrate") if "--norms" in job.argv]
    assert len(norms) == (len(SITES) if whose == "sites" else 0)
    assert set(restored.after) == {job.key for job in norms or [merged]}
    again = [job for job in commands(fold, "calibrate") if restored.key in job.after]
    assert len(again) == len(SITES)
    assert str(fold.models["sum-uncalibrated"]) in restored.argv


def test_other_options_of_a_merge_are_another_folder(plan):
    other = {**TOLD["merges"], "sum": {"options": "--method sum --scale 2", "calibrate": True}}
    assert plan().models["sum"] != plan(merges=other).models["sum"]


def test_a_site_that_is_left_out_is_in_no_command(plan):
    fold = plan(left_out="b")
    assert not [job for job in fold.jobs if "b" in job.argv or "site=b" in job.argv]
    assert set(fold.models) == {"first", "sum", "sum-uncalibrated"}


def test_sites_come_and_go_in_order():
    assert stages(("a", "b", "c")) == [
        ("a",), ("a", "b"), ("a", "b", "c"), ("b", "c"), ("c",),
    ]  # fmt: skip
    assert arrival_orders(("a", "b", "c"), 2) == [("a", "b", "c"), ("b", "c", "a")]
    assert len(arrival_orders(("a", "b"), 9)) == 2


def test_only_those_who_are_there_calibrate_what_arrived(plan):
    fold = plan()
    name = fold.arrivals[frozenset("a")]
    (job,) = [j for j in commands(fold, "head") if str(fold.models[name]) in j.argv]
    assert job.argv[job.argv.index("--site") + 1] == "a"
    assert len(job.after) == 1


def test_a_student_learns_from_rows_or_from_other_images(plan, tmp_path):
    from PIL import Image

    other = tmp_path / "data" / "other"
    other.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(other / "a.png")
    distilled = {"options": "--recipe distill", "transfer": "other"}
    rows = {"options": "--recipe distill", "transfer": "site=a", "calibrate": True}
    fold = plan(merges={**TOLD["merges"], "other": distilled, "rows": rows})
    by_out = {job.argv[job.argv.index("--out") + 1].rsplit("/", 1)[1]: job
              for job in commands(fold, "merge")}  # fmt: skip
    (first,) = (job for name, job in by_out.items() if name.startswith("other-"))
    assert first.argv[2:6] == ("--recipe", "distill", "--data", str(other))
    (second,) = (job for name, job in by_out.items() if name.startswith("rows-"))
    assert second.argv[second.argv.index("--where") + 1] == "site=a"
    assert second.argv[second.argv.index("--split") + 1] == "train"
    Image.new("RGB", (8, 8), "red").save(other / "a.png")
    again = plan(merges={**TOLD["merges"], "other": distilled, "rows": rows})
    keys, changed = {job.key for job in fold.jobs}, {job.key for job in again.jobs}
    assert first.key in keys - changed
    assert len(keys - changed) == 1


def test_a_student_may_learn_without_images(plan, tmp_path):
    """Its command names none, and a site that is left out gives none away."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: distill\nsynthesis: {images: 9}\n")
    free = {"options": f"--recipe {recipe}", "transfer": "synthetic", "calibrate": True}
    told = {**TOLD["merges"], "free": free}
    fold = plan(merges=told, unseen=["free"])
    (job,) = (job for job in commands(fold, "merge") if "--recipe" in job.argv)
    assert job.argv[:4] == ("merge", str(fold.root / "hub"), "--recipe", str(recipe))
    assert "--data" not in job.argv
    (without,) = commands(plan("a", merges=told, unseen=["free"]), "merge")
    assert without.argv[2:4] == job.argv[2:4]
    recipe.write_text("method: distill\nsynthesis: {images: 10}\n")
    keys = {one.key for one in plan(merges=told, unseen=["free"]).jobs}
    assert job.key not in keys


def test_private_models_speak_on_a_hub_of_their_own(plan, tmp_path):
    """What other merges learn from does not change; of the private sites no vector lies there."""
    others = {"vit": {"name": "test_vit"}}
    spoken = {
        "options": "--recipe distill", "transfer": "site=a", "private": {"b": "vit", "c": "vit"},
    }  # fmt: skip
    fold = plan(others=others, merges={**TOLD["merges"], "spoken": spoken})
    (merge,) = (job for job in commands(fold, "merge") if "--recipe" in job.argv)
    hub = merge.argv[1]
    assert hub not in (str(fold.root / "hub"), str(fold.root / "other-vit"))
    said = commands(fold, "predict-proxy")
    assert [job.argv[1].rsplit("/", 1)[1] for job in said] == ["b", "c"]
    sent = [job for job in commands(fold, "publish") if hub in job.argv]
    assert [job.argv[1].rsplit("/", 1)[1] for job in sent] == ["a"]
    assert set(merge.after) == {job.key for job in (*said, *sent)}
    for job, site in zip(said, "bc", strict=True):
        model = job.argv[job.argv.index("--model") + 1]
        assert model == str(fold.root / "alone" / f"{site}-vit") == str(fold.models[f"{site}-vit"])
        (trained,) = (one for one in commands(fold, "finetune") if one.argv[1] == model)
        assert trained.key in job.after
        assert ("--where", f"site={site}") == trained.argv[trained.argv.index("--where") :][:2]
        assert job.argv[job.argv.index("--where") + 1] == "site=a"
        assert job.argv[job.argv.index("--hub") + 1] == hub
    with says(UsageError, "'private: x' is none of the sites: a, b, c."):
        plan(others=others, merges={"spoken": {**spoken, "private": {"x": "vit"}}}, unseen=[],
             arrivals=None)  # fmt: skip


def test_a_tuned_merge_is_a_recipe_that_images_have_chosen(plan):
    """The options of the merge are where tuning starts; one such merge, one recipe."""
    sums = {"options": "--method sum --weights examples"}
    told = {
        "few": {**sums, "tune": "--by labels --steps 9", "calibrate": True},
        "sure": {**sums, "tune": "--by entropy"},
    }
    fold = plan(merges={**TOLD["merges"], **told})
    few, sure = commands(fold, "tune")
    start = ("--method", "sum", "--weights", "examples", "--by", "labels", "--steps", "9")
    assert few.argv[1] == str(fold.root / "hub")
    assert few.argv[few.argv.index("--method") :][:8] == start
    published = {job.key for job in commands(fold, "publish")}
    for tuned in (few, sure):
        recipe = tuned.argv[tuned.argv.index("--out-recipe") + 1]
        (merge,) = (job for job in commands(fold, "merge") if recipe in job.argv)
        assert merge.argv[2:4] == ("--recipe", recipe)
        assert "--method" not in merge.argv
        assert merge.after == (tuned.key,)
        assert set(tuned.after) == published
    assert {"few", "few-uncalibrated", "sure"} <= set(fold.models)


def test_each_way_to_travel_has_its_hub_once(plan):
    small = {"options": "--method sum", "calibrate": True, "compress": "int8"}
    fold = plan(merges={**TOLD["merges"], "small": small, "mean-small": {"compress": "int8"}})
    hubs = [job.argv[1] for job in commands(fold, "init")]
    assert len(hubs) == 2
    sent = [job for job in commands(fold, "publish") if "--compress" in job.argv]
    assert len(sent) == len(SITES)
    first = {job.argv[1]: job.key for job in commands(fold, "publish") if job not in sent}
    for job in sent:
        assert job.argv[2:] == ("--hub", hubs[1], "--compress", "int8")
        assert first[job.argv[1]] in job.after
    merged = [job for job in commands(fold, "merge") if job.argv[1] == hubs[1]]
    assert len(merged) == 2
    assert all({job.key for job in sent} == set(job.after) for job in merged)
    visits = [job for job in commands(fold, "calibrate") if "--hub" in job.argv]
    assert len(visits) == len(SITES)
    assert {job.key for job in plan().jobs} < {job.key for job in fold.jobs}


def test_means_and_recipes_are_part_of_what_was_done(plan, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: mean")
    told = {**TOLD["merges"], "mine": {"options": f"--recipe {recipe}"}}
    first = {job.key for job in plan(merges=told).jobs}
    recipe.write_text("method: mean\nweights: uniform\n")
    second = {job.key for job in plan(merges=told).jobs}
    assert len(first - second) == 1
    assert plan(means=5).root != plan().root
    visits = [job for job in commands(plan(means=5), "calibrate")]
    assert all(job.argv[job.argv.index("--means") + 1] == "5" for job in visits)


@pytest.mark.parametrize("field", ["transfer", "restore"])
def test_a_site_that_is_left_out_gives_no_images_to_the_merge(field):
    told = {**TOLD, "merges": {**TOLD["merges"], "odd": {field: "site=a"}}, "unseen": ["odd"]}
    with pytest.raises(ValueError, match="may be those of the site that is left out"):
        Experiment.model_validate(told)
