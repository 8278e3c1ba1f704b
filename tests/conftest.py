"""What every test stands on: one thread, one cache apart from the user's, the data at hand, and a
token for Ray."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from disk_helpers import mounted

from ftd.data import Dataset, DatasetConfig, load
from ftd_ray.local import ask_for_token

ask_for_token()  # before Ray is imported: all clusters of the tests ask for it

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The number of threads changes bits; a test that sets another must not reach the next."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if os.environ.get("FTD_CACHE"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTD_CACHE", str(tmp_path_factory.mktemp("ftd-cache")))
        yield


@pytest.fixture(scope="session")
def digits(_cache: None) -> Dataset:
    return load(DatasetConfig(name="digits"))


@pytest.fixture(scope="session")
def imagenette_root() -> Path:
    """Real images in Parquet, beside the repository where they are at hand."""
    root = REPOSITORY.parent / "shared" / "data" / "imagenette-160"
    if not any(root.glob("*.parquet")):
        pytest.skip(f"no Imagenette Parquet files in {root}")
    return root


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    for options in ("-rm", "-m"):
        with mounted(options, tmp_path) as disk:
            if disk is not None:
                yield disk
                return
    pytest.skip("this user may not mount a small disk")
