"""The end of an idle cluster, on a real one of this machine."""

import os
import subprocess
import sys

from leftovers import MARK, assert_none_left
from tiny_sweep import ROOT

CLUSTER = [sys.executable, ROOT / "clusters" / "local" / "cluster.py", "--", "bash", "-c"]
STORY = """
ray job submit --no-wait --submission-id busy -- sleep 12
{python} -m clusters.autostop --minutes 0.1 --end "touch {folder}/ended"
ray job status busy
"""


def test_the_head_ends_itself_when_no_job_ran_for_so_long_and_not_before(tmp_path):
    ended = subprocess.run(
        [*CLUSTER, STORY.format(python=sys.executable, folder=tmp_path)],
        cwd=ROOT,
        env=os.environ | {MARK: str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    told = ended.stdout + ended.stderr
    assert ended.returncode == 0, told
    assert (tmp_path / "ended").exists(), told
    assert "nothing ran for 0.1 minutes: touch" in told
    assert "Ray does not answer" not in told
    assert "succeeded" in told.split("nothing ran for")[1], told  # It waited for the job.
    assert_none_left(str(tmp_path), 0)
