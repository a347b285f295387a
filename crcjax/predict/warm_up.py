"""Prepares a process that predicts one case after another, so that its first cases do not wait for compilation."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from crcjax.predict.engine import EngineWork
from crcjax.predict.predict_slides import PredictJob, predict_slides
from crcjax.predict.predictor import Predictor
from crcjax.slides.synthetic.painter import SlideSpec, paint_slide
from crcjax.slides.tiling.plan import mpp_of
from crcjax.slides.wsi.slide import open_slide

# The side of the synthetic slide, in regions.
_REGIONS = 2


def warm_up(predictor: Predictor, work: EngineWork, buckets: Sequence[int] = ()) -> None:
    """Predicts a small synthetic slide in a temporary folder, and compiles what bags of other sizes need.

    The result is not looked at: models of unusual tiling may find no tissue on such a slide, and are then prepared in part.

    Args:
      predictor: the models.
      work: the running engine.
      buckets: numbers of regions that bags are padded to (config.data.region_buckets).
    """
    tiling = predictor.tiling
    side = _REGIONS * tiling.tile_px * tiling.factors[-1]
    with tempfile.TemporaryDirectory(prefix="crcjax-") as folder:
        spec = SlideSpec("immune", 0, size_px=(side, side), mpp=mpp_of(tiling.magnifications[-1]))
        slide = paint_slide(Path(folder) / "slide.svs", spec)
        (row,) = predict_slides(predictor, [PredictJob("slide", "slide", slide)], Path(folder) / "out", work=work)
        if row.has_prediction:
            with open_slide(slide) as opened:
                encoding = predictor.begin(opened)
            for regions in buckets:
                predictor.compile_ahead(encoding, regions)
