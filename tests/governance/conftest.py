"""The bucket of `tests/storage`, for surgery in it."""

from tests.storage.conftest import bucket, gcs, service  # noqa: F401  fixtures
