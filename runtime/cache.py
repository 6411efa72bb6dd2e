"""Compiled artifacts on disk, one file each, in a directory that only its owner may write to.

A cache is an offer: whatever is wrong with the directory, `load` finds nothing and `store` does nothing. Several
processes may use one directory. Files appear under their names as a whole, and are never changed after that; one
that is deleted stays readable for those who have mapped it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from stitch.bundle import Bundle, joined, wires
from stitch.plan import Artifact, BadFile, load, replacing, save

_ABANDONED_S = 3600.0  # a temporary file this old belongs to nobody


class Cache:
    """What lies in `directory`, at most `limit` bytes. No directory: an empty cache that stays so."""

    def __init__(self, directory: Path | None, limit: int) -> None:
        self.directory = directory
        self.limit = limit

    def load(self, key: str) -> Artifact | None:
        """The artifact stored under `key`, its constants mapped."""
        path = self._path(key, "artifact")
        if path is None:
            return None
        try:
            artifact = load(path)
        except BadFile:
            _remove(path)
            return None
        except OSError:
            return None
        _touch(path)
        return artifact

    def store(self, key: str, artifact: Artifact) -> bool:
        """Keep an artifact. Whether it is there now."""
        path = self._path(key, "artifact")
        size = len(artifact.code) + memoryview(artifact.constants).nbytes
        if path is None or size > self.limit:
            return False
        try:
            save(artifact, path)
        except OSError:
            return False
        self._evict(path)
        return path.exists()

    def load_bundle(self, key: str) -> Bundle | None:
        """A model in parts, stored under `key`."""
        text = self.load_bytes(f"{key}-parts")
        try:
            names, wires = json.loads(text) if text is not None else ([], "")
            parts = [self.load(name) for name in names]
            return joined(wires, [p for p in parts if p is not None]) if parts else None
        except (ValueError, KeyError, TypeError):
            return None  # a part is gone, or it is no bundle

    def store_bundle(self, key: str, bundle: Bundle) -> bool:
        """Keep a model in parts. Each has a file of its own, under a name that is new, so that a bundle that is found
        has the parts that it was stored with."""
        fresh = secrets.token_hex(8)
        names = [f"{hashlib.sha256(key.encode()).hexdigest()[:32]}-{fresh}-{k}" for k in range(len(bundle.parts))]
        stored = all(self.store(name, part) for name, part in zip(names, bundle.parts, strict=True))
        return stored and self.store_bytes(f"{key}-parts", json.dumps([names, wires(bundle)]).encode())

    def load_bytes(self, key: str) -> bytes | None:
        """The same for a piece of code by itself."""
        path = self._path(key, "bytes")
        try:
            data = path.read_bytes() if path else b""
        except OSError:
            return None
        if len(data) < 4 or path is None:
            return None
        if zlib.crc32(data[4:]) != int.from_bytes(data[:4], "little"):
            _remove(path)
            return None
        _touch(path)
        return data[4:]

    def store_bytes(self, key: str, data: bytes) -> bool:
        path = self._path(key, "bytes")
        if path is None or len(data) > self.limit:
            return False
        try:
            with replacing(path) as fd, open(fd, "wb", closefd=False) as file:
                file.write(zlib.crc32(data).to_bytes(4, "little") + data)
        except OSError:
            return False
        self._evict(path)
        return path.exists()

    def _path(self, key: str, suffix: str) -> Path | None:
        """Where a key's file would be, None if the directory must not be trusted."""
        if self.directory is None or self.limit <= 0 or not _is_private(self.directory):
            return None
        name = key if re.fullmatch(r"[0-9A-Za-z_-]{1,128}", key) else hashlib.sha256(key.encode()).hexdigest()
        return self.directory / f"{name}.{suffix}"

    def _evict(self, newest: Path) -> None:
        """Delete the least recently used files until the rest fits, `newest` last of all."""
        entries = sorted(self._entries(), key=lambda entry: (entry[2] == newest, entry[0]))
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= self.limit:
                break
            _remove(path)
            total -= size

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """Last use, size and path of each file; abandoned temporary files are deleted on the way."""
        assert self.directory is not None
        with contextlib.suppress(OSError), os.scandir(self.directory) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # another process may have deleted it
                    found = entry.stat(follow_symlinks=False)
                    if entry.name.endswith(".tmp") and found.st_mtime < time.time() - _ABANDONED_S:
                        _remove(Path(entry.path))
                    elif entry.name.endswith((".artifact", ".bytes")) and stat.S_ISREG(found.st_mode):
                        yield found.st_mtime, found.st_size, Path(entry.path)


def _is_private(directory: Path) -> bool:
    """False for a directory to which others could write code. One that does not exist yet will be private."""
    try:
        found = directory.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
