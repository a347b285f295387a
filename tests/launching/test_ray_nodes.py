import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from crcjax.launching.ray_nodes import overall_status, stop_local_processes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("statuses", "status"),
    [([0, 0], 0), ([4, 2], 2), ([4, 85], 85), ([0, 4], 4), ([137, 4], 137), ([5, 85], 5)],
)
def test_the_status_of_a_run_is_the_one_that_decides_what_follows(statuses: list[int], status: int) -> None:
    assert overall_status(statuses) == status


def test_the_hook_of_a_pod_makes_its_processes_save_and_waits_for_them(tmp_path: Path) -> None:
    save = "trap 'sleep 0.3; touch saved; exit 85' TERM; touch ready; while :; do sleep 0.05; done"
    marked = {"PATH": "/usr/bin:/bin", "CRCJAX_RAY_NODE": "1"}
    with (
        subprocess.Popen(["sh", "-c", save], cwd=tmp_path, env=marked) as process,
        subprocess.Popen(["sleep", "60"]) as other,
    ):
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        # A thread collects the child, as Ray's worker does.
        stop_local_processes(poll_s=0.05)
        assert (tmp_path / "saved").exists()
        assert process.wait() == 85
        assert other.poll() is None
        other.kill()


# Two nodes of Ray on this machine. The command's first attempt ends with 85 and its second with 4, each in one process.
_CAMPAIGN = """
import sys
from pathlib import Path
from ray.cluster_utils import Cluster
from crcjax.launching.ray_nodes import main

folder = Path(sys.argv[1])
(folder / "command.py").write_text('''
import sys
from pathlib import Path
places = dict(word[2:].split("=") for word in sys.argv[1:] if word.startswith(("--process", "--coordinator")))
attempts = Path("attempts-" + places["process"])
before = len(attempts.read_text().splitlines()) if attempts.exists() else 0
with attempts.open("a") as file:
    print(" ".join(sys.argv[1:]), file=file)
first = places["process"] == "0"
sys.exit((85, 0 if first else 4, 4 if first else 0, 0)[before])
''')
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20})
cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
arguments = ["--nodes=2", f"--restarts={sys.argv[2]}", f"--folder={folder}", "--"]
import os
os.environ["RAY_ADDRESS"] = cluster.address
status = main([*arguments, sys.executable, "command.py", "--config=a b"])
print("STATUS", status, flush=True)
import ray
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.ray
def test_ray_starts_a_process_on_each_node_and_starts_all_again_as_their_statuses_say(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_CAMPAIGN), str(tmp_path), "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert "STATUS 0" in done.stdout, done.stdout + done.stderr[-2000:]
    for index in (0, 1):
        lines = (tmp_path / f"attempts-{index}").read_text().splitlines()
        assert len(lines) == 4
        assert all(line.endswith(f"--processes=2 --process={index}") for line in lines)
        assert all(line.startswith("--config=a b --coordinator=") for line in lines)
