"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Write `content` (parts: one behind the other) beside `path`, move it there in one step.

    A symbolic link stays and its target is replaced. A file that is there keeps its mode, a new one
    gets what the umask leaves. What is there and is no file (a pipe, a device) is written to.
    """
    parts = (content,) if isinstance(content, bytes) else content
    mode = _mode(path)
    if mode is not None and not stat.S_ISREG(mode):
        with open(path, "wb") as there:
            there.writelines(parts)
        return
    target = path.resolve()
    file, temporary = _beside(target, mode)
    try:
        with file:
            file.writelines(parts)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Raise OSError where `write_atomically` could not write to `path`. Nothing is left behind."""
    mode = _mode(path)
    if mode is not None and not stat.S_ISREG(mode):
        # Opening a pipe would wait for its reader.
        if stat.S_ISDIR(mode) or not os.access(path, os.W_OK):
            raise PermissionError(0, "is a directory or not writable", str(path))
        return
    file, temporary = _beside(path.resolve(), mode)
    file.close()
    temporary.unlink()


def _mode(path: Path) -> int | None:
    """Type and mode of what is there, links followed; None where nothing is."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _beside(target: Path, mode: int | None) -> tuple[BinaryIO, Path]:
    """A new, open file in the folder of `target`, with `mode`."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    # The kernel applies the umask: reading it from here would change it for all threads.
    bits = 0o666 if mode is None else stat.S_IMODE(mode)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, bits)
    if mode is not None:
        os.fchmod(handle, bits)
    return os.fdopen(handle, "wb"), temporary
