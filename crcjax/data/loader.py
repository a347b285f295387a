"""Training batches: Grain from stores to the devices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from crcjax.data.bags import Bag, label_of, open_features, open_stores, read_bag
from crcjax.data.cohort import Cohort
from crcjax.data.sampling import draw_regions, draw_slides, slide_weights
from crcjax.errors import InputError
from crcjax.slides.normaliser import StainNormaliser


def train_batches(
    cohort: Cohort, config: ConfigDict, mesh: Mesh, start_step: int, normaliser: StainNormaliser | None = None
) -> Iterator[Bag]:
    """Yields the bags of every step from `start_step` to config.train.steps, on the mesh, split over `data`.

    What a step sees depends on seed and step alone, so a resumed run reads what it would have read. Each process reads
    its own part. Raises InputError: an empty split, slides that are not tiled, bags that the devices do not divide.
    """
    if not cohort.rows:
        raise InputError("the cohort has no training slides; give it a split column with train, or lower the fractions")
    data, processes = config.data, jax.process_count()
    if data.bags % mesh.shape["data"]:
        raise InputError(f"config.data.bags {data.bags} is no multiple of the {mesh.shape['data']} devices; set it so")
    stores = open_stores(data.store, cohort, pixels=not data.features)
    labels = np.array([label_of(row, cohort.classes) for row in cohort.rows])
    weights = slide_weights(labels, config.train.class_balance)
    features = open_features(stores, config.model.encoder) if data.features else []
    stains = [normaliser.of_store(store) for store in stores] if normaliser else []
    local = data.bags // processes
    mine = range(jax.process_index() * local, (jax.process_index() + 1) * local)

    def load(step: int) -> Bag:
        slides = draw_slides(labels, config.seed, step, data.bags)[mine.start : mine.stop]
        chosen = [
            draw_regions(stores[slide].mask, config.seed, step, bag, data.regions)
            for bag, slide in zip(mine, slides, strict=True)
        ]
        # Their leaves are stacked, since a batch is one estimate with a leading axis.
        stain = jax.tree.map(lambda *leaves: np.stack(leaves), *(stains[slide] for slide in slides)) if stains else None
        some = [features[slide] for slide in slides] if features else []
        bag = read_bag([stores[slide] for slide in slides], chosen, labels[slides], data.regions, stain, some)
        return replace(bag, weight=weights[slides])

    options = grain.ReadOptions(num_threads=data.read_threads, prefetch_buffer_size=data.prefetch)
    steps = grain.MapDataset.range(start_step, config.train.steps).map(load).to_iter_dataset(options)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    for bag in steps:
        yield jax.tree.map(lambda part: jax.make_array_from_process_local_data(sharding, part), bag)
