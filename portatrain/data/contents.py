"""Recognise by their first bytes files that are neither text nor token ids, so that none is trained on as either.

A table holds the marks of formats. A mark of a few bytes can occur at the start of raw token ids as well, so some rows
have a test that looks further. Of text, a mark counts only in a file that is not text itself.
"""

from __future__ import annotations

import bz2
import codecs
import lzma
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from portatrain.errors import UserError

HEAD = 4096
"""The bytes of a file that are looked at."""
NPY = b"\x93NUMPY"
LLM_C = {20240520: "uint16", 20240801: "uint32"}
"""The first number of token files of llm.c (dev/data/data_common.py) by the type of their ids."""
LLM_C_BYTES = 1024

UNPACK = "Unpack it first, and name the unpacked files."
EXPORT = "Write its texts or ids as plain files: text, JSON lines or an array of token ids."


@dataclass(frozen=True)
class Format:
    """A format with its mark at `at`; `test(head, size)` decides if the mark alone does not."""

    name: str
    mark: bytes
    do: str = EXPORT
    at: int = 0
    test: Callable[[bytes, int], bool] | None = None

    def fits(self, head: bytes, size: int) -> bool:
        return head.startswith(self.mark, self.at) and (self.test is None or self.test(head, size))


def _unpacks(open_: Callable[[], Any]) -> Callable[[bytes, int], bool]:
    def test(head: bytes, size: int) -> bool:
        stream = open_()
        try:
            return bool(stream.decompress(head)) or stream.eof or size > len(head)
        except Exception:
            return False

    return test


def _gzip(head: bytes, size: int) -> bool:
    stream = zlib.decompressobj(31)
    try:
        return bool(stream.decompress(head)) or stream.eof
    except zlib.error:
        return False


def _pickle(head: bytes, size: int) -> bool:
    """Protocols 2 to 5: from 4 on, a frame follows whose length fits; before, an operation that opens an object."""
    if head[1:3] in (b"\x04\x95", b"\x05\x95") and len(head) >= 11:
        return struct.unpack("<Q", head[3:11])[0] <= size - 11
    return bool(re.match(rb"\x80[\x02\x03]([]}]q\x00|c[\w.]+\n[\w.]+\n)", head))


def _safetensors(head: bytes, size: int) -> bool:
    return len(head) > 9 and struct.unpack("<Q", head[:8])[0] <= size - 8 and head[8:10] in (b'{"', b"{}")


def is_llm_c(head: bytes, size: int) -> bool:
    """Return whether a file with these first bytes is a token file of llm.c."""
    return head[:4] in [struct.pack("<i", magic) for magic in LLM_C] and _llm_c(head, size)


def _llm_c(head: bytes, size: int) -> bool:
    return len(head) >= 12 and struct.unpack("<i", head[4:8])[0] in range(1, 16) and size >= LLM_C_BYTES


FORMATS = (
    Format("a NumPy array (.npy)", NPY, "Read it with TokenMemmap, if it holds token ids."),
    *(
        Format(f"a token file of llm.c ({dtype})", struct.pack("<i", magic), "Read it with TokenMemmap.", test=_llm_c)
        for magic, dtype in LLM_C.items()
    ),
    Format("gzip", b"\x1f\x8b\x08", UNPACK, test=_gzip),
    Format("zstd", b"\x28\xb5\x2f\xfd", UNPACK),
    Format("bzip2", b"BZh", UNPACK, test=_unpacks(bz2.BZ2Decompressor)),
    Format("xz", b"\xfd7zXZ\0", UNPACK, test=_unpacks(lzma.LZMADecompressor)),
    Format("lz4", b"\x04\x22\x4d\x18", UNPACK),
    Format("7-Zip", b"7z\xbc\xaf\x27\x1c", UNPACK),
    Format("a zip archive, or an .npz or .pt file", b"PK\x03\x04", UNPACK),
    Format("an empty zip archive", b"PK\x05\x06", UNPACK),
    Format("a tar archive", b"ustar", UNPACK, at=257),
    Format("Parquet", b"PAR1", "Read it with Parquet."),
    Format("Arrow", b"ARROW1\0\0", "Read it with Arrow."),
    Format("Avro", b"Obj\x01"),
    Format("HDF5", b"\x89HDF\r\n\x1a\n"),
    Format("SQLite", b"SQLite format 3\0"),
    Format("safetensors", b"", test=_safetensors),
    Format("a pickle", b"\x80", test=_pickle),
    Format("an index of Megatron", b"MMIDIDX\0\0", "Read it with Megatron."),
    Format("a PNG image", b"\x89PNG\r\n\x1a\n"),
    Format(
        "a JPEG image",
        b"\xff\xd8\xff",
        test=lambda head, size: head[6:10] in (b"JFIF", b"Exif") or head[3:6] == b"\xdb\0\x43",
    ),
    Format("a GIF image", b"GIF8"),
    Format("PDF", b"%PDF-"),
    Format("an ELF program", b"\x7fELF"),
    Format("a recording (RIFF)", b"RIFF", test=lambda head, size: head[8:12] in (b"WAVE", b"WEBP", b"AVI ")),
)

BOMS = (
    ("UTF-32", codecs.BOM_UTF32_LE),
    ("UTF-32", codecs.BOM_UTF32_BE),
    ("UTF-16", codecs.BOM_UTF16_LE),
    ("UTF-16", codecs.BOM_UTF16_BE),
)
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def recognised(head: bytes, size: int) -> Format | None:
    """Return the format of a file with these first bytes, or None if it is none of the table's."""
    return next((form for form in FORMATS if form.fits(head, size)), None)


def is_text(head: bytes) -> bool:
    """Return whether these first bytes of a file are UTF-8 without control characters."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return not _CONTROL.search(head)


def check_text(path: object, data: bytes, size: int | None = None) -> None:
    """Raise UserError if a file is not text: of another format, UTF-16, or with a byte 0.

    `data`: the whole file, or its beginning if `size`, its length, is given.
    """
    head, size = data[:HEAD], len(data) if size is None else size
    found = None if is_text(head) else recognised(head, size)
    if found is not None:
        raise _not_text(path, found.name, found.do)
    for name, mark in BOMS:
        if head.startswith(mark):
            raise _not_text(path, f"text in {name}", f"Convert it: iconv -f {name} -t UTF-8 IN > OUT.")
    at = data.find(b"\0")
    if at >= 0:
        raise _not_text(path, f"a byte 0 at offset {at}", "Convert it to UTF-8, or leave it out.")


def _not_text(path: object, got: str, do: str) -> UserError:
    return UserError(f"data file {path}", expected="text, best in UTF-8", got=got, do=do)


def check_ids(path: object, head: bytes, size: int, width: int) -> None:
    """Raise UserError if a file of raw ids of `width` bytes is of another format, or text."""
    found = recognised(head, size)
    # A byte may be the id of a character; two bytes of text are an id that nobody meant.
    if found is None and not (width > 1 and len(head) >= 32 and is_text(head)):
        return
    raise UserError(
        f"token file {path}",
        expected="raw token ids, little-endian, or one array as numpy.save writes it",
        got=found.name if found else f"text that begins with {head[:24].decode('utf-8', 'replace')!r}",
        do=found.do if found else "Name the token files by a glob that leaves it out, or read it with TextFiles.",
    )
