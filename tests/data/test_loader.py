import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcjax.data.bags import Bag, open_stores
from crcjax.data.cohort import Cohort, load_cohort
from crcjax.data.loader import Batches, _end_of, open_feed, train_batches, training_slides
from crcjax.errors import InputError
from crcjax.parallel.mesh import device_mesh
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.store.tile_store import TileStore, open_store
from crcjax.slides.tiling.plan import TilingParams

# Two processes of two devices, between which either the slides or the regions are divided. What each reads is counted.
PROGRAM = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import AxisType, Mesh
from crcjax.config import get_config
from crcjax.data.cohort import load_cohort
from crcjax.data.loader import train_batches
from crcjax.slides.store.tile_store import TileStore

port, process, folder, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
jax.distributed.initialize(f"localhost:{port}", 2, process)
read_pixels, counted = TileStore.read_pixels, []
TileStore.read_pixels = lambda store, indices, out: (counted.append(len(indices)), read_pixels(store, indices, out))[1]
config = get_config()
config.data.store, config.data.cohort = folder + "/store", folder + "/cohort.csv"
config.data.regions_per_bag, config.data.batch_size, config.train.steps = 4, 4, 2
cohort = load_cohort(config.data.cohort, config.data.classes).split("train")
devices = np.array(sorted(jax.devices(), key=lambda device: device.process_index)).reshape(2, 2, 1)
for divided, order in (("slides", devices), ("regions", devices.transpose(1, 0, 2))):
    mesh = Mesh(order, ("data", "bag", "model"), axis_types=(AxisType.Auto,) * 3)
    for step, bag in enumerate(train_batches(cohort, config, mesh, 0)):
        for part in ("tiles", "position", "label"):
            for shard in getattr(bag, part).addressable_shards:
                where = "_".join(f"{s.start or 0}-{s.stop or n}" for s, n in zip(shard.index, bag.tiles.shape[:2]))
                np.save(out / f"{divided} {step} {part} {where}.npy", shard.data)
    print(divided, sum(counted))
    counted.clear()
"""


def _cohort(painted: Path, config) -> Cohort:
    return load_cohort(painted / "cohort.csv", config.data.classes)


def test_batches_have_the_stores_pixels_masks_and_labels(painted: Path, small_config) -> None:
    cohort = _cohort(painted, small_config).split("train")
    bag = next(train_batches(cohort, small_config, device_mesh(), 0))
    assert bag.tiles.shape == (4, 4, 1, 64, 64, 3)
    stored = {row.slide_id: open_store(painted / "store", row.slide_id) for row in cohort.rows}
    for pixels, label in zip(np.asarray(bag.tiles), np.asarray(bag.label), strict=True):
        actual = [
            row.label
            for row in cohort.rows
            for tile in stored[row.slide_id].read_pixels(range(len(stored[row.slide_id].mask)))
            if (tile == pixels[0]).all()
        ]
        assert actual == [cohort.classes[label]]


def test_a_resumed_stream_continues_the_first_one_with_any_number_of_threads_and_workers(
    painted: Path, small_config
) -> None:
    cohort = _cohort(painted, small_config).split("train")
    whole = [np.asarray(bag.tiles) for bag in train_batches(cohort, small_config, device_mesh(), 0)]
    assert len(whole) == 6
    for start, workers, ahead in ((2, 0, 1), (0, 1, 2), (2, 2, 1)):
        data = small_config.data
        data.read_threads, data.workers, data.prefetch, data.device_prefetch = ahead, workers, ahead, ahead
        rest = [np.asarray(bag.tiles) for bag in train_batches(cohort, small_config, device_mesh(), start)]
        assert all((a == b).all() for a, b in zip(whole[start:], rest, strict=True))


def test_the_shapes_of_a_feed_are_those_of_its_bags(
    painted: Path, small_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = _cohort(painted, small_config).split("train")
    small_config.augment.stain_swap_prob = 0.1  # so that bags hold stains
    feed = open_feed(training_slides(cohort, small_config), small_config, device_mesh())
    with monkeypatch.context() as patched:
        patched.setattr(TileStore, "read_pixels", None)  # shapes come without reading
        shapes = feed.shapes()
    for shape, part in zip(jax.tree.leaves(shapes), jax.tree.leaves(next(feed.batches(0))), strict=True):
        assert (shape.shape, shape.dtype, shape.sharding) == (part.shape, part.dtype, part.sharding)


def test_slides_that_are_not_in_the_store_are_listed_with_the_remedy(painted: Path, small_config) -> None:
    cohort = _cohort(painted, small_config)
    absent = replace(cohort, rows=(*cohort.rows, replace(cohort.rows[0], slide_id="absent")))
    with pytest.raises(InputError, match=r"1 of 22 slides .*\(absent\); run crcjax tile"):
        open_stores(small_config.data.store, absent)
    with pytest.raises(InputError, match="no training slides"):
        next(train_batches(replace(cohort, rows=()), small_config, device_mesh(), 0))


def test_a_store_without_pixels_gives_the_same_batches_from_the_slides(
    painted: Path, small_config, tmp_path: Path
) -> None:
    cohort = _cohort(painted, small_config).split("val")
    jobs = [TileJob(row.slide_id, row.path) for row in cohort.rows]
    batches = []
    for pixels in ("none", "lossless"):
        tile_slides(jobs, tmp_path / pixels, TilingParams(("10x",), tile_px=64), pixels=pixels)
        small_config.data.store = str(tmp_path / pixels)
        batches.append(np.asarray(next(train_batches(cohort, small_config, device_mesh(), 0)).tiles))
    np.testing.assert_array_equal(*batches)


def test_a_slide_that_moved_away_from_a_store_without_pixels_is_named_before_anything_is_read(
    painted: Path, small_config, tmp_path: Path
) -> None:
    cohort = _cohort(painted, small_config).split("val")
    path = Path(shutil.copy(cohort.rows[0].path, tmp_path))
    tile_slides([TileJob(cohort.rows[0].slide_id, path)], tmp_path, TilingParams(("10x",), tile_px=64), pixels="none")
    path.unlink()
    with pytest.raises(InputError, match=rf"keeps no pixels, and its slide {path} is not there; put it back"):
        open_stores(str(tmp_path), replace(cohort, rows=cohort.rows[:1]))


def test_slides_tiled_in_two_ways_are_refused(painted: Path, small_config, tmp_path: Path) -> None:
    cohort = _cohort(painted, small_config).split("val")
    store = shutil.copytree(painted / "store", tmp_path / "store")
    other = cohort.rows[-1]
    tile_slides([TileJob(other.slide_id, other.path)], tmp_path / "other", TilingParams(("10x",), tile_px=32))
    shutil.rmtree(store / f"{other.slide_id}.zarr")
    shutil.move(tmp_path / "other" / f"{other.slide_id}.zarr", store)
    with pytest.raises(InputError, match=rf"{other.slide_id}\.zarr: tiled in another way than"):
        open_stores(str(store), cohort)


def test_a_damaged_shard_is_one_error_that_names_the_slide(painted: Path, small_config, tmp_path: Path) -> None:
    store = shutil.copytree(painted / "store", tmp_path / "store")
    for shard in store.glob("*/pixels/streams/c/*"):
        if shard.is_file():
            data = bytearray(shard.read_bytes())
            data[len(data) // 2] ^= 1
            shard.write_bytes(data)
    small_config.data.store = str(store)
    small_config.data.regions_per_bag = 64  # all of a slide's regions, the damaged one with them
    with pytest.raises(InputError, match=r"\.zarr: damaged .*crcjax tile again"):
        list(train_batches(_cohort(painted, small_config).split("train"), small_config, device_mesh(), 0))


@pytest.mark.multiprocess
def test_each_process_reads_only_the_slides_and_regions_of_its_devices(
    painted: Path, small_config, tmp_path: Path
) -> None:
    small_config.train.steps = 2
    whole = list(train_batches(_cohort(painted, small_config).split("train"), small_config, device_mesh(), 0))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PJRT_NPROC": "16", "JAX_PLATFORMS": "cpu"}
    processes = []
    for index in ("0", "1"):
        command = [sys.executable, "-c", PROGRAM, port, index, str(painted), str(tmp_path)]
        processes.append(subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True))
    for process in processes:
        # Half of 2 steps of 4 bags of 4 regions.
        assert process.communicate(timeout=300)[0].splitlines() == ["slides 16", "regions 16"]
        assert process.returncode == 0
    shards = list(tmp_path.glob("*.npy"))
    assert len(shards) == 2 * 2 * (4 + 4 + 2)  # labels have no axis of regions
    for shard in shards:
        _, step, part, where = shard.stem.split()
        index = tuple(slice(*map(int, span.split("-"))) for span in where.split("_"))
        np.testing.assert_array_equal(np.asarray(getattr(whole[int(step)], part))[index], np.load(shard))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_vanishes_while_training_is_one_error_that_names_the_slide(
    painted: Path, small_config, tmp_path: Path, workers: int
) -> None:
    store = shutil.copytree(painted / "store", tmp_path / "store")
    small_config.data.store, small_config.data.workers = str(store), workers
    small_config.train.steps, small_config.data.prefetch = 200, 1
    batches = train_batches(_cohort(painted, small_config).split("train"), small_config, device_mesh(), 0)
    next(batches)
    store.rename(tmp_path / "elsewhere")  # at once, as a disk that is lost
    with pytest.raises(InputError, match=r"/[\w-]+\.zarr: is no longer there; put it back"):
        list(batches)


def test_only_time_in_which_a_step_could_have_run_counts_as_waiting() -> None:
    def slow(step: int) -> Bag:
        time.sleep(0.1)
        one = np.ones((1, 1, 1), np.float32)
        return Bag(one, one > 0, one.repeat(2, -1), np.zeros(1, np.int32), one[0, 0])

    batches = Batches(iter(grain.MapDataset.range(4).map(slow).to_iter_dataset(grain.ReadOptions(0, 0))))
    next(batches)
    assert batches.waited_s >= 0.1
    long = jax.jit(lambda x: jax.lax.fori_loop(0, 3000, lambda _, y: jnp.tanh(y @ x), x))
    warm = long.lower(jnp.ones((256, 256))).compile()
    before = batches.waited_s
    result = warm(jnp.ones((256, 256)))
    batches.follow(result)
    next(batches)
    assert not result.is_ready(), "the step was to be longer than the reading"
    assert batches.waited_s == before
    result.block_until_ready()
    next(batches)
    assert batches.waited_s >= before + 0.1


def test_only_the_part_of_a_wait_after_the_running_steps_end_counts() -> None:
    class Step:
        """A result that becomes ready when the reader of the bag sets it."""

        ready = threading.Event()

        def is_ready(self) -> bool:
            return self.ready.is_set()

        def block_until_ready(self) -> None:
            self.ready.wait()

    def read(_: int) -> Bag:
        one = np.ones((1, 1, 1), np.float32)
        time.sleep(0.3)
        Step.ready.set()
        time.sleep(0.2)
        return Bag(one, one > 0, one.repeat(2, -1), np.zeros(1, np.int32), one[0, 0])

    batches = Batches(iter(grain.MapDataset.range(1).map(read).to_iter_dataset(grain.ReadOptions(0, 0))))
    batches._running = Step()
    batches._running_ended = ThreadPoolExecutor(1).submit(
        _end_of, Step()
    )  # as `follow`, which takes JAX's arrays alone
    start = time.perf_counter()
    next(batches)
    assert 0.18 <= batches.waited_s <= time.perf_counter() - start - 0.25
