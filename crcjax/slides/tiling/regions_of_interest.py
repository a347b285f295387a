"""Areas of a slide as files: mask images, and GeoJSON as QuPath reads and writes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float64
from PIL import Image

from crcjax.errors import InputError
from crcjax.slides.wsi.discovery import SUFFIXES as SLIDE_SUFFIXES

SUFFIXES = (".geojson", ".json", ".png")
_SAME_SHAPE = 0.02  # tolerance between the aspect ratios of a slide and its mask
_FRACTION_BITS = 4
_FARTHEST = 2**28  # points farther out are outside every slide and would overflow


@dataclass(frozen=True)
class Areas:
    """Region files of one slide: only tiles within `include` and outside `exclude` are read.

    `fault` says why the files cannot be used; every use of them then raises it as InputError.
    """

    include: Path | None = None
    exclude: Path | None = None
    fault: str = ""

    @property
    def id(self) -> str:
        """SHA-256 over the files' content; empty without files. Raises InputError."""
        if self.fault:
            raise InputError(self.fault)
        if not self.include and not self.exclude:
            return ""
        parts = [_bytes_of(path) if path else b"" for path in (self.include, self.exclude)]
        return hashlib.sha256(len(parts[0]).to_bytes(8, "little") + b"".join(parts)).hexdigest()

    def mask(
        self, shape: tuple[int, int], size: tuple[int, int], corner: tuple[int, int] = (0, 0)
    ) -> Bool[np.ndarray, "y x"]:
        """The part of the slide that may be tiled, in the form of `read_area`. Raises InputError."""
        allowed = read_area(self.include, shape, size, corner) if self.include else np.ones(shape, bool)
        return allowed & ~read_area(self.exclude, shape, size, corner) if self.exclude else allowed


@dataclass(frozen=True)
class Box:
    """A square of a slide for QuPath.

    Attributes:
      place: its corner (x, y) in level-0 px.
      side: in level-0 px.
      name: its class.
      measurements: numbers by name.
      label: the name that QuPath shows; with one, the square is an annotation, otherwise a tile.
    """

    place: Float64[np.ndarray, " 2"]
    side: float
    name: str
    measurements: Mapping[str, float]
    label: str = ""


def areas_of(slide_id: str, include: Path | None, exclude: Path | None, file_name: str = "") -> Areas:
    """Finds the region files of a slide in two folders, or states the fault; `exclude` need not have one.

    A region file is named after the slide id or the slide's file, as QuPath names images (`s.svs.geojson`); its suffix may
    be in capitals. Raises InputError if there is no such folder.
    """
    region_files: dict[str, Path | None] = {}
    for name, folder in (("include", include), ("exclude", exclude)):
        if folder and not folder.is_dir():
            raise InputError(f"--{name} {folder}: name a folder of files such as {slide_id}.geojson or {slide_id}.png")
        files = _region_files(folder, {slide_id, file_name} - {""}) if folder else []
        if len(files) > 1:
            return Areas(fault=f"--{name} {folder}: holds {files[0].name} and {files[1].name}; leave one")
        region_files[name] = files[0] if files else None
    if include and not region_files["include"]:
        lacking = f"--include {include}: holds no {slide_id}.geojson or {slide_id}.png"
        return Areas(fault=f"{lacking}; draw it, or leave the slide out")
    return Areas(region_files["include"], region_files["exclude"])


def _region_files(folder: Path, names: set[str]) -> list[Path]:
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    stems = names | {f"{name}{suffix}" for name in names for suffix in SLIDE_SUFFIXES}
    return [path for path in files if path.stem in names or _lower_suffix(path.stem) in stems]


def _lower_suffix(name: str) -> str:
    return Path(name).stem + Path(name).suffix.lower()


def read_area(
    path: Path, shape: tuple[int, int], size: tuple[int, int], corner: tuple[int, int] = (0, 0)
) -> Bool[np.ndarray, "y x"]:
    """Reads a region file as a mask of `shape` rows and columns over a slide of `size` (width, height) level-0 px.

    GeoJSON polygons are in level-0 px from the `corner` of the scanned part (SlideInfo.corner), as QuPath exports them,
    and keep their holes. An image covers the whole slide at any resolution; every pixel that is not black counts. Raises InputError.
    """
    if path.suffix.lower() == ".png":
        return _read_image(path, shape, size)
    return np.logical_or.reduce(list(read_classes(path, shape, size, corner).values()))


def read_classes(
    path: Path, shape: tuple[int, int], size: tuple[int, int], corner: tuple[int, int] = (0, 0)
) -> dict[str, Bool[np.ndarray, "y x"]]:
    """Reads the areas of a GeoJSON file by the name of their QuPath class (empty without one), in the form of `read_area`.

    Raises InputError.
    """
    scale = np.array([shape[1] / size[0], shape[0] / size[1]])
    masks: dict[str, np.ndarray] = {}
    polygons = _polygons(path)
    if not any(_overlaps(polygon[0] + corner, size) for _, polygon in polygons):
        raise InputError(
            f"{path}: holds no area within the slide of {size[0]} x {size[1]} px; export it from this slide's image"
        )
    for name, polygon in polygons:
        one = np.zeros(shape, np.uint8)
        for value, ring in zip([1] + [0] * (len(polygon) - 1), polygon, strict=True):
            # A point at x is x pixels from the left edge; OpenCV counts from the first pixel's middle.
            points = ((ring + corner) * scale - 0.5) * 2**_FRACTION_BITS
            points = np.rint(points.clip(-_FARTHEST, _FARTHEST)).astype(np.int32)
            cv2.fillPoly(one, [points], value, shift=_FRACTION_BITS)
        masks[name] = masks.get(name, False) | one.astype(bool)
    return masks


def _overlaps(ring: np.ndarray, size: tuple[int, int]) -> bool:
    return bool((ring.max(axis=0) > 0).all() and (ring.min(axis=0) < size).all())


def _read_image(path: Path, shape: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    try:
        with Image.open(path) as image:
            values = np.asarray(image.convert("L"))
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({error}); export the mask again") from error
    ratio = values.shape[1] / values.shape[0] / (size[0] / size[1])
    if abs(ratio - 1) > _SAME_SHAPE + 1 / min(values.shape):
        shown = f"{values.shape[1]} x {values.shape[0]} px is no picture of the whole slide, {size[0]} x {size[1]} px"
        raise InputError(f"{path}: {shown}; export the mask of the whole slide")
    return cv2.resize((values > 0).astype(np.uint8), shape[::-1], interpolation=cv2.INTER_NEAREST).astype(bool)


def _polygons(path: Path) -> list[tuple[str, list[np.ndarray]]]:
    """Every polygon's class and rings, the outer one first."""
    polygons: list[tuple[str, list[np.ndarray]]] = []
    try:
        document = json.loads(_bytes_of(path))
        features = document if isinstance(document, list) else document.get("features", [document])
        for feature in features:
            name = _class_of(feature)
            for polygon in _geometry_polygons(path, feature.get("geometry", feature)):
                rings = [np.array(ring, np.float64)[:, :2] for ring in polygon]
                if not all(np.isfinite(ring).all() for ring in rings):
                    raise InputError(f"{path}: holds a coordinate that is not a number; export the regions again")
                if rings:
                    polygons.append((name, rings))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path}: is not GeoJSON ({error}); export it from QuPath as GeoJSON") from error
    if not polygons:
        raise InputError(f"{path}: holds no area; draw one, or leave the file out")
    return polygons


def _class_of(feature: dict) -> str:
    """The class of a feature: QuPath writes an object with a name, other tools its name alone."""
    classification = (feature.get("properties") or {}).get("classification")
    return (classification if isinstance(classification, str) else (classification or {}).get("name")) or ""


def _geometry_polygons(path: Path, geometry: dict | None) -> list[list]:
    """The coordinates of a geometry's polygons; a feature without a geometry has none."""
    if geometry is None:
        return []
    kind = geometry["type"]
    if kind == "GeometryCollection":
        return [polygon for one in geometry["geometries"] for polygon in _geometry_polygons(path, one)]
    if kind not in ("Polygon", "MultiPolygon"):
        raise InputError(f"{path}: holds a {kind}; only areas (Polygon, MultiPolygon) are regions")
    return [geometry["coordinates"]] if kind == "Polygon" else list(geometry["coordinates"])


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from error


def write_area(
    stem: Path, mask: Bool[np.ndarray, "y x"], size: tuple[int, int], name: str, corner: tuple[int, int] = (0, 0)
) -> None:
    """Writes a mask over a slide of `size` level-0 px as STEM.png and STEM.geojson, an annotation called `name` in QuPath.

    `read_area` reads both: the GeoJSON counts from the `corner`, the PNG covers the whole slide.
    """
    Image.fromarray(mask.astype(np.uint8) * 255).save(f"{stem}.png")
    polygons = [[_closed(ring - corner) for ring in rings] for rings in _outlines(mask, size)]
    _write_geojson(Path(f"{stem}.geojson"), [_feature("MultiPolygon", polygons, "annotation", name)])


def write_boxes(path: Path, boxes: Iterable[Box], corner: tuple[int, int] = (0, 0)) -> None:
    """Writes squares for QuPath, atomically. In the file, coordinates count from the `corner`, as in `read_area`."""
    features = []
    for box in boxes:
        ring = box.place - corner + box.side * np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
        # Significant digits, because the attention of one of many tiles is small.
        measured = {name: float(f"{value:.4g}") for name, value in box.measurements.items()}
        others: dict[str, object] = {"name": box.label} if box.label else {}
        kind = "annotation" if box.label else "tile"
        features.append(_feature("Polygon", [_closed(ring)], kind, box.name, measurements=measured, **others))
    partial = path.with_suffix(".partial")
    _write_geojson(partial, features)
    partial.replace(path)


def _feature(shape: str, coordinates: list, kind: str, class_name: str, **others: object) -> dict:
    """A GeoJSON feature as QuPath reads it, an object of this kind and class."""
    properties = {"objectType": kind, "classification": {"name": class_name, "color": [0, 158, 115]}} | others
    return {"type": "Feature", "geometry": {"type": shape, "coordinates": coordinates}, "properties": properties}


def _write_geojson(path: Path, features: list[dict]) -> None:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def _outlines(mask: np.ndarray, size: tuple[int, int]) -> list[list[np.ndarray]]:
    """The outer ring and the holes' rings of each piece, along the pixels' edges, in level-0 px."""
    # Outlines run through the middles of the outer pixels: four times larger, that is an eighth of a pixel off the edge.
    large = cv2.copyMakeBorder(
        mask.repeat(4, axis=0).repeat(4, axis=1).astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT
    )
    rings, tree = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    scale = np.array([size[0] / mask.shape[1], size[1] / mask.shape[0]]) / 4
    polygons: dict[int, list[np.ndarray]] = {}
    for i, ring in enumerate(rings):
        parent = int(tree[0, i, 3])
        if len(ring) >= 3:
            polygons.setdefault(i if parent < 0 else parent, []).append((ring[:, 0] - 0.5) * scale)
    return list(polygons.values())


def _closed(ring: np.ndarray) -> list[list[float]]:
    points = np.round(ring, 1).tolist()
    return [*points, points[0]]
