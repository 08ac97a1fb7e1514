"""The zip container of a wheel: read strictly, copied member by member as compressed bytes, written reproducibly.

`zipfile` cannot copy a member without inflating it, and it accepts what a wheel must not have: bytes that belong to
no member, two members of one name, a central directory that contradicts the local headers. Here every byte of the
file belongs to exactly one member or to the directory, or the file is refused.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vllm_patches.errors import PatchesError
from vllm_patches.hashing import BackgroundHash

STORED, DEFLATED = 0, 8
CHUNK = 1 << 20

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 0x1, 0x8, 0x800
# A data descriptor's layout by its length: with or without its optional signature of four bytes, sizes wide or not.
_DESCRIPTORS = {12: "<3L", 16: "<3L", 20: "<LQQ", 24: "<LQQ"}
_ZIP64 = 1  # the id of the extra field
_UNIX = 3 << 8 | 20  # made by: Unix, zip 2.0; the mode is in the upper half of the external attributes
_EPOCH = (0, 0x21)  # 1980-01-01 00:00, the earliest that a zip can say: a clock would change the bytes


@dataclass(frozen=True)
class Member:
    """One entry; *header* is where its local header starts, *start* where its data does, *end* where the next begins.

    *extra* is the directory's extra field without the zip64 part, which depends on where the member stands.
    """

    name: str
    raw_name: bytes
    made: int
    needed: int
    flags: int
    method: int
    time: int
    date: int
    crc: int
    packed: int
    size: int
    internal: int
    external: int
    extra: bytes
    comment: bytes
    header: int
    start: int = 0
    end: int = 0

    @property
    def is_folder(self) -> bool:
        """True for an entry that only names a folder."""
        return self.name.endswith("/")


def read_members(file: int, where: str) -> tuple[Member, ...]:
    """All members of the open *file* in the order of their data; raises `PatchesError` unless all bytes have an owner.

    *where* is the file's name in errors.
    """
    count, size, offset = _find_directory(file, where)
    directory = os.pread(file, size, offset)
    found = tuple(_parse_directory(directory, where))
    if len(found) != count or len(directory) != size:
        raise damaged(where, f"{count} members in the directory", str(len(found)))
    ordered = sorted(found, key=lambda member: member.header)
    ends = [member.header for member in ordered[1:]] + [offset]
    if ordered and ordered[0].header != 0:
        raise damaged(where, "the first member at the start of the file", f"it is at {ordered[0].header}")
    _refuse_twins(ordered, where)
    return tuple(_located(file, member, end, where) for member, end in zip(ordered, ends, strict=True))


def _find_directory(file: int, where: str) -> tuple[int, int, int]:
    """How many entries the central directory has, its size and its offset."""
    length = os.fstat(file).st_size
    tail_at = max(0, length - _END.size - _MAX16)
    tail = os.pread(file, length - tail_at, tail_at)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise damaged(where, "a zip file with its directory at the end", "none: truncated, or not a zip")
    _, disk, first, here, count, size, offset, comment = _END.unpack_from(tail, at)
    if (disk, first) not in ((0, 0), (_MAX16, _MAX16)) or here != count or at + _END.size + comment != len(tail):
        raise damaged(where, "one whole zip file", "an end of directory that does not close the file")
    end = tail_at + at
    if _MAX16 in (count,) or _MAX32 in (size, offset):
        count, size, offset, end = _find_directory64(file, end, where)
    if offset + size != end:
        raise damaged(where, f"the directory to end at {end}", f"it ends at {offset + size}")
    return count, size, offset


def _find_directory64(file: int, end: int, where: str) -> tuple[int, int, int, int]:
    """The same from the zip64 records, and where they begin; *end* is where the plain end record begins."""
    locator = os.pread(file, _LOCATOR64.size, max(0, end - _LOCATOR64.size))
    if locator[:4] != b"PK\6\7":
        raise damaged(where, "a zip64 locator", "none")
    at = _LOCATOR64.unpack(locator)[2]
    record = os.pread(file, _END64.size, at) if at < end else b""
    if record[:4] != b"PK\6\6" or len(record) != _END64.size or at + _END64.size + _LOCATOR64.size != end:
        raise damaged(where, "a zip64 end of directory", "none where the locator points")
    *_, count, size, offset = _END64.unpack(record)
    return count, size, offset, at


def _parse_directory(data: bytes, where: str) -> Iterator[Member]:
    at = 0
    while at < len(data):
        head = data[at : at + _CENTRAL.size]
        if len(head) != _CENTRAL.size or head[:4] != b"PK\1\2":
            raise damaged(where, "an entry of the directory", f"something else at byte {at} of it")
        values = _CENTRAL.unpack(head)
        names, extras, comments = values[10:13]
        begin = at + _CENTRAL.size
        at = begin + names + extras + comments
        if at > len(data):
            raise damaged(where, "a whole directory", "an entry that runs over its end")
        raw_name, extra = data[begin : begin + names], data[begin + names : begin + names + extras]
        yield _member(values, raw_name, extra, data[at - comments : at], where)


def _member(values: tuple[int, ...], raw_name: bytes, extra: bytes, comment: bytes, where: str) -> Member:
    _, made, needed, flags, method, time, date, crc, packed, size, _, _, _, _, internal, external, header = values
    try:
        name = raw_name.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError as error:
        raise damaged(where, "a name in UTF-8", repr(raw_name)) from error
    wide, extra = _split_zip64(extra, name, where)
    fields = iter(wide)
    try:  # the zip64 field holds only those of the three that do not fit, in this order
        size = next(fields) if size == _MAX32 else size
        packed = next(fields) if packed == _MAX32 else packed
        header = next(fields) if header == _MAX32 else header
    except StopIteration:
        raise damaged(where, f"a zip64 field of {name}", "too short a one") from None
    _refuse_unsafe(name, flags, method, external >> 16 if made >> 8 == 3 else 0, where)
    return Member(
        name, raw_name, made, needed, flags, method, time, date, crc, packed, size, internal, external, extra, comment,
        header,
    )  # fmt: skip


def _split_zip64(extra: bytes, name: str, where: str) -> tuple[list[int], bytes]:
    """The numbers of the zip64 field, and the other fields as they are."""
    numbers: list[int] = []
    rest = b""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        field = extra[at : at + 4 + length]
        if len(field) != 4 + length:
            raise damaged(where, f"whole extra fields of {name}", "a cut one")
        if kind == _ZIP64:
            numbers = [number for (number,) in struct.iter_unpack("<Q", field[4 : 4 + length // 8 * 8])]
        else:
            rest += field
        at += 4 + length
    return numbers, rest + extra[at:]


def _refuse_unsafe(name: str, flags: int, method: int, mode: int, where: str) -> None:
    """What no wheel needs and an installer could be misled by."""
    parts = name.removesuffix("/").split("/")  # an absolute name has an empty first part
    if {"", ".", ".."} & set(parts) or ":" in parts[0] or set("\\\0\r\n") & set(name):
        raise damaged(where, "names inside the wheel", repr(name))
    if flags & _ENCRYPTED or method not in (STORED, DEFLATED):
        raise damaged(where, f"{name} stored or deflated", f"method {method}, flags {flags:#x}")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise damaged(where, f"{name} to be a file", f"mode {mode:o}")


def _refuse_twins(members: list[Member], where: str) -> None:
    seen: set[str] = set()
    for member in members:
        if member.name in seen:
            raise damaged(where, "one member of each name", f"two of {member.name}")
        seen.add(member.name)


def _located(file: int, member: Member, end: int, where: str) -> Member:
    """The member with the place of its data, once its local header agrees with the directory."""
    head = os.pread(file, _LOCAL.size + len(member.raw_name), member.header)
    if len(head) < _LOCAL.size or head[:4] != b"PK\3\4":
        raise damaged(where, f"a local header of {member.name}", "none where the directory points")
    _, _, flags, method, _, _, crc, packed, size, names, extras = _LOCAL.unpack_from(head)
    described = bool(flags & _DESCRIPTOR)
    agree = described or ((crc, packed, size) == (member.crc, member.packed, member.size) or _MAX32 in (packed, size))
    if (flags, method, head[_LOCAL.size :]) != (member.flags, member.method, member.raw_name) or not agree:
        raise damaged(where, f"one account of {member.name}", "its local header contradicts the directory")
    start = member.header + _LOCAL.size + names + extras
    _check_gap(file, member, start + member.packed, end, described, where)
    return replace(member, start=start, end=end)


def _check_gap(file: int, member: Member, data_end: int, end: int, described: bool, where: str) -> None:
    """Between a member's data and the next header there is its data descriptor or nothing."""
    gap = end - data_end
    if gap == 0 and not described:
        return
    if described and gap in _DESCRIPTORS:
        form = struct.Struct(_DESCRIPTORS[gap])
        wanted = (member.crc, member.packed, member.size)
        if form.unpack(os.pread(file, gap, data_end)[gap - form.size :]) == wanted:
            return
    raise damaged(where, f"nothing between {member.name} and what follows it", f"{gap} bytes that belong to no member")


def read_data(file: int, member: Member, where: str) -> bytes:
    """The content of a small member, its size and CRC checked."""
    data = b"".join(content(file, member, where))
    if zlib.crc32(data) != member.crc:
        raise damaged(where, f"CRC {member.crc:08x} of {member.name}", f"{zlib.crc32(data):08x}")
    return data


def digest(file: int, member: Member, algorithm: str, where: str) -> bytes:
    """The hash of a member's content, its size and CRC checked; memory does not grow with the member."""
    hasher, crc = hashlib.new(algorithm), 0
    for block in content(file, member, where):
        hasher.update(block)
        crc = zlib.crc32(block, crc)
    if crc != member.crc:
        raise damaged(where, f"CRC {member.crc:08x} of {member.name}", f"{crc:08x}")
    return hasher.digest()


def content(file: int, member: Member, where: str) -> Iterator[bytes]:
    """The content in blocks of at most `CHUNK`; exactly as long as the directory says."""
    inflater = zlib.decompressobj(-15) if member.method == DEFLATED else None
    left = member.size
    for raw in _blocks(file, member.start, member.packed):
        for block in (raw,) if inflater is None else _inflate(inflater, raw, member, where):
            left -= len(block)
            if left < 0:
                raise damaged(where, f"{member.size} bytes in {member.name}", "more")
            yield block
    if left or (inflater is not None and (not inflater.eof or inflater.unused_data)):
        raise damaged(where, f"{member.size} bytes in {member.name}", f"{member.size - left}, or a stream that goes on")


def _inflate(inflater: zlib._Decompress, raw: bytes, member: Member, where: str) -> Iterator[bytes]:
    try:
        while raw:
            yield inflater.decompress(raw, CHUNK)
            raw = inflater.unconsumed_tail
    except zlib.error as error:
        raise damaged(where, f"{member.name} to inflate", str(error)) from error


def _blocks(file: int, at: int, length: int) -> Iterator[bytes]:
    end = at + length
    while at < end:
        block = os.pread(file, min(CHUNK, end - at), at)
        if not block:
            return
        at += len(block)
        yield block


class HashedSource:
    """A file read once from front to back: the bytes that are handed out are the very ones that were hashed."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._at = 0
        self._hash = BackgroundHash()

    def blocks(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from *start* to *end*; those before that nobody asked for are hashed and passed over."""
        for block in _blocks(self._file, self._at, start - self._at):
            self._hash.update(block)
        for block in _blocks(self._file, start, end - start):
            self._hash.update(block)
            yield block
        self._at = end

    def finish(self) -> str:
        """The sha256 of the whole file."""
        for _ in self.blocks(self._at, os.fstat(self._file).st_size):
            pass
        return self._hash.hexdigest()


class ZipWriter:
    """Writes a zip file to an open descriptor: members copied raw or stored; the same input gives the same bytes."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._at = 0
        self._hash = BackgroundHash()
        self._members: list[Member] = []

    def copy(self, source: HashedSource, member: Member) -> Member:
        """Append a member of *source* as it lies there: header, compressed bytes, data descriptor."""
        header, length = self._at, member.end - member.header
        for block in source.blocks(member.header, member.end):
            self._write(block)
        if self._at - header != length:
            raise damaged(member.name, f"{length} bytes", f"{self._at - header}: the file shrank while it was read")
        placed = replace(member, header=header, start=header + member.start - member.header, end=self._at)
        self._members.append(placed)
        return placed

    def add(self, name: str, data: bytes, mode: int = 0o100644) -> Member:
        """Append *data* stored, dated 1980: deflate would differ between builds of zlib."""
        raw = name.encode("utf-8")
        flags = 0 if raw.isascii() else _UTF8
        crc, size, header = zlib.crc32(data), len(data), self._at
        head = _LOCAL.pack(b"PK\3\4", 20, flags, STORED, *_EPOCH, crc, size, size, len(raw), 0)
        self._write(head + raw + data)
        start = header + len(head) + len(raw)
        member = Member(
            name, raw, _UNIX, 20, flags, STORED, *_EPOCH, crc, size, size, 0, mode << 16, b"", b"",
            header, start, self._at,
        )  # fmt: skip
        self._members.append(member)
        return member

    def finish(self) -> str:
        """Write the central directory; returns the sha256 of the whole file."""
        offset = self._at
        self._write(b"".join(map(_central_entry, self._members)))
        count, size = len(self._members), self._at - offset
        if count >= _MAX16 or size >= _MAX32 or offset >= _MAX32:
            locator = _LOCATOR64.pack(b"PK\6\7", 0, self._at, 1)
            self._write(_END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, offset) + locator)
        counted = min(count, _MAX16)
        self._write(_END.pack(b"PK\5\6", 0, 0, counted, counted, min(size, _MAX32), min(offset, _MAX32), 0))
        return self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        self._hash.update(data)
        self._at += len(data)
        view = memoryview(data)
        while view:  # a disk that fills up writes a part first
            view = view[os.write(self._file, view) :]


def _central_entry(member: Member) -> bytes:
    wide = [value for value in (member.size, member.packed, member.header) if value >= _MAX32]
    extra = struct.pack(f"<2H{len(wide)}Q", _ZIP64, 8 * len(wide), *wide) + member.extra if wide else member.extra
    needed = max(member.needed, 45) if wide else member.needed
    head = _CENTRAL.pack(
        b"PK\1\2", member.made, needed, member.flags, member.method, member.time, member.date, member.crc,
        min(member.packed, _MAX32), min(member.size, _MAX32), len(member.raw_name), len(extra), len(member.comment),
        0, member.internal, member.external, min(member.header, _MAX32),
    )  # fmt: skip
    return head + member.raw_name + extra + member.comment


def damaged(where: str, expected: str, found: str) -> PatchesError:
    """The error for a wheel whose bytes are not what they claim to be."""
    return PatchesError(
        "the wheel is damaged, or not one",
        file=where,
        expected=expected,
        found=found,
        next_command="pip config list    # fetch it again: make build without WHEEL=FILE",
    )
