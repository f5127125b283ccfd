"""Kernel TLS (Documentation/networking/tls.rst): the ULP, the keys, and records that are not application data.

Validation is the caller's first step: ``ktls_attach`` right after accept (it fails with ENOTCONN once the peer's FIN is there),
``ktls_suite_known`` and the probed set of suites before the first key. A failure of ``ktls_set_keys`` closes the connection.
"""

from libc.errno cimport EINVAL, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from kdaemon_pyx cimport linux_tls as tls
from kdaemon_pyx.libcrypto cimport OPENSSL_cleanse
from kdaemon_pyx.record cimport (
    SUITE_AES_128_GCM_SHA256, SUITE_AES_256_GCM_SHA384, SUITE_CHACHA20_POLY1305_SHA256)


cdef extern from "<sys/socket.h>" nogil:
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    int setsockopt(int fd, int level, int name, const void* value, unsigned int length)
    int getsockopt(int fd, int level, int name, void* value, unsigned int* length)
    size_t CMSG_LEN(size_t length)
    size_t CMSG_SPACE(size_t length)
    unsigned char* CMSG_DATA(cmsghdr* header)
    int MSG_CTRUNC
    int MSG_TRUNC
    int SOL_TCP


cdef union CryptoInfo:
    tls.tls_crypto_info info
    tls.tls12_crypto_info_aes_gcm_128 aes_gcm_128
    tls.tls12_crypto_info_aes_gcm_256 aes_gcm_256
    tls.tls12_crypto_info_chacha20_poly1305 chacha20_poly1305


cdef int ktls_attach(int fd) noexcept nogil:
    """0, or a negative errno: ENOENT (no kTLS in this kernel), ENOTCONN (the peer's FIN was faster)."""
    if setsockopt(fd, SOL_TCP, tls.TCP_ULP, b"tls", 3) < 0:
        return -errno
    return 0


cdef bint ktls_suite_known(uint16_t cipher_suite) noexcept nogil:
    return cipher_suite >= SUITE_AES_128_GCM_SHA256 and cipher_suite <= SUITE_CHACHA20_POLY1305_SHA256


cdef int ktls_set_keys(
        int fd, int direction, uint16_t cipher_suite, const uint8_t* key, const uint8_t* iv, uint64_t sequence) noexcept nogil:
    """Sets TLS_TX or TLS_RX; ``iv`` has 12 bytes, of which the kernel calls the first 4 the salt with AES-GCM. 0 or a negative errno."""
    cdef CryptoInfo crypto
    cdef uint8_t[8] rec_seq
    cdef uint32_t size
    cdef int result, i
    for i in range(8):
        rec_seq[i] = <uint8_t>(sequence >> (56 - 8 * i))
    memset(&crypto, 0, sizeof(crypto))
    crypto.info.version = <uint16_t>tls.TLS_1_3_VERSION
    if cipher_suite == SUITE_AES_128_GCM_SHA256:
        crypto.info.cipher_type = <uint16_t>tls.TLS_CIPHER_AES_GCM_128
        memcpy(crypto.aes_gcm_128.salt, iv, 4)
        memcpy(crypto.aes_gcm_128.iv, iv + 4, 8)
        memcpy(crypto.aes_gcm_128.key, key, 16)
        memcpy(crypto.aes_gcm_128.rec_seq, rec_seq, 8)
        size = sizeof(crypto.aes_gcm_128)
    elif cipher_suite == SUITE_AES_256_GCM_SHA384:
        crypto.info.cipher_type = <uint16_t>tls.TLS_CIPHER_AES_GCM_256
        memcpy(crypto.aes_gcm_256.salt, iv, 4)
        memcpy(crypto.aes_gcm_256.iv, iv + 4, 8)
        memcpy(crypto.aes_gcm_256.key, key, 32)
        memcpy(crypto.aes_gcm_256.rec_seq, rec_seq, 8)
        size = sizeof(crypto.aes_gcm_256)
    elif cipher_suite == SUITE_CHACHA20_POLY1305_SHA256:
        crypto.info.cipher_type = <uint16_t>tls.TLS_CIPHER_CHACHA20_POLY1305
        memcpy(crypto.chacha20_poly1305.iv, iv, 12)
        memcpy(crypto.chacha20_poly1305.key, key, 32)
        memcpy(crypto.chacha20_poly1305.rec_seq, rec_seq, 8)
        size = sizeof(crypto.chacha20_poly1305)
    else:
        return -EINVAL
    result = setsockopt(fd, tls.SOL_TLS, tls.TLS_TX if direction == KTLS_TX else tls.TLS_RX, &crypto, size)
    if result < 0:
        result = -errno
    OPENSSL_cleanse(&crypto, sizeof(crypto))
    return result


cdef int ktls_set_record_content_max(int fd, uint16_t record_content_max) noexcept nogil:
    """Smaller records, from Linux 6.19 on; TLS_TX must be set. 0 or a negative errno."""
    if setsockopt(fd, tls.SOL_TLS, tls.TLS_TX_MAX_PAYLOAD_LEN, &record_content_max, sizeof(record_content_max)) < 0:
        return -errno
    return 0


cdef int ktls_transmit_sequence(int fd, uint16_t cipher_suite, uint64_t* sequence) noexcept nogil:
    """The number of the next record to be encrypted. 0 or a negative errno."""
    cdef CryptoInfo crypto
    cdef uint8_t* rec_seq = crypto.aes_gcm_128.rec_seq
    cdef unsigned int size = sizeof(crypto.aes_gcm_128)
    cdef int result, i
    if cipher_suite == SUITE_AES_256_GCM_SHA384:
        rec_seq = crypto.aes_gcm_256.rec_seq
        size = sizeof(crypto.aes_gcm_256)
    elif cipher_suite == SUITE_CHACHA20_POLY1305_SHA256:
        rec_seq = crypto.chacha20_poly1305.rec_seq
        size = sizeof(crypto.chacha20_poly1305)
    memset(&crypto, 0, sizeof(crypto))
    result = -errno if getsockopt(fd, tls.SOL_TLS, tls.TLS_TX, &crypto, &size) < 0 else 0
    sequence[0] = 0
    for i in range(8):
        sequence[0] = sequence[0] << 8 | rec_seq[i]
    OPENSSL_cleanse(&crypto, sizeof(crypto))               # the key is in it
    return result


cdef void ktls_control_prepare_send(ControlMessage* m, uint8_t content_type, uint32_t length) noexcept nogil:
    """A message that makes one record of ``content_type`` from the first ``length`` bytes of its data."""
    cdef cmsghdr* header = <cmsghdr*>m.control
    memset(m, 0, sizeof(m.header) + sizeof(m.vector) + sizeof(m.control))
    m.vector.iov_base = m.data
    m.vector.iov_len = length
    m.header.msg_iov = &m.vector
    m.header.msg_iovlen = 1
    m.header.msg_control = m.control
    m.header.msg_controllen = CMSG_SPACE(1)
    header.cmsg_level = tls.SOL_TLS
    header.cmsg_type = tls.TLS_SET_RECORD_TYPE
    header.cmsg_len = CMSG_LEN(1)
    CMSG_DATA(header)[0] = content_type


cdef void ktls_control_prepare_receive(ControlMessage* m) noexcept nogil:
    """Room for one whole record and its type."""
    memset(m, 0, sizeof(m.header) + sizeof(m.vector) + sizeof(m.control))
    m.vector.iov_base = m.data
    m.vector.iov_len = sizeof(m.data)
    m.header.msg_iov = &m.vector
    m.header.msg_iovlen = 1
    m.header.msg_control = m.control
    m.header.msg_controllen = sizeof(m.control)


cdef int ktls_control_type(const ControlMessage* m) noexcept nogil:
    """The content type of a received record, or -EINVAL if the kernel's answer is not exactly one record type."""
    cdef cmsghdr* header = <cmsghdr*>m.control
    if m.header.msg_flags & (MSG_CTRUNC | MSG_TRUNC):
        return -EINVAL
    if m.header.msg_controllen < CMSG_LEN(1) or header.cmsg_len != CMSG_LEN(1):
        return -EINVAL
    if header.cmsg_level != tls.SOL_TLS or header.cmsg_type != tls.TLS_GET_RECORD_TYPE:
        return -EINVAL
    return CMSG_DATA(header)[0]
