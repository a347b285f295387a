"""Kills training at random moments, lets the supervisor restart it, and compares the end with an undisturbed run, bit for bit.

    python tools/kill_campaign.py --kills 100 [--folder FOLDER]

Every call adds its kills to those recorded before. A run that ends in other bits is kept, and named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import psutil
from bench_feed import WIDTH, feature_store
from record import earlier_rows, record

from crcjax.models.mil import build_model
from crcjax.runs.checkpoint import restore_params
from crcjax.runs.run_directory import open_run

ROOT = Path(__file__).parents[1]
STEPS = 60
# The longest time from one kill to the next, in seconds. A run needs less to start again and to save several times.
LONGEST_PAUSE_S = 30.0
RECOVERY_TIMEOUT_S = 600.0
# 200 MB of parameters and moments; a checkpoint every 5 steps is written most of the time.
CONFIG = f"""
from crcjax.config import get_config as default

def get_config():
    config = default()
    config.data.features, config.data.batch_size, config.data.regions_per_bag = True, 4, 16
    config.data.region_buckets = (256, 4096)
    config.model.encoder, config.model.imported_features = "random", {WIDTH}
    config.model.features, config.model.attention = 4096, 1536
    config.augment.flips, config.augment.stain = False, 0.0
    config.train.steps, config.train.eval_every, config.train.checkpoint_every = {STEPS}, 30, 5
    config.train.log_every, config.optimizer.warmup_steps = 1, 2
    return config
"""
CLOCK = {"train/steps_per_s", "train/slides_per_hour", "train/data_wait"}
STARTING, SAVING, BETWEEN, ALL = "starting or restoring", "during a save", "between two saves", "all moments"


@dataclass(frozen=True)
class Kill:
    """One kill: the moment and the cost."""

    moment: str
    recovery_s: float
    lost_steps: int


class Training:
    """A supervised training; its lines of output come with their times."""

    def __init__(self, folder: Path, run: Path):
        self.run = run
        arguments = [f"--config={folder / 'config.py'}", f"--workdir={run}"]
        arguments += [f"--config.data.store={folder / 'store'}", f"--config.data.cohort={folder / 'cohort.csv'}"]
        command = [sys.executable, "-m", "crcjax.main"]
        supervise = [sys.executable, "-m", "crcjax.cli", "supervise", "--run", str(run), "--first-delay-s", "0.1"]
        supervise += ["--max-delay-s", "0.1", "--max-failures", "1000", "--"]
        self._supervisor = subprocess.Popen(
            [*supervise, *command, *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
        )
        self._lines: queue.Queue[tuple[float, str] | None] = queue.Queue()
        self.output: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def processes(self) -> list[psutil.Process]:
        """The training processes, without supervisor and launcher."""
        with suppress(psutil.Error):
            children = psutil.Process(self._supervisor.pid).children(recursive=True)
            return [
                child
                for child in children
                if "crcjax.main" in child.cmdline() and not child.cmdline()[1].endswith("local.py")
            ]
        return []

    def lines(self, until_s: float) -> Iterator[tuple[float, str]]:
        """The lines of output up to a time of the monotonic clock, or to the end."""
        while (remaining_s := until_s - time.monotonic()) > 0:
            try:
                line = self._lines.get(timeout=remaining_s)
            except queue.Empty:
                return
            if line is None:
                self._lines.put(None)
                return
            yield line

    def status(self) -> int | None:
        """The supervisor's exit status; None while it runs."""
        return self._supervisor.poll()

    def end(self) -> None:
        """Ends whatever still runs."""
        for process in [*self.processes(), self._supervisor]:
            with suppress(psutil.Error, OSError):
                process.kill()
        self._supervisor.wait()

    def _read(self) -> None:
        assert self._supervisor.stdout
        for line in self._supervisor.stdout:
            self.output.append(line)
            self._lines.put((time.monotonic(), line))
        self._lines.put(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--folder", type=Path, help="a folder on the disk of the checkpoints; by default a temporary one"
    )
    options = parser.parse_args()
    generator = random.Random()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        prepare(folder)
        undisturbed = train(folder, folder / "undisturbed")
        import_s = import_seconds()
        kills: list[Kill] = []
        rounds = differing = 0
        while len(kills) < options.kills:
            run = folder / f"run-{rounds}"
            result = train(folder, run, generator, kills, options.kills)
            rounds += 1
            differing += result != undisturbed
            print(f"{len(kills)} kills, {rounds} runs, {differing} with other bits", flush=True)
    add(kills, rounds, differing, import_s)


def prepare(folder: Path) -> None:
    """Writes the store, the cohort with three validation slides, and the config."""
    feature_store(folder)
    header, *rows = (folder / "cohort.csv").read_text().splitlines()
    rows[-3:] = [row.replace(",train", ",val") for row in rows[-3:]]
    (folder / "cohort.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "config.py").write_text(CONFIG)


def train(
    folder: Path,
    run: Path,
    generator: random.Random | None = None,
    kills: list[Kill] | None = None,
    most_kills: int = 0,
) -> str:
    """Trains to the end, with kills added to `kills` if there is a generator. Returns the hash of parameters and history."""
    training = Training(folder, run)
    try:
        while generator and kills is not None and len(kills) < most_kills and training.status() is None:
            kill = disturb(training, generator)
            if kill:
                kills.append(kill)
                print(kill, flush=True)
        for _ in training.lines(time.monotonic() + RECOVERY_TIMEOUT_S):
            pass
        if training._supervisor.wait(60) != 0:
            raise SystemExit(f"the training of {run} failed:\n{''.join(training.output[-40:])}")
    finally:
        training.end()
    return fingerprint(run)


def disturb(training: Training, generator: random.Random) -> Kill | None:
    """Waits for a random time, kills, and waits for the next finished step; None if the run ended before the kill."""
    step = 0
    moment = STARTING
    for _, line in training.lines(time.monotonic() + generator.uniform(0.0, LONGEST_PAUSE_S)):
        step, moment = progress(line, step, moment)
    victims = training.processes()
    if not victims:
        return None
    if moment != STARTING and list((training.run / "checkpoints").glob("unfinished-*")):
        moment = SAVING
    killed = time.monotonic()
    for process in victims:
        with suppress(psutil.Error):
            process.kill()
    resumed: int | None = None
    for printed_s, line in training.lines(killed + RECOVERY_TIMEOUT_S):
        if match := re.search(r"resuming from step (\d+)", line):
            resumed = int(match[1])
        elif re.search(r": starting$", line.rstrip()):
            resumed = 0
        match = re.search(r"step (\d+)/", line)
        if match and resumed is None:
            step = max(step, int(match[1]))
        elif match and resumed is not None:
            return Kill(moment, printed_s - killed, max(step - resumed, 0))
        elif resumed == STEPS:
            # It was killed after the last step was saved.
            return Kill(moment, printed_s - killed, 0)
    raise SystemExit(f"no step within {RECOVERY_TIMEOUT_S} s of a kill:\n{''.join(training.output[-40:])}")


def progress(line: str, step: int, moment: str) -> tuple[int, str]:
    """The last finished step and the moment, after a line of output."""
    if match := re.search(r"step (\d+)/", line):
        return int(match[1]), BETWEEN
    return step, STARTING if "restart" in line and "crcjax supervise" in line else moment


def fingerprint(run: Path) -> str:
    """The hash of a run's last parameters, and of its history without the clock."""
    config = open_run(run).config
    params, _ = restore_params(run, build_model(config.model, len(config.data.classes), 0), STEPS)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = {name: value for name, value in json.loads(line).items() if name not in CLOCK}
        digest.update(json.dumps(values, sort_keys=True).encode())
    return digest.hexdigest()


def import_seconds() -> float:
    """The median time of a process that imports jax and lists its devices."""
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], check=True)
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds)


def add(kills: list[Kill], rounds: int, differing: int, import_s: float) -> None:
    """Adds kills to the recorded ones, by moment."""
    rows = earlier_rows("kills")
    for moment in (STARTING, SAVING, BETWEEN):
        chosen = [kill for kill in kills if kill.moment == moment]
        if chosen:
            rows = merged(rows, row_of(moment, chosen, import_s))
    rows = merged(rows, row_of(ALL, kills, import_s, rounds, differing))
    rows.sort(key=lambda row: row["killed"])
    record("kills", "python tools/kill_campaign.py --kills 20", rows, ABOUT)


def row_of(killed: str, kills: list[Kill], import_s: float, runs: int = 0, differing: int = 0) -> dict:
    """A row of the table."""
    recovery_s = [kill.recovery_s for kill in kills]
    return {
        "killed": killed,
        "kills": len(kills),
        "mean time to recovery, s": statistics.mean(recovery_s),
        "mean beyond importing jax, s": statistics.mean(recovery_s) - import_s,
        "longest, s": max(recovery_s),
        "mean steps lost": statistics.mean(kill.lost_steps for kill in kills),
        "runs": runs,
        "runs with other bits": differing,
    }


def merged(rows: list[dict], row: dict) -> list[dict]:
    """The rows with `row` added to the one of the same moment."""
    for index, earlier in enumerate(rows):
        if earlier["killed"] == row["killed"]:
            count = earlier["kills"] + row["kills"]
            means = {
                name: (earlier[name] * earlier["kills"] + row[name] * row["kills"]) / count
                for name in row
                if name.startswith("mean")
            }
            sums = {name: earlier[name] + row[name] for name in ("kills", "runs", "runs with other bits")}
            longest = {"longest, s": max(earlier["longest, s"], row["longest, s"])}
            return [*rows[:index], {**earlier, **means, **sums, **longest}, *rows[index + 1 :]]
    return [*rows, row]


ABOUT = (
    "Trainings of 200 MB of state that are killed at random moments and restarted by the supervisor: recovery, lost steps, and bits.\n\n"
    f"* {STEPS} steps over stored features, a checkpoint every 5 steps, killed up to {LONGEST_PAUSE_S:.0f} s after the last recovery.\n"
    "* Recovery: from the signal to the next finished step, in it the supervisor's delay of 0.1 s at most. `beyond importing jax` is that less the"
    " time of a process that imports jax and lists its devices, measured on the same machine before.\n"
    "* `runs with other bits` counts the runs whose last parameters or history of metrics differ from an undisturbed run's in any bit.\n"
    "* The disk is not throttled. A save of 200 MB takes as long as several steps, so that many kills come during one.\n"
    "* The machine's two cores were shared with other programs. A single process reads the compiled step from the cache.\n"
    "* Target: 10 s beyond importing jax."
)


if __name__ == "__main__":
    main()
