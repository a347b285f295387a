import json
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcjax.data.cohort import load_cohort
from crcjax.data.hard_mining import Memory, MemoryFolder, Mining, after_step, remember
from crcjax.errors import InputError
from crcjax.train.loop import train

EMPTY = Memory(jnp.full(4, -1.0), jnp.zeros(4, bool), jnp.full((4, 2), -1, jnp.int32))


def _results(
    slide: list[int], loss: list[float], wrong: list[bool], region: list[list[int]], attention: list[list[float]]
):
    return jnp.array(slide), jnp.array(region), jnp.array(loss), jnp.array(wrong), jnp.array(attention)


def test_the_memory_has_a_slides_running_loss_and_its_regions_of_highest_attention() -> None:
    slide, region, loss, wrong, attention = _results(
        [2, 0, 2], [1.0, 4.0, 3.0], [False, True, True], [[7, 8, -1], [1, 2, 3], [4, 5, 6]],
        [[0.6, 0.4, 0.0], [0.1, 0.2, 0.7], [0.5, 0.1, 0.4]],
    )  # fmt: skip
    actual = remember(EMPTY, slide, region, loss, wrong, attention)
    np.testing.assert_allclose(actual.loss, [4.0, -1.0, 2.0, -1.0])
    assert actual.wrong.tolist() == [True, False, True, False]
    assert actual.region.tolist() == [[3, 2], [-1, -1], [4, 6], [-1, -1]]
    again = remember(actual, slide[:1], region[:1], loss[:1], wrong[:1], attention[:1])
    np.testing.assert_allclose(again.loss, [4.0, -1.0, 0.7 * 2.0 + 0.3 * 1.0, -1.0])
    assert again.wrong.tolist() == [True, False, False, False]


def test_a_period_is_sampled_by_the_memory_at_the_start_of_the_period_before() -> None:
    mining, losses_after_step = Mining(EMPTY, EMPTY, EMPTY), []
    for step in range(1, 13):
        results = _results([0], [float(step)], [False], [[0, 1]], [[0.5, 0.5]])
        mining = after_step(mining, jnp.int32(step), 4, *results)
        losses_after_step.append((float(mining.used.loss[0]), float(mining.next.loss[0]), float(mining.live.loss[0])))
    live = [value for _, _, value in losses_after_step]
    assert [used for used, _, _ in losses_after_step] == [-1.0] * 7 + [live[3]] * 4 + [live[7]]
    assert [coming for _, coming, _ in losses_after_step] == [-1.0] * 3 + [live[3]] * 4 + [live[7]] * 4 + [live[11]]


def test_a_loader_waits_for_its_period_and_ends_with_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "mining"
    folder.mkdir()
    memory_folder, losses = MemoryFolder(folder), []
    waiting = threading.Thread(target=lambda: losses.append(memory_folder.memory(3).loss.tolist()))
    waiting.start()
    MemoryFolder(folder).publish(3, jax.tree.map(np.asarray, EMPTY))
    waiting.join(5)
    assert losses == [[-1.0] * 4]
    (folder / "3.npz").unlink()
    folder.rmdir()
    with pytest.raises(InputError, match="training ended before this period"):
        memory_folder.memory(9)


def test_only_training_slides_are_mined_and_their_ids_logged(small_config, tmp_path: Path) -> None:
    data = small_config.data
    data.mine_slides, data.mine_regions, data.mine_every, data.region_sampling = 0.25, 0.3, 2, "spread"
    small_config.train.steps = 12
    train(small_config, tmp_path)
    training = {row.slide_id for row in load_cohort(data.cohort, data.classes).split("train").rows}
    lines = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert [line["first_step"] for line in lines] == [0, 2, 4, 6, 8, 10]
    assert [sum(line["slides"].values()) for line in lines] == [0, 0, 2, 2, 2, 2]
    assert {name for line in lines for name in line["slides"]} <= training
    regions = {name: indices for line in lines for name, indices in line["regions"].items()}
    assert regions
    assert set(regions) <= training
    assert all(len(indices) == 1 for indices in regions.values())
