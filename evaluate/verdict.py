"""What a summary says, in a few plain sentences that are computed, never written by hand.

Reads the content of metrics.json (see `evaluate.summary.summarise`) and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAIN_SCORE = "balanced_accuracy"
_SCOPES = {"union": "all {n} cases", "mean_over_sites": "the mean over the {n} sites"}
_MOST_MODELS = 3
_MOST_SITES = 4


def ranking(models: Sequence[Mapping[str, Any]], scope: str) -> list[str]:
    """Return the models' names, highest balanced accuracy first, without undefined ones.

    `scope` is "union" or "mean_over_sites"; equal figures keep the order of the models.
    """
    values = {model["model"]: model[scope][MAIN_SCORE]["value"] for model in models}
    defined = [name for name, value in values.items() if value is not None]
    return sorted(defined, key=lambda name: -values[name])


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """Return the findings of a summary as plain sentences, the most important first.

    Which model is best on the union and on the mean over sites and by how much, with its worst
    site; where merged models fall below a site's own model; how the best merged model stands to
    single-site, pooled and base models; and what is too small to be believed.
    """
    return [
        *_best(summary),
        *_worst_site(summary),
        *_baselines(summary),
        *_against_own(summary),
        *_absent(summary),
        *_small(summary),
    ]


def _best(summary: Mapping[str, Any]) -> list[str]:
    sentences: list[str] = []
    leaders: list[str] = []
    for scope, words in _SCOPES.items():
        order = ranking(summary["models"], scope)
        if not order:
            continue
        figure = _model(summary, order[0])[scope][MAIN_SCORE]
        where = words.format(n=figure["n"])
        if len(order) == 1:
            sentence = (
                f"{_name(order[0])} has a balanced accuracy of {_interval(figure)} on {where}."
            )
        else:
            also = "also " if order[0] in leaders else ""
            sentence = (
                f"{_name(order[0])} {also}has the highest balanced accuracy on {where}, "
                f"{_interval(figure)}; {_lead(summary, scope)}."
            )
        leaders.append(order[0])
        sentences.append(sentence)
    return sentences or ["No model has a defined balanced accuracy: there are no labelled cases."]


def _lead(summary: Mapping[str, Any], scope: str) -> str:
    (entry,) = (entry for entry in summary["comparisons"] if entry["scope"] == scope)
    difference = entry["difference"]
    if not difference["value"]:
        return f"{_name(entry['against'])} has the same"
    words = f"the next, {_name(entry['against'])}, is lower by {_interval(difference)}"
    if difference["low"] is not None and difference["low"] <= 0:
        words += ", which may be chance"
    return words


def _worst_site(summary: Mapping[str, Any]) -> list[str]:
    order = ranking(summary["models"], "mean_over_sites")
    worst = _model(summary, order[0])["worst_site"] if order else None
    if worst is None or len(summary["sites"]) < 2:
        return []
    name = _name(order[0])
    return [f"The worst site of {name} is {worst['site']}: {worst['value']:.3f}{_on(worst)}."]


def _on(row: Mapping[str, Any]) -> str:
    return f" on {row['n']} case{'s' if row['n'] != 1 else ''}"


def _baselines(summary: Mapping[str, Any]) -> list[str]:
    """Set the merged model that is best on the union against the other kinds of models."""
    kinds: dict[str, list[tuple[float, str]]] = {}
    for name in ranking(summary["models"], "union"):
        model = _model(summary, name)
        kind = "site" if model["role"].startswith("site:") else model["role"]
        kinds.setdefault(kind, []).append((model["union"][MAIN_SCORE]["value"], name))
    if "merged" not in kinds:
        return []
    value, merged = kinds["merged"][0]
    against = []
    if own := kinds.get("site"):
        mean = sum(figure for figure, _ in own) / len(own)
        if len(own) > 1:
            text = f"the mean of the {len(own)} single-site models"
            against.append(f"{_relation(value, mean)} {text} ({mean:.3f})")
        text = "the best of them" if len(own) > 1 else "the single-site model"
        against.append(
            f"{_relation(value, own[0][0])} {text} ({_name(own[0][1])}, {own[0][0]:.3f})"
        )
    for kind, text in (("pooled", "pooled training"), ("base", "the base")):
        if kind in kinds:
            figure, name = kinds[kind][0]
            against.append(f"{_relation(value, figure)} {text} ({_name(name)}, {figure:.3f})")
    if not against:
        return []
    return [
        f"On all cases the best merged model, {_name(merged)} ({value:.3f}), is {_list(against)}."
    ]


def _relation(value: float, other: float) -> str:
    return "above" if value > other else "below" if value < other else "level with"


def _against_own(summary: Mapping[str, Any]) -> list[str]:
    entries = [
        entry
        for entry in summary["comparisons"]
        if entry["scope"].startswith("site:") and entry["difference"]["value"] is not None
    ]
    compared = {entry["model"] for entry in entries}
    order = [name for name in ranking(summary["models"], "mean_over_sites") if name in compared]
    sentences = [
        _falls_below(name, [entry for entry in entries if entry["model"] == name])
        for name in order[:_MOST_MODELS]
    ]
    if len(order) > _MOST_MODELS:
        rest = [entry for entry in entries if entry["model"] in order[_MOST_MODELS:]]
        below = sum(entry["difference"]["value"] < 0 for entry in rest)
        sentences.append(
            f"The other {len(order) - _MOST_MODELS} merged models fall below a site's own model "
            f"in {below} of {len(rest)} comparisons."
        )
    return sentences


def _falls_below(name: str, entries: Sequence[Mapping[str, Any]]) -> str:
    below = [entry for entry in entries if entry["difference"]["value"] < 0]
    below.sort(key=lambda entry: entry["difference"]["value"])
    total, sites = len({e["scope"] for e in entries}), len({e["scope"] for e in below})
    where = f"{sites or 'none'} of {total} site{'s' if total != 1 else ''}"
    if not below:
        return f"{_name(name)} falls below a site's own model at {where}."
    named = [
        f"{entry['scope'].removeprefix('site:')} by {_loss(entry['difference'])}"
        for entry in below[:_MOST_SITES]
    ]
    if len(below) > _MOST_SITES:
        named.append(f"{len(below) - _MOST_SITES} more")
    return f"{_name(name)} falls below the site's own model at {where}: {'; '.join(named)}."


def _absent(summary: Mapping[str, Any]) -> list[str]:
    absent = [entry["class"] for entry in summary["cases"]["classes"] if entry["n"] == 0]
    if not absent or not summary["cases"]["total"]:
        return []
    return [
        f"No case is of the class {_list(absent)}: the balanced accuracy is over the other "
        "classes, and a model that takes everything for one of them can look perfect."
    ]


def _small(summary: Mapping[str, Any]) -> list[str]:
    limit = summary["minimum_cell"]
    cells = [cell for site in summary["cases"]["sites"] for cell in site["classes"]]
    small = sum(0 < cell["n"] < limit for cell in cells)
    if not small:
        return []
    return [
        f"{small} of the {len(cells)} cells of one class at one site "
        f"{'holds' if small == 1 else 'hold'} fewer than {limit} cases; the figures of such cells "
        f"say little."
    ]


def _model(summary: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(m for m in summary["models"] if m["model"] == name)
    return found


def _name(model: str) -> str:
    return f"“{model}”"  # a model may be called "mean" or "base"


def _interval(figure: Mapping[str, Any]) -> str:
    if figure["low"] is None:
        return _signed(figure["value"])
    low, high = _signed(figure["low"]), _signed(figure["high"])
    return f"{_signed(figure['value'])} (95 % interval {low} to {high})"


def _loss(difference: Mapping[str, Any]) -> str:
    """Write a negative difference as the size of the loss."""
    if difference["low"] is None:
        return _signed(-difference["value"])
    low, high = _signed(-difference["high"]), _signed(-difference["low"])
    chance = ", may be chance" if difference["high"] >= 0 else ""
    return f"{_signed(-difference['value'])} ({low} to {high}{chance})"


def _signed(value: float) -> str:
    return f"{value:.3f}".replace("-", "−") if round(value, 3) else "0.000"


def _list(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
