"""TLS 1.3 record protection in user mode (RFC 8446 sections 5.2 to 5.5), sealed and opened in place.

Thread-safety: a ``RecordKeys`` belongs to one connection and so to one engine thread. The ciphers are fetched once, at import.
"""

from libc.errno cimport EBADMSG, EINVAL, EMSGSIZE, ENOMEM, EPROTO
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from kdaemon_pyx cimport libcrypto as crypto
from kdaemon_pyx.gcm cimport gcm_key_free, gcm_key_new, gcm_open, gcm_seal

cdef extern from "<errno.h>" nogil:
    int EKEYEXPIRED

# Fetched ciphers (never freed: they live as long as the process); read-only after import.
cdef crypto.EVP_CIPHER* aes_128_gcm = crypto.EVP_CIPHER_fetch(NULL, b"AES-128-GCM", NULL)
cdef crypto.EVP_CIPHER* aes_256_gcm = crypto.EVP_CIPHER_fetch(NULL, b"AES-256-GCM", NULL)
cdef crypto.EVP_CIPHER* chacha20_poly1305 = crypto.EVP_CIPHER_fetch(NULL, b"ChaCha20-Poly1305", NULL)


cdef uint32_t suite_key_length(uint16_t cipher_suite) noexcept nogil:
    """Bytes of the traffic key; 0 for a suite that this record layer does not know."""
    if cipher_suite == SUITE_AES_128_GCM_SHA256:
        return 16
    if cipher_suite == SUITE_AES_256_GCM_SHA384 or cipher_suite == SUITE_CHACHA20_POLY1305_SHA256:
        return 32
    return 0


cdef uint32_t suite_hash_length(uint16_t cipher_suite) noexcept nogil:
    return 48 if cipher_suite == SUITE_AES_256_GCM_SHA384 else 32


cdef uint64_t suite_records_max(uint16_t cipher_suite) noexcept nogil:
    """Records that may be sealed under one key: RFC 8446 section 5.5 gives 2^24.5 full-size records for AES-GCM, and no limit that is
    below the wrap of the sequence number for ChaCha20-Poly1305."""
    return <uint64_t>1 << 62 if cipher_suite == SUITE_CHACHA20_POLY1305_SHA256 else 23726566


cdef crypto.EVP_CIPHER* suite_cipher(uint16_t cipher_suite) noexcept nogil:
    if cipher_suite == SUITE_AES_128_GCM_SHA256:
        return aes_128_gcm
    if cipher_suite == SUITE_AES_256_GCM_SHA384:
        return aes_256_gcm
    if cipher_suite == SUITE_CHACHA20_POLY1305_SHA256:
        return chacha20_poly1305
    return NULL


cdef int record_keys_set(
        RecordKeys* keys, uint16_t cipher_suite, const uint8_t* key, const uint8_t* iv, uint64_t sequence,
        bint encrypt) noexcept nogil:
    """Installs the key of one direction; replaces what was there only when the new one is complete. 0, -EINVAL or -ENOMEM."""
    cdef crypto.EVP_CIPHER* cipher = suite_cipher(cipher_suite)
    cdef crypto.EVP_CIPHER_CTX* context = NULL
    cdef GcmKey* gcm = NULL
    if cipher == NULL:
        return -EINVAL
    if cipher_suite != SUITE_CHACHA20_POLY1305_SHA256:
        gcm = gcm_key_new(key, suite_key_length(cipher_suite))
    if gcm == NULL:
        context = crypto.EVP_CIPHER_CTX_new()
        if context == NULL:
            return -ENOMEM
        # 12 bytes is the default IV length of all three ciphers.
        if crypto.EVP_CipherInit_ex(context, cipher, NULL, key, iv, encrypt) != 1:
            crypto.EVP_CIPHER_CTX_free(context)
            crypto.ERR_clear_error()
            return -ENOMEM
    record_keys_clear(keys)
    keys.gcm = gcm
    keys.context = context
    keys.cipher_suite = cipher_suite
    keys.sequence = sequence
    keys.sequence_max = suite_records_max(cipher_suite)
    memcpy(keys.iv, iv, 12)
    return 0


cdef void record_keys_clear(RecordKeys* keys) noexcept nogil:
    gcm_key_free(keys.gcm)
    if keys.context != NULL:
        crypto.EVP_CIPHER_CTX_free(keys.context)   # cleanses its key
    crypto.OPENSSL_cleanse(keys, sizeof(RecordKeys))


cdef void record_nonce(const RecordKeys* keys, uint8_t* nonce) noexcept nogil:
    """RFC 8446 section 5.3: the sequence number in network order, padded on the left, XORed with the IV."""
    cdef uint64_t sequence = keys.sequence
    cdef int i
    memcpy(nonce, keys.iv, 12)
    for i in range(8):
        nonce[11 - i] ^= <uint8_t>(sequence >> (8 * i))


cdef int64_t record_seal(RecordKeys* keys, uint8_t content_type, uint8_t* record, uint32_t length) noexcept nogil:
    """Seals one record in place: RECORD_HEADER bytes of room, ``length`` (0..16384) bytes of plaintext, 17 bytes of room. As record_seal_from."""
    return record_seal_from(keys, content_type, record, record + RECORD_HEADER, length)


cdef int64_t record_seal_from(
        RecordKeys* keys, uint8_t content_type, uint8_t* record, const uint8_t* plaintext, uint32_t length) noexcept nogil:
    """Seals one record into ``record``, which has room for ``length`` + RECORD_OVERHEAD bytes.

    ``plaintext`` is in its place in ``record`` or anywhere else. It may be memory that somebody rewrites meanwhile: every byte is read once, what is
    authenticated is the ciphertext in ``record``. Returns the record's size on the wire, -EKEYEXPIRED at the AEAD limit, -EINVAL, -EPROTO if
    libcrypto fails. A sequence number is used at most once: it moves on failure too.
    """
    cdef uint8_t[12] nonce
    cdef uint32_t sealed = length + 1 + RECORD_TAG
    cdef uint8_t* body = record + RECORD_HEADER
    cdef uint32_t apart = length if plaintext != body else 0     # bytes sealed before the content type joins
    cdef int out = 0
    if (keys.context == NULL and keys.gcm == NULL) or length > RECORD_PLAINTEXT_MAX:
        return -EINVAL
    if keys.sequence >= keys.sequence_max:
        return -EKEYEXPIRED
    record[0] = CONTENT_APPLICATION_DATA
    record[1] = 3
    record[2] = 3
    record[3] = <uint8_t>(sealed >> 8)
    record[4] = <uint8_t>sealed
    body[length] = content_type
    record_nonce(keys, nonce)
    keys.sequence += 1
    if keys.gcm != NULL:
        gcm_seal(keys.gcm, nonce, record, body, plaintext, length)
        return RECORD_HEADER + sealed
    if (crypto.EVP_CipherInit_ex(keys.context, NULL, NULL, NULL, nonce, -1) != 1
            or crypto.EVP_EncryptUpdate(keys.context, NULL, &out, record, RECORD_HEADER) != 1
            or (apart and crypto.EVP_EncryptUpdate(keys.context, body, &out, plaintext, <int>apart) != 1)
            or crypto.EVP_EncryptUpdate(keys.context, body + apart, &out, body + apart, <int>(length + 1 - apart)) != 1
            or crypto.EVP_EncryptFinal_ex(keys.context, body + length + 1, &out) != 1
            or crypto.EVP_CIPHER_CTX_ctrl(keys.context, crypto.EVP_CTRL_AEAD_GET_TAG, RECORD_TAG, body + length + 1) != 1):
        crypto.ERR_clear_error()
        return -EPROTO
    return RECORD_HEADER + sealed


cdef bint libcrypto_open(crypto.EVP_CIPHER_CTX* context, const uint8_t* nonce, uint8_t* record, uint32_t length) noexcept nogil:
    """Opens ``length`` bytes behind the header in place. False: the tag behind them is another one."""
    cdef int out = 0
    cdef uint8_t* body = record + RECORD_HEADER
    if (crypto.EVP_CipherInit_ex(context, NULL, NULL, NULL, nonce, -1) == 1
            and crypto.EVP_CIPHER_CTX_ctrl(context, crypto.EVP_CTRL_AEAD_SET_TAG, RECORD_TAG, body + length) == 1
            and crypto.EVP_DecryptUpdate(context, NULL, &out, record, RECORD_HEADER) == 1
            and crypto.EVP_DecryptUpdate(context, body, &out, body, <int>length) == 1
            and crypto.EVP_DecryptFinal_ex(context, body + length, &out) == 1):
        return True
    crypto.ERR_clear_error()
    return False


cdef int64_t record_open(
        RecordKeys* keys, uint8_t* record, uint32_t record_length, uint8_t* content_type) noexcept nogil:
    """Opens one whole record in place; ``record_length`` includes its header.

    Returns the length of the content at ``record + RECORD_HEADER`` and its type. Negative: -EBADMSG (tag), -EMSGSIZE (too long),
    -EPROTO (outer type, or nothing but padding inside), -EKEYEXPIRED. On failure the content is wiped: nothing unverified is left behind.
    """
    cdef uint8_t[12] nonce
    cdef uint32_t length
    cdef bint opened
    if record_length > RECORD_WIRE_MAX:
        return -EMSGSIZE
    if record[0] != CONTENT_APPLICATION_DATA:
        return -EPROTO
    if record_length < RECORD_OVERHEAD or (keys.context == NULL and keys.gcm == NULL):
        return -EBADMSG
    if keys.sequence == <uint64_t>-1:
        return -EKEYEXPIRED
    length = record_length - RECORD_HEADER - RECORD_TAG
    record_nonce(keys, nonce)
    if keys.gcm != NULL:
        opened = gcm_open(keys.gcm, nonce, record, record + RECORD_HEADER, length)
    else:
        opened = libcrypto_open(keys.context, nonce, record, length)
    if not opened:
        memset(record + RECORD_HEADER, 0, length)
        return -EBADMSG
    keys.sequence += 1
    if length > RECORD_PLAINTEXT_MAX + 1:
        return -EMSGSIZE                           # padding counts (section 5.4)
    # Section 5.4: the content type is the last octet that is not zero. The scan leaks only the padding's length.
    while length > 0 and record[RECORD_HEADER + length - 1] == 0:
        length -= 1
    if length == 0:
        return -EPROTO
    length -= 1
    content_type[0] = record[RECORD_HEADER + length]
    return length


cdef int record_alert(int error) noexcept nogil:
    """The alert for a failure of record_open (RFC 8446 sections 5.1, 5.2 and 5.4)."""
    if error == -EBADMSG:
        return ALERT_BAD_RECORD_MAC
    if error == -EMSGSIZE:
        return ALERT_RECORD_OVERFLOW
    if error == -EPROTO:
        return ALERT_UNEXPECTED_MESSAGE
    return ALERT_INTERNAL_ERROR


class RecordError(Exception):
    """A record could not be sealed or opened; ``errno`` says why."""

    def __init__(self, errno: int) -> None:
        super().__init__(f"record layer: errno {errno}")
        self.errno = errno


cdef class RecordProtection:
    """One direction of the record layer for Python: tests, tools and known-answer vectors. Not thread-safe.

    Parameters: ``cipher_suite`` (0x1301..0x1303), ``key``, ``iv`` (12 bytes), ``sequence`` of the next record, ``encrypt``.
    """
    cdef RecordKeys keys

    def __cinit__(self, int cipher_suite, bytes key, bytes iv, unsigned long long sequence=0, bint encrypt=True):
        if suite_key_length(<uint16_t>cipher_suite) != <uint32_t>len(key) or len(key) == 0 or len(iv) != 12:
            raise ValueError("RecordProtection: key or iv has the wrong length for the cipher suite")
        if record_keys_set(&self.keys, <uint16_t>cipher_suite, key, iv, sequence, encrypt) < 0:
            raise MemoryError

    def __dealloc__(self):
        record_keys_clear(&self.keys)

    @property
    def sequence(self) -> int:
        return self.keys.sequence

    @property
    def records_max(self) -> int:
        return self.keys.sequence_max

    def seal(self, int content_type, bytes plaintext) -> bytes:
        """One record around ``plaintext`` (at most 16384 bytes). Raises RecordError."""
        cdef int64_t result
        cdef bytearray record
        if len(plaintext) > RECORD_PLAINTEXT_MAX:
            raise RecordError(EMSGSIZE)
        record = bytearray(RECORD_HEADER) + plaintext + bytearray(1 + RECORD_TAG)
        result = record_seal(&self.keys, <uint8_t>content_type, record, <uint32_t>len(plaintext))
        if result < 0:
            raise RecordError(<int>-result)
        return bytes(record)

    def open(self, bytes record) -> tuple:
        """(content_type, plaintext) of one whole record. Raises RecordError."""
        cdef uint8_t content_type = 0
        cdef int64_t result
        cdef bytearray copy = bytearray(record)
        if len(copy) < RECORD_HEADER:
            raise RecordError(EBADMSG)
        result = record_open(&self.keys, copy, <uint32_t>len(copy), &content_type)
        if result < 0:
            raise RecordError(<int>-result)
        return content_type, bytes(copy[RECORD_HEADER:RECORD_HEADER + result])
