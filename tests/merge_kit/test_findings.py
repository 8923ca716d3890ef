"""Classifiers of findings from sums: those of the pooled images that know each of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from merge_kit import findings, moments, solving
from merge_kit.errors import VectorError
from merge_kit.findings import FindingMoments, measure
from merge_kit.solving import PENALTIES, SHRINKAGES, HeadOptions, solve
from tests.merge_kit.helpers import quick, says

WIDTH = 5


def made(sizes, seed, classes=3, patterns=((1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1))):
    """Features (n, d) and targets (n, C) of sites, each with annotations of some patterns."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(classes, WIDTH, generator=generator)
    found = []
    for site, size in enumerate(sizes):
        marks = torch.rand(size, classes, generator=generator) < 0.4
        features = marks.float() @ directions
        features += torch.randn(size, WIDTH, generator=generator) + 0.2 * site
        first = torch.tensor(patterns[site % len(patterns)], dtype=torch.bool)
        second = torch.tensor(patterns[(site + 1) % len(patterns)], dtype=torch.bool)
        known = torch.where(torch.rand(size, 1, generator=generator) < 0.7, first, second)
        found.append((features, torch.where(known, marks.long(), -1)))
    return found


def pooled(sites):
    return torch.cat([f for f, _ in sites]), torch.cat([t for _, t in sites])


def close(found, expected):
    """Alike to 1e-6 of the largest value."""
    scale = float(expected.abs().max().clamp(min=1e-12))
    assert float((found - expected).abs().max()) <= 1e-6 * scale


@quick
@given(
    st.lists(st.integers(6, 25), min_size=1, max_size=5), st.integers(0, 99), st.floats(0.01, 100)
)
def test_ridge_is_that_of_the_pooled_images_which_know_a_finding(sizes, seed, penalty):
    sites = made(sizes, seed)
    head = findings.ridge(findings.add([measure(f, t) for f, t in sites]), penalty)
    features, targets = (part.numpy() for part in pooled(sites))
    for finding in range(3):
        rows = targets[:, finding] >= 0
        if not rows.any():
            assert not head.weight[finding].any()
            continue
        told = Ridge(alpha=penalty, solver="cholesky").fit(
            features[rows].astype(np.float64), 2.0 * targets[rows, finding] - 1
        )
        close(head.weight[finding], torch.from_numpy(told.coef_))
        assert float(head.bias[finding]) == pytest.approx(told.intercept_, rel=1e-6, abs=1e-9)


@quick
@given(st.lists(st.integers(8, 25), min_size=2, max_size=4), st.integers(0, 99))
def test_the_discriminant_is_that_of_the_pooled_images_which_know_a_finding(sizes, seed):
    sites = made(sizes, seed)
    head = findings.discriminant(findings.add([measure(f, t) for f, t in sites]), 0.3)
    features, targets = pooled(sites)
    for finding in range(3):
        rows = targets[:, finding] >= 0
        x, y = features[rows].double(), targets[rows, finding]
        if not (0 < int(y.sum()) < len(y)):
            assert not head.weight[finding].any()
            assert not head.bias[finding]
            continue
        present, absent = x[y == 1].mean(dim=0), x[y == 0].mean(dim=0)
        centred = x - torch.where((y == 1)[:, None], present, absent)
        within = 0.7 * centred.T @ centred / len(x)
        level = float((centred.square().sum() / len(x)) / WIDTH)
        within += 0.3 * level * torch.eye(WIDTH, dtype=torch.float64)
        weight = torch.linalg.solve(within, present - absent)
        close(head.weight[finding], weight)
        middle = (present + absent) / 2
        assert float(head.bias[finding]) == pytest.approx(float(-weight @ middle), rel=1e-6)


@quick
@given(st.lists(st.integers(4, 20), min_size=2, max_size=4), st.integers(0, 99), st.data())
def test_what_a_site_has_told_leaves_with_it_and_no_order_matters(sizes, seed, data):
    told = [measure(f, t) for f, t in made(sizes, seed)]
    gone = data.draw(st.integers(0, len(told) - 1))
    kept = [part for place, part in enumerate(told) if place != gone]
    sites = [s for place, s in enumerate(made(sizes, seed)) if place != gone]
    alone = findings.ridge(measure(*pooled(sites)), 1.0)
    for order in itertools.islice(itertools.permutations(kept), 6):
        found = findings.ridge(findings.add(order), 1.0)
        close(found.weight, alone.weight)
        close(found.bias, alone.bias)


def test_counts_and_patterns_by_hand():
    targets = torch.tensor([[1, 0, -1], [1, -1, -1], [0, 0, -1], [-1, -1, -1]])
    features = torch.arange(8.0).reshape(4, 2)
    found = measure(features, targets)
    assert found.annotated.tolist() == [[True, False, False], [True, True, False]]
    assert found.sizes.tolist() == [1, 2]
    assert found.size == 3
    assert found.counts.tolist() == [2, 0, 0]
    assert found.absent.tolist() == [1, 2, 0]
    assert found.totals.tolist() == [[2, 3], [4, 6]]
    assert found.present[1].tolist() == [[0, 1], [0, 0], [0, 0]]
    first = found.of(0)
    assert first.counts.tolist() == [1, 2]
    assert first.sums.tolist() == [[4, 5], [2, 4]]
    torch.testing.assert_close(first.gram, features[:3].double().T @ features[:3].double())


def test_a_pattern_costs_one_gram_matrix():
    features, targets = made([20], 0)[0]
    told = measure(features, targets.where(targets < 0, 0).new_ones(20, 3))
    assert told.grams.shape == (1, WIDTH, WIDTH)


def test_a_finding_with_one_side_alone_has_no_logit():
    targets = torch.tensor([[1, 0, 1], [1, 1, -1], [1, 0, 1], [1, 1, -1]])
    head = findings.discriminant(measure(torch.randn(4, 3), targets), 0.5)
    assert head.weight.any(dim=1).tolist() == [False, True, False]
    assert (head.bias != 0).tolist() == [False, True, False]


def test_no_image_gives_no_head():
    none = measure(torch.zeros(2, 4), torch.full((2, 3), -1))
    assert none.size == 0
    with says(
        VectorError, "there is no image to make a head of: take at least one site's moments."
    ):
        findings.ridge(none, 1.0)


@pytest.mark.parametrize(
    "targets", [torch.zeros(3, 2), torch.tensor([[2, 0], [0, 1]]), torch.zeros(2)]
)
def test_targets_that_do_not_fit_are_refused(targets):
    with pytest.raises(VectorError, match="or a target is none of 1, 0 and -1"):
        measure(torch.zeros(2, 4), targets)


def test_moments_of_different_models_cannot_be_added():
    two = [measure(torch.zeros(2, w), torch.zeros(2, 3, dtype=torch.long)) for w in (4, 5)]
    with says(
        VectorError,
        "moments of 3 findings x 4 features and 3 findings x 5 features cannot be added: take "
        "those of one model.",
    ):
        findings.add(two)


# What `auto` takes


def sums_of(sites) -> list[FindingMoments]:
    return [measure(f, t) for f, t in sites]


def test_the_penalty_is_that_of_the_least_error_over_findings_that_count_alike():
    """From the images: residuals and degrees of freedom of each finding's ridge. Without dividing
    by each finding's own variance the rare one would have no say, and another penalty be taken."""
    generator = torch.Generator().manual_seed(60)
    directions = torch.randn(3, WIDTH, generator=generator) * torch.tensor([[3.0], [0.3], [0.3]])
    marks = torch.rand(60, 3, generator=generator) < torch.tensor([0.5, 0.12, 0.5])
    features = marks.float() @ directions + torch.randn(60, WIDTH, generator=generator)
    targets = marks.long()
    found = torch.zeros(2, len(PENALTIES), dtype=torch.float64)
    for finding in range(3):
        x, y = features.double(), targets[:, finding].double()
        x, y, n = x - x.mean(dim=0), y - y.mean(), len(y)
        for place, penalty in enumerate(PENALTIES):
            inner = torch.linalg.inv(x.T @ x + penalty * torch.eye(WIDTH, dtype=torch.float64))
            hat = x @ inner @ x.T
            rest, freedom = (y - hat @ y).square().sum() / n, (1 + hat.trace()) / n
            error = rest / (1 - freedom) ** 2
            found[:, place] += torch.stack([error / (y.square().sum() / n), error])
    told = [measure(features[:25], targets[:25]), measure(features[25:], targets[25:])]
    _, chosen = solve(told, HeadOptions(solver="ridge"))
    fair, raw = found.argmin(dim=1).tolist()
    assert chosen.penalty == PENALTIES[fair] != PENALTIES[raw]


def test_the_shrinkage_describes_the_sites_that_know_each_finding_best():
    told = sums_of(made([30, 25, 40, 20], 5))
    total = torch.zeros(len(SHRINKAGES), dtype=torch.float64)
    for finding in range(3):
        folds = [p.of(finding) for p in told if bool(p.annotated[:, finding].any())]
        total += moments.held_out(folds, SHRINKAGES)
    head, chosen = solve(told, HeadOptions())
    assert chosen.shrinkage == SHRINKAGES[int(total.argmax())]
    expected = findings.discriminant(findings.add(told), chosen.shrinkage)
    assert torch.equal(head.weight, expected.weight)


def test_of_findings_that_no_two_sites_share_auto_takes_a_fixed_number():
    told = sums_of(made([30, 30], 1, patterns=((1, 0, 0), (1, 0, 0))))[:1]
    told += sums_of(made([30, 30], 2, patterns=((0, 1, 0), (0, 1, 0))))[:1]
    _, chosen = solve(told, HeadOptions())
    assert chosen.shrinkage == solving.ALONE
    assert solving.unseen_error(told) is None


def test_the_error_at_unseen_sites_is_the_mean_over_findings_that_two_know():
    told = sums_of(made([30, 25], 5, patterns=((1, 1, 0), (1, 0, 1))))
    several = [0, *(f for f in (1, 2) if all(bool(p.annotated[:, f].any()) for p in told))]
    expected = [moments.unseen_error([p.of(f) for p in told]) for f in several]
    assert solving.unseen_error(told) == pytest.approx(sum(expected) / len(expected))
