"""HMAC-SHA256 and HMAC-SHA384 without the fetching and allocating that a general HMAC call does each time.

A TLS 1.3 handshake takes about two dozen HMACs over inputs of some fifty bytes; there the preparation costs several times
the hashing. One digest context per thread and hash is kept and initialised again for every use.
Thread-safe: contexts are thread-local. Keys and pads are wiped from the stack before a call returns.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcpy, memset

from kdaemon_pyx.libcrypto cimport OPENSSL_cleanse


cdef extern from "<openssl/evp.h>" nogil:
    ctypedef struct EVP_MD:
        pass
    ctypedef struct EVP_MD_CTX:
        pass
    EVP_MD* EVP_MD_fetch(void* libctx, const char* algorithm, const char* properties)
    EVP_MD_CTX* EVP_MD_CTX_new()
    int EVP_DigestInit_ex(EVP_MD_CTX* ctx, const EVP_MD* type, void* impl)
    int EVP_DigestUpdate(EVP_MD_CTX* ctx, const void* data, size_t size)
    int EVP_DigestFinal_ex(EVP_MD_CTX* ctx, unsigned char* digest, unsigned int* size)

cdef extern from *:
    """
    static __thread EVP_MD_CTX *kdaemon_hkdf_context[2];
    """
    EVP_MD_CTX* kdaemon_hkdf_context[2]

cdef enum:
    BLOCK_SIZE_MAX = 128

cdef struct Hash:
    EVP_MD* md            # owner: this module, for the life of the process
    Py_ssize_t block_size
    Py_ssize_t digest_size

cdef Hash hashes[2]
hashes[0].md = EVP_MD_fetch(NULL, b"SHA256", NULL)
hashes[0].block_size = 64
hashes[0].digest_size = 32
hashes[1].md = EVP_MD_fetch(NULL, b"SHA384", NULL)
hashes[1].block_size = 128
hashes[1].digest_size = 48
if hashes[0].md == NULL or hashes[1].md == NULL:
    raise ImportError("libcrypto has no SHA256 or SHA384")


cdef EVP_MD_CTX* context_of(int which) noexcept nogil:
    """This thread's context, initialised once with its hash; NULL without memory."""
    if kdaemon_hkdf_context[which] == NULL:
        kdaemon_hkdf_context[which] = EVP_MD_CTX_new()
        if kdaemon_hkdf_context[which] != NULL:
            if EVP_DigestInit_ex(kdaemon_hkdf_context[which], hashes[which].md, NULL) != 1:
                return NULL
    return kdaemon_hkdf_context[which]


cdef int half(EVP_MD_CTX* ctx, const unsigned char* pad, Py_ssize_t pad_size,
              const unsigned char* data, Py_ssize_t size, unsigned char* digest) noexcept nogil:
    """Hashes a padded key and data; 1 on success."""
    return (
        EVP_DigestInit_ex(ctx, NULL, NULL) == 1
        and EVP_DigestUpdate(ctx, pad, pad_size) == 1
        and EVP_DigestUpdate(ctx, data, size) == 1
        and EVP_DigestFinal_ex(ctx, digest, NULL) == 1
    )


cdef int hmac(int which, const unsigned char* key, Py_ssize_t key_size,
              const unsigned char* message, Py_ssize_t message_size, unsigned char* digest) noexcept nogil:
    """RFC 2104 for keys that are not longer than a block; 1 on success."""
    cdef unsigned char inner[BLOCK_SIZE_MAX]
    cdef unsigned char outer[BLOCK_SIZE_MAX]
    cdef Py_ssize_t block_size = hashes[which].block_size
    cdef EVP_MD_CTX* ctx = context_of(which)
    cdef Py_ssize_t index
    cdef int ok
    if ctx == NULL:
        return 0
    memcpy(inner, key, key_size)
    memset(inner + key_size, 0, block_size - key_size)
    for index in range(block_size):
        outer[index] = inner[index] ^ 0x5C
        inner[index] ^= 0x36
    ok = (
        half(ctx, inner, block_size, message, message_size, digest)
        and half(ctx, outer, block_size, digest, hashes[which].digest_size, digest)
    )
    OPENSSL_cleanse(inner, block_size)
    OPENSSL_cleanse(outer, block_size)
    return ok


def hmac_digest(bytes key not None, bytes message not None, str name not None):
    """HMAC of ``message``. ``name``: "sha256" or "sha384"; ``key``: at most one block (64 or 128 bytes).

    Raises ValueError for anything else, MemoryError if libcrypto fails. The signature is that of ``hmac.digest``.
    """
    cdef int which = 0 if name == "sha256" else 1
    cdef bytes digest
    if (which and name != "sha384") or PyBytes_GET_SIZE(key) > hashes[which].block_size:
        raise ValueError("the hash must be sha256 or sha384, and the key no longer than its block")
    digest = PyBytes_FromStringAndSize(NULL, hashes[which].digest_size)
    if not hmac(which, <const unsigned char*> PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key),
                <const unsigned char*> PyBytes_AS_STRING(message), PyBytes_GET_SIZE(message),
                <unsigned char*> PyBytes_AS_STRING(digest)):
        raise MemoryError("libcrypto could not hash")
    return digest
