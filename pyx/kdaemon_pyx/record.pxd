"""TLS 1.3 record protection in user mode (RFC 8446 section 5.2), one key of gcm.pyx or context of libcrypto per direction."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from kdaemon_pyx.gcm cimport GcmKey
from kdaemon_pyx.libcrypto cimport EVP_CIPHER_CTX

cdef enum:
    RECORD_HEADER = 5
    RECORD_TAG = 16
    RECORD_TRAILER = 17            # inner content type, tag
    RECORD_OVERHEAD = 22           # header and trailer
    RECORD_PLAINTEXT_MAX = 16384
    RECORD_CIPHERTEXT_MAX = 16640  # the length field: plaintext + 256 (section 5.2)
    RECORD_WIRE_MAX = 16645        # with its header

    CONTENT_CHANGE_CIPHER_SPEC = 20
    CONTENT_ALERT = 21
    CONTENT_HANDSHAKE = 22
    CONTENT_APPLICATION_DATA = 23

    ALERT_CLOSE_NOTIFY = 0
    ALERT_UNEXPECTED_MESSAGE = 10
    ALERT_BAD_RECORD_MAC = 20
    ALERT_RECORD_OVERFLOW = 22
    ALERT_INTERNAL_ERROR = 80
    ALERT_USER_CANCELED = 90

    SUITE_AES_128_GCM_SHA256 = 0x1301
    SUITE_AES_256_GCM_SHA384 = 0x1302
    SUITE_CHACHA20_POLY1305_SHA256 = 0x1303


# Keys of one direction. Owner: the connection. The key itself lives in one of the first two only; both NULL: no keys.
cdef struct RecordKeys:
    GcmKey* gcm
    EVP_CIPHER_CTX* context
    uint64_t sequence              # of the next record
    uint64_t sequence_max          # AEAD limit (RFC 8446 section 5.5): this record is not sealed any more
    uint8_t iv[12]
    uint16_t cipher_suite


cdef uint32_t suite_key_length(uint16_t cipher_suite) noexcept nogil
cdef uint32_t suite_hash_length(uint16_t cipher_suite) noexcept nogil
cdef uint64_t suite_records_max(uint16_t cipher_suite) noexcept nogil
cdef int record_keys_set(
    RecordKeys* keys, uint16_t cipher_suite, const uint8_t* key, const uint8_t* iv, uint64_t sequence,
    bint encrypt) noexcept nogil
cdef void record_keys_clear(RecordKeys* keys) noexcept nogil
cdef int64_t record_seal(RecordKeys* keys, uint8_t content_type, uint8_t* record, uint32_t length) noexcept nogil
cdef int64_t record_seal_from(
    RecordKeys* keys, uint8_t content_type, uint8_t* record, const uint8_t* plaintext, uint32_t length) noexcept nogil
cdef int64_t record_open(RecordKeys* keys, uint8_t* record, uint32_t record_length, uint8_t* content_type) noexcept nogil
cdef int record_alert(int error) noexcept nogil
