"""Atomic, fsynced writes of files and directories, and locks between processes.

New content goes to a temporary name in the same directory, is flushed to disk and then renamed. A reader, or a run that
resumes after a kill, sees the old content or the new content, never a part.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from snake_lora_pl.errors import UserError

logger = logging.getLogger(__name__)

_OLD_SUFFIX = ".old"


@contextlib.contextmanager
def open_durably(
    path: str | os.PathLike[str], mode: str = "wb", encoding: str | None = None, newline: str | None = None
) -> Iterator[IO[Any]]:
    """Open a temporary file that replaces ``path`` when the block ends without an exception.

    Args:
        path: Path of the finished file; its directory is created.
        mode: ``wb`` or ``w``.
        encoding: Text encoding for ``w``.
        newline: Newline handling, as in the built-in ``open``.

    Yields:
        The open temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        # mkstemp creates files that only their owner can read; a file in a shared directory follows the umask.
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
    """Yield a temporary directory that replaces ``path`` when the block ends without an exception.

    Args:
        path: Path of the finished directory; an existing directory is replaced as a whole.

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
                # Some writers create files that only their owner can read; shared directories follow the umask.
                os.chmod(file, 0o666 & ~_umask())
            _sync(file)
        _sync(temporary)
        _replace_directory(temporary, path)
    finally:
        # After a replacement, this is the old directory.
        shutil.rmtree(temporary, ignore_errors=True)


def move_durably(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Flush a finished file to disk and rename it to ``path``, which must be on the same file system."""
    _sync(Path(source))
    os.replace(source, path)
    sync_directory(Path(path).parent)


@contextlib.contextmanager
def exclusive(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock for building a directory, waiting for as long as another process holds it.

    The operating system releases the lock of a process that is killed.

    Args:
        directory: The directory to build; the lock file is its sibling.
    """
    from filelock import FileLock, Timeout

    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("Waiting for another process that is preparing %s.", directory.name)
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
    instead: str = "omit --ckpt_path to start a run in a new directory",
) -> Iterator[None]:
    """Hold the lock for writing to a directory, or fail if another process keeps holding it.

    The operating system releases the lock of a process that is killed.

    Args:
        lock_path: The lock file.
        directory: The directory in use, for messages; by default the directory of the lock file.
        timeout_s: Seconds to wait for another process. The worker processes of a killed run keep its lock until they
            notice, which takes some seconds.
        instead: What the user can do instead of waiting, as the end of a sentence.

    Raises:
        UserError: If another process uses the directory, or the lock file cannot be written.
    """
    from filelock import FileLock, Timeout

    directory = Path(lock_path).parent if directory is None else directory
    lock = FileLock(lock_path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("Waiting up to %g s for another process that uses %s.", timeout_s, directory)
            lock.acquire(timeout=timeout_s)
    except Timeout as error:
        raise UserError(f"{directory}: another run is writing there. Wait until it ends, or {instead}.") from error
    except OSError as error:
        raise UserError(f"{directory}: cannot be written to ({error.strerror}). Make it writable.") from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def explain_failed_writes(
    path: str | os.PathLike[str],
    what: str,
    *also: type[Exception],
    then: str = "resume the run with --ckpt_path last",
) -> Iterator[None]:
    """Turn file system errors into an error message with a remedy.

    Args:
        path: The file or directory being written.
        what: Its description, as the subject of a sentence.
        also: Exceptions other than OSError by which a library reports a failed write.
        then: What to do once the cause is fixed, as the end of a sentence.

    Raises:
        UserError: If the disk is full, or the directory was removed or is not writable.
    """
    write_errors: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except write_errors as error:
        code = _errno_of(error)
        if code == errno.ENOENT:
            raise UserError(
                f"{path}: {what} could not be written because the directory was removed during the run. Start the run "
                "again without --ckpt_path."
            ) from error
        cause = os.strerror(code) if code is not None else " ".join(str(error).split())
        remedy = "Free space" if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "Make the directory writable"
        raise UserError(
            f"{path}: {what} could not be written ({cause}). Earlier files are intact. {remedy}, then {then}."
        ) from error


def _errno_of(error: BaseException | None) -> int | None:
    """Return the error number of a failed system call; libraries written in Rust state it in their message only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return int(found[1])
        error = error.__context__
    return None


def recover_directory(path: str | os.PathLike[str]) -> None:
    """Restore the old directory if a kill interrupted its replacement before the new one was in place."""
    path = Path(path)
    if path.exists():  # also true for "." and "/", which have no name to derive the old path from
        return
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        os.rename(_old_path(path), path)


def remove_leftovers(directory: str | os.PathLike[str], name: str) -> None:
    """Clean up after writers of ``name`` that were killed.

    Restores a directory whose replacement was interrupted, and removes temporary files and directories.

    Args:
        directory: Directory that holds the leftovers.
        name: Name of the file or directory that was being written; may be a glob pattern.
    """
    directory = Path(directory)
    for old in directory.glob(f".{name}{_OLD_SUFFIX}"):
        recover_directory(directory / old.name.removeprefix(".").removesuffix(_OLD_SUFFIX))
        shutil.rmtree(old, ignore_errors=True)
    for leftover in directory.glob(f".{name}.*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Flush the entries of a directory to disk, so that a rename survives a power failure."""
    _sync(Path(path))


def file_sha256(*paths: Path) -> str:
    """Return the SHA-256 of the concatenated contents of files, like ``cat FILES | sha256sum``."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _replace_directory(new: Path, path: Path) -> None:
    """Swap ``new`` and ``path``; without a directory at ``path``, rename ``new`` to it.

    POSIX cannot rename onto a directory that is not empty, so the old one is renamed first. A kill between the two
    renames leaves it under that name, from which ``recover_directory`` restores it.
    """
    old = _old_path(path)
    while True:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        try:
            os.rename(new, path)
            break
        except OSError as error:
            # A reader called recover_directory between the two renames.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    sync_directory(path.parent)
    # Only a whole directory may have the old name, from which it could be restored.
    with contextlib.suppress(FileNotFoundError):
        os.rename(old, new)


def _old_path(path: Path) -> Path:
    return path.with_name(f".{path.name}{_OLD_SUFFIX}")


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories.
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
