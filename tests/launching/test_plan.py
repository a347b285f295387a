import json
from pathlib import Path

import pytest

from crcjax.errors import InputError
from crcjax.launching import plan

RESULTS = Path(__file__).parents[2] / "tools" / "results"


def _rows(name: str) -> list[dict]:
    result = json.loads((RESULTS / f"{name}.json").read_text())
    if name != "collectives":
        # A figure never stands under another card's name.
        assert result["machine"].startswith(f"one {plan.CARD}")
    return result["rows"]


def test_the_figures_are_those_that_were_recorded_on_the_card_that_is_named() -> None:
    by_task = {row["task"]: row for row in _rows("device_gpu")}
    assert plan.TRAINING["compact"].step_ms == by_task["pixels, compact encoder (configs/epoc.py)"]["crcjax, ms"]
    assert plan.TRAINING["vit-s16"].step_ms == by_task["pixels, ViT-S/16 fine-tuned"]["crcjax, ms"]
    assert {name: by_task[f"{name}, encoding"]["crcjax"] for name in plan.TILES_PER_S} == plan.TILES_PER_S
    (memory,) = (
        row["value"]
        for row in _rows("memory_gpu")
        if row["measure"] == "8 bags of 256 tiles of 256 px in 1 micro-batch, remat none: measured"
    )
    assert memory / (8 * 256) == plan.MIB_PER_TILE
    rows = {
        (row["devices"], row["bags"], row["data x bag x model"], row["parameters"]): row for row in _rows("collectives")
    }
    for gpus, layout in ((8, "8 x 1 x 1"), (32, "32 x 1 x 1")):
        row = rows[gpus, 64, layout, "replicated"]
        assert row["transfer ms"] + row["latency ms"] == plan.COMMUNICATION_MS[gpus]


def test_the_measured_layout_is_measured_on_one_gpu_and_all_else_is_predicted() -> None:
    measured = plan.plan_training("compact", 32, 64, 5, 1000, 3.0, 1)
    assert measured.basis == f"measured on one {plan.CARD}"
    assert measured.step_ms == pytest.approx(98.628, abs=1e-3)
    assert measured.hours == pytest.approx(1000 * 98.628e-3 / 3600, rel=1e-4)
    assert measured.cost == pytest.approx(3.0 * measured.hours)
    for gpus, bags in ((4, 32), (32, 32), (1, 16)):
        other = plan.plan_training("compact", bags, 64, 5, 1000, 3.0, gpus)
        assert other.basis == f"predicted from one {plan.CARD}"
    assert plan.plan_prediction("uni", 100, 10000, 1.0, 1).basis.startswith("measured")
    assert plan.plan_prediction("uni", 100, 10000, 1.0, 16).basis.startswith("predicted")


def test_micro_batches_are_the_fewest_that_fit_and_a_bag_that_never_fits_is_an_error() -> None:
    full_plan = plan.plan_training("compact", 32, 64, 5, 1, 0.0, 1)
    assert full_plan.micro_batches == 2
    assert full_plan.memory_gib <= 72 < 2 * full_plan.memory_gib
    assert plan.plan_training("compact", 32, 64, 5, 1, 0.0, 4).micro_batches == 1
    with pytest.raises(InputError, match="use fewer regions"):
        plan.plan_training("compact", 1, 4096, 21, 1, 0.0, 1)
    with pytest.raises(InputError, match="model must be one of compact, vit-s16, got 'x'"):
        plan.plan_training("x", 1, 1, 1, 1, 0.0, 1)
    with pytest.raises(InputError, match="encoder must be one of"):
        plan.plan_prediction("x", 1, 1, 0.0, 1)


def test_the_command_prints_both_tables_with_the_basis_of_every_row(crcjax) -> None:
    done = crcjax("launch", "plan", "--price", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"measured on one {plan.CARD}") == 2
    assert done.stdout.count(f"predicted from one {plan.CARD}") == 4
    assert crcjax("launch", "plan", "--encoder", "x").returncode == 2
