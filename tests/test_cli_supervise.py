"""The commands of supervision, on real runs."""

import json
import re
from pathlib import Path

from crcjax.monitor.heartbeat import FOLDER


def test_health_shows_a_finished_run_and_says_by_its_status_that_a_process_was_lost(
    crcjax, run: Path, tmp_path: Path
) -> None:
    done = crcjax("health", run)
    assert done.returncode == 0
    assert re.search(r"^ 0 .* 6 .* finished", done.stdout, re.MULTILINE)
    assert re.search(r"^goodput \d+\.\d% of .* in 1 attempt, 0 steps lost", done.stdout, re.MULTILINE)
    (tmp_path / FOLDER).mkdir()
    beat = json.loads((run / FOLDER / "process-0.json").read_text())
    for process in (0, 1):
        path = tmp_path / FOLDER / f"process-{process}.json"
        silent = {"process": process, "process_count": 3, "ending": "", "time_s": beat["time_s"] - 60}
        path.write_text(json.dumps(beat | silent))
    done = crcjax("health", tmp_path)
    assert done.returncode == 1
    assert len(re.findall(r"no heartbeat for \d+ s; it was ", done.stdout)) == 2
    assert re.search(r"^ 2 +no heartbeat", done.stdout, re.MULTILINE)
    done = crcjax("health", tmp_path / "absent")
    assert done.returncode == 2
    assert "has no heartbeats" in done.stderr
