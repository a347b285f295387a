"""The kill campaign of the service, in small; docs/benchmarks.md has the large one."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "campaign_serve.py"


@pytest.mark.redis
@pytest.mark.slow
def test_every_accepted_case_has_one_result_or_a_named_failure_after_20_kills_of_any_part(
    tmp_path: Path, start_redis: object
) -> None:
    command = [sys.executable, str(TOOL), str(tmp_path / "out"), "--kills", "20", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 kills" in done.stdout
    for kind in ("worker", "replica", "redis", "whole tree"):
        assert f"of {kind}" in done.stdout
