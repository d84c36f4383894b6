"""Writing to disk so that neither a reader nor a crash meets half a file, and saying what to do if it is refused."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import UserError

_MENDS = {
    errno.ENOSPC: "the disk is full: free some space, or put the runs elsewhere with --runs-dir",
    errno.EDQUOT: "the disk quota is used up: free some space, or put the runs elsewhere with --runs-dir",
    errno.EFBIG: "the file is larger than this file system or process may write: use another one with --runs-dir",
    errno.EROFS: "the file system is read-only: put the runs elsewhere with --runs-dir",
    errno.EACCES: "permission denied: change the owner or the mode, or put the runs elsewhere with --runs-dir",
    errno.EPERM: "the operation is not permitted: put the runs elsewhere with --runs-dir",
    errno.EEXIST: "a file stands where a folder is needed: move it away, or choose another --runs-dir",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away, or choose another --runs-dir",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter --name",
}


@contextmanager
def refusals_explained(path: Path, doing: str) -> Iterator[None]:
    """Turn an operating-system error that the user can mend into a UserError: `cannot <doing> <path>: <mend>`."""
    try:
        yield
    except Exception as error:
        code = _error_number(error)
        if code not in _MENDS:
            raise
        raise UserError(f"cannot {doing} {path}: {_MENDS[code]}") from error


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors wraps the OSError of its Rust side and keeps the number only in its text.
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match.group(1)) if match else None


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's content in one step. Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Wait until the file's content is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the folder's entries (creations and renames in it) are on the disk itself."""
    sync_file(path)
