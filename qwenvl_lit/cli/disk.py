"""Messages for disks that are full, read-only or not what a path says."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

DISK_ERRORS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EROFS,
)
FULL_BYTES = 1 << 20  # a disk with less free space counts as full


def disk_message(error: OSError, *, run: Path, cache: Path) -> str:
    """Says which file or folder cannot be written, and which setting chooses another one.

    Args:
        run: folder of the run.
        cache: folder of `paths.cache`.
    """
    advice = {
        cache: "free disk space there, or choose another cache with paths.cache=FOLDER",
        run: "free disk space there, or choose another folder with hydra.run.dir=FOLDER",
    }
    if isinstance(error.filename, str):
        file = Path(error.filename)
        for folder, hint in advice.items():
            if file.absolute().is_relative_to(folder.absolute()):
                return f"{file} cannot be written: {error.strerror}; {hint}"
        advice_for_file = "free disk space there, or choose another path"
        return f"{file} cannot be written: {error.strerror}; {advice_for_file}"
    # The system does not say which file it was.
    full = [folder for folder in advice if _is_full(folder)]
    folders = full if len(full) == 1 else list(advice)
    names = " or ".join(str(folder) for folder in folders)
    what_to_do = "; ".join(advice[folder] for folder in folders)
    return f"{names} cannot be written: {error.strerror}; {what_to_do}"


def _is_full(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free < FULL_BYTES
