"""What a report says, in a few plain sentences that are computed, never written by hand."""

from __future__ import annotations

from collections.abc import Sequence

from evaluate.document import CHANCE, Comparison, Figure, ModelReport, Report, Scope
from evaluate.wording import listed, number, percent, plural

SCORE_NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "macro_auroc": "macro AUROC",
    "accuracy": "accuracy",
    "auroc": "AUROC",
}
_SCOPES = ("union", "mean_over_sites")
_MOST_MODELS = 3
_MOST_SITES = 4
_LEANS = ("sure of themselves", "unsure")


def ranking(report: Report, scope: str) -> list[str]:
    """Names of the models, highest main score first, without undefined and withheld ones.

    Equal figures keep the order of the models.
    """
    values = {model.name: main(report, model, scope).value for model in report.models}
    defined = {name: value for name, value in values.items() if value is not None}
    return sorted(defined, key=lambda name: -defined[name])


def leader(report: Report, scope: str) -> str | None:
    """The best merged model on a scope, or the best where none is merged."""
    order = ranking(report, scope)
    merged = (name for name in order if report.model(name).role == "merged")
    return next(merged, order[0] if order else None)


def main(report: Report, model: ModelReport, scope: str) -> Figure:
    """A model's main score on a scope; an empty figure where it has none."""
    found = next((s.figures for s in model.scopes if s.scope == scope), {})
    return found.get(report.main_score, Figure(value=None))


def verdict(report: Report) -> tuple[str, ...]:
    """The findings, the most important first.

    How the best merged model stands to single-site, pooled and base models, and to each site's own
    model at that site; which model is best on all cases and on the mean over sites, and by how
    much; how models do on sites that none was trained on; the worst site; the other merged models
    against the sites' own; how far probabilities can be trusted; gaps between groups; whether
    resamples are too few; and what is too small to be believed. "The best merged model" is the
    same in all of them, the one with the highest main score on all cases (`leader`).
    """
    own = _against_own(report)
    return (
        *_baselines(report),
        *own[:1],
        *_best(report),
        *_external(report),
        *_worst_site(report),
        *own[1:],
        *_calibration(report),
        *_gaps(report),
        *_resolution(report),
        *_absent(report),
        *_small(report),
    )


def _best(report: Report) -> list[str]:
    sentences: list[str] = []
    leaders: list[str] = []
    score = SCORE_NAMES[report.main_score]
    for scope in _SCOPES:
        order = ranking(report, scope)
        if not order:
            continue
        figure = main(report, report.model(order[0]), scope)
        where = _all(figure) if scope == "union" else f"the mean over {_sites(figure)}"
        if len(order) == 1:
            sentence = f"{_name(order[0])} has a {score} of {_interval(report, figure)} on {where}."
        else:
            also = "also " if order[0] in leaders else ""
            sentence = (
                f"{_name(order[0])} {also}has the highest {score} on {where}, "
                f"{_interval(report, figure)}; {_lead(report, scope, *order[:2])}."
            )
        leaders.append(order[0])
        sentences.append(sentence)
    return sentences or [f"No model has a defined {score}: there are too few labelled cases."]


def _all(figure: Figure) -> str:
    return f"all {figure.n} cases" if figure.n != 1 else "the only case"


def _sites(figure: Figure) -> str:
    return f"the {figure.n} sites" if figure.n != 1 else "the only site that can be judged"


def _lead(report: Report, scope: str, first: str, second: str) -> str:
    entry = next(
        c
        for c in report.comparisons
        if c.family == "best" and c.scope == scope and (c.model, c.against) == (first, second)
    )
    if not entry.difference.value:
        return f"{_name(second)} has the same"
    words = f"the next, {_name(second)}, is lower by {_interval(report, entry.difference)}"
    chance = _chance(entry)
    return words + (f", which {chance}" if chance else "")


def _chance(entry: Comparison) -> str:
    """What to say of a difference that is not clear, if it is not."""
    if entry.p is None or entry.p_adjusted is None or entry.p_adjusted < CHANCE:
        return ""
    return "may be chance" if entry.p >= CHANCE else "may be chance among so many comparisons"


def _external(report: Report) -> list[str]:
    order = ranking(report, "external")
    if not order:
        return []
    names = [scope.name for scope in report.sites() if scope.external]
    best = main(report, report.model(order[0]), "external")
    rank = "has" if len(order) == 1 else "is best:"
    text = (
        f"On {listed(names)}, which no model was trained on, {_name(order[0])} {rank} "
        f"{_interval(report, best)} on {plural(best.n or 0, 'case')}"
    )
    merged = leader(report, "union")
    if merged in order[1:] and report.model(merged).role == "merged":
        figure = main(report, report.model(merged), "external")
        text += f"; {_name(merged)}, the best merged model on all cases, has "
        text += _interval(report, figure)
    return [f"{text}."]


def _worst_site(report: Report) -> list[str]:
    name = leader(report, "union")
    worst = report.model(name).worst_site if name else None
    if name is None or worst is None or (main(report, report.model(name), _SCOPES[1]).n or 0) < 2:
        return []
    return [
        f"The worst site of {_name(name)} is {worst.name}: {worst.value:.3f} on "
        f"{plural(worst.n, 'case')}."
    ]


_KINDS = (
    ("pooled", "pooled training"),
    ("federated", "training in rounds"),
    ("base", "the base"),
)


def _baselines(report: Report) -> list[str]:
    """Set the merged model that is best on all cases against the other kinds of models."""
    order = ranking(report, "union")
    kinds: dict[str, list[str]] = {}
    for name in order:
        kinds.setdefault(report.model(name).role.partition(":")[0], []).append(name)
    if "merged" not in kinds:
        return []
    merged = kinds["merged"][0]
    value = _main_value(report, merged)
    against = []
    if own := kinds.get("site"):
        if len(own) > 1:
            mean = sum(_main_value(report, name) for name in own) / len(own)
            text = f"the mean of the {len(own)} single-site models"
            against.append(f"{_relation(value, mean)} {text} ({mean:.3f})")
        text = "the best of them" if len(own) > 1 else "the single-site model"
        against.append(_against_kind(report, merged, own[0], text))
    against += [
        _against_kind(report, merged, kinds[kind][0], text)
        for kind, text in _KINDS
        if kind in kinds
    ]
    if not against:
        return []
    several = len(kinds["merged"])
    chosen = f" of {several}, chosen by these very cases" if several > 1 else ""
    return [
        f"On all cases the best merged model{chosen}, {_name(merged)} ({value:.3f}), is "
        f"{'; '.join(against)}."
    ]


def _main_value(report: Report, name: str) -> float:
    value = main(report, report.model(name), "union").value
    assert value is not None  # it is ranked
    return value


def _against_kind(report: Report, merged: str, other: str, text: str) -> str:
    """``above pooled training ("pooled", 0.901) by 0.020 (0.001 to 0.040)``."""
    value, theirs = _main_value(report, merged), _main_value(report, other)
    words = f"{_relation(value, theirs)} {text} ({_name(other)}, {theirs:.3f})"
    entry = next(
        e
        for e in report.comparisons
        if e.family == "kinds" and (e.model, e.against) == (merged, other)
    )
    size = abs(entry.difference.value or 0.0)
    if not round(size, 3):
        return words
    return f"{words} by {_size(entry)}"


def _relation(value: float, other: float) -> str:
    return "above" if value > other else "below" if value < other else "level with"


def _against_own(report: Report) -> list[str]:
    entries = [
        entry
        for entry in report.comparisons
        if entry.family == "own" and entry.difference.value is not None
    ]
    compared = {entry.model for entry in entries}
    order = [name for name in ranking(report, "union") if name in compared]
    sentences = [
        _beats(report, name, [entry for entry in entries if entry.model == name])
        for name in order[:_MOST_MODELS]
    ]
    if len(order) > _MOST_MODELS:
        rest = [entry for entry in entries if entry.model in order[_MOST_MODELS:]]
        below = sum(_value(entry) < 0 for entry in rest)
        sentences.append(
            f"The other {len(order) - _MOST_MODELS} merged models do worse than a site's own model "
            f"in {below} of {len(rest)} comparisons."
        )
    return sentences


def _value(entry: Comparison) -> float:
    return entry.difference.value or 0.0


def _beats(report: Report, name: str, entries: Sequence[Comparison]) -> str:
    above = [entry for entry in entries if _value(entry) > 0]
    below = sorted((entry for entry in entries if _value(entry) < 0), key=_value)
    sites = len({entry.scope for entry in entries})
    better = len({entry.scope for entry in above} - {entry.scope for entry in below})
    where = f"{better or 'none'} of {plural(sites, 'site')}"
    clear = len({entry.scope for entry in above if not _chance(entry)})
    beyond = f" (beyond chance at {clear or 'none'})" if better else ""
    text = f"{_name(name)} beats the site's own model at {where}{beyond}"
    if not below:
        return f"{text} and is worse at none."
    names = {scope.key: scope.name for scope in report.scopes}
    homes = [model.role for model in report.models]
    losses = []
    for entry in below[:_MOST_SITES]:
        than = f" than {_name(entry.against)}" if homes.count(entry.scope) > 1 else ""
        losses.append(f"at {names[entry.scope]} it is worse{than} by {_size(entry)}")
    if len(below) > _MOST_SITES:
        losses.append(f"at {len(below) - _MOST_SITES} more it is worse too")
    return f"{text}; {'; '.join(losses)}."


def _size(entry: Comparison) -> str:
    """How large a difference is, without its sign, with its interval and what chance says."""
    found = entry.difference
    turned = _value(entry) < 0
    ends = [bound for bound in (found.low, found.high) if bound is not None]
    span = " to ".join(number(-end if turned else end) for end in (ends[::-1] if turned else ends))
    about = "; ".join(part for part in (span, _chance(entry)) if part)
    return f"{number(abs(_value(entry)))}{f' ({about})' if about else ''}"


def _calibration(report: Report) -> list[str]:
    name = leader(report, "union")
    if name is None:
        return []
    figures = report.model(name).on("union").figures
    error, confidence = figures.get("ece"), _overconfidence(report.model(name))
    if error is None or error.value is None:
        return []
    lean = ""
    if confidence is not None and round(confidence, 3):
        # Of several labels a case, a probability below one half is no confidence in the label.
        words = ("high", "low") if report.task == "multi-label" else _LEANS
        lean = f", on average too {words[confidence < 0]}"
    return [
        f"The probabilities of {_name(name)} are off by {error.value:.3f} (expected calibration "
        f"error, {report.bins} bins){lean}."
    ]


def _overconfidence(model: ModelReport) -> float | None:
    """Mean probability less the fraction that is right (several labels: that is present)."""
    known = [b for b in model.reliability if b.n and b.confidence is not None]
    total = sum(b.n or 0 for b in known)
    if not total:
        return None
    gaps = ((b.n or 0) * ((b.confidence or 0.0) - (b.observed or 0.0)) for b in known)
    return sum(gaps) / total


def _gaps(report: Report) -> list[str]:
    chosen = leader(report, "union")
    sentences = []
    names = {scope.key: scope.name for scope in report.scopes}
    for gap in report.gaps:
        found = gap.difference
        if gap.model != chosen or not found.value:
            continue
        chance = ", which may be chance" if found.low is None or found.low <= 0 else ""
        left = (
            f"; {plural(gap.unknown, 'case')} without {gap.column} left out" if gap.unknown else ""
        )
        sentences.append(
            f"By {gap.column}, {_name(gap.model)} does best on {names[gap.best]} and worst on "
            f"{names[gap.worst]}: a gap of {_interval(report, found)}{chance}{left}."
        )
    return sentences


def _resolution(report: Report) -> list[str]:
    """Where even the clearest difference is "chance": resamples are too few for the family."""
    drawn = report.resampling.resamples
    least = 2 / (drawn + 1)
    hidden = [
        entry.family
        for entry in report.comparisons
        if entry.test == "paired bootstrap"
        and entry.p is not None
        and entry.p <= least
        and (entry.p_adjusted or 0) >= CHANCE
    ]
    tested = [entry.family for entry in report.comparisons if entry.p is not None]
    most = max((tested.count(family) for family in set(hidden)), default=0)
    if not most:
        return []
    return [
        f"{drawn:,} resamples are too few to tell differences among {most:,} comparisons from "
        f"chance: repeat with --resamples {round(2 * most / CHANCE)} or more."
    ]


def _absent(report: Report) -> list[str]:
    union = next(scope for scope in report.scopes if scope.kind == "union")
    absent = [count.name for count in union.classes if count.n == 0]
    if not absent or union.cases == 0:
        return []
    text = f"No case is of the class {listed(absent)}: "
    if len(absent) == len(report.classes):
        return [f"{text}nothing can be said of how models find them."]
    text += "figures are over the other classes"
    if report.task == "single-label" and len(absent) == len(report.classes) - 1:
        return [f"{text}, and a model that takes everything for the only one left looks perfect."]
    return [f"{text}."]


def _small(report: Report) -> list[str]:
    cells = [count for scope in report.sites() for count in scope.classes]
    few = sum(count.small for count in cells)
    sentences = []
    if few:
        verb = "holds" if few == 1 else "hold"
        counted = ""
        if report.main_score == "balanced_accuracy":
            counted = ", but balanced accuracy counts each as much as a class of many"
        sentences.append(
            f"{few} of the {len(cells)} cells of one class at one site {verb} fewer than "
            f"{report.minimum} cases; figures of such cells are withheld{counted}."
        )
    small: list[Scope] = [s for s in report.scopes if s.small and s.kind in ("site", "group")]
    if small:
        names = [f"{s.column} {s.name}" if s.column else s.name for s in small]
        if len(names) > _MOST_SITES:
            names[_MOST_SITES:] = [f"{len(names) - _MOST_SITES} more"]
        sentences.append(
            f"Too few cases for any figure ({report.minimum} are asked for): {listed(names)}."
        )
    return sentences


def _name(model: str) -> str:
    return f"“{model}”"  # a model may be called "mean" or "base"


def _interval(report: Report, figure: Figure) -> str:
    assert figure.value is not None
    if figure.low is None or figure.high is None:
        return number(figure.value)
    level = percent(report.resampling.level)
    span = f"{number(figure.low)} to {number(figure.high)}"
    return f"{number(figure.value)} ({level} interval {span})"
