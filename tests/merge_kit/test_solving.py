"""Classifiers from moments of sites: which numbers `auto` takes, and what they depend on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

from merge_kit import moments, solving
from merge_kit.errors import ContributionError, VectorError
from merge_kit.moments import held_out, measure
from merge_kit.solving import ALONE, SHRINKAGES, HeadOptions, backbone_of, head_tensors, solve
from merge_kit.tensorfile import TensorFile, specs_of, write_tensors
from tests.conftest import drawn
from tests.merge_kit.helpers import load, quick, says


def parts(sizes, width=6):
    """Moments of sites whose features are shifted against each other."""
    found = []
    for seed, counts in enumerate(sizes):
        features, labels = drawn(counts, seed=seed, features=width)
        found.append(measure(features + 0.3 * seed, labels, len(counts)))
    return found


def likelihood(sizes, shrinkage, width=6):
    """The mean log-likelihood of each site's images under the others' classes, image by image."""
    total, size = 0.0, 0
    for left, counts in enumerate(sizes):
        images, labels = drawn(counts, seed=left, features=width)
        rest = moments.add([p for i, p in enumerate(parts(sizes, width)) if i != left])
        means = rest.sums / rest.counts[:, None]
        within = (rest.gram - means.T @ rest.sums) / rest.size
        covariance = (1 - shrinkage) * within
        covariance += shrinkage * within.diagonal().mean() * torch.eye(width, dtype=torch.float64)
        for image, label in zip(images.double() + 0.3 * left, labels, strict=True):
            total += float(MultivariateNormal(means[label], covariance).log_prob(image))
        size += len(labels)
    return total / size


def test_held_out_is_the_likelihood_of_the_images_themselves():
    sizes = [(4, 6, 5), (3, 9, 2), (7, 3, 3)]
    found = held_out(parts(sizes), [0.1, 0.5, 0.9])
    constant = 6 / 2 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    expected = torch.tensor([likelihood(sizes, s) for s in (0.1, 0.5, 0.9)], dtype=torch.float64)
    torch.testing.assert_close(
        found, expected + constant, rtol=1e-7, atol=1e-7
    )  # features are float32


def test_one_site_cannot_be_left_out():
    with says(VectorError, "shrinkage cannot be chosen from one site: give it as a number."):
        held_out(parts([(4, 4, 4), (0, 0, 0)]), [0.1])


def test_auto_takes_what_describes_unseen_sites_best():
    told = parts([(4, 6, 5), (3, 9, 2), (7, 3, 3)])
    head, chosen = solve(told, HeadOptions())
    best = SHRINKAGES[int(held_out(told, SHRINKAGES).argmax())]
    assert chosen.shrinkage == best
    assert torch.equal(head.weight, moments.discriminant(moments.add(told), best).weight)


def test_of_one_site_auto_takes_a_fixed_number():
    _, chosen = solve(parts([(5, 5, 5)]), HeadOptions())
    assert chosen.shrinkage == ALONE


def test_many_sites_are_left_out_in_five_groups(monkeypatch):
    seen = []
    monkeypatch.setattr(moments, "held_out", lambda p, s: seen.append(p) or torch.zeros(len(s)))
    told = parts([(2 + n, 3, 2) for n in range(8)])
    solve(told, HeadOptions())
    (groups,) = seen
    assert len(groups) == 5
    assert sum(group.size for group in groups) == sum(part.size for part in told)
    assert max(group.size for group in groups) <= 2 * min(group.size for group in groups)


def test_a_chosen_penalty_does_not_nearly_interpolate():
    told = parts([(3, 3, 3)], width=20)  # fewer images than features
    _, chosen = solve(told, HeadOptions(solver="ridge"))
    total = moments.add(told)
    mean = total.sums.sum(dim=0) / total.size
    values = torch.linalg.eigvalsh(total.gram - total.size * torch.outer(mean, mean)).clamp(min=0)
    assert float((values / (values + chosen.penalty)).sum()) <= total.size / 2


@given(st.permutations(range(4)))
@quick
def test_numbers_that_are_given_are_used_and_order_does_not_matter(order):
    told = parts([(4, 6, 5), (3, 9, 2), (7, 3, 3), (5, 0, 1)])
    options = HeadOptions(solver="ridge", penalty=3.0)
    first, chosen = solve(told, options)
    again, _ = solve([told[i] for i in order], options)
    assert chosen == options
    torch.testing.assert_close(again.weight, first.weight, rtol=1e-10, atol=1e-12)


def test_without_moments_the_way_out_is_said():
    with says(
        ContributionError,
        "no site has published moments of this model: sites make them with "
        "'merge-kit calibrate' and 'merge-kit publish'; labelled images of your own may stand in, "
        "with --data.",
    ):
        solving.solve_from([], HeadOptions())


def test_a_backbone_is_the_same_whatever_its_classifier_says(hub, tmp_path):
    tensors = load(hub.root / "base" / "model.safetensors")
    found = []
    for name in (None, "fc.weight", "conv1.0.weight"):
        change = {} if name is None else {name: tensors[name] + 1}
        write_tensors(tmp_path / "m.safetensors", {**tensors, **change})
        with TensorFile(tmp_path / "m.safetensors") as file:
            found.append(backbone_of(file, ("fc",)).fingerprint)
    assert found[0] == found[1] != found[2]


def test_a_classifier_without_a_bias_is_refused(federation):
    head = moments.Head(torch.zeros(3, 4), torch.zeros(3))
    with says(
        VectorError,
        "the classifier 'fc' has no bias, which a solved one needs: choose a backbone whose "
        "classifier has one.",
    ):
        head_tensors(head, federation, specs_of({"fc.weight": torch.zeros(3, 4)}))


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_classifier_takes_the_shape_and_dtype_of_the_model(federation, shape, dtype):
    head = moments.Head(torch.arange(12.0).reshape(3, 4).double(), torch.ones(3).double())
    there = {"fc.weight": torch.zeros(shape, dtype=dtype), "fc.bias": torch.zeros(3, dtype=dtype)}
    found = head_tensors(head, federation, specs_of(there))
    assert specs_of(found) == specs_of(there)
    assert torch.equal(found["fc.weight"].double().reshape(3, 4), head.weight)


def errors_by_image(sizes, penalty, width=6):
    """The mean squared error at each site of a ridge classifier of the others, image by image."""
    found = []
    for left, counts in enumerate(sizes):
        rest = moments.add([p for i, p in enumerate(parts(sizes, width)) if i != left])
        mean = rest.sums.sum(dim=0) / rest.size
        scatter = rest.gram - rest.size * torch.outer(mean, mean)
        head = moments.ridge(rest, penalty * float(scatter.diagonal().mean()))
        features, labels = drawn(counts, seed=left, features=width)
        outputs = (features + 0.3 * left).double() @ head.weight.T + head.bias
        wanted = torch.nn.functional.one_hot(labels, len(counts)).double()
        found.append(float((wanted - outputs).square().sum(dim=1).mean()))
    return sum(found) / len(found)


def test_the_error_at_an_unseen_site_is_that_of_its_images():
    sizes = [(4, 6, 5), (3, 9, 2), (7, 3, 3)]
    expected = min(errors_by_image(sizes, p) for p in (0.1, 0.3, 1.0, 3.0, 10.0))
    assert moments.unseen_error(parts(sizes)) == pytest.approx(expected, rel=1e-6)


@given(st.floats(0.01, 100))
@quick
def test_the_scale_of_the_features_does_not_matter(scale):
    told = parts([(4, 6, 5), (3, 9, 2), (7, 3, 3)])
    scaled = [moments.Moments(p.gram * scale**2, p.sums * scale, p.counts) for p in told]
    assert moments.unseen_error(scaled) == pytest.approx(moments.unseen_error(told), rel=1e-6)


def test_one_site_shows_nothing_of_unseen_ones():
    assert solving.unseen_error(parts([(5, 5, 5)])) is None
    with says(VectorError, "what is lost at an unseen site shows only with two sites or more."):
        moments.unseen_error(parts([(5, 5, 5)]))
