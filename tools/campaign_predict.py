"""Predicts 500 synthetic slides, 5 % of them broken in ten ways, in one command, and again with ten kills.

    python tools/campaign_predict.py OUT

OUT is a new folder. The command fails if a slide has no row or two, a broken slide has no reason, a good one no prediction, or
the killed command ends with another table.
"""

from __future__ import annotations

import csv
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import tifffile
from record import Row, record

from crcjax.data.cohort import load_cohort
from crcjax.demo import demo_config
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.synthetic.painter import paint_cohort
from crcjax.slides.tiling.plan import TilingParams
from crcjax.train.loop import train

SLIDES, BROKEN_SHARE, KILLS, SIZE_PX, MPP = 500, 0.05, 10, (800, 640), 1.0
TRAINING = {"train": 9, "val": 3}
POLL_S = 0.02


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def random_bytes(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def text_file(path: Path) -> None:
    path.write_text("This slide is on another disk.\n")


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("moved/away.svs")


def without_mpp(path: Path) -> None:
    """Neither µm per pixel nor the objective power, from which they would be guessed."""
    path.write_bytes(path.read_bytes().replace(b"|MPP = ", b"|--- = ").replace(b"|AppMag = ", b"|------ = "))


def zeros_for_tiles(path: Path) -> None:
    """The headers are whole, and no JPEG stream is."""
    with tifffile.TiffFile(path) as slide:
        streams = [place for page in slide.pages for place in zip(page.dataoffsets, page.databytecounts, strict=True)]
    with open(path, "r+b") as file:
        for offset, size in streams:
            file.seek(offset)
            file.write(bytes(size))


def directory_beyond_the_end(path: Path) -> None:
    """The offset of the first image directory of a classic TIFF, or of a BigTIFF, is beyond the end of the file."""
    content = bytearray(path.read_bytes())
    start = 8 if content[2] == 43 else 4
    content[start : start + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)


def without_tissue(path: Path) -> None:
    with tifffile.TiffFile(path) as slide:
        description = slide.pages[0].description
    glass = np.full((SIZE_PX[1], SIZE_PX[0], 3), 244, np.uint8)
    tifffile.imwrite(
        path, glass, tile=(256, 256), compression="jpeg", photometric="rgb", description=description, metadata=None
    )


WAYS: tuple[Callable[[Path], None], ...] = (
    *(empty, cut_off, random_bytes, text_file, folder_in_its_place, dangling_link, without_mpp, zeros_for_tiles),
    *(directory_beyond_the_end, without_tissue),
)


def trained_run(folder: Path) -> Path:
    """A model of the demo that was trained for two steps."""
    config = demo_config()
    config.train.steps, config.optimizer.warmup_steps = 2, 1
    table = paint_cohort(folder / "training", TRAINING, size_px=SIZE_PX, mpp=MPP, seed=1)
    jobs = [TileJob(row.slide_id, row.path) for row in load_cohort(table, config.data.classes).rows if row.path]
    tile_slides(jobs, folder / "store", TilingParams(("10x",)))
    config.data.store, config.data.cohort = str(folder / "store"), str(table)
    train(config, folder / "run")
    return folder / "run"


def break_slides(table: Path) -> dict[str, str]:
    """Breaks slides at equal distances, and returns the way by slide id."""
    rows = load_cohort(table, None).rows
    broken = rows[:: round(1 / BROKEN_SHARE)]
    ways = dict(zip((row.slide_id for row in broken), itertools.cycle(WAYS), strict=False))
    for row in broken:
        ways[row.slide_id](Path(str(row.path)))
    return {slide_id: way.__name__.replace("_", " ") for slide_id, way in ways.items()}


class Command:
    """`crcjax predict` as a process of its own."""

    def __init__(self, run: Path, table: Path, out: Path):
        self.table = out / "predictions.csv"
        arguments = ("predict", "--run", str(run), "--cohort", str(table), "--out", str(out))
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out.parent / f"{out.name}.log", "a") as log:
            self.process = psutil.Popen([sys.executable, "-m", "crcjax.cli", *arguments], stderr=log)

    def lines(self) -> int:
        return self.table.read_bytes().count(b"\n") - 1 if self.table.exists() else 0

    def memory_by_rows(self) -> list[tuple[int, float]]:
        """The rows written and the resident MiB, until the process ends."""
        samples = []
        while self.process.poll() is None:
            try:
                samples.append((self.lines(), self.process.memory_info().rss / 2**20))
            except psutil.Error:
                break
            time.sleep(0.1)
        self.process.wait()
        return samples

    def kill_after(self, rows: int) -> bool:
        """Kills the process once the table has that many rows; False if it ended before."""
        while self.process.poll() is None:
            if self.lines() >= rows:
                self.process.kill()
                self.process.wait()
                return True
            time.sleep(POLL_S)
        return False


def rows_of(table: Path) -> list[dict[str, str]]:
    """The rows that are whole; a kill may cut the last one."""
    text = table.read_text()
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def without_seconds(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if not name.startswith("seconds_")} for row in rows]


def killed(run: Path, table: Path, out: Path) -> tuple[int, int]:
    """Kills the command KILLS times and lets it end; returns how many rows were on disk at kills, and were predicted again."""
    done: dict[str, dict[str, str]] = {}
    for number in range(KILLS):
        assert Command(run, table, out).kill_after((number + 1) * SLIDES // (KILLS + 1))
        done |= {row["slide_id"]: row for row in rows_of(out / "predictions.csv") if row["status"] == "ok"}
    Command(run, table, out).process.wait()
    seconds = {row["slide_id"]: row["seconds_total"] for row in rows_of(out / "predictions.csv")}
    return len(done), sum(seconds.get(name) != row["seconds_total"] for name, row in done.items())


def main() -> None:
    folder = Path(sys.argv[1])
    run = trained_run(folder)
    table = paint_cohort(folder / "cohort", {"test": SLIDES}, size_px=SIZE_PX, mpp=MPP, seed=2)
    ways = break_slides(table)
    start = time.monotonic()
    command = Command(run, table, folder / "whole")
    samples = command.memory_by_rows()
    seconds = time.monotonic() - start
    undisturbed = rows_of(command.table)
    assert command.process.returncode == 1, command.process.returncode
    named = {row["slide_id"]: row for row in undisturbed}
    assert len(named) == len(undisturbed) == SLIDES
    wrong = [
        name
        for name, row in named.items()
        if (row["status"] == "ok") != (name not in ways) or (name in ways and not row["reason"])
    ]
    assert not wrong, [(name, ways.get(name), named[name]["status"], named[name]["reason"]) for name in wrong]
    peak = [
        max(mib for rows, mib in samples if low <= rows <= high)
        for low, high in ((SLIDES // 4, SLIDES // 2), (3 * SLIDES // 4, SLIDES))
    ]
    on_disk, again = killed(run, table, folder / "killed")
    repeated = rows_of(folder / "killed" / "predictions.csv")
    assert without_seconds(repeated) == without_seconds(undisturbed)
    counts = Counter(row["slide_id"] for row in repeated)
    causes = Counter(named[name]["reason"].partition(":")[0] for name in ways)
    rows = [
        Row("slides", SLIDES, "slides"),
        Row("predicted", sum(row["status"] == "ok" for row in undisturbed), "slides"),
        Row(f"broken in {len(WAYS)} ways, each named with its reason", len(ways), "slides"),
        Row("speed with start and compiling", 3600 * SLIDES / seconds, "slides/h"),
        Row("peak memory, second quarter of the slides", peak[0], "MiB"),
        Row("peak memory, last quarter of the slides", peak[1], "MiB", peak[1] / peak[0], "second quarter"),
        Row(f"rows missing after {KILLS} kills", SLIDES - len(counts), "rows"),
        Row(f"rows twice after {KILLS} kills", sum(count > 1 for count in counts.values()), "rows"),
        Row(f"rows predicted again after {KILLS} kills", again, "rows", again / on_disk, "rows on disk at the kills"),
    ]
    about = (
        "Many slides in one command, some of them broken, and the same command killed ten times.\n\n"
        f"Synthetic slides of {SIZE_PX[0]} x {SIZE_PX[1]} px at {MPP} µm per pixel; the demo's model at 10x. "
        f"Broken by: {', '.join(way.__name__.replace('_', ' ') for way in WAYS)}. "
        f"Causes that the table states: {', '.join(f'{cause} {count}' for cause, count in sorted(causes.items()))}. "
        "Kills are SIGKILL at equal numbers of rows; the final table equals that of the command that was not killed, "
        "apart from the seconds."
    )
    record("campaign_predict", "python tools/campaign_predict.py OUT", rows, about)


if __name__ == "__main__":
    main()
