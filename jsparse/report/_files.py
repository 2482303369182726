"""Folders and files of a report: checked before the work, replaced in one step."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from jsparse.measure import BadInput


def prepare_folder(folder: Path, option: str = "--out") -> list[Path]:
    """Makes sure that files can be written to a folder.

    Args:
        folder: made if it is missing, with its parents.
        option: of the command line, that names another folder.

    Returns:
        The folders that were made, innermost first.

    Raises:
        BadInput: if it cannot be made or written to.

    Example:
        >>> prepare_folder(Path("a/b"))
        [PosixPath('a/b'), PosixPath('a')]
        >>> prepare_folder(Path("a/b"))
        []
    """
    made = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as err:
        raise BadInput(
            f"{folder}: files cannot be written there ({err.strerror or err}). Name "
            f"another folder with {option}."
        ) from err
    return made


def write_file(file: Path, data: bytes | str) -> None:
    """Writes a file whole, or leaves what was there.

    Args:
        file: replaced if it exists.
        data: text is written as UTF-8.

    Raises:
        BadInput: if it cannot be written, e.g. on a full disk.

    Example:
        >>> write_file(Path("note.txt"), "10 Å")
        >>> Path("note.txt").read_text(encoding="utf-8")
        '10 Å'
    """
    content = data.encode() if isinstance(data, str) else data
    try:
        _replace(file, content)
    except OSError as err:
        raise BadInput(
            f"{file}: cannot be written ({err.strerror or err}). Make room, or name "
            "another folder."
        ) from err


def _replace(file: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's own mode hides it from others
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
