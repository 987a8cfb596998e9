"""Trials whose workers run out of memory, are killed too often, cannot write, or have a bug."""

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from lab import ROOT, Lab, Undisturbed, assert_as_undisturbed, ended, holder, wait_for
from leftovers import MARK, OF_TRIALS, assert_none_left


def most_images(cache: Path) -> int:
    """The physical batch size that was found so far."""
    return min(
        (json.loads(p.read_text())["size"] for p in cache.glob("physical*.json")), default=99
    )


def test_out_of_memory_fenced_out_without_space_then_left_alone(
    cluster: Lab, undisturbed: Undisturbed, small_disk
):
    sweep = cluster.sweep("worn", [1e-3], "workers_per_trial: 1\nmax_failures: 0")
    mounts = os.geteuid() == 0  # Others may not; all but the full disk is tested then, too.
    if mounts:
        kept = [(path, path.read_text()) for path in sweep.trials.glob("*/trial_id")]
        small_disk(sweep.trials, 6000)
        for path, text in kept:
            path.parent.mkdir()
            path.write_text(text)

    driver = sweep.start(spoilt="memory")
    trial = sweep.wait_for_trial(process=driver)
    cache = sweep.config.folder.parent / "cache"
    wait_for(lambda: most_images(cache) <= 7, "batch that fits into memory")
    newer = int(time.time()) + 10
    (sweep.config.folder / "launch").write_text(str(newer))  # As a newer driver would.
    code, told = ended(driver)
    assert code == 1
    assert f"a newer driver (launch {newer}) runs sweep 'worn': this worker of launch" in told
    assert not (trial / "evaluation.json").exists()
    assert not (trial / "error.txt").exists(), "the trial belongs to the newer driver"

    if mounts:
        last = trial / "checkpoints" / "last.pt"
        written = last.stat().st_mtime_ns
        driver = sweep.start()
        wait_for(lambda: last.stat().st_mtime_ns != written, "next checkpoint")
        filler = sweep.trials / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        code, told = ended(driver)
        assert code == 1
        # The run or its ledger, whichever writes first.
        assert re.search(r"cannot be (used|written) \(No space left on device\)", told), told
        assert torch.load(last)["step"] % 5 == 0, "the last checkpoint is whole"
        assert not (trial / "evaluation.json").exists()
        filler.unlink()

    code, told = sweep.finish()
    assert code == 0, told
    assert_as_undisturbed(sweep, undisturbed)


def test_who_lacks_the_clusters_token_is_told_so_in_one_line(cluster: Lab):
    address = cluster.environment["RAY_ADDRESS"]
    kept = {k: v for k, v in cluster.environment.items() if not k.startswith("RAY_AUTH")}
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster.folder / "none")}
    forgot = Lab(cluster.folder, kept | settings)
    code, told = forgot.sweep("forgot", [1e-3]).finish("--doctor")
    assert code == 1
    (line,) = [line for line in told.splitlines() if line.startswith("FAIL")]
    stranger = subprocess.run(
        [sys.executable, "-c", "from sweep.driver.cluster import join_cluster; join_cluster()"],
        cwd=ROOT,
        env=kept | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    for text in (line, stranger.stderr.splitlines()[-1]):
        assert f"RAY_ADDRESS='{address}' cannot be joined" in text
        assert "RAY_AUTH_MODE=token" in text
    assert "Traceback" not in told


def test_ten_short_trials_leave_no_process_and_the_same_bug_twice_stops_the_sweep(cluster: Lab):
    # The two rates that the bug waits for are the last but one that this seed draws.
    rates = [1e-2, 1e-4, 2e-2, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4, 7e-4, 8e-4, 9e-4]
    head = "workers_per_trial: 1\nmax_failures: 0\nmax_same_error: 2\nsearch_seed: 1"
    sweep = cluster.sweep("ten", rates, head, steps=8)
    driver, seen, killed = sweep.start(spoilt="bug"), defaultdict(list), 0
    while driver.poll() is None:
        number_ended = len(list(sweep.trials.glob("*/evaluation.json")))
        seen[number_ended].append(len(cluster.processes(OF_TRIALS)))
        trial = sweep.running_trial() if number_ended == 3 and not killed else None
        if trial and (killed := holder(trial)):
            os.kill(killed, signal.SIGKILL)  # As by a system without memory.
        time.sleep(0.5)
    code, told = ended(driver)
    assert code == 1
    assert "2 trials in a row failed with the same error: ZeroDivisionError" in told
    assert told.count("Traceback (most recent call last)") == 1
    assert "spoilt/bug/sitecustomize.py" in told
    assert "a worker's process was killed, more often than max_failures allows" in told
    assert "max_physical_batch_size=auto" in told
    entries = sweep.ledger().summary()["entries"]
    assert len(list(sweep.trials.glob("*/config.yaml"))) == len(entries) == 10
    assert len(list(sweep.trials.glob("*/evaluation.json"))) == 7
    assert sorted(e["state"] for e in entries) == [*["committed"] * 9, "reserved"]
    early, late = statistics.median(seen[1] + seen[2]), statistics.median(seen[5] + seen[6])
    print(f"processes of trials at a time: {early:g} early on, {late:g} late")
    assert 0 < late <= early + 1
    assert_none_left(cluster.environment[MARK], 60, OF_TRIALS)
