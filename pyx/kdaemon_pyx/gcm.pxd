"""AES-GCM by Intel's Multi-Buffer Crypto library, where this machine has it."""

from libc.stdint cimport uint8_t, uint32_t

cdef enum:
    GCM_KEY_BYTES = 1024           # struct gcm_key_data of libIPSec_MB.so.1 has 1008

cdef struct GcmFunctions           # of one key size

# An expanded key, good for both directions, 64-byte aligned. Owner: whoever made it.
cdef struct GcmKey:
    uint8_t data[GCM_KEY_BYTES]
    const GcmFunctions* functions


cdef GcmKey* gcm_key_new(const uint8_t* key, uint32_t key_length) noexcept nogil
cdef void gcm_key_free(GcmKey* key) noexcept nogil
cdef void gcm_seal(
    const GcmKey* key, const uint8_t* nonce, const uint8_t* header, uint8_t* body, const uint8_t* plaintext, uint32_t length) noexcept nogil
cdef bint gcm_open(const GcmKey* key, const uint8_t* nonce, const uint8_t* header, uint8_t* body, uint32_t length) noexcept nogil
