"""The content of metrics.json, and the sentences that are read from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sklearn

from evaluate.summary import Predictions, summarise, verdict
from finetune.scores import balanced_accuracy, bootstrap_intervals, macro_auroc
from merge_kit.errors import DataError

CLASSES = ("benign", "malignant", "other")
SITES = ("lyon", "oslo")
ROLES = {"merged": "merged", "own": "site:lyon", "pooled": "pooled", "start": "base"}


def predictions(model: str = "merged", *, n: int = 120, skill: float = 1.0) -> Predictions:
    """Three classes at two sites, 60 patients of two images; the cases are the same for all."""
    cases, noise = np.random.default_rng(0), np.random.default_rng(sum(model.encode()))
    labels = cases.integers(0, 3, n)
    logits = noise.normal(size=(n, 3)) + skill * np.eye(3)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Predictions(
        model=model,
        classes=CLASSES,
        files=tuple(f"{index:03}.png" for index in range(n)),
        labels=labels,
        probabilities=probabilities,
        patients=tuple(f"p{index // 2}" for index in range(n)),
        sites=tuple(SITES[index % 6 == 5] for index in range(n)),
    )


def certain(model: str, truth: str, said: str, sites: str) -> Predictions:
    """One case a letter: true class, predicted class ("a", "b") and site, each by a letter."""
    n = len(truth)
    columns = np.array([ord(letter) - ord("a") for letter in said], dtype=np.int64)
    return Predictions(
        model,
        ("a", "b"),
        tuple(f"{index}.png" for index in range(n)),
        np.array([ord(letter) - ord("a") for letter in truth], dtype=np.int64),
        np.eye(2)[columns],
        (None,) * n,
        tuple(site.strip() for site in sites),
    )


def four_models() -> list[Predictions]:
    skills = {"merged": 1.5, "own": 2.5, "pooled": 3.0, "start": 0.0}
    return [predictions(name, skill=skill) for name, skill in skills.items()]


def leaves(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from leaves(entry)
    else:
        yield value


def test_union_and_site_figures_equal_those_of_scikit_learn() -> None:
    data = predictions()
    (model,) = summarise([data], resamples=10)["models"]
    at = {site: np.array(data.sites) == site for site in SITES} | {"": np.ones(120, bool)}
    for row in [*model["sites"], {"site": "", **model["union"]}]:
        labels, chances = data.labels[at[row["site"]]], data.probabilities[at[row["site"]]]
        recall = sklearn.recall_score(labels, chances.argmax(axis=1), average="macro")
        auroc = sklearn.roc_auc_score(np.eye(3)[labels], chances, average="macro")
        assert row["balanced_accuracy"]["value"] == pytest.approx(recall)
        assert row["macro_auroc"]["value"] == pytest.approx(auroc)
        assert row["accuracy"]["value"] == np.mean(labels == chances.argmax(axis=1))
        assert row["n"] == row["accuracy"]["n"] == len(labels)


def test_class_figures_and_confusion_equal_those_of_scikit_learn() -> None:
    data = predictions()
    (model,) = summarise([data], resamples=10)["models"]
    predicted = data.probabilities.argmax(axis=1)
    recalls = sklearn.recall_score(data.labels, predicted, average=None)
    aurocs = sklearn.roc_auc_score(np.eye(3)[data.labels], data.probabilities, average=None)
    assert [row["class"] for row in model["classes"]] == list(CLASSES)
    assert [row["sensitivity"] for row in model["classes"]] == pytest.approx(recalls)
    assert [row["auroc"] for row in model["classes"]] == pytest.approx(aurocs)
    assert model["confusion"] == sklearn.confusion_matrix(data.labels, predicted).tolist()


def test_a_tiny_summary_by_hand() -> None:
    data = certain("m", truth="aaabab", said="aabaab", sites="xxxxyy")
    (model,) = summarise([data], resamples=10)["models"]
    assert model["union"]["balanced_accuracy"]["value"] == (3 / 4 + 1 / 2) / 2
    assert [row["balanced_accuracy"]["value"] for row in model["sites"]] == [1 / 3, 1]
    assert model["mean_over_sites"]["balanced_accuracy"]["value"] == pytest.approx(2 / 3)
    assert model["worst_site"] == {"site": "x", "value": 1 / 3, "n": 4, "small": True}
    assert model["worst_class"] == {"class": "b", "value": 1 / 2, "n": 2, "small": True}
    assert model["confusion"] == [[3, 1], [1, 1]]


def test_a_small_site_is_the_worst_only_when_all_are_small() -> None:
    data = certain("m", truth="aaaaabab", said="aaaaaaba", sites="xxxxxxyy")
    (model,) = summarise([data], resamples=10)["models"]
    assert model["worst_site"] == {"site": "x", "value": 0.5, "n": 6, "small": False}
    (model,) = summarise([data], resamples=10, minimum_cell=7)["models"]
    assert model["worst_site"] == {"site": "y", "value": 0, "n": 2, "small": True}


def test_cells_below_the_minimum_are_flagged_and_no_others() -> None:
    data = certain("m", truth="aaaaabbbb", said="aaaaabbbb", sites="x" * 9)
    summary = summarise([data], resamples=10)
    assert [(c["n"], c["small"]) for c in summary["cases"]["classes"]] == [(5, False), (4, True)]
    (site,) = summary["models"][0]["sites"]
    assert [c["small"] for c in site["classes"]] == [False, True]
    assert not site["small"]


def test_the_summary_is_plain_json_with_null_for_what_is_undefined() -> None:
    summary = summarise([certain("m", truth="aa", said="ab", sites="xx")], resamples=10)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert {type(leaf) for leaf in leaves(summary)} <= {int, float, str, bool, type(None)}
    (model,) = summary["models"]
    assert model["union"]["macro_auroc"] == {"value": None, "low": None, "high": None, "n": 2}
    assert model["classes"][1]["sensitivity"] is None


def test_no_case_at_all_gives_nulls_and_a_sentence() -> None:
    summary = summarise([certain("m", "", "", "")], resamples=10)
    assert summary["models"][0]["union"]["accuracy"]["value"] is None
    assert summary["models"][0]["worst_site"] is None
    assert verdict(summary) == [
        "No model has a defined balanced accuracy: there are no labelled cases."
    ]


def test_patients_are_drawn_whole() -> None:
    data = predictions()
    one_each = replace(data, patients=tuple(str(index) for index in range(120)))
    unknown = replace(data, patients=(None,) * 120)
    unions = [summarise([p])["models"][0]["union"] for p in (data, one_each, unknown)]
    assert unions[0] != unions[1]
    assert unions[1] == unions[2]


def test_intervals_of_the_union_are_those_of_the_bootstrap_by_patient() -> None:
    data = replace(predictions(), sites=("lyon",) * 120)
    scores = {"balanced_accuracy": balanced_accuracy, "macro_auroc": macro_auroc}
    options: dict[str, Any] = {"groups": data.patients, "seed": [7, 0]}
    expected = bootstrap_intervals(data.labels, data.probabilities, scores, **options)
    union = summarise([data], seed=7)["models"][0]["union"]
    for name, interval in expected.items():
        assert union[name]["low"] == interval.low
        assert union[name]["high"] == interval.high


def test_one_patient_number_at_two_sites_is_two_patients() -> None:
    data = certain("m", truth="abab", said="abab", sites="xxyy")
    summary = summarise([replace(data, patients=("1", "2", "1", "2"))], resamples=10)
    assert summary["cases"]["patients"] == 4
    assert summary["bootstrap"]["unit"] == "patient"


@pytest.mark.parametrize(
    ("patients", "unit"), [((None,) * 4, "case"), (("1", None, "2", ""), "patient or case")]
)
def test_unknown_patients_are_said_to_be_unknown(
    patients: tuple[str | None, ...], unit: str
) -> None:
    data = replace(certain("m", "abab", "abab", "xxyy"), patients=patients)
    summary = summarise([data], resamples=10)
    assert summary["bootstrap"]["unit"] == unit
    assert summary["cases"]["patients"] is None


def test_the_mean_over_sites_has_an_interval_around_it() -> None:
    mean = summarise([predictions()])["models"][0]["mean_over_sites"]["balanced_accuracy"]
    assert mean["low"] < mean["value"] < mean["high"]
    assert mean["n"] == 2


def test_sites_of_one_case_have_no_interval_and_neither_has_their_mean() -> None:
    (model,) = summarise([certain("m", "ab", "ab", "xy")], resamples=10)["models"]
    assert model["sites"][0]["accuracy"] == {"value": 1, "low": None, "high": None, "n": 1}
    assert model["mean_over_sites"]["accuracy"]["low"] is None


def test_cases_without_a_site_count_in_the_union_only() -> None:
    summary = summarise([certain("m", truth="abab", said="abba", sites="xx  ")], resamples=10)
    assert summary["sites"] == ["x"]
    assert summary["cases"]["without_site"] == 2
    assert summary["models"][0]["union"]["n"] == 4
    assert summary["models"][0]["mean_over_sites"]["accuracy"]["value"] == 1


def test_a_site_keeps_its_figures_when_another_joins() -> None:
    data = predictions()
    lyon = [index for index, site in enumerate(data.sites) if site == "lyon"]
    alone = Predictions(
        "merged",
        CLASSES,
        tuple(data.files[i] for i in lyon),
        data.labels[lyon],
        data.probabilities[lyon],
        tuple(data.patients[i] for i in lyon),
        ("lyon",) * len(lyon),
    )
    both, one = summarise([data]), summarise([alone])
    assert both["models"][0]["sites"][0] == one["models"][0]["sites"][0]


def test_sites_are_drawn_independently_of_each_other() -> None:
    half = "aab" * 7, "aba" * 7
    (model,) = summarise([certain("m", half[0] * 2, half[1] * 2, "x" * 21 + "y" * 21)])["models"]
    bounds = [site["macro_auroc"] for site in model["sites"]]
    mean = model["mean_over_sites"]["macro_auroc"]
    assert bounds[0]["value"] == bounds[1]["value"] == mean["value"]
    width, each = (b["high"] - b["low"] for b in (mean, bounds[0]))
    assert width == pytest.approx(each / 2**0.5, rel=0.15)


def test_differences_are_paired() -> None:
    data = predictions("merged")
    twin = replace(data, model="own")
    summary = summarise([data, twin], roles={"merged": "merged", "own": "site:lyon"})
    for entry in summary["comparisons"]:
        difference = entry["difference"]
        assert (difference["value"], difference["low"], difference["high"]) == (0, 0, 0)


def test_every_merged_model_is_compared_with_the_sites_own_model() -> None:
    summary = summarise(four_models(), roles=ROLES, resamples=100)
    scopes = [(e["scope"], e["model"], e["against"]) for e in summary["comparisons"]]
    assert ("site:lyon", "merged", "own") in scopes
    assert scopes[0] == ("union", "pooled", "own")
    (entry,) = (e for e in summary["comparisons"] if e["scope"] == "site:lyon")
    merged, own = (m["sites"][0]["balanced_accuracy"]["value"] for m in summary["models"][:2])
    assert entry["difference"]["value"] == pytest.approx(merged - own)
    assert entry["difference"]["low"] < merged - own < entry["difference"]["high"]


def test_roles_are_stored_and_default_to_other() -> None:
    summary = summarise(four_models(), roles={"own": "site:lyon"}, resamples=5)
    assert [m["role"] for m in summary["models"]] == ["other", "site:lyon", "other", "other"]


def test_the_same_predictions_give_the_same_summary() -> None:
    first = summarise(four_models(), roles=ROLES, resamples=20, seed=1)
    assert first == summarise(four_models(), roles=ROLES, resamples=20, seed=1)
    assert first != summarise(four_models(), roles=ROLES, resamples=20, seed=2)


def test_the_verdict_in_words() -> None:
    a = certain("TIES", truth="aaaaabbbbbab", said="aaaaabbbbaab", sites="x" * 10 + "yy")
    b = replace(a, model="x alone", probabilities=np.eye(2)[[0] * 5 + [1] * 5 + [0, 0]])
    summary = summarise([a, b], roles={"TIES": "merged", "x alone": "site:x"}, resamples=1)
    for entry in summary["comparisons"]:  # the bounds of one resample are no use here
        entry["difference"] |= {"low": -0.25, "high": -0.0004}
    for model in summary["models"]:
        for figures in (model["union"], model["mean_over_sites"]):
            figures["balanced_accuracy"] |= {"low": 0.5, "high": 1.0}
    assert verdict(summary) == [
        "“TIES” has the highest balanced accuracy on all 12 cases, 0.917 (95 % interval 0.500 to "
        "1.000); “x alone” has the same.",
        "“TIES” also has the highest balanced accuracy on the mean over the 2 sites, 0.950 (95 % "
        "interval 0.500 to 1.000); the next, “x alone”, is lower by 0.200 (95 % interval −0.250 to "
        "0.000), which may be chance.",
        "The worst site of “TIES” is x: 0.900 on 10 cases.",
        "On all cases the best merged model, “TIES” (0.917), is level with the single-site model "
        "(“x alone”, 0.917).",
        "“TIES” falls below the site's own model at 1 of 1 site: x by 0.100 (0.000 to 0.250).",
        "2 of the 4 cells of one class at one site hold fewer than 5 cases; the figures of such "
        "cells say little.",
    ]


def test_the_verdict_says_where_nothing_is_lost() -> None:
    better, worse = predictions("merged", skill=9), predictions("own", skill=0)
    summary = summarise([better, worse], roles={"merged": "merged", "own": "site:lyon"})
    assert "“merged” falls below a site's own model at none of 1 site." in verdict(summary)


def test_the_verdict_on_a_single_model_names_no_other() -> None:
    sentences = verdict(summarise([predictions()], resamples=50))
    assert sentences[0].startswith("“merged” has a balanced accuracy of 0.")
    assert not any("next" in sentence or "highest" in sentence for sentence in sentences)


def test_the_verdict_counts_small_cells_but_not_empty_ones() -> None:
    said = verdict(summarise([certain("m", "aaaaabaa", "aaaaabaa", "xxxxxxyy")], resamples=5))
    assert said[-1].startswith("2 of the 4 cells of one class at one site hold fewer than 5 cases")


def test_the_verdict_on_many_merged_models_stays_short() -> None:
    models = [predictions(f"m{index}", skill=index / 4) for index in range(6)]
    own = predictions("own", skill=5)
    roles = {f"m{index}": "merged" for index in range(6)} | {"own": "site:lyon"}
    sentences = verdict(summarise([*models, own], roles=roles, resamples=20))
    text = "The other 3 merged models fall below a site's own model in 3 of 3 comparisons."
    assert text in sentences
    assert len(sentences) <= 9


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"classes": ("benign", "other", "malignant")}, "have different classes or another order"),
        ({"files": ("x.png", *(f"{i:03}.png" for i in range(1, 120)))}, "1 is 000.png and x.png"),
        ({"labels": np.full(120, 1)}, "000.png has another label, patient or site"),
        ({"patients": ("p9",) * 120}, "000.png has another label, patient or site"),
        ({"sites": ("oslo",) * 120}, "000.png has another label, patient or site"),
        ({"model": "merged"}, "Two models are called 'merged': give each a name of its own"),
    ],
)
def test_models_on_different_cases_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        summarise([predictions(), replace(predictions("b"), **changes)], resamples=5)


def test_a_model_with_fewer_cases_is_refused() -> None:
    with pytest.raises(DataError, match=r"different cases \(120 and 90 of them\): run all"):
        summarise([predictions(), predictions("b", n=90)], resamples=5)


@pytest.mark.parametrize(
    ("roles", "sentence"),
    [
        ({"merged": "best"}, "'merged' has the role 'best', but a role is base, site:<site>"),
        ({"merged": "site:"}, "'merged' has the role 'site:', but a role is base"),
        ({"absent": "base"}, "There is no model 'absent' to give a role"),
    ],
)
def test_unknown_roles_are_refused(roles: dict[str, str], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        summarise([predictions()], roles=roles, resamples=5)


def test_no_model_is_refused() -> None:
    with pytest.raises(DataError, match="There is no model to summarise: name at least one"):
        summarise([])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sites": ("x",)}, "predictions of model 'merged' do not fit its 120 files and 3 classes"),
        ({"probabilities": np.ones((120, 2))}, "do not fit its 120 files and 3 classes"),
        ({"probabilities": np.full((120, 3), np.nan)}, "'merged' gives 000.png a probability"),
        ({"probabilities": np.full((120, 3), 1.5)}, "'merged' gives 000.png a probability"),
        ({"labels": np.full(120, 3)}, "The label of 000.png is none of the 3 classes"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        replace(predictions(), **changes)
