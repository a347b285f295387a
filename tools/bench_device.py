"""Tile encoders and whole training steps on this device, compared with PyTorch and with the limits of the device.

Made for a GPU; on a CPU it runs at small sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import timm
import torch
from ceilings import Ceilings, Work, ceilings, median_seconds, torch_work, wait_for_torch
from flax import nnx
from ml_collections import ConfigDict
from record import record
from torch.nn import functional
from torch_mil import ABMIL, CLASSES, HEADS, HIDDEN, WIDTH, Hierarchical

from crcjax.config import get_config
from crcjax.data.bags import Bag
from crcjax.models.encoders.registry import PRETRAINED
from crcjax.models.mil import DTYPES, build_model
from crcjax.parallel.mesh import device_mesh
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import abstract_state, build_step, init_state

ON_CPU = jax.default_backend() == "cpu"
DEVICE, DTYPE = ("cpu", "float32") if ON_CPU else ("cuda", "bfloat16")
TILES = 8 if ON_CPU else 256
REPEATS = 2 if ON_CPU else 10
TILE_PX = 256
# The model of timm that has the shape of each encoder.
TIMM: dict[str, Callable[[], torch.nn.Module]] = {
    "lunit-dino-s16": partial(timm.create_model, "vit_small_patch16_224", num_classes=0),
    "uni": partial(timm.create_model, "vit_large_patch16_224", init_values=1e-5, num_classes=0, dynamic_img_size=True),
    "uni2-h": partial(
        timm.create_model,
        "vit_giant_patch14_224",
        img_size=224,
        patch_size=14,
        depth=24,
        num_heads=24,
        init_values=1e-5,
        embed_dim=1536,
        mlp_ratio=2.66667 * 2,
        num_classes=0,
        no_embed_class=True,
        mlp_layer=timm.layers.SwiGLUPacked,
        act_layer=torch.nn.SiLU,
        reg_tokens=8,
        dynamic_img_size=True,
    ),
    "imagenet-resnet50": partial(timm.create_model, "resnet50", num_classes=0),
    "imagenet-swin-t": partial(timm.create_model, "swin_tiny_patch4_window7_224", num_classes=0),
}
ENCODERS = ("lunit-dino-s16", "imagenet-resnet50") if ON_CPU else tuple(TIMM)


@dataclass
class Case:
    """One row of the table.

    `ours` and `theirs` return functions that do the same work and wait for its end. A call does `per` of a `unit`.
    """

    name: str
    ours: Future[Callable[[], object]]
    theirs: Callable[[], Callable[[], object]]
    work: Work
    unit: str
    per: float


def encoder_case(name: str, pool: ThreadPoolExecutor) -> Case:
    """The features of a batch of tiles on the device; preparation and encoding are in bfloat16."""
    encoder = PRETRAINED[name]
    graph, state = nnx.split(encoder.build(dtype=DTYPES[DTYPE], rngs=nnx.Rngs(0)))
    pixels = jax.random.randint(jax.random.key(0), (TILES, TILE_PX, TILE_PX, 3), 0, 256, jnp.uint8)
    forward = jax.jit(lambda state, pixels: nnx.merge(graph, state)(encoder.prepare(pixels)))
    lowered = forward.lower(state, pixels)

    def compiled() -> Callable[[], object]:
        program = lowered.compile()
        return lambda: jax.block_until_ready(program(state, pixels))

    def theirs() -> Callable[[], object]:
        with torch.device(DEVICE):
            model = TIMM[name]().eval().to(getattr(torch, DTYPE), memory_format=torch.channels_last)
        tiles = torch.randint(256, (TILES, 3, TILE_PX, TILE_PX), dtype=torch.uint8, device=DEVICE)
        mean, std = (torch.tensor(part, device=DEVICE).view(1, 3, 1, 1) for part in encoder.normalisation)

        def encode() -> None:
            with torch.inference_mode():
                resized = functional.interpolate(tiles.float(), (224, 224), mode="bilinear", antialias=True)
                model(((resized.round() / 255 - mean) / std).to(getattr(torch, DTYPE)))
            wait_for_torch()

        return encode

    with torch.device("meta"):
        model, image = TIMM[name]().eval(), torch.empty(1, 3, 224, 224)
    with torch.inference_mode():
        flops = TILES * torch_work(lambda: model(image))
    weight_bytes = sum(part.numel() for part in model.parameters()) * jnp.dtype(DTYPE).itemsize
    work = Work(flops, weight_bytes + pixels.nbytes)
    return Case(f"{name}, encoding", pool.submit(compiled), theirs, work, "tiles/s", TILES)


class CompactEncoder(torch.nn.Module):
    """crcjax.models.encoders.compact in PyTorch, on pixels [tile, y, x, 3]."""

    def __init__(self, width: int, features: int):
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 4 * width)
        self.sides = (4, 2, 2, 2)
        self.merges = torch.nn.ModuleList(
            [
                torch.nn.Linear(side**2 * before, after)
                for side, (before, after) in zip(self.sides, pairwise(widths), strict=True)
            ]
        )
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(after) for after in widths[1:]])
        self.project = torch.nn.Linear(8 * width, features)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        maps = -torch.log((pixels.float() + 1.0) / 256.0) - 0.5
        for side, merge, norm in zip(self.sides, self.merges, self.norms, strict=True):
            split = maps.unflatten(1, (-1, side)).unflatten(3, (-1, side)).transpose(2, 3)
            maps = merge(split.flatten(3))
            maps = functional.gelu(maps if side == 4 else norm(maps), approximate="tanh")
        return self.project(torch.cat([maps.mean(dim=(1, 2)), maps.amax(dim=(1, 2))], dim=-1))


class ViTSmall(torch.nn.Module):
    """timm's ViT-S/16 on pixels [tile, y, x, 3], prepared as in crcjax."""

    def __init__(self, features: int):
        super().__init__()
        self.encoder, self.project = TIMM["lunit-dino-s16"](), torch.nn.Linear(384, features)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        images = functional.interpolate(pixels.movedim(-1, 1).float(), (224, 224), mode="bilinear", antialias=True)
        return self.project(self.encoder(images / 255 - 0.5))


class Learner(torch.nn.Module):
    """An encoder of pixels or stored features, and an aggregator over bags."""

    def __init__(self, encoder: torch.nn.Module, aggregator: torch.nn.Module, features: int):
        super().__init__()
        self.encoder, self.norm, self.aggregator = encoder, torch.nn.LayerNorm(features), aggregator

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        bags, regions, slots = tiles.shape[:3]
        features = self.norm(self.encoder(tiles.flatten(0, 2))).view(bags, regions * slots, -1)
        return self.aggregator(functional.dropout(features, 0.1, self.training), None)[0]


def augmented(pixels: torch.Tensor) -> torch.Tensor:
    """The defaults of config.augment: a flip and a rotation per tile, and gains of the optical density per bag and channel."""
    flips = torch.rand(3, *pixels.shape[:3], 1, 1, 1, device=pixels.device) < 0.5
    pixels = torch.where(flips[0], pixels.flip(4), pixels)
    pixels = torch.where(flips[1], pixels.flip(3), pixels)
    pixels = torch.where(flips[2], pixels.transpose(3, 4), pixels)
    gain = torch.exp(0.15 * torch.randn(len(pixels), 1, 1, 1, 1, 3, device=pixels.device))
    density = -torch.log((pixels.float() + 1) / 256)
    return (256 * torch.exp(-density * gain) - 1).clamp(0, 255)


@dataclass(frozen=True)
class StepCase:
    """A training step, with the same micro-batches in crcjax and in PyTorch."""

    name: str
    learner: Callable[[ConfigDict], Learner]
    settings: dict[str, object]
    bags: int
    regions: int
    slots: int = 1
    micro_batches: int = 1


def _frozen(aggregator: Callable[[], torch.nn.Module]) -> Callable[[ConfigDict], Learner]:
    return lambda config: Learner(torch.nn.Linear(WIDTH, WIDTH), aggregator(), WIDTH)


def _pixels(encoder: Callable[[ConfigDict], torch.nn.Module]) -> Callable[[ConfigDict], Learner]:
    return lambda config: Learner(encoder(config), ABMIL(True, config.model.features), config.model.features)


STORED = {"model.imported_features": WIDTH, "model.features": WIDTH, "model.attention": HIDDEN, "data.features": True}
STEPS = (
    StepCase(
        "stored features, gated_abmil", _frozen(partial(ABMIL, True)), STORED, *((2, 64) if ON_CPU else (32, 4096))
    ),
    StepCase(
        "stored features, hierarchical",
        _frozen(Hierarchical),
        STORED | {"model.mil": "hierarchical", "model.heads": HEADS},
        *((2, 64) if ON_CPU else (32, 4096)),
        micro_batches=1 if ON_CPU else 4,
    ),
    StepCase(
        "pixels, compact encoder (configs/epoc.py)",
        _pixels(lambda config: CompactEncoder(config.model.width, config.model.features)),
        {"model.width": 64, "model.features": 512, "model.attention": HIDDEN},
        *((2, 2, 5) if ON_CPU else (32, 64, 5, 8)),
    ),
    StepCase(
        "pixels, ViT-S/16 fine-tuned",
        _pixels(lambda config: ViTSmall(config.model.features)),
        {
            "model.encoder": "kaiko-vits16",
            "model.frozen": False,
            "model.features": 384,
            "model.attention": HIDDEN,
            "model.remat": "none",
        },
        *((2, 2) if ON_CPU else (8, 64)),
        micro_batches=1 if ON_CPU else 2,
    ),
)


def step_config(case: StepCase) -> ConfigDict:
    """The config of a case, in the device's type."""
    config = get_config()
    for field, value in case.settings.items():
        section, name = field.split(".")
        config[section][name] = value
    config.data.batch_size, config.data.regions_per_bag, config.model.dtype = case.bags, case.regions, DTYPE
    config.train.micro_batches = case.micro_batches
    return config


def step_case(case: StepCase, pool: ThreadPoolExecutor) -> Case:
    """The whole step on bags on the device: augmentation, encoder, aggregator, gradient and AdamW."""
    config = step_config(case)
    stored = config.data.features
    shape = (case.bags, case.regions, case.slots)
    tile = (WIDTH,) if stored else (TILE_PX, TILE_PX, 3)
    factors = (1,) if case.slots == 1 else (1, 2)
    mesh, model = device_mesh(config), build_model(config.model, CLASSES, 0, factors)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    step = build_step(model, optimizer, config, mesh)

    def tiles() -> jax.Array:
        key = jax.random.key(0)
        if stored:
            return jax.random.normal(key, (*shape, *tile), jnp.float16)
        return jax.random.randint(key, (*shape, *tile), 0, 256, jnp.uint8)

    def bag() -> Bag:
        position = jnp.stack([jnp.arange(case.regions) % 64, jnp.arange(case.regions) // 64], axis=-1)
        position = jnp.broadcast_to(position.astype(jnp.float32), (*shape[:2], 2))
        return Bag(tiles(), jnp.ones(shape, bool), position, jnp.arange(case.bags) % CLASSES, jnp.ones(case.bags))

    abstract = abstract_state(model, optimizer, config, mesh)
    state = [init_state(model, optimizer, config, mesh)]
    lowered = step.lower(abstract, jax.eval_shape(bag))

    def compiled() -> Callable[[], object]:
        program, bags = lowered.compile(), []
        temporary_gib = program.memory_analysis().temp_size_in_bytes / 2**30
        print(f"{case.name}: {temporary_gib:.2f} GiB without its state", flush=True)

        def train() -> None:
            if not bags:
                bags.append(jax.jit(bag)())
            state[0], _ = jax.block_until_ready(program(state[0], bags[0]))

        return train

    def theirs() -> Callable[[], object]:
        model = case.learner(config).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        label = torch.arange(case.bags, device=DEVICE) % CLASSES
        kind = {"dtype": torch.float16} if stored else {"dtype": torch.uint8}
        values = torch.zeros((*shape, *tile), device=DEVICE, **kind)
        values = values.normal_() if stored else values.random_(0, 256)

        def train() -> None:
            optimizer.zero_grad()
            for tiles, labels in zip(values.chunk(case.micro_batches), label.chunk(case.micro_batches), strict=True):
                with torch.autocast(DEVICE, torch.bfloat16, enabled=not ON_CPU):
                    logits = model(tiles.float() if stored and ON_CPU else tiles if stored else augmented(tiles))
                    losses = functional.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=0.05)
                (losses / case.bags).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            wait_for_torch()

        return train

    with torch.device("meta"):
        twin, one_bag = case.learner(config), torch.empty((1, *shape[1:], *tile))
    count = sum(part.size for part in jax.tree.leaves(abstract.params))
    torch_count = sum(part.numel() for part in twin.parameters())
    assert abs(count - torch_count) <= 0.01 * torch_count, (
        f"{case.name}: {count:,} parameters, PyTorch's {torch_count:,}"
    )
    flops = case.bags * torch_work(lambda: twin(one_bag).sum().backward())
    # AdamW reads and writes the parameters and both moments, and reads the gradient, which was written: 8 float32 numbers.
    moved = float(np.prod((*shape, *tile)) * (2 if stored else 1)) + 8 * 4 * torch_count
    return Case(case.name, pool.submit(compiled), theirs, Work(flops, moved), "slides/hour", 3600 * case.bags)


def rows_of(cases: list[Case], limits: Ceilings) -> Iterator[dict]:
    """Yields the rows; the memory of a case is freed before the next one."""
    while cases:
        case = cases.pop(0)
        seconds = median_seconds(case.ours.result(), REPEATS)
        torch_seconds = median_seconds(case.theirs(), REPEATS)
        if not ON_CPU:
            torch.cuda.empty_cache()
        least, limit = limits.seconds(case.work, DTYPE)
        row = {"task": case.name, "crcjax, ms": seconds * 1e3, "crcjax": case.per / seconds, "unit": case.unit}
        row |= {"PyTorch": case.per / torch_seconds, "speed-up": torch_seconds / seconds}
        row |= {"fraction of limit": least / seconds, "limit": limit, "TFLOP/s": case.work.flops / seconds / 1e12}
        print(row, flush=True)
        yield row


def main(chosen: list[str]) -> None:
    torch.set_float32_matmul_precision("high")
    limits = ceilings((DTYPE,))
    print(limits, flush=True)
    with ThreadPoolExecutor(2 if ON_CPU else 3) as pool:
        cases = [encoder_case(name, pool) for name in ENCODERS if not chosen or name in chosen]
        cases += [step_case(case, pool) for case in STEPS if not chosen or case.name in chosen]
        rows = list(rows_of(cases, limits))
    steps = "; ".join(
        f"{case.name}, {case.bags} bags of {case.regions} x {case.slots} in {case.micro_batches}"
        f" micro-batch{'es' if case.micro_batches > 1 else ''}"
        for case in STEPS
    )
    about = (
        "Tile encoders and whole training steps on one device, compared with PyTorch and with the limits of the device.\n\n"
        f"* {DTYPE}; random weights; random data, which already lie on the device.\n"
        f"* Encoders: {TILES} tiles of {TILE_PX} px per batch.\n"
        f"* Steps, with regions x slots of a bag: {steps}.\n"
        f"* PyTorch {torch.__version__}, timm {timm.__version__}, in eager mode, with autocast for steps.\n"
        "* The limit is the shortest time for all products, none computed twice, or for all memory traffic, at the rates that"
        f" this device reached: {limits}."
    )
    record("device", "python tools/bench_device.py", rows, about if ON_CPU else about + ABOUT_GPU)


ABOUT_GPU = (
    "\n* Vision transformers are slower than PyTorch's because of the float32 operations between the products. Of uni's 95 ms,"
    " products took 42, GELU 16, norms and sums with tokens 17, cuDNN's attention 6, the layout of its inputs 7, and the"
    " convolution of the patches 3.\n"
    "* Some changes have not been timed yet: GELU by erf, LayerScale merged into the kernels, patches by a product, and, for"
    " hierarchical, a custom gradient for attention in blocks.\n"
    "* The compact encoder reaches a tenth of the limit, because its first layers are narrow: memory, not products, would be"
    " its limit."
)


if __name__ == "__main__":
    main(sys.argv[1:])
