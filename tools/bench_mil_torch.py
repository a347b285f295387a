"""Seconds of MIL models' forward pass and training step, ours and the same in PyTorch, on the same device.

python tools/bench_mil_torch.py [MODEL ...] [TYPE ...] [PASS ...] [INSTANCES ...]     # of others, the rows recorded last stay
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from ceilings import Ceilings, Work, ceilings, median_seconds, torch_work, wait_for_torch
from flax import nnx
from record import earlier_rows, record
from torch import nn
from torch_mil import CLASSES, FACTORS, HEADS, HIDDEN, SLOTTED, TWINS, WIDTH

from crcjax.config import get_config
from crcjax.models.aggregators.pooling import Instances
from crcjax.models.mil import AGGREGATORS, DTYPES

LABEL = 1
COUNTS = (1_000, 10_000, 100_000)
PASSES = ("forward", "training step")
ON_CPU = jax.default_backend() == "cpu"
DEVICE = "cpu" if ON_CPU else "cuda"
REPEATS, MOST_S, ONCE_S = (5, 30.0, 30.0) if ON_CPU else (20, 2.0, math.inf)
SLOTS = sum(factor**2 for factor in FACTORS)

Timed = tuple[
    Callable[[], object], Callable[[], object]
]  # a forward pass and a training step, which wait for their end


def in_torch(mil: str, features: np.ndarray, dtype: str) -> Timed:
    """The forward pass and the step of AdamW; in bfloat16 as torch.autocast has it."""
    model, label = TWINS[mil]().to(DEVICE), torch.tensor([LABEL], device=DEVICE)
    bag = torch.from_numpy(features).to(DEVICE, getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    autocast = partial(torch.autocast, DEVICE, torch.bfloat16, enabled=dtype == "bfloat16")

    def forward() -> None:
        with torch.inference_mode(), autocast():
            model(bag, None)
        wait_for_torch()

    def step() -> None:
        optimizer.zero_grad()
        with autocast():
            logits, instance_loss = model(bag, LABEL)
            loss = nn.functional.cross_entropy(logits, label) + instance_loss
        loss.backward()
        optimizer.step()
        wait_for_torch()

    return forward, step


def in_jax(mil: str, features: np.ndarray, dtype: str, pool: ThreadPoolExecutor) -> Callable[[], Timed]:
    """The forward pass and the step of AdamW, compiled in `pool` until they are asked for."""
    config = get_config().model
    config.mil, config.dropout = mil.partition(",")[0], 0.0
    config.features, config.attention, config.heads = WIDTH, HIDDEN, HEADS
    if ON_CPU:
        config.remat = "dots"  # products are kept, as PyTorch keeps them
    factors = FACTORS if mil == SLOTTED else (1,)
    graph, first = nnx.split(AGGREGATORS[config.mil](config, CLASSES, factors, dtype=DTYPES[dtype], rngs=nnx.Rngs(0)))
    sizes = [sum(part.size for part in jax.tree.leaves(first)), sum(part.numel() for part in TWINS[mil]().parameters())]
    assert sizes[0] == sizes[1], f"{mil}: {sizes[0]:,} parameters, PyTorch's {sizes[1]:,}"
    optimizer = optax.adamw(1e-4)
    values = jnp.asarray(features, dtype)[None]
    bag = Instances(values, jnp.ones((1, len(features)), bool), jnp.zeros((1, len(features), 2)))
    label = jnp.array([LABEL])

    @jax.jit
    def forward(params: nnx.State, bag: Instances) -> jax.Array:
        return nnx.merge(graph, params)(bag).logits

    @partial(jax.jit, donate_argnums=0)
    def step(state: tuple, bag: Instances) -> tuple:
        params, moments = state

        def loss(params: nnx.State) -> jax.Array:
            found = nnx.merge(graph, params)(bag, label)
            losses = optax.softmax_cross_entropy_with_integer_labels(found.logits, label) + found.instance_loss
            return losses.mean()

        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    state = [(first, optimizer.init(first))]
    lowered = forward.lower(first, bag), step.lower(state[0], bag)
    programs = [pool.submit(one.compile) for one in lowered]

    def ready() -> Timed:
        forward, step = (program.result() for program in programs)

        def train() -> None:
            state[0] = jax.block_until_ready(step(state[0], bag))

        return lambda: jax.block_until_ready(forward(first, bag)), train

    return ready


def work_of(mil: str, count: int, dtype: str) -> tuple[Work, Work]:
    """What a forward pass and a step must do at least: the bag is read once, and for the weights' gradient once more."""
    with torch.device("meta"):
        model, bag = TWINS[mil](), torch.empty(count, WIDTH)
    held = 4 * sum(part.numel() for part in model.parameters())
    bag_bytes = count * WIDTH * jnp.dtype(dtype).itemsize

    def train() -> None:
        logits, instance_loss = model(bag, LABEL)
        (logits.sum() + instance_loss).backward()

    # AdamW reads and writes the parameters and both moments, and reads the gradient, which was written.
    return (
        Work(torch_work(lambda: model(bag, None)), bag_bytes + held),
        Work(torch_work(train), 2 * bag_bytes + 8 * held),
    )


def rows_of(
    count: int, models: list[str], types: list[str], passes: list[str], limits: Ceilings | None
) -> Iterator[dict]:
    """The rows of bags of one size, of several slots a region the next whole number of regions."""
    features = np.random.default_rng(0).standard_normal((-(-count // SLOTS) * SLOTS, WIDTH), np.float32)
    cases = [(mil, dtype) for mil in models for dtype in types]
    bags = {mil: features if mil == SLOTTED else features[:count] for mil in models}
    with ThreadPoolExecutor(1 if ON_CPU else 4) as pool:
        # On a CPU one by one: what is held would crowd the caches, and the memory.
        made = {} if ON_CPU else {case: in_jax(case[0], bags[case[0]], case[1], pool) for case in cases}
        compiled = {case: ready() for case, ready in made.items()}
        for mil, dtype in cases:
            ours = compiled[mil, dtype] if compiled else in_jax(mil, bags[mil], dtype, pool)()
            theirs = in_torch(mil, bags[mil], dtype)
            for what, one, other, work in zip(PASSES, ours, theirs, work_of(mil, len(bags[mil]), dtype), strict=True):
                if what not in passes:
                    continue
                seconds, of_torch = (median_seconds(call, REPEATS, MOST_S, ONCE_S) for call in (one, other))
                row = {"instances": f"{count:,}", "model": mil, "type": dtype, "pass": what, "ours, ms": seconds * 1e3}
                row |= {"PyTorch, ms": of_torch * 1e3, "times as fast": of_torch / seconds}
                if limits:
                    least, by = limits.seconds(work, dtype)
                    row |= {"of the limit": least / seconds, "limit": by}
                print(row, flush=True)
                yield row


def main(chosen: list[str]) -> None:
    types = [part for part in chosen if part in DTYPES] or ["float32"] + ["bfloat16"] * (not ON_CPU)
    models = [part for part in chosen if part in TWINS] or list(TWINS)
    passes = [part for part in chosen if part in PASSES] or list(PASSES)
    counts = [int(part) for part in chosen if part not in {*DTYPES, *TWINS, *PASSES}] or COUNTS
    torch.set_float32_matmul_precision("high")  # on GPUs as JAX has it by default: TF32
    limits = None if ON_CPU else ceilings(types)  # a CPU holds small bags in its caches
    anew = set(product([f"{count:,}" for count in counts], models, types, passes))
    earlier = earlier_rows("mil_torch")
    rows = [row for row in earlier if tuple(row[name] for name in ("instances", "model", "type", "pass")) not in anew]
    for count in counts:
        rows += rows_of(count, models, types, passes, limits)
    models, types = list(TWINS), list(DTYPES)
    rows.sort(
        key=lambda row: (
            int(row["instances"].replace(",", "")),
            models.index(row["model"]),
            types.index(row["type"]),
            PASSES.index(row["pass"]),
        )
    )
    note = (
        f"{WIDTH} features, {HIDDEN} hidden units, one bag, medians of {REPEATS}, of fewer, but three, past {MOST_S:.0f} s"
        f"{'' if math.isinf(ONCE_S) else ', of the first call alone if it takes longer'}."
        f" Of {SLOTS} slots a region (10x, 20x and 40x), the next whole number of regions: 48, 477 and 4,762."
        f" Steps of clam and dsmil include their instance losses. PyTorch {torch.__version__}, eager. "
    )
    note += CPU_NOTE if limits is None else GPU_NOTE.format(limits)
    record("mil_torch", "python tools/bench_mil_torch.py", rows, note)


CPU_NOTE = (
    "Steps of hierarchical and transmil with config.model.remat = dots, which keeps products as PyTorch does."
    " Where ours is behind, it is by the products: 10,000 x 1,024 features and as many outputs take XLA's CPU code 182 ms"
    " forward and 185 and 166 for the gradients, PyTorch's library 151, 148 and 130; 256 outputs take 41, 63 and 33, PyTorch's"
    " 35, 44 and 33: the last, of the weights, is computed turned over, which as it stands takes 48."
    " Bags of few instances also pay XLA's start of a program."
    " hierarchical with one slot a region is attention of all to all, which PyTorch computes in one kernel: ours in tiles of 256"
    " queries and 512 keys, whose scores stay in the caches and are made again for the gradient. Behind it is by the products, as"
    " above, and by exponentials and sums that XLA computes apart from them. Attention of 10,000 alone (4 heads of 256 channels)"
    " takes, forward and with gradient, 4.4 and 13.1 s; in tiles of 512 x 512 4.4 and 14.4; with the keys' gradients turned over"
    " 14.4 and 15.1; in blocks of 209 queries and all keys 4.9 and 13.3; PyTorch's 3.1 and 11.5. On 100,000, blocks of 20 queries"
    " and all keys took 1,914 s forward. The machine's speed changed by up to 1.7 between rows: compare within one."
    " TransMIL's step on 1,000 is the inverse of the landmarks' matrix: 72 products of 512 x 512 a head and"
    " layer; it was measured as computed on as little as eleven sixteenths of them where a bag has no more; the plain iteration"
    " that replaced this was not measured. It convolves by shifted products: 7 x 7 of 1,024 channels take 0.36 s of processor time forward, XLA's grouped convolution"
    " 4.1. Its kernels' gradients are products with ones: of a single bag XLA's code takes 4.1 s for the sums of 33 taps over"
    " 10,001 instances, 0.2 for the products; steps of 10,000 took 21 s, of 100,000 235."
)
GPU_NOTE = (
    "Products of float32 are TF32 in both; bfloat16 is PyTorch's autocast. The limit is the time of the least that must be"
    " computed or moved, at what this device reached: {}. Training steps are ahead but for hierarchical's in bfloat16 with"
    " one slot a region, 10,000 regions: its heads of 256 channels are wider than those that cuDNN's kernel is used for, up to"
    " 128, where PyTorch's kernel keeps the scores on the chip. Of 8 heads of 128 cuDNN's took 0.9 ms forward and 3.1 with"
    " gradient, blocks 4.7 and 19. A forward pass of few operations is the time to start a program, 0.1 ms; TransMIL's spends"
    " its time on the sums of shifted products and on what masks and sorts instances."
    " Not measured: 100,000 instances with transmil and both hierarchical. TransMIL was measured before its values reached the"
    " landmarks first, its inverse was computed in part, and its kernels' gradients were products; hierarchical with one slot a"
    " region on 10,000, before the gradient of attention in blocks was its own."
)


if __name__ == "__main__":
    main(sys.argv[1:])
