import re

import pytest
from ml_collections import ConfigDict

from crcjax.config import get_config
from crcjax.config_check import CHOICES, RANGES, check_config
from crcjax.errors import InputError


def _valid() -> ConfigDict:
    config = get_config()
    config.data.store, config.data.cohort = "store", "cohort.csv"
    return config


def _leaves(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    leaves: dict[str, object] = {}
    for name, value in config.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {prefix + name: value}
    return leaves


def _refused(**fields: object) -> str:
    config = _valid()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    with pytest.raises(InputError) as raised:
        check_config(config)
    return str(raised.value)


def test_every_number_of_the_config_has_a_range_and_the_defaults_are_valid() -> None:
    leaves = _leaves(get_config())
    assert {name for name, value in leaves.items() if type(value) in (int, float)} == set(RANGES)
    check_config(_valid())


def test_a_number_out_of_its_range_is_one_line_with_the_field_the_rule_and_a_value_to_try() -> None:
    assert _refused(data__regions_per_bag=0) == "config.data.regions_per_bag must be at least 1, got 0; try 32"
    assert _refused(model__dropout=1.5) == "config.model.dropout must be from 0 to below 1, got 1.5; try 0.1"
    assert _refused(train__stall_timeout_s=0.0) == "config.train.stall_timeout_s must be above 0, got 0.0; try 900.0"
    for field, valid in RANGES.items():
        kind = type(_leaves(get_config())[field])
        step = 1 if kind is int else 0.5
        outside = [valid.least if valid.above else valid.least - step]
        if valid.most < 2**31 - 1:
            outside.append(valid.most if valid.below else valid.most + step)
        for value in outside + ([float("nan"), float("inf")] if kind is float else []):
            message = _refused(**{field.replace(".", "__"): kind(value)})
            assert re.fullmatch(rf"config\.{field} must be .*, got {re.escape(str(kind(value)))}; try .*", message)


def test_a_text_that_is_no_choice_lists_the_choices() -> None:
    for field, choices in CHOICES.items():
        message = _refused(**{field.replace(".", "__"): "other"})
        assert message.startswith(f"config.{field} must be one of {', '.join(choices)}, got 'other'; try ")


def test_the_choices_are_those_of_the_code() -> None:
    from crcjax.data import case_bags, splits
    from crcjax.models import attention, heads, mil
    from crcjax.models.aggregators import registry
    from crcjax.slides.stain import methods
    from crcjax.train import auxiliary_tasks

    in_code = {
        "data.unit": case_bags.UNITS,
        "data.fold_by": splits.FOLD_BY,
        "stain.method": ("none", *methods.METHODS),
        "model.remat": attention.REMAT,
        "model.mil": registry.AGGREGATORS,
        "model.head": heads.HEADS,
        "model.dtype": mil.DTYPES,
        "tasks.weighting": auxiliary_tasks.WEIGHTINGS,
    }
    assert {field: set(CHOICES[field]) for field in in_code} == {field: set(names) for field, names in in_code.items()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer__warmup_steps": 300}, "optimizer.warmup_steps must be below config.train.steps 300, got 300; try 30"),
        ({"optimizer__schedule": "one_cycle", "optimizer__final_fraction": 0.0}, "optimizer.warmup_steps and config.optimizer"),
        ({"data__val_fraction": 0.5, "data__test_fraction": 0.5}, "data.val_fraction and config.data.test_fraction must sum"),
        ({"data__folds": 1}, "data.folds must be 0 or at least 2, got 1; try 5"),
        ({"data__folds": 3, "data__fold": 3}, "data.fold must be below config.data.folds 3, got 3; try 0"),
        ({"data__fold": 1}, "data.fold must be below config.data.folds 0, got 1; try 0"),
        ({"model__features": 100}, "model.features must be a multiple of 4 x config.model.heads 4, got 100; try 96"),
        ({"model__head": "evidential"}, "train.loss 'cross_entropy' does not go with config.model.head 'evidential'; try"),
        ({"train__micro_batches": 2, "train__contrastive_weight": 0.1}, "train.micro_batches must be 1 with"),
        ({"data__unit": "case", "stain__method": "macenko"}, "data.unit must be slide with config.stain.method"),
        ({"data__features": True, "stain__method": "macenko"}, "stain.method must be none with config.data.features"),
        ({"augment__stain_swap_prob": 0.5, "stain__method": "macenko"}, "augment.stain_swap_prob must be 0 with"),
        ({"data__region_buckets": ()}, "data.region_buckets must be one or more increasing numbers of regions, got ()"),
        ({"data__region_buckets": (64, 32)}, "data.region_buckets must be"),
        ({"data__classes": ("CMS1",)}, "data.classes must name two or more classes, got ('CMS1',)"),
        ({"data__classes": ("a", "b", "a")}, "data.classes must be names, each once, got ('a', 'b', 'a')"),
        ({"data__store": ""}, "data.store is empty; give --config.data.store=PATH"),
    ],
)  # fmt: skip
def test_fields_that_contradict_each_other_are_named(fields: dict, message: str) -> None:
    assert _refused(**fields).startswith(f"config.{message}")
