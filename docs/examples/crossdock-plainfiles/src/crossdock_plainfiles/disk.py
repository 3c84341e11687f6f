"""The few ways in which files are changed. Each is done whole, or not at all, whenever the process is killed.

A rename is one step: whoever looks finds the file under its old name or its new one. A process that is killed loses nothing that it
has written; a power loss does, unless the file was flushed, and the directory that has its name.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from crossdock.errors import BrokerUnavailable

PATIENCE: Final = 15.0
"""Seconds to wait for a lock that somebody else holds."""
_DIGITS: Final = 20


def make_folder(folder: Path) -> None:
    """Make a directory for this user alone, unless it is there."""
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
        sync(folder.parent)


def make_file(path: Path) -> None:
    """Make an empty file for this user alone, unless it is there."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    sync(path.parent)


def write(path: Path, data: bytes) -> None:
    """Write and flush a file. Killed on the way, there is a part of it: so write where nobody looks, and rename it then."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        while data:
            data = data[os.write(file, data) :]
        os.fsync(file)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(file)


def rename(path: Path, to: Path) -> None:
    """Give a file another name; a file that has it goes."""
    os.rename(path, to)


def unlink(path: Path) -> None:
    """Delete a file, if it is there."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def sync(folder: Path) -> None:
    """Flush a directory: the names that are in it, and those that are gone."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def erase(folder: Path) -> None:
    """Delete a directory with all that is in it. For those who look it is gone in one step: a name with a dot is nobody's."""
    gone = folder.with_name(f".{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)  # left here by somebody who was killed
    os.rename(folder, gone)
    sync(folder.parent)
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):
        os.rmdir(folder.parent)  # unless there is something else in it


def why(error: OSError) -> str:
    """What the system says, as the end of a sentence."""
    return (error.strerror or type(error).__name__).lower()


# --- a lock file, with a number in it -------------------------------------------------------------


class LockFile:
    """A file that one thread of one process can hold. The end of a process, whatever that is, releases what it held.

    Threads of one process line up for it, and only the first of them asks for the file again and again.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._line = threading.Lock()
        self._file = -1

    def acquire(self) -> bool:
        """Take it; False if there is no such file.

        Raises:
            BrokerUnavailable: Somebody else holds it all the time.
        """
        end = time.monotonic() + PATIENCE
        if not self._line.acquire(timeout=PATIENCE):
            raise self._too_long()
        try:
            while True:
                self._file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
                while not self._try():
                    if time.monotonic() > end:
                        raise self._too_long()
                    time.sleep(0.002)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self._file), os.stat(self._path)):
                        return True
                self._unlock()  # it was erased while we waited: if there is another one now, that is the lock that counts
        except FileNotFoundError:
            self._line.release()
            return False
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let the next one have it."""
        self._unlock()
        self._line.release()

    def read(self) -> int:
        """The number in it, which is held; 0 if there is none yet."""
        return int(os.pread(self._file, _DIGITS, 0) or b"0")

    def write(self, number: int) -> None:
        """Change the number. Not flushed: who remembers another one does not outlive a power loss."""
        os.pwrite(self._file, b"%0*d" % (_DIGITS, number), 0)

    def glance(self) -> int:
        """The number in it, whoever holds it; 0 if there is no such file."""
        try:
            return int(self._path.read_bytes() or b"0")
        except FileNotFoundError:
            return 0

    def _try(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would not do: a forked child may have the file open, too
            os.close(file)

    def _too_long(self) -> BrokerUnavailable:
        return BrokerUnavailable(f"Somebody else has locked the queue {str(self._path.parent)!r} for {PATIENCE:g} s.")
