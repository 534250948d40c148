"""Messages for files that cannot be written: a full or read-only disk, no access, no folder."""

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
RUN_FOLDER = "choose another folder with hydra.run.dir=FOLDER"
FULL_BYTES = 1 << 20  # a disk with less free space counts as full


def disk_message(error: OSError, *, run: Path, cache: Path) -> str:
    """Says which file or folder cannot be written, and which setting chooses another one.

    Args:
        run: folder of the run.
        cache: folder of `paths.cache`.
    """
    advice = {cache: "choose another cache with paths.cache=FOLDER", run: RUN_FOLDER}
    if isinstance(error.filename, str):
        file = Path(error.filename)
        for folder, hint in advice.items():
            if file.absolute().is_relative_to(folder.absolute()):
                return write_error(error, file, hint)
        return write_error(error, file, "choose another path")
    # The system does not say which file it was.
    full = [folder for folder in advice if _is_full(folder)]
    folders = full if len(full) == 1 else list(advice)
    names = " or ".join(str(folder) for folder in folders)
    return write_error(error, names, "; ".join(advice[folder] for folder in folders))


def write_error(error: OSError, file: str | Path, advice: str) -> str:
    """Returns the message that `file` cannot be written, with what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = f"free disk space there, or {advice}"
    return f"{file} cannot be written: {error.strerror}; {advice}"


def _is_full(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free < FULL_BYTES
