"""Notice that the cloud takes a spot machine away: Ray is told, so that its trial is kept at once.

`python -m clusters.notice` runs on every worker, beside Ray, and ends with the notice. What is then
lost does not count as a failure of the trial.
"""

import argparse
import subprocess
import sys
import time
import urllib.request

_EVERY_S = 3.0
_METADATA = "http://169.254.169.254"


def main(arguments: list[str] | None = None) -> int:
    """Waits for the notice; returns the exit code of what tells Ray."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metadata", default=_METADATA, help="address of the metadata server")
    parser.add_argument("--node-id", help="of this machine in Ray; if not given, Ray finds it")
    options = parser.parse_args(arguments)
    while not (seconds := seconds_left(options.metadata)):
        time.sleep(_EVERY_S)
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command = ["ray", "drain-node", *reason, "--deadline-remaining-seconds", str(seconds)]
    command += ["--node-id", options.node_id] if options.node_id else []
    print(f"the cloud takes this machine away: {' '.join(command)}", flush=True)
    return subprocess.call(command)


def seconds_left(metadata: str) -> int:
    """Seconds between the notice and the end on AWS or GCP; 0 while there is no notice."""
    token = _fetched(
        f"{metadata}/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 60", "PUT"
    )
    action = f"{metadata}/latest/meta-data/spot/instance-action"
    if token and _fetched(action, f"X-aws-ec2-metadata-token: {token}"):
        return 120
    preempted = f"{metadata}/computeMetadata/v1/instance/preempted"
    return 30 if _fetched(preempted, "Metadata-Flavor: Google") == "TRUE" else 0


def _fetched(url: str, header: str, method: str = "GET") -> str:
    """The text at an address; empty where there is none, or nobody answers."""
    name, _, value = header.partition(": ")
    request = urllib.request.Request(url, headers={name: value}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().decode().strip()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
