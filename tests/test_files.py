"""`write_atomically`: what may already be where a file is written, and the mode that it gets."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from moyu_ext._files import check_writable, write_atomically


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_atomically(pipe, [b"one ", memoryview(b"two")])
    reader.join(10)
    assert read == [b"one two"]
    assert stat.S_ISFIFO(pipe.stat().st_mode) and list(tmp_path.iterdir()) == [pipe]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    link = tmp_path / "link"
    link.symlink_to("there/file")
    for content in (b"new", b"newer"):  # first the target is missing
        write_atomically(link, content)
        assert link.is_symlink() and (folder / "file").read_bytes() == content
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "link", "there"]


@pytest.mark.parametrize("bits", [0o600, 0o664, 0o444])
def test_a_file_keeps_its_mode(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(bits)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and mode(path) == bits


@pytest.mark.parametrize("umask, bits", [("077", 0o600), ("002", 0o664), ("022", 0o644)])
def test_a_new_file_gets_what_the_umask_leaves(tmp_path: Path, umask: str, bits: int) -> None:
    # In a process of its own: the umask belongs to all threads.
    code = (
        f"import os, pathlib; os.umask(0o{umask}); from moyu_ext._files import write_atomically; "
        f"write_atomically(pathlib.Path({str(tmp_path / 'new')!r}), b'x')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert mode(tmp_path / "new") == bits


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_atomically(path, [b"half", None])  # type: ignore[list-item]
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path / "new")
    os.mkfifo(tmp_path / "pipe")
    check_writable(tmp_path / "pipe")  # without waiting for a reader
    (tmp_path / "loop").symlink_to("loop")
    for name in ("missing/file", "loop", "."):
        with pytest.raises(OSError):
            check_writable(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loop", "pipe"]
