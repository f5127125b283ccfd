"""Bounded reader for the presentation language of RFC 8446 §3, and its vectors for writing.

Every length is checked against the bytes that are really there before anything is sliced; a violation is a
:class:`~kdaemon.tls.errors.MalformedMessage` (decode_error) that names the field.
"""

import struct

from kdaemon.tls.errors import MalformedMessage


class Reader:
    """Reads ``data`` from ``position`` on.

    Not thread-safe; holds a reference to ``data``, copies only what it returns.
    """

    __slots__ = ("_data", "_end", "_position")

    def __init__(self, data: bytes, position: int = 0) -> None:
        self._data = data
        self._position = position
        self._end = len(data)

    def remaining(self) -> int:
        """Number of bytes not read yet."""
        return self._end - self._position

    def position(self) -> int:
        """Offset of the next byte in the data given to the constructor."""
        return self._position

    def opaque(self, size: int, name: str) -> bytes:
        """The next ``size`` bytes."""
        start = self._position
        end = start + size
        if end > self._end:
            raise MalformedMessage(f"{name} is cut short")
        self._position = end
        return self._data[start:end]

    def uint8(self, name: str) -> int:
        """An unsigned 8-bit number."""
        position = self._position
        if position >= self._end:
            raise MalformedMessage(f"{name} is cut short")
        self._position = position + 1
        return self._data[position]

    def uint16(self, name: str) -> int:
        """An unsigned 16-bit number."""
        position = self._position
        if position + 2 > self._end:
            raise MalformedMessage(f"{name} is cut short")
        self._position = position + 2
        return self._data[position] << 8 | self._data[position + 1]

    def uint24(self, name: str) -> int:
        """An unsigned 24-bit number."""
        return int.from_bytes(self.opaque(3, name), "big")

    def uint32(self, name: str) -> int:
        """An unsigned 32-bit number."""
        return int.from_bytes(self.opaque(4, name), "big")

    def vector8(self, name: str, size_min: int = 0, size_max: int = 0xFF) -> bytes:
        """A vector with a one-byte length between the bounds."""
        data, start = self._data, self._position + 1
        if start > self._end:
            raise MalformedMessage(f"{name} is cut short")
        end = start + data[start - 1]
        if end > self._end or end - start < size_min or end - start > size_max:
            raise MalformedMessage(f"{name} has a length out of bounds ({end - start})")
        self._position = end
        return data[start:end]

    def vector16(self, name: str, size_min: int = 0, size_max: int = 0xFFFF) -> bytes:
        """A vector with a two-byte length between the bounds."""
        data, start = self._data, self._position + 2
        if start > self._end:
            raise MalformedMessage(f"{name} is cut short")
        end = start + (data[start - 2] << 8 | data[start - 1])
        if end > self._end or end - start < size_min or end - start > size_max:
            raise MalformedMessage(f"{name} has a length out of bounds ({end - start})")
        self._position = end
        return data[start:end]

    def vector24(self, name: str, size_min: int = 0, size_max: int = 0xFFFFFF) -> bytes:
        """A vector with a three-byte length between the bounds."""
        size = self.uint24(name)
        if not size_min <= size <= size_max:
            raise MalformedMessage(f"{name} has a length out of bounds ({size})")
        return self.opaque(size, name)

    def finish(self, name: str) -> None:
        """Everything must have been read."""
        if self._position != self._end:
            raise MalformedMessage(f"{name} has {self._end - self._position} bytes too many")


def parse_uint16_list(data: bytes, name: str) -> tuple[int, ...]:
    """A non-empty list of 16-bit numbers without a length in front."""
    if not data or len(data) & 1:
        raise MalformedMessage(f"{name} has a length out of bounds ({len(data)})")
    return struct.unpack(f">{len(data) >> 1}H", data)


def serialize_uint16_list(values: tuple[int, ...]) -> bytes:
    """The inverse of :func:`parse_uint16_list`."""
    return struct.pack(f">{len(values)}H", *values)


def vector8(data: bytes) -> bytes:
    """``data`` behind a one-byte length."""
    return len(data).to_bytes(1, "big") + data


def vector16(data: bytes) -> bytes:
    """``data`` behind a two-byte length."""
    return len(data).to_bytes(2, "big") + data


def vector24(data: bytes) -> bytes:
    """``data`` behind a three-byte length."""
    return len(data).to_bytes(3, "big") + data
