"""Where things lie, and writing them so that a kill or a full disk leaves the old ones whole."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def default_cache_dir() -> Path:
    """The user's cache: $ADASPEC_CACHE, or adaspec_eagle in the system's cache folder."""
    if "ADASPEC_CACHE" in os.environ:
        return Path(os.environ["ADASPEC_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(base).expanduser() / "adaspec_eagle"


def replace_folder(made: Path, folder: Path) -> None:
    """Put the finished folder `made` in the place of `folder` (same file system), old one gone.

    If it fails or is killed half-way, the old folder stays, at the worst in .NAME-*.old beside it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-", suffix=".old"))
    old = aside / folder.name
    if folder.exists():
        folder.rename(old)
    try:
        made.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def taken(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this worker holds the lock file inside the block; the system frees a dead one's.

    wait: until whoever has it is done.
    """
    import fcntl  # not on Windows

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
