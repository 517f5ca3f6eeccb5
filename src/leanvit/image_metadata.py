"""Encoded images without their metadata, for files whose metadata is broken around sound pixels.

Viewers show such files; Pillow stops at them. JPEG: ITU-T T.81, annex B. PNG: https://www.w3.org/TR/png-3/#5Chunk-layout
"""

from __future__ import annotations

from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_SCAN = 0xDA
_DROPPED = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
"""APP1 to APP13, APP15 and comments. APP0 (JFIF) and APP14 (Adobe) say how colours are stored."""


def without_metadata(data: bytes) -> bytes | None:
    """The same JPEG or PNG with nothing in it but what its pixels need; None for another format or a cut header."""
    if data.startswith(_PNG):
        return _PNG + b"".join(_needed_chunks(data))
    if data.startswith(_JPEG):
        return _jpeg_without_metadata(data)
    return None


def _needed_chunks(data: bytes) -> Iterator[bytes]:
    """Critical chunks, which have a capital first letter, and transparency."""
    start = len(_PNG)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        kind = data[start + 4 : start + 8]
        if kind[:1].isupper() or kind == b"tRNS":
            yield data[start:end]
        start = end


def _jpeg_without_metadata(data: bytes) -> bytes | None:
    kept, start = [_JPEG], 2
    while start + 4 <= len(data) and data[start] == 0xFF:
        marker = data[start + 1]
        if marker == _SCAN:
            return b"".join([*kept, data[start:]])
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker not in _DROPPED:
            kept.append(data[start:end])
        start = end
    return None
