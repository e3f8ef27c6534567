"""The files of the mount, in memory, and its rules."""

from __future__ import annotations

import errno
import os
import stat
import time
from dataclasses import dataclass, field

from tests.fuse.places import Rules

__all__ = ["Files", "Handle", "Node", "Refused"]

ROOT = 1


class Refused(Exception):
    """What is answered with a number."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


@dataclass
class Node:
    """A file, a directory or a link."""

    number: int
    mode: int
    uid: int = 0
    gid: int = 0
    data: bytearray = field(default_factory=bytearray)
    entries: dict[bytes, int] = field(default_factory=dict)
    links: int = 1
    writers: int = 0
    is_spoilt: bool = False
    changed: float = field(default_factory=time.time)


@dataclass
class Handle:
    """An open file."""

    node: Node
    writes: bool
    is_sealed: bool = False
    error: int = 0


class Files:
    """All of it; one request at a time.

    Attributes:
        log: what was asked for, in order: a word, and what it was about.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.log: list[str] = []
        self.nodes = {ROOT: Node(ROOT, stat.S_IFDIR | 0o755)}
        self.handles: dict[int, Handle] = {}
        self._next = ROOT

    def node(self, number: int) -> Node:
        """Return what has that number."""
        try:
            return self.nodes[number]
        except KeyError:
            raise Refused(errno.ESTALE) from None

    def look(self, parent: int, name: bytes) -> Node:
        """Return what has that name."""
        number = self.node(parent).entries.get(name)
        if number is None:
            raise Refused(errno.ENOENT)
        return self.node(number)

    def size(self, node: Node) -> int:
        """Return the length that is shown."""
        return 0 if self.rules.late and node.writers else len(node.data)

    def make(self, parent: int, name: bytes, mode: int, owner: tuple[int, int]) -> Node:
        """Make a file, a directory or a link."""
        if stat.S_ISREG(mode):
            self._refuse(self.rules.create)
        if name in self.node(parent).entries:
            raise Refused(errno.EEXIST)
        self._next += 1
        node = Node(self._next, mode, *owner)
        self.nodes[node.number] = node
        self.node(parent).entries[name] = node.number
        return node

    def open(self, node: Node, flags: int, *, is_new: bool = False) -> int:
        """Open a file; return the handle's number."""
        access = flags & os.O_ACCMODE
        writes = access != os.O_RDONLY
        if access == os.O_RDWR:
            self._refuse(self.rules.both)
        if writes and not is_new:
            self._refuse(self.rules.overwrite)
            if not flags & os.O_TRUNC:
                self._refuse(self.rules.change)
        if writes:
            node.writers += 1
        if flags & os.O_TRUNC:
            node.data.clear()
            node.is_spoilt = False
        self._next += 1
        self.handles[self._next] = Handle(node, writes)
        return self._next

    def write(self, number: int, offset: int, data: bytes) -> int:
        """Write."""
        handle = self.handles[number]
        node = handle.node
        if handle.is_sealed or node.is_spoilt:
            raise Refused(errno.EIO)
        if offset != len(node.data):
            if self.rules.offset:
                node.is_spoilt = self.rules.seals
                raise Refused(self.rules.offset)
            handle.error = self.rules.late_offset
            node.data.extend(bytes(max(0, offset - len(node.data))))
        node.data[offset : offset + len(data)] = data
        node.changed = time.time()
        return len(data)

    def flush(self, number: int) -> None:
        """Be told of a close of one of its descriptors."""
        handle = self.handles[number]
        if handle.writes and self.rules.seals:
            handle.is_sealed = bool(handle.node.data)  # as Mountpoint has it
        self._refuse(handle.error)

    def sync(self, number: int) -> None:
        """Sync a file."""
        handle = self.handles[number]
        self._refuse(self.rules.sync)
        self._refuse(handle.error)
        handle.is_sealed = handle.is_sealed or self.rules.seals

    def release(self, number: int) -> None:
        """Forget a handle."""
        handle = self.handles.pop(number)
        handle.node.writers -= handle.writes
        if handle.node.is_spoilt:  # an upload that failed has left nothing
            for node in self.nodes.values():
                for name in [name for name, at in node.entries.items() if at == handle.node.number]:
                    del node.entries[name]

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a file."""
        node = self.look(parent, name)
        self._refuse(self.rules.unlink_open if node.writers else 0)
        self._refuse(self.rules.unlink)
        node.links -= 1
        del self.node(parent).entries[name]

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        if self.look(parent, name).entries:
            raise Refused(errno.ENOTEMPTY)
        del self.node(parent).entries[name]

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes) -> None:
        """Give a file another name."""
        node = self.look(parent, name)
        is_taken = new_name in self.node(new_parent).entries
        self._refuse(self.rules.replace if is_taken else self.rules.rename)
        self._refuse(errno.EBUSY if self.rules.seals and node.writers else 0)
        self.node(new_parent).entries[new_name] = self.node(parent).entries.pop(name)

    def change_mode(self, node: Node, mode: int) -> None:
        """Change what is permitted."""
        self._refuse(self.rules.mode)
        node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)

    def resize(self, node: Node, nbytes: int) -> None:
        """Change the length."""
        self._refuse(self.rules.change)
        node.data[:] = bytes(node.data[:nbytes]).ljust(nbytes, b"\0")

    def _refuse(self, number: int) -> None:
        if number:
            raise Refused(number)
