"""Training options: checked once, with the nearest known name for a wrong one."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from finetune.options import TrainingOptions, make_options
from merge_kit.errors import UsageError

WRONG = [
    ({"learning_rat": 0.1}, "site.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
    ({"zzz": 1}, "site.yaml: unknown key 'zzz'; known are steps, epochs, "),
    ({"steps": -1}, "site.yaml: 'steps': input should be greater than or equal to 0 (got -1)."),
    ({"epochs": -0.5}, "site.yaml: 'epochs': input should be greater than or equal to 0 (got -0.5"),
    ({"batch_size": 0}, "site.yaml: 'batch_size': input should be greater than or equal to 1"),
    ({"batch_size": 1.5}, "site.yaml: 'batch_size': input should be a valid integer"),
    ({"learning_rate": 0}, "site.yaml: 'learning_rate': input should be greater than 0 (got 0)."),
    ({"learning_rate": float("nan")}, "site.yaml: 'learning_rate': input should be a finite"),
    ({"layer_decay": 1.1}, "site.yaml: 'layer_decay': input should be less than or equal to 1"),
    ({"ema": 1}, "site.yaml: 'ema': input should be less than 1 (got 1)."),
    ({"warmup": 1}, "site.yaml: 'warmup': input should be less than 1 (got 1)."),
    ({"patience": 0}, "site.yaml: 'patience': input should be greater than or equal to 1 (got 0)."),
    (
        {"norm": "thaw"},
        "site.yaml: 'norm': input should be 'frozen', 'update' or 'fixed' (got 'thaw').",
    ),
    ({"augment": None}, "site.yaml: 'augment': input should be 'none', 'light' or 'strong'"),
    ({"seed": "now"}, "site.yaml: 'seed': input should be a valid integer"),
]


@pytest.mark.parametrize(("data", "sentence"), WRONG, ids=[str(d) for d, _ in WRONG])
def test_a_wrong_option_gives_its_sentence(data, sentence):
    with pytest.raises(UsageError) as caught:
        make_options(data, "site.yaml")
    assert str(caught.value).startswith(sentence)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        *(
            (
                {"lora": 4, **other},
                f"site.yaml: 'lora' and '{next(iter(other))}' do not go together: a mean of LoRA's "
                "factors is not the mean of its weights; leave one of them out.",
            )
            for other in ({"ema": 0.9}, {"average": 0.5}, {"soup": 2})
        ),
        *(
            (
                {"soup": 2, **other},
                f"site.yaml: 'soup' and '{next(iter(other))}' do not go together: a soup is a mean "
                "of weights already; leave one of them out.",
            )
            for other in ({"ema": 0.9}, {"average": 0.5})
        ),
        (
            {"soup": 2, "norm": "update"},
            "site.yaml: 'soup' and 'norm: update' do not go together: the mean of the members "
            "would have the statistics of the last one; leave one of them out.",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(data, sentence):
    with pytest.raises(UsageError) as caught:
        make_options(data, "site.yaml")
    assert str(caught.value) == sentence


def test_what_is_not_said_has_its_default():
    assert make_options({}, "x") == TrainingOptions()
    assert make_options({"steps": 7}, "x") == TrainingOptions(steps=7)


def test_options_survive_a_file():
    options = TrainingOptions(epochs=2.5, norm="update", clip_norm=None)
    assert make_options(options.model_dump(mode="json"), "x") == options


def test_options_cannot_be_changed_later():
    with pytest.raises(ValidationError):
        TrainingOptions().steps = 3


def test_every_option_says_what_it_does_or_speaks_for_itself():
    silent = {n for n, f in TrainingOptions.model_fields.items() if not f.description}
    assert silent <= {"batch_size", "learning_rate", "weight_decay", "clip_norm", "seed"} | {
        "head_learning_rate", "augment", "flip", "precision"
    }  # fmt: skip
