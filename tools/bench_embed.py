"""`crcjax embed` compared with its encoder alone, which decoding and writing should not slow down, and with PyTorch's."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from record import Row, record
from safetensors.numpy import save_file

from crcjax.models.encoders.registry import PRETRAINED
from crcjax.models.encoders.torch_weights import torch_tensors
from crcjax.predict.embed import Embedder, embed_store
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.synthetic.painter import SlideSpec, paint_slide
from crcjax.slides.tiling.plan import TilingParams

ENCODER, TIMM = "lunit-dino-s16", "vit_small_patch16_224"
SIZE_PX = (5120, 4096)
BATCHES = 6


def tiles_per_s(encode: Callable[[], object], tiles: int) -> float:
    """The mean speed over `BATCHES` batches, after one that compiles."""
    encode()
    start = time.monotonic()
    for _ in range(BATCHES):
        encode()
    return BATCHES * tiles / (time.monotonic() - start)


def torch_encoder(images: np.ndarray) -> Callable[[], object] | None:
    """timm's encoder on the CPU; None without the extra torch, or if JAX uses an accelerator."""
    try:
        import timm
        import torch
    except ImportError:
        return None
    if jax.default_backend() != "cpu":
        return None
    model, pixels = timm.create_model(TIMM, num_classes=0).eval(), torch.from_numpy(images)

    def encode() -> object:
        with torch.inference_mode():
            return model(pixels)

    return encode


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slide = paint_slide(folder / "a.svs", SlideSpec("stromal", 0, size_px=SIZE_PX))
        tile_slides([TileJob("a", slide)], folder / "store", TilingParams(("20x",)))
        save_file(torch_tensors(PRETRAINED[ENCODER].build(rngs=nnx.Rngs(0))), folder / "w.safetensors")
        batches: list[int] = []
        (outcome,) = embed_store(
            folder / "store",
            ENCODER,
            folder / "w.safetensors",
            on_start=lambda view, slides, batch: batches.append(batch),
        )
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        embedder = Embedder(ENCODER, folder / "w.safetensors", dtype, 256, batches[0])
    pixels = np.random.default_rng(0).integers(0, 256, (embedder.batch, 256, 256, 3), np.uint8)
    alone = tiles_per_s(lambda: np.asarray(embedder.encode(pixels)), embedder.batch)
    store_to_store = outcome.tiles / outcome.seconds
    kind = f"ViT-S/16, {dtype}, {embedder.batch} tiles per batch"
    rows = [Row(f"encoder alone, {kind}", alone, "tiles/s")]
    rows.append(
        Row(
            f"store to store, {outcome.tiles} tiles", store_to_store, "tiles/s", store_to_store / alone, "encoder alone"
        )
    )
    rival = torch_encoder(np.zeros((embedder.batch, 3, 224, 224), np.float32))
    if rival:
        torch_speed = tiles_per_s(rival, embedder.batch)
        rows.append(Row("encoder alone in PyTorch", torch_speed, "tiles/s"))
        rows[0] = Row(rows[0].measure, alone, "tiles/s", alone / torch_speed, "PyTorch")
    about = (
        "`crcjax embed` from store to store, compared with its encoder alone and with timm's encoder in PyTorch.\n\n"
        f"Random weights; the tiles of a synthetic slide of {SIZE_PX[0]} x {SIZE_PX[1]} px."
    )
    record("embed", "python tools/bench_embed.py", rows, about)


if __name__ == "__main__":
    main()
