"""What tests that keep something at an address share."""

from collections.abc import Iterator

import pytest
from s3_store import BUCKET, s3_store


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, str]]:
    """Environment by which programs reach a store of the module; this one has it."""
    with s3_store(BUCKET) as environment:
        yield environment


@pytest.fixture
def address(store, tmp_path) -> str:
    """A place of the test's own in the store."""
    return f"s3://{BUCKET}/{tmp_path.name}"
