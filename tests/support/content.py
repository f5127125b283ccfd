"""Contents of files that betray a wrong offset."""


def pattern(length: int) -> bytes:
    """`length` bytes that tell their own offset: a shifted, repeated or zeroed piece cannot go unseen."""
    return b"".join(b"%07x\n" % (offset & 0xFFFFFFF) for offset in range(0, length, 8))[:length]
