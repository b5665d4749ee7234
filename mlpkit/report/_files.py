"""Files that appear whole or not at all, and one sentence where they cannot be written. Shared by trace and tune."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlpkit.errors import ArgumentError, MlpkitError, OutputError


def write_whole(path: str | os.PathLike[str], text: str | bytes) -> Path:
    """Write UTF-8 text (or bytes): a temporary file beside ``path``, then a rename; folders on the way are made.

    Raises OutputError where the system refuses; nothing is left then, and an older file stays as it was.
    """
    target = Path(path)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        name = os.fspath(target.with_name(f".{target.name}.{secrets.token_hex(8)}"))
        handle = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # less what the umask forbids
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(text.encode() if isinstance(text, str) else text)
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
    return target


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """What the system says about a write, as an OutputError that names the target."""
    try:
        yield
    except MlpkitError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error


def check_folder(path: Path, what: str) -> None:
    """Raises ArgumentError, beginning with ``what``, unless files can be made in ``path`` or in a folder made there."""
    for place in (path, *path.parents):
        if not place.exists():
            continue
        if not place.is_dir():
            raise ArgumentError(f"{what}: {place} is a file; a folder is wanted")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ArgumentError(f"{what}: no permission to write in {place}")
        return
