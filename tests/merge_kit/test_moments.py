"""Heads from moments: those of the pooled images, and those of scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from merge_kit.errors import VectorError
from merge_kit.moments import (
    Head,
    Moments,
    add,
    discriminant,
    generalised_cross_validation,
    measure,
    ridge,
)
from tests.merge_kit.helpers import quick


def sample(n=90, d=12, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    centres = 2 * torch.randn(classes, d, generator=generator)
    scales = torch.logspace(-1, 1, d)
    features = (centres[labels] + torch.randn(n, d, generator=generator)) * scales + 3.0
    return features, labels


def heads(moments: Moments) -> list[Head]:
    return [ridge(moments, 0.7), discriminant(moments, 0.1), discriminant(moments, 0.0, "counts")]


def close(found: Head, expected: Head, tolerance: float = 1e-6) -> None:
    for one, other in ((found.weight, expected.weight), (found.bias, expected.bias)):
        assert float((one - other).norm()) <= tolerance * float(other.norm())


@quick
@given(st.integers(0, 999), st.integers(1, 6))
def test_any_split_and_order_give_the_head_of_the_pooled_images(seed, sites):
    features, labels = sample(seed=seed)
    site = torch.randint(0, sites, (len(labels),), generator=torch.Generator().manual_seed(seed))
    parts = [measure(features[site == k], labels[site == k], 3) for k in range(sites)]
    for order in (parts, parts[::-1]):
        for found, expected in zip(
            heads(add(order)), heads(measure(features, labels, 3)), strict=True
        ):
            close(found, expected)


def test_whoever_leaves_was_never_there():
    features, labels = sample()
    parts = [measure(features[k::3], labels[k::3], 3) for k in range(3)]
    stay = torch.arange(len(labels)) % 3 != 1
    again = measure(features[stay], labels[stay], 3)
    for found, expected in zip(heads(add([parts[0], parts[2]])), heads(again), strict=True):
        close(found, expected)


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 100.0])
def test_ridge_is_that_of_scikit_learn(penalty):
    features, labels = sample()
    targets = np.eye(3)[labels.numpy()]
    expected = Ridge(alpha=penalty).fit(features.double().numpy(), targets)
    found = ridge(measure(features, labels, 3), penalty)
    np.testing.assert_allclose(found.weight, expected.coef_, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(found.bias, expected.intercept_, rtol=1e-7)


def test_discriminants_are_those_of_scikit_learn():
    features, labels = sample()
    x = features.double().numpy()
    model = LinearDiscriminantAnalysis(solver="lsqr").fit(x, labels.numpy())
    found = discriminant(measure(features, labels, 3), 0.0, "counts")
    mine, theirs = x @ found.weight.numpy().T + found.bias.numpy(), model.decision_function(x)
    # Only differences between classes mean something.
    expected = theirs - theirs[:, :1]
    np.testing.assert_allclose(mine - mine[:, :1], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shrinkage", [0.1, 1.0])
def test_the_covariance_is_shrunk_towards_its_mean_variance(shrinkage):
    features, labels = sample()
    x, y = features.double().numpy(), labels.numpy()
    means = np.stack([x[y == c].mean(axis=0) for c in range(3)])
    plain = (x - means[y]).T @ (x - means[y]) / len(x)
    level = np.trace(plain) / len(plain)
    covariance = (1 - shrinkage) * plain + shrinkage * level * np.eye(len(plain))
    found = discriminant(measure(features, labels, 3), shrinkage)
    np.testing.assert_allclose(found.weight, np.linalg.solve(covariance, means.T).T, rtol=1e-6)


def test_equal_priors_take_the_shares_of_the_classes_out():
    features, labels = sample()
    moments = measure(features, labels, 3)
    even, counted = (discriminant(moments, 0.1, p) for p in ("uniform", "counts"))
    shares = moments.counts / moments.size
    torch.testing.assert_close(counted.bias - even.bias, (shares * 3).log())
    assert torch.equal(even.weight, counted.weight)


@pytest.mark.parametrize(
    ("penalty", "d"), [(0.0, 12), (0.5, 12), (50.0, 12), (1e-4, 60), (0.01, 60), (10.0, 60)]
)
def test_cross_validation_is_its_definition_on_the_images(penalty, d):
    features, labels = sample(n=40, d=d)
    x, y = features.double(), torch.eye(3, dtype=torch.float64)[labels]
    centred = x - x.mean(dim=0)
    inverse = torch.linalg.inv(centred.T @ centred + penalty * torch.eye(d, dtype=torch.float64))
    hat = centred @ inverse @ centred.T + 1 / 40
    residual = y - hat @ y
    expected = (residual.square().sum() / 40) / (1 - hat.trace() / 40) ** 2
    (found,) = generalised_cross_validation(measure(features, labels, 3), [penalty])
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_as_many_free_parameters_as_images_are_never_chosen():
    features, labels = sample(n=8)
    none, some = generalised_cross_validation(measure(features, labels, 3), [0.0, 10.0])
    assert float(none) == math.inf
    assert math.isfinite(float(some))


def test_a_class_that_nobody_has_seen_is_never_the_answer():
    features, labels = sample()
    moments = measure(features, labels, 4)
    for head in heads(moments):
        outputs = features.double() @ head.weight.T + head.bias
        assert bool(outputs.isfinite().all())
        assert not bool((outputs.argmax(dim=1) == 3).any())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: add([]), "moments of nothing cannot be added"),
        (
            lambda: add([measure(*sample(d=2), 3), measure(*sample(d=4), 3)]),
            "moments of 3 classes x 2 features and 3 classes x 4 features cannot be added",
        ),
        (lambda: ridge(measure(torch.zeros(0, 2), torch.zeros(0).long(), 3), 1.0), "no image"),
        (lambda: measure(torch.zeros(2, 2), torch.tensor([0, 3]), 3), "none of the 3 classes"),
        (lambda: measure(torch.zeros(2, 2), torch.tensor([0]), 3), r"of shape \(1,\) do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(make, sentence):
    with pytest.raises(VectorError, match=sentence):
        make()
