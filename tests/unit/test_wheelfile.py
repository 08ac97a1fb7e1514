"""The zip container: what is copied stays as it was, what is written any reader takes, and what lies is refused."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_patches.errors import PatchesError
from vllm_patches.hashing import BackgroundHash
from vllm_patches.wheels import wheelfile
from vllm_patches.wheels.wheelfile import HashedSource, ZipWriter, digest, read_data, read_members
from wheelworld import official_files, zipped

PARTS = st.text(st.characters(blacklist_characters="/\\:\0\r\n", blacklist_categories=("Cs",)), min_size=1, max_size=12)
NAMES = st.lists(PARTS.filter(lambda part: part not in (".", "..")), min_size=1, max_size=3).map("/".join)
CONTENTS = st.dictionaries(NAMES, st.binary(max_size=300) | st.just(b"x" * 5000), max_size=8)


def opened(tmp: Path, data: bytes, name: str = "source") -> int:
    path = tmp / name
    path.write_bytes(data)
    return os.open(path, os.O_RDWR)


def copied(source: int, target: int) -> str:
    hashed, writer = HashedSource(source), ZipWriter(target)
    for member in read_members(source, "x.whl"):
        writer.copy(hashed, member)
    writer.finish()
    return hashed.finish()


@settings(max_examples=60, deadline=None)
@given(files=CONTENTS, streamed=st.booleans(), zip64=st.booleans(), data=st.data())
def test_a_copy_of_every_member_reads_the_same_and_is_raw(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], streamed: bool, zip64: bool, data: st.DataObject
) -> None:
    stored = data.draw(st.sets(st.sampled_from(sorted(files)))) if files else set()
    tmp = tmp_path_factory.mktemp("zip")
    original = zipped(files, streamed=streamed, zip64=zip64, stored=stored)
    source, target = opened(tmp, original), opened(tmp, b"", "target")
    assert copied(source, target) == hashlib.sha256(original).hexdigest()
    made = (tmp / "target").read_bytes()
    with zipfile.ZipFile(io.BytesIO(original)) as before, zipfile.ZipFile(io.BytesIO(made)) as after:
        assert after.testzip() is None
        assert after.namelist() == before.namelist()
        for a, b in zip(before.infolist(), after.infolist(), strict=True):
            assert (a.date_time, a.external_attr, a.compress_size) == (b.date_time, b.external_attr, b.compress_size)
            assert after.read(b) == before.read(a)
    end = max((member.end for member in read_members(source, "x")), default=0)
    assert made[:end] == original[:end]  # not one byte was compressed again
    for member in read_members(target, "x"):
        assert digest(target, member, "sha256", "x") == hashlib.sha256(read_data(target, member, "x")).digest()
    os.close(source)
    os.close(target)


def described(content: bytes, *, signature: bool, wide: bool, crc: int | None = None) -> bytes:
    """A file with one member and a data descriptor of each form that the zip specification allows."""
    crc = zlib.crc32(content) if crc is None else crc
    size = len(content)
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 45 if wide else 20, 8, 0, 0, 33, 0, 0, 0, 1, 0) + b"a" + content
    local += b"PK\7\x08" * signature + struct.pack("<LQQ" if wide else "<3L", crc, size, size)
    central = struct.pack(
        "<4s6H3L5H2L",
        b"PK\1\2",
        788,
        20,
        8,
        0,
        0,
        33,
        zlib.crc32(content),
        size,
        size,
        1,
        0,
        0,
        0,
        0,
        0o100644 << 16,
        0,
    )
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(central) + 1, len(local), 0)
    return local + central + b"a" + end


@settings(max_examples=40, deadline=None)
@given(content=st.binary(max_size=40) | st.just(b"PK\7\x08" * 4), signature=st.booleans(), wide=st.booleans())
def test_data_descriptors_of_every_form(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, signature: bool, wide: bool
) -> None:
    tmp = tmp_path_factory.mktemp("zip")
    source = opened(tmp, described(content, signature=signature, wide=wide))
    target = opened(tmp, b"", "target")
    copied(source, target)
    (member,) = read_members(target, "x")
    assert read_data(target, member, "x") == content
    wrong = opened(tmp, described(content, signature=signature, wide=wide, crc=zlib.crc32(content) ^ 1), "wrong")
    with pytest.raises(PatchesError, match="damaged"):
        read_members(wrong, "x.whl")
    for file in (source, target, wrong):
        os.close(file)


@settings(max_examples=40, deadline=None)
@given(files=CONTENTS)
def test_what_is_added_is_stored_and_every_reader_takes_it(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    tmp = tmp_path_factory.mktemp("zip")
    made = []
    for name in ("a", "b"):
        target = opened(tmp, b"", name)
        writer = ZipWriter(target)
        for path, content in files.items():
            writer.add(path, content, 0o100755)
        sha256 = writer.finish()
        os.close(target)
        made.append((tmp / name).read_bytes())
        assert hashlib.sha256(made[-1]).hexdigest() == sha256
    assert made[0] == made[1]
    with zipfile.ZipFile(tmp / "a") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files
        assert {i.compress_type for i in archive.infolist()} <= {zipfile.ZIP_STORED}
        assert {i.external_attr >> 16 for i in archive.infolist()} <= {0o100755}
        assert {i.date_time for i in archive.infolist()} <= {(1980, 1, 1, 0, 0, 0)}


def test_offsets_over_4_gib_are_written_as_zip64(tmp_path: Path) -> None:
    """A sparse file stands for the 4 GiB: only the directory is looked at."""
    source, target = opened(tmp_path, zipped({"a": b"1"})), opened(tmp_path, b"", "target")
    writer = ZipWriter(target)
    writer._at = os.lseek(target, 5 << 30, os.SEEK_SET)
    hashed = HashedSource(source)
    placed = [writer.copy(hashed, member) for member in read_members(source, "x")]
    writer.finish()
    count, size, offset = wheelfile._find_directory(target, "x")
    found = list(wheelfile._parse_directory(os.pread(target, size, offset), "x"))
    assert (count, [member.header for member in found]) == (2, [member.header for member in placed])
    assert placed[0].header == 5 << 30
    with zipfile.ZipFile(tmp_path / "target") as archive:
        assert archive.read("a") == b"1"


def test_many_members_are_written_as_zip64(tmp_path: Path) -> None:
    target = opened(tmp_path, b"")
    writer = ZipWriter(target)
    for number in range(65_536):
        writer.add(str(number), b"")
    writer.finish()
    assert len(read_members(target, "x")) == 65_536
    with zipfile.ZipFile(tmp_path / "source") as archive:
        assert len(archive.namelist()) == 65_536


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One changed byte anywhere: an error of ours, or no difference that a reader of the members could see."""
    original = zipped(official_files(), streamed=data.draw(st.booleans()))
    at = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[at] ^= data.draw(st.integers(1, 255))
    source = opened(tmp_path_factory.mktemp("zip"), bytes(changed))
    try:
        contents = {m.name: read_data(source, m, "x.whl") for m in read_members(source, "x.whl")}
    except PatchesError as error:
        assert error.file == "x.whl"
        assert error.expected
        assert error.next_command
    else:
        wanted = official_files()
        assert {name: contents[name] for name in wanted if name in contents}.items() <= wanted.items()
    finally:
        os.close(source)


@settings(max_examples=60, deadline=None)
@given(keep=st.integers(0, 4000))
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, keep: int) -> None:
    original = zipped(official_files())
    source = opened(tmp_path_factory.mktemp("zip"), original[: min(keep, len(original) - 1)])
    with pytest.raises(PatchesError):
        read_members(source, "x.whl")
    os.close(source)


def _twice() -> bytes:
    out = io.BytesIO()
    with pytest.warns(UserWarning), zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a", b"1")
        archive.writestr("a", b"2")
    return out.getvalue()


def _gap() -> bytes:
    data = zipped({"a": b"1", "b": b"2"})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        start = archive.start_dir
    end = data.rindex(b"PK\5\6")
    moved = data[:end] + data[end : end + 16] + struct.pack("<L", start + 3) + data[end + 20 :]
    return moved[:start] + b"gap" + moved[start:]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "none"),
        (b"not a zip", "none"),
        (zipped({}) + b"tail", "does not close"),
        (b"#!/bin/sh\n" + zipped({"a": b""}), "ends at"),
        (_twice, "two of a"),
        (_gap, "3 bytes that belong to no member"),
        (zipped({"../a": b""}), "'../a'"),
        (zipped({"/a": b""}), "'/a'"),
        (zipped({"a//b": b""}), "'a//b'"),
        (zipped({"a\\b": b""}), "'a\\\\b'"),
        (zipped({"C:/b": b""}), "'C:/b'"),
        (zipped({"a\rb": b""}), "'a\\rb'"),  # csv before Python 3.13 writes it unquoted into RECORD
        (zipped({"a": b"x"}, modes={"a": 0o120777}), "mode 120777"),
    ],
)
def test_what_no_wheel_has_is_refused(tmp_path: Path, data: object, found: str) -> None:
    source = opened(tmp_path, data() if callable(data) else data)  # type: ignore[arg-type]
    with pytest.raises(PatchesError) as caught:
        read_members(source, "x.whl")
    assert found in caught.value.found
    os.close(source)


@pytest.mark.parametrize("change", ["flags", "method", "crc", "size", "name"])
def test_a_local_header_that_contradicts_the_directory_is_refused(tmp_path: Path, change: str) -> None:
    data = bytearray(zipped({"a": b"12345"}))
    at = {"flags": 6, "method": 8, "crc": 14, "size": 22, "name": 30}[change]
    data[at] ^= 2
    source = opened(tmp_path, bytes(data))
    with pytest.raises(PatchesError) as caught:
        read_members(source, "x.whl")
    assert "contradicts" in caught.value.found
    os.close(source)


def test_an_encrypted_or_strangely_packed_member_is_refused(tmp_path: Path) -> None:
    for flags, method in ((1, 8), (0, 12)):
        data = zipped({"a": b"12345"})
        at = data.index(b"PK\1\2")
        data = data[: at + 8] + struct.pack("<2H", flags, method) + data[at + 12 :]
        source = opened(tmp_path, data)
        with pytest.raises(PatchesError) as caught:
            read_members(source, "x.whl")
        assert f"method {method}, flags {flags:#x}" in caught.value.found
        os.close(source)


def test_memory_does_not_grow_with_what_a_member_inflates_to(tmp_path: Path) -> None:
    """A bomb of 200 MB in 200 kB is read in blocks."""
    source = opened(tmp_path, zipped({"bomb": b"\0" * (200 << 20)}))
    member = read_members(source, "x")[0]
    assert max(map(len, wheelfile.content(source, member, "x"))) <= wheelfile.CHUNK
    os.close(source)


def test_a_source_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    source, target = opened(tmp_path, zipped({"a": os.urandom(9000)})), opened(tmp_path, b"", "t")
    member = read_members(source, "x")[0]
    os.truncate(tmp_path / "source", 4000)
    with pytest.raises(PatchesError, match="damaged"):
        ZipWriter(target).copy(HashedSource(source), member)


def test_a_member_whose_crc_or_stream_is_wrong_is_noticed_while_it_is_read(tmp_path: Path) -> None:
    source = opened(tmp_path, zipped({"a": b"12345" * 99, "b": b"2"}))
    member = read_members(source, "x")[0]
    for wrong in (
        replace(member, crc=member.crc ^ 1),
        replace(member, packed=member.packed + 4),  # bytes behind the end of the stream
        replace(member, packed=member.packed - 1),
        replace(member, size=member.size + 1),
        replace(member, size=member.size - 1),
    ):
        for read in (lambda m: read_data(source, m, "x"), lambda m: digest(source, m, "sha256", "x")):
            with pytest.raises(PatchesError):
                read(wrong)
    os.close(source)


@given(sizes=st.tuples(*[st.sampled_from([0, 1, 0xFFFFFFFE, 0xFFFFFFFF, 5 << 30, 1 << 40])] * 3), extra=st.booleans())
def test_the_directory_holds_sizes_of_any_width(sizes: tuple[int, int, int], extra: bool) -> None:
    field = b"UT\5\0\3abcd" if extra else b""
    member = wheelfile.Member("a", b"a", 788, 20, 0, 0, 0, 33, 7, *sizes[:2], 0, 0, field, b"note", sizes[2])
    (parsed,) = wheelfile._parse_directory(wheelfile._central_entry(member), "x")
    assert replace(parsed, needed=20) == member


def test_the_hash_beside_the_work_is_that_of_all_bytes_in_order() -> None:
    hashed, data = BackgroundHash(), os.urandom(5_000_000)
    for at in (0, 1, 70_000, 70_001, 2_000_000, 4_999_999):
        end = {0: 1, 1: 70_000, 70_000: 70_001, 70_001: 2_000_000, 2_000_000: 4_999_999, 4_999_999: 5_000_000}[at]
        hashed.update(data[at:end])
    assert hashed.hexdigest() == hashlib.sha256(data).hexdigest()
    assert BackgroundHash().hexdigest() == hashlib.sha256(b"").hexdigest()
