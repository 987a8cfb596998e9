"""A store that speaks S3's protocol, in a process of its own: moto's server."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest

from core.privacy.ledger import durable_copy
from sweep.results import folder_copy

BUCKET = "bucket"
SECRET = "kept-from-all-messages"


def s3() -> Any:
    return boto3.client("s3")


def forget_clients() -> None:
    """What reads the environment anew."""
    durable_copy._client.cache_clear()
    folder_copy._file_system.cache_clear()


@contextmanager
def s3_store(bucket: str, port: int = 0) -> Iterator[dict[str, str]]:
    """Starts one with a bucket; gives the environment by which programs, as this one, reach it."""
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    found = (re.search(r"Running on (http://\S+)", line) for line in server.stderr)
    environment = {
        "AWS_ENDPOINT_URL": next(match[1] for match in found if match),
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    # Else its pipe fills up.
    threading.Thread(target=server.stderr.read, daemon=True).start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            forget_clients()
            s3().create_bucket(Bucket=bucket)
            yield environment
    finally:
        server.kill()
        server.wait()
        forget_clients()
