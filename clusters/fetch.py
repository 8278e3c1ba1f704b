"""Brings a folder of a bucket to this machine.

python clusters/fetch.py s3://my-bucket/imagenette data/imagenette

Files that are there with the same size stay as they are, so it can be run again.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyarrow import fs as pafs

from ftd.errors import UserError
from ftd_ray.storage import open_uri

AT_ONCE = 32


def fetch(uri: str, folder: Path) -> tuple[int, int]:
    """How many files there are, and how many of them came now."""
    filesystem, path = open_uri(uri)
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    files = [i for i in filesystem.get_file_info(selector) if i.type == pafs.FileType.File]
    if not files:
        raise UserError(f"there are no files at {uri}. Upload the data set, or change the address.")

    def bring(info: pafs.FileInfo) -> bool:
        target = folder / info.path.removeprefix(path).lstrip("/")
        if target.exists() and target.stat().st_size == info.size:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        with filesystem.open_input_stream(info.path) as stream:
            part.write_bytes(stream.read())
        part.rename(target)
        return True

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return len(files), sum(pool.map(bring, files))


def main() -> int:
    parser = argparse.ArgumentParser(prog="fetch.py", description=__doc__.splitlines()[0])
    parser.add_argument("place")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        there, came = fetch(arguments.place, arguments.folder)
    except (OSError, UserError) as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 2
    print(f"{there} files in {arguments.folder}, {came} of them fetched now")
    return 0


if __name__ == "__main__":
    sys.exit(main())
