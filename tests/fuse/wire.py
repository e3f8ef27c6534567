"""The kernel's side: requests from /dev/fuse are answered from ``Files``, one after the other, until it is unmounted.

Run as ``python -m tests.fuse.wire DIRECTORY RULES LOG``. It mounts, writes ``mounted`` to its output, and to LOG a line
for each request that changes something.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import stat
import struct
import sys
from collections import Counter
from collections.abc import Callable
from typing import TextIO

from tests.fuse.files import Files, Node, Refused
from tests.fuse.places import Rules

_IN = struct.Struct("=IIQQIIIHH")
_OUT = struct.Struct("=IiQ")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("=QQQQII")
_MOST_BYTES = 1 << 17
_ATOMIC_TRUNCATION, _BIG_WRITES = 1 << 3, 1 << 5
_WITHOUT_AN_ANSWER = (2, 42)  # FORGET


class Kernel:
    """The other end of one mount.

    Args:
        files: what is mounted.
        device: the descriptor of /dev/fuse.
        log: where changes are noted.
    """

    def __init__(self, files: Files, device: int, log: TextIO) -> None:
        self._files = files
        self._device = device
        self._log = log
        self._done: Counter[str] = Counter()
        self._doing = ""
        self._asker = 0
        self._owner = (0, 0)
        self._answers: dict[int, Callable[[int, bytes], bytes]] = {
            1: self._lookup,
            3: self._getattr,
            4: self._setattr,
            5: lambda node, body: bytes(files.node(node).data),
            6: self._symlink,
            9: self._mkdir,
            10: self._unlink,
            11: self._rmdir,
            12: self._rename,
            14: self._open,
            15: self._read,
            16: self._write,
            17: lambda node, body: struct.pack(
                "=QQQQQIIII24x", 1 << 20, 1 << 19, 1 << 19, 0, 0, 4096, 255, 4096, 0
            ),
            18: self._release,
            20: self._fsync,
            25: self._flush,
            26: self._init,
            27: lambda node, body: struct.pack("=QII", 0, 0, 0),
            28: self._readdir,
            29: lambda node, body: b"",
            30: self._fsyncdir,
            35: self._create,
            38: lambda node, body: b"",
            43: self._fallocate,
        }

    def serve(self) -> None:
        """Answer until it is unmounted."""
        while True:
            try:
                request = os.read(self._device, _MOST_BYTES + 4096)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue
                return  # ENODEV
            _, opcode, unique, node, uid, gid, pid, _, _ = _IN.unpack_from(request)
            if opcode in _WITHOUT_AN_ANSWER:
                continue
            self._doing, self._asker, self._owner = "", pid, (uid, gid)
            number, body = 0, b""
            try:
                answer = self._answers.get(opcode)
                if answer is None:
                    raise Refused(errno.ENOSYS)
                body = answer(node, request[_IN.size :])
            except Refused as refused:
                number = refused.number
            self._note(number)
            try:
                os.write(self._device, _OUT.pack(_OUT.size + len(body), -number, unique) + body)
            except OSError:  # who asked is gone
                continue

    def _note(self, number: int) -> None:
        if not self._doing:
            return
        print(self._doing, f"[{errno.errorcode[number]}]" if number else "", file=self._log, flush=True)
        word = self._doing.split()[0]
        if number == 0:
            self._done[word] += 1
            if (word, self._done[word]) == tuple(self._files.rules.kill):
                os.kill(self._asker, signal.SIGKILL)

    def _attr(self, node: Node) -> bytes:
        seconds, rest = divmod(int(node.changed * 1e9), 10**9)
        return _ATTR.pack(
            node.number, self._files.size(node), 0, seconds, seconds, seconds, rest, rest, rest,
            node.mode, node.links, node.uid, node.gid, 0, 4096, 0,
        )  # fmt: skip

    def _entry(self, node: Node) -> bytes:
        return _ENTRY.pack(node.number, 0, 0, 0, 0, 0) + self._attr(node)

    def _init(self, node: int, body: bytes) -> bytes:
        _, minor, readahead, flags = struct.unpack_from("=IIII", body)
        wanted = flags & (_ATOMIC_TRUNCATION | _BIG_WRITES)
        return struct.pack(
            "=IIIIHHIIHHI28x", 7, min(minor, 31), readahead, wanted, 8, 6, _MOST_BYTES, 1, 0, 0, 0
        )

    def _lookup(self, node: int, body: bytes) -> bytes:
        return self._entry(self._files.look(node, body.rstrip(b"\0")))

    def _getattr(self, node: int, body: bytes) -> bytes:
        return struct.pack("=QII", 0, 0, 0) + self._attr(self._files.node(node))

    def _setattr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size = struct.unpack_from("=IIQQ", body)
        mode = struct.unpack_from("=I", body, 68)[0]
        at = self._files.node(node)
        if valid & 1:
            self._files.change_mode(at, mode)
        if valid & 8:
            self._files.resize(at, size)
        return self._getattr(node, b"")

    def _symlink(self, node: int, body: bytes) -> bytes:
        raise Refused(errno.EPERM)

    def _mkdir(self, node: int, body: bytes) -> bytes:
        mode = struct.unpack_from("=I", body)[0]
        return self._entry(
            self._files.make(node, body[8:].rstrip(b"\0"), stat.S_IFDIR | stat.S_IMODE(mode), self._owner)
        )

    def _unlink(self, node: int, body: bytes) -> bytes:
        name = body.rstrip(b"\0")
        self._doing = f"unlink {name.decode()}"
        self._files.unlink(node, name)
        return b""

    def _rmdir(self, node: int, body: bytes) -> bytes:
        self._files.rmdir(node, body.rstrip(b"\0"))
        return b""

    def _rename(self, node: int, body: bytes) -> bytes:
        directory = struct.unpack_from("=Q", body)[0]
        old, new = body[8:].split(b"\0")[:2]
        self._doing = f"rename {old.decode()} {new.decode()}"
        self._files.rename(node, old, directory, new)
        return b""

    def _open(self, node: int, body: bytes) -> bytes:
        flags = struct.unpack_from("=I", body)[0]
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self._doing = f"overwrite {node}"
        if flags & os.O_DIRECT:
            self._doing = f"direct {node}"
            if self._files.rules.direct:
                raise Refused(self._files.rules.direct)
        return struct.pack("=QII", self._files.open(self._files.node(node), flags), 0, 0)

    def _create(self, node: int, body: bytes) -> bytes:
        flags, mode = struct.unpack_from("=II", body)
        name = body[16:].rstrip(b"\0")
        self._doing = f"create {name.decode()}"
        if flags & os.O_ACCMODE == os.O_RDWR and self._files.rules.both:
            raise Refused(self._files.rules.both)
        made = self._files.make(node, name, stat.S_IFREG | stat.S_IMODE(mode), self._owner)
        number = self._files.open(made, flags, is_new=True)
        return self._entry(made) + struct.pack("=QII", number, 0, 0)

    def _read(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("=QQI", body)
        return bytes(self._files.node(node).data[offset : offset + size])

    def _write(self, node: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("=QQI", body)
        self._doing = f"write {offset} {size}"
        if struct.unpack_from("=I", body, 32)[0] & os.O_DIRECT:
            self._doing = f"directly {offset} {size}"
            if self._files.rules.direct_write:
                raise Refused(self._files.rules.direct_write)
        return struct.pack("=II", self._files.write(handle, offset, body[40 : 40 + size]), 0)

    def _release(self, node: int, body: bytes) -> bytes:
        self._files.release(struct.unpack_from("=Q", body)[0])
        return b""

    def _flush(self, node: int, body: bytes) -> bytes:
        self._files.flush(struct.unpack_from("=Q", body)[0])
        return b""

    def _fsync(self, node: int, body: bytes) -> bytes:
        self._doing = f"sync {node}"
        self._files.sync(struct.unpack_from("=Q", body)[0])
        return b""

    def _fsyncdir(self, node: int, body: bytes) -> bytes:
        if self._files.rules.sync_directory:
            raise Refused(self._files.rules.sync_directory)
        return b""

    def _fallocate(self, node: int, body: bytes) -> bytes:
        if self._files.rules.allocate:
            raise Refused(self._files.rules.allocate)
        _, offset, length = struct.unpack_from("=QQQ", body)
        at = self._files.node(node)
        self._files.resize(at, max(len(at.data), offset + length))
        return b""

    def _readdir(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("=QQI", body)
        answer = b""
        for index, (name, number) in enumerate(sorted(self._files.node(node).entries.items()), 1):
            if index <= offset:
                continue
            kind = stat.S_IFMT(self._files.node(number).mode) >> 12
            entry = struct.pack("=QQII", number, index, len(name), kind) + name
            entry += bytes(-len(entry) % 8)
            if len(answer) + len(entry) > size:
                break
            answer += entry
        return answer


def main(directory: str, rules: str, log: str) -> None:
    """Mount and serve."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    mount = ctypes.CDLL(None, use_errno=True).mount
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    if mount(b"tests", os.fsencode(directory), b"fuse.tests", 0, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), "cannot mount")
    sys.stdout.write("mounted\n")
    sys.stdout.flush()
    with open(log, "w", encoding="utf-8") as lines:
        Kernel(Files(Rules(**json.loads(rules))), device, lines).serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
