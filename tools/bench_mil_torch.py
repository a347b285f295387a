"""The time of the forward pass and training step of MIL models, compared with the same models in PyTorch on the same device.

    python tools/bench_mil_torch.py [MODEL ...] [TYPE ...] [PASS ...] [INSTANCES ...]

The other rows stay as they were recorded last.
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
from crcjax.models.aggregators.registry import AGGREGATORS
from crcjax.models.mil import DTYPES

LABEL = 1
COUNTS = (1_000, 10_000, 100_000)
PASSES = ("forward", "training step")
ON_CPU = jax.default_backend() == "cpu"
DEVICE = "cpu" if ON_CPU else "cuda"
REPEATS, MOST_S, ONCE_S = (5, 30.0, 30.0) if ON_CPU else (20, 2.0, math.inf)
SLOTS = sum(factor**2 for factor in FACTORS)

# A forward pass and a training step; both wait for their end.
Timed = tuple[Callable[[], object], Callable[[], object]]


def in_torch(mil: str, features: np.ndarray, dtype: str) -> Timed:
    """The forward pass and the step of AdamW in PyTorch; bfloat16 is torch.autocast."""
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
    """The forward pass and the step of AdamW in crcjax. Both compile in `pool`; the returned function waits for them."""
    config = get_config().model
    config.mil, config.dropout = mil.partition(",")[0], 0.0
    config.features, config.attention, config.heads = WIDTH, HIDDEN, HEADS
    if ON_CPU:
        # Rematerialisation keeps the outputs of products, as PyTorch does.
        config.remat = "dots"
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
            pooled = nnx.merge(graph, params)(bag, label)
            losses = optax.softmax_cross_entropy_with_integer_labels(pooled.logits, label) + pooled.instance_loss
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
    """The least work of a forward pass and of a step: the bag is read once, and once more for the gradient of the weights."""
    with torch.device("meta"):
        model, bag = TWINS[mil](), torch.empty(count, WIDTH)
    weight_bytes = 4 * sum(part.numel() for part in model.parameters())
    bag_bytes = count * WIDTH * jnp.dtype(dtype).itemsize

    def train() -> None:
        logits, instance_loss = model(bag, LABEL)
        (logits.sum() + instance_loss).backward()

    # AdamW reads and writes the parameters and both moments, and reads the gradient, which was written.
    return (
        Work(torch_work(lambda: model(bag, None)), bag_bytes + weight_bytes),
        Work(torch_work(train), 2 * bag_bytes + 8 * weight_bytes),
    )


def rows_of(
    count: int, models: list[str], types: list[str], passes: list[str], limits: Ceilings | None
) -> Iterator[dict]:
    """Yields the rows of bags of one size, rounded up to whole regions for several slots per region."""
    features = np.random.default_rng(0).standard_normal((-(-count // SLOTS) * SLOTS, WIDTH), np.float32)
    cases = [(mil, dtype) for mil in models for dtype in types]
    bags = {mil: features if mil == SLOTTED else features[:count] for mil in models}
    with ThreadPoolExecutor(1 if ON_CPU else 4) as pool:
        # On a CPU each case is compiled on its own, because others would occupy caches and memory.
        compiling = {} if ON_CPU else {case: in_jax(case[0], bags[case[0]], case[1], pool) for case in cases}
        compiled = {case: ready() for case, ready in compiling.items()}
        for mil, dtype in cases:
            ours = compiled[mil, dtype] if compiled else in_jax(mil, bags[mil], dtype, pool)()
            theirs = in_torch(mil, bags[mil], dtype)
            works = work_of(mil, len(bags[mil]), dtype)
            for name, ours_call, torch_call, work in zip(PASSES, ours, theirs, works, strict=True):
                if name not in passes:
                    continue
                seconds = median_seconds(ours_call, REPEATS, MOST_S, ONCE_S)
                torch_seconds = median_seconds(torch_call, REPEATS, MOST_S, ONCE_S)
                row = {"instances": f"{count:,}", "model": mil, "type": dtype, "pass": name}
                row |= {"crcjax, ms": seconds * 1e3, "PyTorch, ms": torch_seconds * 1e3}
                row |= {"speed-up": torch_seconds / seconds}
                if limits:
                    least, limit = limits.seconds(work, dtype)
                    row |= {"fraction of limit": least / seconds, "limit": limit}
                print(row, flush=True)
                yield row


def main(chosen: list[str]) -> None:
    types = [part for part in chosen if part in DTYPES] or ["float32"] + ["bfloat16"] * (not ON_CPU)
    models = [part for part in chosen if part in TWINS] or list(TWINS)
    passes = [part for part in chosen if part in PASSES] or list(PASSES)
    counts = [int(part) for part in chosen if part not in {*DTYPES, *TWINS, *PASSES}] or COUNTS
    # TF32 on GPUs, which is JAX's default.
    torch.set_float32_matmul_precision("high")
    # A CPU keeps small bags in its caches, so that the limit of its memory says nothing.
    limits = None if ON_CPU else ceilings(types)
    measured = set(product([f"{count:,}" for count in counts], models, types, passes))
    key = ("instances", "model", "type", "pass")
    rows = [row for row in earlier_rows("mil_torch") if tuple(row[name] for name in key) not in measured]
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
    stops_at = "" if math.isinf(ONCE_S) else " If the first call takes longer than that, its time is given."
    about = (
        "Forward pass and training step of every MIL model, compared with the same model in PyTorch.\n\n"
        f"* {WIDTH} features, {HIDDEN} hidden units, one bag.\n"
        f"* Medians of {REPEATS} calls; after {MOST_S:.0f} s no call follows the third.{stops_at}\n"
        f"* With {SLOTS} slots per region (10x, 20x and 40x), instances are rounded up to whole regions: 48, 477 and 4,762.\n"
        "* Steps of clam and dsmil include their instance losses.\n"
        f"* PyTorch {torch.__version__} in eager mode.\n"
    )
    about += ABOUT_CPU if limits is None else ABOUT_GPU.format(limits)
    record("mil_torch", "python tools/bench_mil_torch.py", rows, about)


ABOUT_CPU = (
    "* Steps of hierarchical and transmil use `config.model.remat = dots`, which keeps the outputs of products, as PyTorch does.\n"
    "* The speed of the machine changed by up to 1.7 between rows. Compare figures within a row.\n\n"
    "**Products.** Where crcjax is slower, the cause is XLA's CPU code for products. Times in ms for 10,000 x 1,024 features:\n\n"
    "| outputs | | forward | gradient of the inputs | gradient of the weights |\n|---|---|---|---|---|\n"
    "| 1,024 | XLA | 182 | 185 | 166 |\n| 1,024 | PyTorch | 151 | 148 | 130 |\n"
    "| 256 | XLA | 41 | 63 | 33, computed transposed; 48 without |\n| 256 | PyTorch | 35 | 44 | 33 |\n\n"
    "With few instances, the start of an XLA program counts too.\n\n"
    "**Attention.** With one slot per region, hierarchical computes attention between all instances. PyTorch has one kernel for"
    " it. crcjax computes tiles of 256 queries and 512 keys; their scores stay in the caches and are recomputed for the gradient."
    " It is slower because of the products, and because XLA computes exponentials and sums apart from them. Times in s for"
    " attention alone, 10,000 instances, 4 heads of 256 channels:\n\n"
    "| method | forward | with gradient |\n|---|---|---|\n"
    "| tiles of 256 x 512 | 4.4 | 13.1 |\n| the same, gradients of the keys transposed | | 14.4 |\n"
    "| tiles of 512 x 512 | 4.4 | 14.4 |\n| the same, gradients of the keys transposed | | 15.1 |\n"
    "| blocks of 209 queries and all keys | 4.9 | 13.3 |\n| PyTorch | 3.1 | 11.5 |\n\n"
    "On 100,000 instances, the forward pass in blocks of 20 queries and all keys took 1,914 s.\n\n"
    "**TransMIL.**\n\n"
    "* On 1,000 instances its step is the inverse of the landmarks' matrix: 72 products of 512 x 512 per head and layer. The"
    " measured code computed as little as eleven sixteenths of each matrix, where a bag had no more landmarks. The plain iteration"
    " that replaced it has not been measured.\n"
    "* It convolves by shifted products: 7 x 7 of 1,024 channels take 0.36 s of processor time forward; XLA's grouped convolution"
    " takes 4.1 s.\n"
    "* The gradients of its kernels are products with ones. For one bag, 33 taps over 10,001 instances take 0.2 s; XLA's code for"
    " sums takes 4.1 s. With sums, steps took 21 s on 10,000 instances and 235 s on 100,000."
)
ABOUT_GPU = (
    "* float32 products use TF32 in both; bfloat16 is PyTorch's autocast.\n"
    "* The limit is the shortest time for all products or for all memory traffic, at the rates that this device reached: {}.\n"
    "* Training steps are faster than PyTorch's, except hierarchical's in bfloat16 with one slot per region on 10,000 regions."
    " cuDNN's kernel is used for heads of up to 128 channels, and its heads have 256. PyTorch's kernel keeps the scores on the"
    " chip. With 8 heads of 128 channels, cuDNN's kernel took 0.9 ms forward and 3.1 ms with gradient; blocks took 4.7 and"
    " 19 ms.\n"
    "* A forward pass of few operations takes the time to start a program, 0.1 ms. TransMIL's forward pass spends its time on"
    " sums of shifted products and on masking and sorting instances.\n"
    "* Not measured: 100,000 instances with transmil and both hierarchical.\n"
    "* Some changes have not been timed yet. TransMIL: values reach the landmarks first, the inverse is computed in part, and the"
    " gradients of the kernels are products. hierarchical with one slot per region on 10,000 instances: a custom gradient for"
    " attention in blocks."
)


if __name__ == "__main__":
    main(sys.argv[1:])
