"""The findings in words, read from a report and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evaluate.document import Figure, Report
from evaluate.verdict import ranking, verdict
from tests.evaluate.judged import cases, certain, four_models, letters, many_and_few, predictions
from tests.evaluate.judged import report as report_of


def bounded(report: Report, low: float, high: float, p: float) -> Report:
    """The report with other bounds: those of one resample are no use."""
    comparisons = tuple(
        c.model_copy(
            update={
                "difference": c.difference.model_copy(update={"low": low, "high": high}),
                "p": p / 4,
                "p_adjusted": p,
            }
        )
        for c in report.comparisons
    )
    models = tuple(
        m.model_copy(
            update={
                "scopes": tuple(
                    s.model_copy(
                        update={
                            "figures": {
                                name: f.model_copy(update={"low": 0.5, "high": 1.0})
                                for name, f in s.figures.items()
                            }
                        }
                    )
                    for s in m.scopes
                )
            }
        )
        for m in report.models
    )
    return report.model_copy(update={"comparisons": comparisons, "models": models})


def test_the_verdict_in_words() -> None:
    labelled = letters("aaaaabbbbbaaaaabbbbb", "x" * 10 + "y" * 10)
    ties = certain("aaaaabbbba" + "aaaaabbbbb", "TIES", "merged")
    own = certain("aaaaabbbbb" + "aaaaaaabbb", "x alone", "site:x")
    report = bounded(report_of(labelled, [ties, own], resamples=1), -0.25, -0.0004, 0.01)
    assert verdict(report) == (
        "On all cases the best merged model, “TIES” (0.950), is above the single-site model "
        "(“x alone”, 0.900) by 0.050 (−0.250 to 0.000).",
        "“TIES” beats the site's own model at none of 1 site; at x it is worse by 0.100 (0.000 to "
        "0.250).",
        "“TIES” has the highest balanced accuracy on all 20 cases, 0.950 (95 % interval 0.500 to "
        "1.000); the next, “x alone”, is lower by 0.050 (95 % interval −0.250 to 0.000).",
        "“TIES” also has the highest balanced accuracy on the mean over the 2 sites, 0.950 (95 % "
        "interval 0.500 to 1.000); the next, “x alone”, is lower by 0.050 (95 % interval −0.250 to "
        "0.000).",
        "The worst site of “TIES” is x: 0.900 on 10 cases.",
        "The probabilities of “TIES” are off by 0.050 (expected calibration error, 15 bins), on "
        "average too sure of themselves.",
    )


def test_the_best_merged_model_is_set_against_every_kind_with_what_chance_says() -> None:
    labelled = cases(600)
    models = four_models(labelled)
    second = predictions(labelled, "second", "merged", 0.5)
    other = predictions(labelled, "other", "site:oslo", 1.49)
    said = report_of(labelled, [*models, second, other], resamples=400).verdict[0]
    assert said.startswith(
        "On all cases the best merged model of 2, chosen by these very cases, “merged” (0."
    )
    for words in ("the mean of the 2 single-site models", "below the best of them (“own”, 0."):
        assert words in said
    assert "above the base (“start”, 0." in said


@pytest.mark.parametrize(("p", "unclear"), [(0.4, True), (0.1, True), (0.01, False)])
def test_a_difference_may_be_chance_by_its_adjusted_p_value(p: float, unclear: bool) -> None:
    labelled = cases()
    report = bounded(report_of(labelled, four_models(labelled), resamples=1), -0.1, 0.2, p)
    text = " ".join(verdict(report))
    assert ("may be chance" in text) is unclear
    assert ("among so many comparisons" in text) is (p == 0.1)


def test_the_worst_site_is_that_of_the_best_merged_model() -> None:
    labelled = cases()
    report = report_of(labelled, four_models(labelled))
    assert any(s.startswith("The worst site of “merged” is") for s in report.verdict)


def test_models_that_are_level_are_said_to_be() -> None:
    labelled = cases()
    model = predictions(labelled)
    report = report_of(labelled, [model, replace(model, model="twin")])
    assert report.verdict[0].endswith("; “twin” has the same.")


def test_the_verdict_says_where_nothing_is_lost() -> None:
    labelled = cases()
    pair = [
        predictions(labelled, "merged", "merged", 9),
        predictions(labelled, "own", "site:lyon", 0),
    ]
    text = (
        "“merged” beats the site's own model at 1 of 1 site (beyond chance at 1) and is worse at "
        "none."
    )
    assert text in report_of(labelled, pair).verdict


def test_the_verdict_on_a_single_model_names_no_other() -> None:
    labelled = cases()
    sentences = report_of(labelled, predictions(labelled)).verdict
    assert sentences[0].startswith("“merged” has a balanced accuracy of 0.")
    assert not any("next" in sentence or "highest" in sentence for sentence in sentences)


def test_the_verdict_counts_small_cells_but_not_empty_ones() -> None:
    said = report_of(letters("aaaaabaaaaaa", "x" * 6 + "y" * 6), certain("a" * 12)).verdict
    assert said[-1] == (
        "1 of the 4 cells of one class at one site holds fewer than 5 cases; figures of such cells "
        "are withheld, but balanced accuracy counts each as much as a class of many."
    )


def test_the_verdict_names_sites_with_too_few_cases() -> None:
    said = report_of(letters("aaaaabbbbbab", "x" * 10 + "yy"), certain("a" * 12)).verdict
    assert "Too few cases for any figure (5 are asked for): y." in said


def test_of_many_small_groups_the_first_are_named_with_their_column() -> None:
    ages = tuple(f"{age:02}" for age in range(6) for _ in range(2))
    labelled = letters("ab" * 6, " " * 12, columns={"age": ages})
    said = report_of(labelled, certain("ab" * 6)).verdict
    text = (
        "Too few cases for any figure (5 are asked for): age 00, age 01, age 02, age 03 and 2 more."
    )
    assert text in said


def test_a_class_without_a_case_is_named() -> None:
    said = report_of(letters("aaaaaa", "x" * 6), certain("aaaaaa")).verdict
    assert any(sentence.startswith("No case is of the class b: figures are") for sentence in said)


def test_the_verdict_on_many_merged_models_stays_short() -> None:
    labelled = cases()
    models = [predictions(labelled, f"m{i}", "merged", i / 4) for i in range(6)]
    report = report_of(labelled, [*models, predictions(labelled, "own", "site:lyon", 5)])
    text = "The other 3 merged models do worse than a site's own model in 3 of 3 comparisons."
    assert text in report.verdict
    assert len(report.verdict) <= 10


def test_a_gap_between_groups_is_told_with_its_interval() -> None:
    labelled = cases()
    model = predictions(labelled, skill=2)
    # Worse on every other case.
    scrambled = np.where(
        (np.arange(120) % 2)[:, None] == 0,
        np.roll(model.probabilities, 1, axis=1),
        model.probabilities,
    )
    by = replace(labelled, columns={"scanner": ("old", "new") * 60})
    report = report_of(by, replace(model, probabilities=scrambled))
    (said,) = (sentence for sentence in report.verdict if sentence.startswith("By scanner"))
    assert said.startswith("By scanner, “merged” does best on new and worst on old: a gap of 0.")
    assert "may be chance" not in said


def test_withheld_and_undefined_models_are_not_ranked() -> None:
    labelled = letters("ab", "xx")
    report = report_of(labelled, certain("ab"))
    assert ranking(report, "union") == []
    assert report.models[0].on("union").figures["accuracy"] == Figure(value=None, small=True)


def test_the_worst_site_is_named_among_sites_that_have_figures() -> None:
    said = " ".join(report_of(letters("aaaaabbbbbab", "x" * 10 + "yy"), certain("a" * 12)).verdict)
    assert "worst site" not in said
    assert "on the mean over the only site that can be judged" in said


def test_one_model_on_external_sites_is_not_called_the_best() -> None:
    labelled = letters("aaaaabbbbb", "x" * 10)
    said = report_of(labelled, certain("aaaaabbbbb"), external=("x",)).verdict
    assert any("trained on, “m” has 1.000" in sentence for sentence in said)


def test_right_probabilities_lean_to_neither_side() -> None:
    labelled = letters("aaaaabbbbb", "x" * 10)
    said = report_of(labelled, certain("aaaaabbbbb")).verdict
    assert any(
        sentence.endswith("off by 0.000 (expected calibration error, 15 bins).")
        for sentence in said
    )


def test_probabilities_of_several_labels_are_too_high_or_too_low() -> None:
    labelled = cases(multi_label=True)
    low = predictions(labelled)
    low = replace(low, probabilities=low.probabilities / 5)
    assert any(
        s.endswith("15 bins), on average too low.") for s in report_of(labelled, low).verdict
    )


def test_cases_left_out_of_a_gap_are_counted() -> None:
    labelled = cases(columns={"sex": ("f", "m", "unknown") * 40})
    (said,) = (s for s in report_of(labelled, predictions(labelled)).verdict if "By sex" in s)
    assert said.endswith("; 40 cases without sex left out.")


def test_two_models_of_one_site_are_told_apart() -> None:
    labelled = cases()
    models = [
        predictions(labelled, "merged", "merged", 0),
        predictions(labelled, "first", "site:lyon", 4),
        predictions(labelled, "second", "site:lyon", 9),
    ]
    text = " ".join(report_of(labelled, models).verdict)
    assert "at lyon it is worse than “first” by 0." in text
    assert "at lyon it is worse than “second” by 0." in text


def test_intervals_are_told_with_their_level() -> None:
    labelled = cases()
    said = report_of(labelled, predictions(labelled), level=0.9).verdict[0]
    assert "(90 % interval 0." in said


def test_the_best_merged_model_is_the_same_in_every_sentence() -> None:
    labelled, models = many_and_few()
    report = report_of(labelled, [*models, certain("a" * 90, "own", "site:x")])
    assert ranking(report, "union")[0] == "many"
    assert ranking(report, "mean_over_sites")[0] == "few"
    text = " ".join(report.verdict)
    assert "chosen by these very cases, “many” (0.889), is above" in text
    assert "The worst site of “many” is y: 0.000" in text
    assert text.index("“many” beats the site's own") < text.index("“few” beats the site's own")


def test_a_gap_of_nothing_is_no_finding() -> None:
    labelled = letters("aaaaabbbbb" * 2, " " * 20, columns={"sex": ("f",) * 10 + ("m",) * 10})
    said = report_of(labelled, certain("aaaaabbbbb" * 2)).verdict
    assert not any(sentence.startswith("By sex") for sentence in said)


def test_a_model_of_one_answer_looks_perfect_only_where_one_class_is_left() -> None:
    one = report_of(letters("aaaaaa", "x" * 6), certain("aaaaaa")).verdict
    assert any("takes everything for the only one left looks perfect" in text for text in one)
    three = cases()
    two = three.take(np.flatnonzero(three.labels != 2))
    said = report_of(two, predictions(two)).verdict
    assert "No case is of the class other: figures are over the other classes." in said


def test_the_verdict_says_when_resamples_are_too_few_for_the_comparisons() -> None:
    labelled = cases()
    models = [predictions(labelled, "good", skill=20), predictions(labelled, "bad", skill=-5)]
    few = report_of(labelled, models, resamples=50).verdict
    text = "50 resamples are too few to tell differences among 2 comparisons from chance: "
    assert text + "repeat with --resamples 80 or more." in few
    enough = report_of(labelled, models, resamples=80).verdict
    assert not any("too few to tell" in sentence for sentence in enough)
