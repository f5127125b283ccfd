"""AES-GCM by Intel's Multi-Buffer Crypto library (Debian: libipsec-mb1), where this machine has it; else the record layer uses libcrypto.

Its code for AVX-512 with VAES takes less than half the time of OpenSSL 3.0 per byte, and that for AVX2 a fifth of it per small record. The
library is opened at import and asked for functions by name: nothing of it is needed to build. Before it is used its answers are compared with
libcrypto's. ``KDAEMON_GCM`` in the environment narrows the choice: ``avx2`` (no AVX-512), ``libcrypto``.

Thread-safety: the functions are fixed at import; a key may be used by any number of threads.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcmp, memcpy, memset
from posix.dlfcn cimport RTLD_LOCAL, RTLD_NOW, dlopen, dlsym

from kdaemon_pyx cimport libcrypto as crypto

import os

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void** memory, size_t alignment, size_t size)

cdef extern from *:
    """
    #if defined(__x86_64__)
    static int kdaemon_has_avx2(void)
    {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("aes") && __builtin_cpu_supports("pclmul");
    }
    static int kdaemon_has_vaes_avx512(void)
    {
        return kdaemon_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("vaes") && __builtin_cpu_supports("vpclmulqdq");
    }
    #else
    static int kdaemon_has_avx2(void) { return 0; }
    static int kdaemon_has_vaes_avx512(void) { return 0; }
    #endif
    """
    bint kdaemon_has_avx2() nogil
    bint kdaemon_has_vaes_avx512() nogil

cdef enum:
    CONTEXT_WORDS = 16             # struct gcm_context_data has 88 bytes
    HEADER = 5                     # of a record: the additional data
    TAG = 16
    CHECKED_BYTES = 4096 + 77

# The library's calling conventions (intel-ipsec-mb.h, "Direct API").
ctypedef void (*Prepare)(const void* key, void* key_data) noexcept nogil
ctypedef void (*Whole)(
    const void* key_data, void* context, uint8_t* out, const uint8_t* data, uint64_t length, const uint8_t* nonce, const uint8_t* header,
    uint64_t header_length, uint8_t* tag, uint64_t tag_length) noexcept nogil
ctypedef void (*Begin)(const void* key_data, void* context, const uint8_t* nonce, const uint8_t* header, uint64_t header_length) noexcept nogil
ctypedef void (*Update)(const void* key_data, void* context, uint8_t* out, const uint8_t* data, uint64_t length) noexcept nogil
ctypedef void (*Finish)(const void* key_data, void* context, uint8_t* tag, uint64_t tag_length) noexcept nogil

cdef struct GcmFunctions:
    Prepare prepare
    Whole seal
    Whole open
    Begin begin
    Update update
    Finish finish

cdef GcmFunctions aes_128            # prepare is NULL: not to be used
cdef GcmFunctions aes_256


cdef const GcmFunctions* functions_of(uint32_t key_length) noexcept nogil:
    return &aes_128 if key_length == 16 else &aes_256


cdef GcmKey* gcm_key_new(const uint8_t* key, uint32_t key_length) noexcept nogil:
    """NULL: use libcrypto."""
    cdef const GcmFunctions* functions = functions_of(key_length)
    cdef void* memory = NULL
    if functions.prepare == NULL or posix_memalign(&memory, 64, sizeof(GcmKey)) != 0:
        return NULL
    functions.prepare(key, memory)
    (<GcmKey*>memory).functions = functions
    return <GcmKey*>memory


cdef void gcm_key_free(GcmKey* key) noexcept nogil:
    if key != NULL:
        crypto.OPENSSL_cleanse(key, sizeof(GcmKey))
        free(key)


cdef void gcm_seal(
        const GcmKey* key, const uint8_t* nonce, const uint8_t* header, uint8_t* body, const uint8_t* plaintext,
        uint32_t length) noexcept nogil:
    """Seals ``length`` bytes of ``plaintext``, each read once, and the content type that stands at ``body[length]``; the tag comes behind it."""
    cdef uint64_t[CONTEXT_WORDS] context
    cdef const GcmFunctions* f = key.functions
    if plaintext == body:
        f.seal(key, context, body, body, length + 1, nonce, header, HEADER, body + length + 1, TAG)
        return
    f.begin(key, context, nonce, header, HEADER)
    f.update(key, context, body, plaintext, length)
    f.update(key, context, body + length, body + length, 1)
    f.finish(key, context, body + length + 1, TAG)


cdef bint gcm_open(const GcmKey* key, const uint8_t* nonce, const uint8_t* header, uint8_t* body, uint32_t length) noexcept nogil:
    """Opens ``length`` bytes in place. False: the tag behind them is another one, and what stands in ``body`` is worth nothing."""
    cdef uint64_t[CONTEXT_WORDS] context
    cdef uint8_t[TAG] tag
    key.functions.open(key, context, body, body, length, nonce, header, HEADER, tag, TAG)
    return crypto.CRYPTO_memcmp(tag, body + length, TAG) == 0


# --- choosing, at import ------------------------------------------------------------------------------------------------

cdef bint load(void* library, const char* bits, const char* variant, GcmFunctions* found) except -1:
    """Looks all functions of a key size up; false if one is missing."""
    cdef void* addresses[6]
    cdef int i
    patterns = (b"aes_gcm_pre_%b_%b", b"aes_gcm_enc_%b_%b", b"aes_gcm_dec_%b_%b", b"aes_gcm_init_%b_%b", b"aes_gcm_enc_%b_update_%b",
                b"aes_gcm_enc_%b_finalize_%b")
    for i in range(6):
        addresses[i] = dlsym(library, patterns[i] % (bits, variant))
        if addresses[i] == NULL:
            return False
    found.prepare = <Prepare>addresses[0]
    found.seal = <Whole>addresses[1]
    found.open = <Whole>addresses[2]
    found.begin = <Begin>addresses[3]
    found.update = <Update>addresses[4]
    found.finish = <Finish>addresses[5]
    return True


cdef bint libcrypto_seals(
        const char* name, const uint8_t* key, const uint8_t* nonce, const uint8_t* header, uint8_t* body, uint32_t length) noexcept:
    """What the library is compared with: ``length`` bytes in place, the tag behind them."""
    cdef crypto.EVP_CIPHER* cipher = crypto.EVP_CIPHER_fetch(NULL, name, NULL)
    cdef crypto.EVP_CIPHER_CTX* context = crypto.EVP_CIPHER_CTX_new()
    cdef int out = 0
    cdef bint sealed = (
        cipher != NULL and context != NULL and crypto.EVP_CipherInit_ex(context, cipher, NULL, key, nonce, True) == 1
        and crypto.EVP_EncryptUpdate(context, NULL, &out, header, HEADER) == 1
        and crypto.EVP_EncryptUpdate(context, body, &out, body, <int>length) == 1
        and crypto.EVP_EncryptFinal_ex(context, body + length, &out) == 1
        and crypto.EVP_CIPHER_CTX_ctrl(context, crypto.EVP_CTRL_AEAD_GET_TAG, TAG, body + length) == 1)
    crypto.EVP_CIPHER_CTX_free(context)
    crypto.EVP_CIPHER_free(cipher)
    crypto.ERR_clear_error()
    return sealed


cdef bint agrees(const char* name, uint32_t key_length) noexcept:
    """Whether the functions of a key size do what libcrypto does: in place, from elsewhere, back; and refuse a tag that was changed."""
    cdef uint8_t[32] secret
    cdef uint8_t[CHECKED_BYTES + 1 + TAG] plain
    cdef uint8_t[CHECKED_BYTES + 1 + TAG] expected
    cdef uint8_t[CHECKED_BYTES + 1 + TAG] body
    cdef uint8_t* nonce = secret + 3
    cdef uint8_t* header = secret + 16
    cdef uint32_t[3] lengths
    cdef uint32_t length, sealed
    cdef GcmKey* key
    cdef bint agreed = True
    cdef int i
    lengths[0], lengths[1], lengths[2] = 0, 64, CHECKED_BYTES
    for i in range(32):
        secret[i] = <uint8_t>(7 * i + 1)
    for i in range(CHECKED_BYTES + 1):
        plain[i] = <uint8_t>(i * i + (i >> 8))
    key = gcm_key_new(secret, key_length)
    if key == NULL:
        return False
    for i in range(3):
        length = lengths[i]
        sealed = length + 1 + TAG
        memcpy(expected, plain, length + 1)
        memcpy(body, plain, length + 1)
        agreed = agreed and libcrypto_seals(name, secret, nonce, header, expected, length + 1)
        gcm_seal(key, nonce, header, body, body, length)
        agreed = agreed and memcmp(body, expected, sealed) == 0
        memset(body, 0, length)
        body[length] = plain[length]
        gcm_seal(key, nonce, header, body, plain, length)
        agreed = agreed and memcmp(body, expected, sealed) == 0
        agreed = agreed and gcm_open(key, nonce, header, body, length + 1) and memcmp(body, plain, length + 1) == 0
        expected[length + 1] ^= 1
        agreed = agreed and not gcm_open(key, nonce, header, expected, length + 1)
    gcm_key_free(key)
    return agreed


cdef bint use(void* library, const char* variant) except -1:
    """Takes a variant for both key sizes, or for none."""
    if (load(library, b"128", variant, &aes_128) and load(library, b"256", variant, &aes_256)
            and agrees(b"AES-128-GCM", 16) and agrees(b"AES-256-GCM", 32)):
        return True
    aes_128.prepare = NULL
    aes_256.prepare = NULL
    return False


cdef str choose(str wanted):
    cdef void* library
    if wanted not in ("", "avx2", "libcrypto"):
        raise ImportError(f"KDAEMON_GCM is {wanted!r}: must be avx2 or libcrypto, or not be set")
    if wanted == "libcrypto" or not kdaemon_has_avx2():
        return "libcrypto"
    library = dlopen(b"libIPSec_MB.so.1", RTLD_NOW | RTLD_LOCAL)      # never closed: its functions are used as long as the process lives
    if library == NULL:
        return "libcrypto"
    if wanted != "avx2" and kdaemon_has_vaes_avx512() and use(library, b"vaes_avx512"):
        return "vaes_avx512"
    return "avx2" if use(library, b"avx_gen4") else "libcrypto"


#: What encrypts by AES-GCM: "vaes_avx512" or "avx2" of libIPSec_MB, or "libcrypto".
IMPLEMENTATION = choose(os.environ.get("KDAEMON_GCM", ""))
