"""launch/slurm/train.sbatch on a real cluster of two nodes."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = """
from crcjax.config import get_config as default

def get_config():
    config = default()
    config.data.regions_per_bag, config.data.batch_size, config.data.region_buckets = 4, 4, (64, 128)
    config.data.folds = 3
    config.model.width, config.model.features, config.model.attention = 8, 16, 8
    config.train.steps, config.train.eval_every, config.train.checkpoint_every = 300, 300, 1000
    config.train.log_every, config.train.replica_check_every, config.optimizer.warmup_steps = 1, 10, 2
    return config
"""


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict]]]:
    """The address of a server that keeps what is posted to it, and what it has kept."""
    kept: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            kept.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", kept
        server.shutdown()
        thread.join()


def _await(ready, what: str, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def _submit(folder: Path, webhook: str, options: list[str], arguments: list[str]) -> tuple[str, Path]:
    """A job of launch/slurm/train.sbatch with the config SMALL: its number, and the file of its output."""
    (folder / "small.py").write_text(SMALL)
    ours = {"CRCJAX_WEBHOOK": webhook, "CRCJAX_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    options = ["--gpus-per-node=0", "--mem=0", "--cpus-per-task=1", "--time=60", *options]
    command = ["sbatch", "--parsable", *options, f"--output={folder / 'job.out'}", "--mail-user=somebody"]
    command += [str(ROOT / "launch" / "slurm" / "train.sbatch"), f"--config={folder / 'small.py'}", *arguments]
    job = subprocess.run(command, cwd=ROOT, env=os.environ | ours, capture_output=True, text=True, check=True)
    return job.stdout.strip(), folder / "job.out"


def _mails(slurm: Path, job: str) -> list[str]:
    """What became of a job, by the mails that came of it."""
    of_job = [line for line in (slurm / "mails").read_text().splitlines() if re.search(rf"Job_id={job}\D", line)]
    assert all(line.endswith(" somebody") for line in of_job)
    return [found[0] for line in of_job if (found := re.search("Began|Ended|Failed|Requeued", line))]


@pytest.mark.slurm
@pytest.mark.multiprocess
def test_a_fold_trained_over_two_nodes_is_stopped_by_a_signal_requeued_and_goes_on_to_its_end(
    slurm: Path, painted: Path, tmp_path: Path, webhook: tuple[str, list[dict]]
) -> None:
    address, posted = webhook
    run = tmp_path / "run"
    store = [f"--config.data.store={painted / 'store'}", f"--config.data.cohort={painted / 'cohort.csv'}"]
    job, output = _submit(tmp_path, address, ["--nodes=2", "--array=1"], [f"--workdir={run}", *store])

    def text() -> str:
        return output.read_text() if output.exists() else ""

    _await(lambda: re.search(r"^\[0\] step \d", text(), re.MULTILINE) or "failure" in str(posted), text())
    # As SLURM does before the time limit, by the script's --signal.
    subprocess.run(["scancel", "--signal=USR1", f"{job}_1"], check=True)
    _await(lambda: [post["event"] for post in posted][-1] in ("end", "failure"), text())
    assert [post["event"] for post in posted] == ["start", "requeue", "start", "end"], text()
    assert [post["restarts"] for post in posted] == [0, 0, 1, 1]
    assert {post["workdir"] for post in posted} == {str(run / "fold-1" / "seed-0")}
    saved = re.search(r"stopped at step (\d+); the same command resumes", text())
    resumed = re.search(r"resuming from step (\d+)", text())
    assert saved is not None
    assert resumed is not None
    assert saved[1] == resumed[1]
    assert "8,707 parameters on 2 cpu devices of 2 processes" in text()
    lines = [json.loads(line) for line in (run / "fold-1" / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 301))
    assert json.loads((run / "fold-1" / "seed-0" / "config.json").read_text())["data"]["fold"] == 1
    for process in (0, 1):
        assert "trained to step 300" in (run / "fold-1" / "seed-0" / "logs" / f"process-{process}.log").read_text()
    _await(lambda: set(_mails(slurm, job)) == {"Began", "Requeued", "Ended"}, "the mails of a job that ended", 20)


@pytest.mark.slurm
@pytest.mark.multiprocess
def test_a_job_that_fails_tells_the_webhook_and_by_mail_and_is_not_repeated(
    slurm: Path, tmp_path: Path, webhook: tuple[str, list[dict]]
) -> None:
    address, posted = webhook
    nowhere = [f"--workdir={tmp_path / 'run'}", f"--config.data.store={tmp_path}", "--config.data.cohort=absent.csv"]
    job, output = _submit(tmp_path, address, ["--nodes=1"], nowhere)
    _await(lambda: len(posted) > 1, "the webhook is told of the failure", 60)
    _await(lambda: len(_mails(slurm, job)) > 1, "the mails of a job that failed", 20)
    assert [(post["event"], post["status"], post["restarts"]) for post in posted] == [
        ("start", None, 0),
        ("failure", 2, 0),
    ]
    assert {(post["job"], post["name"], post["workdir"]) for post in posted} == {(job, "crcjax", str(tmp_path / "run"))}
    assert sorted(_mails(slurm, job)) == ["Began", "Failed"]
    assert "absent.csv" in output.read_text()


@pytest.mark.parametrize(
    ("array", "arguments", "message"),
    [
        ("", ["--config=small.py"], "give --config FILE and --workdir DIR"),
        (
            "0",
            ["--config=small.py", "--workdir=RUN", "--config.data.folds=0"],
            "an array trains folds; give their number",
        ),
    ],
)
def test_without_a_place_for_the_run_or_folds_for_an_array_the_script_says_so(
    array: str, arguments: list[str], message: str, tmp_path: Path, webhook: tuple[str, list[dict]]
) -> None:
    address, posted = webhook
    (tmp_path / "small.py").write_text(SMALL)
    ours = {"CRCJAX_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "CRCJAX_WEBHOOK": address}
    ours |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "a", "SLURM_JOB_NODELIST": "n0", "SLURM_ARRAY_TASK_ID": array}
    command = ["bash", str(ROOT / "launch" / "slurm" / "train.sbatch"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | ours, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert [(post["event"], post["status"], post["job"]) for post in posted] == [("failure", 2, "7")]
    assert not (tmp_path / "RUN").exists()
