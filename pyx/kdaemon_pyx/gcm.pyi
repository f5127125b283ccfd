"""Which implementation of AES-GCM the record layer uses."""

from typing import Final, Literal

IMPLEMENTATION: Final[Literal["vaes_avx512", "avx2", "libcrypto"]]
