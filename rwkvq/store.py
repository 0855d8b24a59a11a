"""A store of files that many machines reach: a folder or bucket behind an fsspec URL. No file in it is ever half there.

A file is written under `uploads/` and moved to its key when all of it has arrived. Who reads proves what he got (by
hash, or by the digest inside); what fails the proof is removed from the store, so that it is sent again.
"""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from rwkvq.errors import RwkvqError, StoredObjectError, StoreError
from rwkvq.files import atomic_path, sha256_of_file
from rwkvq.hashes import file_hash
from rwkvq.redaction import without_secrets

LEFTOVER_SECONDS = 24 * 3600.0
"""An upload that is older was cut off: nothing takes that long."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that is kept under its content: the name it has where it is used, hex SHA-256, size in bytes."""

    name: str
    sha256: str
    size: int

    @property
    def key(self) -> str:
        """Where it is in the store."""
        return f"objects/{self.sha256}"

    @classmethod
    def of(cls, path: Path, name: str) -> StoredFile:
        """What `path` is in a store."""
        return cls(name, file_hash(path), path.stat().st_size)


class Store:
    """Files by key at an fsspec URL."""

    def __init__(self, url: str) -> None:
        """Raises StoreError: no URL, a password in it, an unknown protocol, or one whose package is missing."""
        self.url = url
        self.name = without_secrets(url)
        parts = urlsplit(url)
        if not parts.scheme or "://" not in url:
            raise StoreError(f"run.store {self.name}: not a URL; write file:///FOLDER or s3://BUCKET/PREFIX")
        if parts.password or parts.query:
            place = f"{parts.scheme}://{parts.hostname}"
            raise StoreError(
                f"run.store {place}: holds a password or a query; leave it out and set it where fsspec looks, "
                f"such as FSSPEC_{parts.scheme.upper()}_PASSWORD"
            )
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise StoreError(f"run.store {self.name}: {error}") from error
        except ValueError as error:
            raise StoreError(f"run.store {self.name}: {error}; write file:///FOLDER or s3://BUCKET/PREFIX") from error

    def size(self, key: str) -> int | None:
        """Bytes of the file under `key`, None if there is none. Raises StoreError if the store does not answer."""
        with self._explained(key):
            self._files.invalidate_cache()  # other machines write, too
            try:
                return int(self._files.info(self._path(key))["size"])
            except FileNotFoundError:
                return None

    def put(self, path: Path, key: str) -> None:
        """Store `path` under `key`, in place of what is there. Raises StoreError."""
        upload = f"uploads/{secrets.token_hex(16)}"
        with self._explained(key):
            try:
                for place in (upload, key):
                    self._files.makedirs(self._path(place).rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path), self._path(upload))
                self._files.mv(self._path(upload), self._path(key))
            except BaseException:
                with suppress(Exception):  # the reason for the failure matters more
                    self._files.rm_file(self._path(upload))
                raise

    def get(self, key: str, target: Path, is_whole: Callable[[Path], bool]) -> None:
        """Fetch `key` to `target` atomically, if `is_whole(file)` says that it is as it was stored.

        Raises StoredObjectError if it is missing or damaged (then it is removed), StoreError if the store does not
        answer, OutputError if `target` cannot be written.
        """
        with atomic_path(target) as temporary:
            with self._explained(key):
                self._files.invalidate_cache()
                try:
                    self._files.get_file(self._path(key), str(temporary))
                except FileNotFoundError as error:
                    raise StoredObjectError(f"{self.name}/{key}: not in the store; send it again") from error
            if not is_whole(temporary):
                self.remove([key])
                raise StoredObjectError(f"{self.name}/{key}: damaged, and removed; send it again")

    def send(self, path: Path, file: StoredFile) -> None:
        """Store `path`, whose content is `file`, unless it is there with the right size. Raises StoreError."""
        if self.size(file.key) != file.size:
            self.put(path, file.key)

    def fetch(self, file: StoredFile, target: Path) -> None:
        """Have a sent file at `target`: kept if it is there already, proved by its hash. Raises as `get`."""
        if not _is_there(target, file):
            self.get(file.key, target, lambda found: sha256_of_file(found) == file.sha256)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove what is there under `keys`. Raises StoreError if that is refused."""
        for key in keys:
            with self._explained(key), suppress(FileNotFoundError):
                self._files.rm_file(self._path(key))

    def remove_leftovers(self) -> None:
        """Remove uploads that were cut off long ago. Raises StoreError if the store does not answer."""
        with self._explained("uploads"), suppress(FileNotFoundError):
            self._files.invalidate_cache()
            for path in self._files.ls(self._path("uploads"), detail=False):
                if time.time() - self._files.modified(path).timestamp() > LEFTOVER_SECONDS:
                    self._files.rm_file(path)

    def _path(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{key}"

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Turn whatever the store's protocol raises into StoreError of one line; protocols share no error class."""
        try:
            yield
        except RwkvqError:
            raise
        except Exception as error:
            is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            found = without_secrets((str(error).splitlines() or [""])[0][:200])
            check = "free some space" if is_full else "see that the address is right, reachable and writable"
            remedy = f"{check} and run again, finished work is kept"
            raise StoreError(f"run.store {self.name}: {key}: {type(error).__name__}: {found}; {remedy}") from error


def _is_there(path: Path, file: StoredFile) -> bool:
    """Whether `path` holds `file` already; the hash of a large file is remembered."""
    return path.is_file() and path.stat().st_size == file.size and file_hash(path) == file.sha256
