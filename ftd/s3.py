"""S3 as it is written to here: a small file is one request in place of three.

pyarrow begins each upload as one of many parts. With ``allow_delayed_open`` it waits for the data,
and puts what fits into one part at once; but where a large upload cannot be begun then, it leaves
an empty object in the place of the one before. So large files go through a client without.
"""

from typing import Any

from pyarrow import fs as pafs

SMALL = 5 * 2**20
"""Bytes, the least that S3 takes for a part."""


class S3(pafs.S3FileSystem):
    """``pafs.S3FileSystem`` with these options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._small = pafs.S3FileSystem(**options, allow_delayed_open=True)

    def writer(self, size: int) -> pafs.S3FileSystem:
        """What to write a file of so many bytes by."""
        return self._small if size <= SMALL else self
