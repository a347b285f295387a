"""The communication of one step of configs/epoc.py and its predicted cost, from the programs compiled for 8 to 256 devices.

Nothing runs. XLA's text of the partitioned program states every collective with its shape and devices.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=256"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.sharding import NamedSharding
from record import RESULTS, record

sys.path.append(str(Path(__file__).parents[1] / "configs"))
from epoc import get_config

from crcjax.data.bags import Bag, bag_spec
from crcjax.models.mil import build_model
from crcjax.parallel.mesh import device_mesh
from crcjax.slides.stain.normalisation import stain_normaliser
from crcjax.train.auxiliary_tasks import add_heads, open_tasks
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import abstract_state, build_step

# Tiles along the side of a region at 10x, 20x and 40x.
FACTORS = (1, 2, 4)
# Bags, regions and tiles per region of the step that tools/bench_device.py measures.
MEASURED_TILES = (32, 64, 5)
# GPUs of a host, which NVLink connects.
HOST = 8
# Bytes/s in each direction: of a GPU's NVLink, and of the one 200 Gb/s port of a host.
NVLINK, NETWORK = 450e9, 25e9
# Seconds per collective, across hosts (True) and within one.
LATENCY = {True: 30e-6, False: 10e-6}
# Bags, devices, the mesh axes data, bag and model, and config.mesh.fsdp_min_size.
LAYOUTS = (
    (64, 8, 8, 1, 1, 0),
    (32, 32, 32, 1, 1, 0),
    (64, 32, 32, 1, 1, 0),
    (128, 32, 32, 1, 1, 0),
    (64, 32, 32, 1, 1, 65536),
    (64, 32, 8, 4, 1, 0),
    (64, 32, 16, 1, 2, 0),
    (64, 256, 64, 4, 1, 0),
    (256, 256, 256, 1, 1, 0),
    (1024, 256, 256, 1, 1, 0),
)
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_OPERATION = re.compile(
    r"= (?P<shape>\([^)]*\)|\S+) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


@dataclass(frozen=True)
class Collective:
    """One collective, seen from one device.

    Attributes:
      kind: XLA's name.
      sent: the bytes that the device sends, in a ring.
      times: how often it runs per step.
      across: whether its devices span hosts.
      sharing: the number of groups that use the port of a host at once.
    """

    kind: str
    sent: float
    times: int
    across: bool
    sharing: int


def collectives(text: str) -> list[Collective]:
    """All collectives of a program; a collective in a loop counts as often as the loop runs."""
    blocks: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            entry = name if line.startswith("ENTRY") else entry
            blocks[name] = []
        elif name:
            blocks[name].append(line)
    operations: list[Collective] = []

    def walk(block: str, times: int) -> None:
        for line in blocks.get(block, ()):
            if match := _OPERATION.search(line):
                operations.append(_collective(match["kind"], match["shape"], line, times))
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for called in re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line):
                walk(called, times * (int(trips[1]) if trips else 1))

    walk(entry, 1)
    return operations


def _collective(kind: str, shape: str, line: str, times: int) -> Collective:
    size = sum(
        SIZES[kind] * math.prod(map(int, filter(None, sides.split(","))))
        for kind, sides in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        if kind in SIZES
    )
    groups = _groups(line)
    count = len(groups[0])
    across = any(len({device // HOST for device in group}) > 1 for group in groups)
    share = {"all-reduce": 2 * (count - 1) / count, "reduce-scatter": count - 1, "collective-permute": 1}
    touching = sum(any(device < HOST for device in group) for group in groups)
    return Collective(kind, size * share.get(kind, (count - 1) / count), times, across, touching)


def _groups(line: str) -> list[list[int]]:
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return [[int(one), int(other)] for one, other in re.findall(r"(\d+),(\d+)", pairs[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, sides = ([int(side) for side in iota[i].split(",")] for i in (1, 2))
        order = [int(axis) for axis in iota[3].split(",")] if iota[3] else list(range(len(sides)))
        return np.arange(math.prod(sides)).reshape(sides).transpose(order).reshape(shape).tolist()
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{([^}]*)\}", line
    ):
        sides = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        over = re.findall(r"'(\w+)'", named[4])
        assert ":(" not in named[4], line
        devices = np.arange(math.prod(sides.values()))
        if named[2]:
            shape, order = ([int(part) for part in named[i].split(",")] for i in (2, 3))
            devices = devices.reshape(shape).transpose(order)
        devices = devices.reshape(list(sides.values()))
        order = [name for name in sides if name not in over] + over
        moved = devices.transpose([list(sides).index(name) for name in order])
        return moved.reshape(-1, math.prod(sides[name] for name in over)).tolist()
    listed = re.search(r"replica_groups=\{\{(.*?)\}\}", line)
    assert listed, line
    return [[int(device) for device in group.split(",")] for group in listed[1].split("},{")]


def compiled(bags: int, devices: int, data: int, bag: int, model: int, fsdp_min_size: int) -> list[Collective]:
    """The collectives of the step in one layout."""
    config = get_config()
    sizes, config.data.batch_size = config.mesh, bags
    sizes.data, sizes.bag, sizes.model, sizes.fsdp_min_size = data, bag, model, fsdp_min_size
    mesh = device_mesh(config, jax.devices()[:devices])
    built = build_model(config.model, len(config.data.classes), 0, FACTORS)
    normaliser, tasks = stain_normaliser(config.stain.method, config.stain.reference, ""), open_tasks(config, (), ())
    assert normaliser
    assert tasks
    add_heads(built, tasks, 0)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    batch, regions, slots = config.data.batch_size, config.data.regions_per_bag, sum(factor**2 for factor in FACTORS)
    bag_shape = Bag(
        jax.ShapeDtypeStruct((batch, regions, slots, 256, 256, 3), np.uint8),
        jax.ShapeDtypeStruct((batch, regions, slots), bool),
        jax.ShapeDtypeStruct((batch, regions, 2), np.float32),
        jax.ShapeDtypeStruct((batch,), np.int32),
        jax.ShapeDtypeStruct((batch,), np.float32),
        stain=jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((batch, *np.shape(leaf)), np.asarray(leaf).dtype), normaliser.reference
        ),
    )
    placed = jax.tree_util.tree_map_with_path(
        lambda path, part: part.update(sharding=NamedSharding(mesh, bag_spec(path))), bag_shape
    )
    step = build_step(built, optimizer, config, mesh, normaliser, tasks)
    return collectives(step.lower(abstract_state(built, optimizer, config, mesh), placed).compile().as_text())


def row(layout: tuple[int, ...]) -> dict:
    operations = compiled(*layout)
    bags, devices, data, bag, model, fsdp_min_size = layout
    by_kind: dict[str, float] = defaultdict(float)
    for one in operations:
        by_kind[one.kind] += one.sent * one.times / 1e6
    # XLA for GPUs merges the collectives of one kind and group that are outside of loops.
    merged = {(one.kind, one.across, one.sharing) if one.times == 1 else id(one): one for one in operations}
    transfer = sum(
        one.times * one.sent / (NETWORK / one.sharing if one.across else NVLINK) for one in operations if one.sent
    )
    latency = sum(one.times * LATENCY[one.across] for one in merged.values())
    tiles = bags * get_config().data.regions_per_bag * sum(factor**2 for factor in FACTORS)
    compute = seconds_per_tile() * tiles / devices
    return {
        "bags": bags,
        "devices": devices,
        "data x bag x model": f"{data} x {bag} x {model}",
        "parameters": "sharded" if fsdp_min_size else "replicated",
        "MB sent per device": ", ".join(f"{kind} {sent:.3g}" for kind, sent in sorted(by_kind.items())),
        "MB across hosts": sum(one.sent * one.times for one in operations if one.across) / 1e6,
        "compute ms": 1e3 * compute,
        "transfer ms": 1e3 * transfer,
        "latency ms": 1e3 * latency,
        "efficiency without overlap": compute / (compute + transfer + latency),
        "efficiency with overlap": compute / (compute + latency + max(0.0, transfer - compute / 2)),
    }


def measured() -> dict:
    """The last result of tools/bench_device.py on a GPU."""
    return json.loads((RESULTS / "device_gpu.json").read_text())


def seconds_per_tile() -> float:
    """The measured step of the compact encoder of configs/epoc.py on one GPU, divided by its tiles."""
    seconds = next(row["crcjax, ms"] for row in measured()["rows"] if "configs/epoc.py" in row["task"]) / 1e3
    return seconds / math.prod(MEASURED_TILES)


def main() -> None:
    rows = [row(layout) for layout in LAYOUTS]
    about = (
        "Predicted communication of one step of configs/epoc.py on 8 to 256 GPUs. No step was run on several GPUs.\n\n"
        "* Step: pixels at 10x, 20x and 40x, 32 regions per bag, stain normalisation, evidential head and artefact task, as XLA"
        " partitions it for CPUs. configs/epoc.py has two bags per device on 32 devices.\n"
        "* Compute: the compact encoder's step, measured on"
        f" {measured()['machine'].partition(',')[0]} (device_gpu: {1e6 * seconds_per_tile():.2f} µs per tile), in proportion to"
        " the tiles. Normalisation, head and task are not included.\n"
    )
    record("collectives", "python tools/collectives.py", rows, about + ABOUT_EFFICIENCY)
    print(json.dumps(rows, indent=1))


ABOUT_EFFICIENCY = (
    f"* Assumptions: {HOST} GPUs per host; NVLink of {NVLINK / 1e9:.0f} GB/s in each direction; one port of 200 Gb/s per host,"
    f" which all groups of the host share; rings; {1e6 * LATENCY[True]:.0f} µs per merged collective across hosts and"
    f" {1e6 * LATENCY[False]:.0f} µs within a host.\n"
    "* With overlap, each gradient is sent during the backward pass of the layers below it, which is half of the step.\n"
    "* The efficiency considers communication only. Sharding the parameters, or a layer, costs more than this small model can"
    " gain."
)


if __name__ == "__main__":
    main()
