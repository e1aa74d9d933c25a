"""Files and directories that are whole or absent, whenever the process dies.

New content goes to a temporary name beside its place, is flushed to the disk and renamed: a reader, and a run that
goes on after a kill, sees the old content or the new, never a part.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from snake_lora_pl.errors import UserError

logger = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_OLD_SUFFIX = ".old"


@contextlib.contextmanager
def open_durably(
    path: str | os.PathLike[str], mode: str = "wb", encoding: str | None = None, newline: str | None = None
) -> Iterator[IO]:
    """Open a file for writing that takes ``path``'s place only when the block ends without an exception.

    Args:
        path: The file's final place; its directory is created.
        mode: ``wb`` or ``w``.
        encoding: Text encoding for ``w``.
        newline: As the built-in ``open`` takes it.

    Yields:
        The open temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        # mkstemp makes files only their owner can read; what lands in a shared directory follows the umask.
        os.chmod(temporary, 0o666 & ~_umask())
        with os.fdopen(handle, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def directory_durably(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a directory that takes ``path``'s place as a whole when the block ends without an exception.

    Args:
        path: The directory's final place; a directory that stands there is replaced and removed.

    Yields:
        The temporary directory to fill.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                # Some writers make files only their owner can read; what lands in a shared directory follows the umask.
                os.chmod(file, 0o666 & ~_umask())
            _sync(file)
        _sync(temporary)
        if path.exists():
            _exchange(temporary, path)
        else:
            os.rename(temporary, path)
        sync_directory(path.parent)
    finally:
        # After an exchange this is the old directory.
        shutil.rmtree(temporary, ignore_errors=True)


def move_durably(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Give a finished file its place, once its content is on the disk; both lie on one file system."""
    _sync(Path(source))
    os.replace(source, path)
    sync_directory(Path(path).parent)


@contextlib.contextmanager
def exclusive(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Let one process at a time build a directory; the system frees the lock of one that dies.

    Args:
        directory: What is built; the lock file lies beside it.
    """
    from filelock import FileLock, Timeout

    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("Another process is preparing %s: waiting for it.", directory.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def sole_use(
    lock_path: str | os.PathLike[str],
    directory: str | os.PathLike[str] | None = None,
    *,
    timeout_s: float = 10.0,
    instead: str = "leave out --ckpt_path for a directory of its own",
) -> Iterator[None]:
    """Keep every other process that asks for the same directory out of it; the system frees the lock of one that dies.

    Args:
        lock_path: The lock file.
        directory: What is used; None for the directory that the lock file lies in.
        timeout_s: How long to wait for another process. One that was killed holds its lock until the workers it left
            behind notice, which takes some seconds.
        instead: What to do but wait, in words.

    Raises:
        UserError: If another process uses the directory, or no lock can be written in it.
    """
    from filelock import FileLock, Timeout

    directory = Path(lock_path).parent if directory is None else directory
    lock = FileLock(lock_path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("Another process uses %s: waiting %g s for it to end.", directory, timeout_s)
            lock.acquire(timeout=timeout_s)
    except Timeout as error:
        raise UserError(f"{directory}: another run is writing there. Wait for it to end, or {instead}.") from error
    except OSError as error:
        raise UserError(f"{directory} cannot be written to ({error.strerror}). Make it writable.") from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def explain_failed_writes(
    path: str | os.PathLike[str], what: str, *also: type[Exception], then: str = "go on with --ckpt_path last"
) -> Iterator[None]:
    """Turn what the file system refuses to a run into what the user can do about it.

    Args:
        path: What is being written.
        what: What it is, in words.
        also: Exceptions beside OSError by which a library says that it could not write.
        then: What to do once the cause is mended.

    Raises:
        UserError: If the disk is full, or the directory is gone or cannot be written to.
    """
    refusals: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except refusals as error:
        code = _error_number(error)
        if code == errno.ENOENT:
            raise UserError(
                f"{path}: {what} could not be written, its directory was removed while the run went on. "
                "Start the run again, without --ckpt_path."
            ) from error
        cause = os.strerror(code) if code is not None else " ".join(str(error).split())
        cure = "Free space" if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "Make the directory writable"
        raise UserError(
            f"{path}: {what} could not be written ({cause}). What was there before is untouched. {cure}, then {then}."
        ) from error


def _error_number(error: BaseException | None) -> int | None:
    """The system's number of what went wrong; libraries not written in Python hide it in their message."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return int(found[1])
        error = error.__context__
    return None


def recover_directory(path: str | os.PathLike[str]) -> None:
    """Bring back a directory whose replacement was killed between two renames.

    Only a file system that cannot exchange two directories in one step leaves such a state.
    """
    path = Path(path)
    if path.exists():  # as "." and "/" do, which have no name that the old one could be called by
        return
    old = path.with_name(f".{path.name}{_OLD_SUFFIX}")
    if old.exists():
        os.rename(old, path)


def remove_leftovers(directory: str | os.PathLike[str], name: str) -> None:
    """Remove the temporary files and directories of ``name`` that killed writers left in ``directory``."""
    for leftover in Path(directory).glob(f".{name}.*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Flush a directory's entries, so that a rename outlives a power cut."""
    _sync(Path(path))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories.
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(new: Path, current: Path) -> None:
    """Swap two directories; in one step where the system can, else in two that ``recover_directory`` can mend."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2"):
            names = os.fsencode(new), os.fsencode(current)
            if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
                return
            if (code := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise OSError(code, os.strerror(code), str(current))
    old = current.with_name(f".{current.name}{_OLD_SUFFIX}")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(current, old)
    os.rename(new, current)
    os.rename(old, new)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def file_sha256(*paths: Path) -> str:
    """The sha256 of the files' bytes, one file after the other, as ``cat FILES | sha256sum`` gives it."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
