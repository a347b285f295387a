import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crcjax.config import get_config
from crcjax.data.bags import open_stores
from crcjax.data.cohort import load_cohort
from crcjax.data.tile_labels import bag_labels, tile_labels
from crcjax.errors import InputError
from crcjax.slides.store.tile_store import open_store
from crcjax.slides.synthetic.truth import load_truth
from crcjax.slides.tiling.plan import TilingParams
from crcjax.slides.tiling.regions_of_interest import write_area

TISSUES = ("cribriform", "stroma", "lymphoid", "glands", "desmoplastic")


def _tasks(folder: Path, classes: tuple[str, ...]):
    tasks = get_config().tasks
    tasks.labels, tasks.tissue_classes, tasks.tissue = str(folder), classes, 1.0
    return tasks


def _drawn(path: Path, **boxes: tuple[int, int, int, int]) -> None:
    """Writes rectangles by class as QuPath exports them."""
    features = []
    for name, (x0, y0, x1, y1) in boxes.items():
        ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
        properties = {"objectType": "annotation", "classification": {"name": name, "color": [1, 2, 3]}}
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def test_tiles_of_every_magnification_are_labelled_by_the_area_that_covers_most_of_them(
    painted: Path, tmp_path: Path
) -> None:
    store = open_store(painted / "store", "synthetic-0000")
    store.slide_id, store.params, store.region_px = "a", TilingParams(("10x", "20x"), tile_px=64), 128.0
    store.info = replace(store.info, size=(512, 512))
    store.origin, store.mask = np.array([[0, 0], [128, 0], [0, 128]], np.int32), np.ones((3, 5), bool)
    artefacts = {"pen": (0, 128, 100, 188), "dust": (100, 210, 110, 220)}
    _drawn(
        tmp_path / "a.geojson", tumour=(0, 0, 128, 56), stroma=(128, 0, 216, 128), other=(0, 0, 999, 999), **artefacts
    )
    actual = tile_labels(store, _tasks(tmp_path, ("stroma", "tumour")))
    # Of the first region less than half is tumour, but most of its upper tiles; of the second's right tiles a third is stroma.
    assert actual[0, :, 0].tolist() == [-1, 1, 1, -1, -1]
    assert actual[1, :, 0].tolist() == [0, 0, -1, 0, -1]
    assert actual[2, :, 0].tolist() == [-1] * 5
    # Pen spoils a third of the third region and more than half of its upper tiles; the dust of its last tile is too little.
    assert actual[2, :, 1].tolist() == [1, 1, 1, 0, -1]
    assert not actual[:2, :, 1].any()


def test_the_ground_truth_and_annotations_of_the_same_areas_give_the_same_labels(painted: Path, tmp_path: Path) -> None:
    slide = load_cohort(painted / "cohort.csv", None).rows[0].slide_id
    store, truth = open_store(painted / "store", slide), load_truth(painted / "slides" / f"{slide}.truth.npz")
    features = []
    for name in TISSUES:
        write_area(tmp_path / "one", truth.kinds == truth.names.index(name), store.info.size, name)
        features += json.loads((tmp_path / "one.geojson").read_text())["features"]
    (tmp_path / f"{slide}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    from_truth, from_annotations = (tile_labels(store, _tasks(of, TISSUES)) for of in (painted / "slides", tmp_path))
    assert (from_truth[..., 0] >= 0).mean() > 0.4
    assert len(np.unique(from_truth[..., 0])) > 4
    assert (from_truth == from_annotations).mean() > 0.97
    side = truth.um_per_px * 4  # a tile of 64 µm
    for region in np.flatnonzero(from_truth[:, 0, 0] >= 0)[:20]:
        x, y = store.origin[region] * store.info.mpp
        kind = truth.names.index(TISSUES[from_truth[region, 0, 0]])
        assert truth.tissue_share(x, y, side, [kind]) > 0.5


def test_a_slide_without_a_file_has_no_tissue_and_no_artefact(painted: Path, tmp_path: Path) -> None:
    cohort = load_cohort(painted / "cohort.csv", None)
    stores = open_stores(str(painted / "store"), cohort)[:2]
    for labels in bag_labels(stores, _tasks(tmp_path, TISSUES)):
        assert (labels[..., 0] == -1).all()
        assert (labels[..., 1] == 0).all()
    assert bag_labels(stores, get_config().tasks) == []


def test_a_damaged_file_is_refused_by_name(painted: Path, tmp_path: Path) -> None:
    store = open_store(painted / "store", "synthetic-0000")
    (tmp_path / "synthetic-0000.geojson").write_text("no json")
    with pytest.raises(InputError, match=r"synthetic-0000\.geojson: is not GeoJSON"):
        tile_labels(store, _tasks(tmp_path, TISSUES))
