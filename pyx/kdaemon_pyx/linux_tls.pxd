"""linux/tls.h: kernel TLS socket options and structures (Documentation/networking/tls.rst)."""

from libc.stdint cimport uint16_t


cdef extern from "<linux/tls.h>" nogil:
    """
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <sys/socket.h>
    #ifndef SOL_TLS
    #define SOL_TLS 282
    #endif
    #ifndef TCP_ULP
    #define TCP_ULP 31
    #endif
    #ifndef TLS_RX_EXPECT_NO_PAD
    #define TLS_RX_EXPECT_NO_PAD 4
    #endif
    #ifndef TLS_TX_MAX_PAYLOAD_LEN
    #define TLS_TX_MAX_PAYLOAD_LEN 5
    #endif
    """
    int SOL_TLS
    int TCP_ULP
    int TLS_TX
    int TLS_RX
    int TLS_RX_EXPECT_NO_PAD
    int TLS_TX_MAX_PAYLOAD_LEN
    int TLS_SET_RECORD_TYPE
    int TLS_GET_RECORD_TYPE
    int TLS_1_3_VERSION
    int TLS_CIPHER_AES_GCM_128
    int TLS_CIPHER_AES_GCM_256
    int TLS_CIPHER_CHACHA20_POLY1305

    struct tls_crypto_info:
        uint16_t version
        uint16_t cipher_type

    struct tls12_crypto_info_aes_gcm_128:
        tls_crypto_info info
        unsigned char iv[8]
        unsigned char key[16]
        unsigned char salt[4]
        unsigned char rec_seq[8]

    struct tls12_crypto_info_aes_gcm_256:
        tls_crypto_info info
        unsigned char iv[8]
        unsigned char key[32]
        unsigned char salt[4]
        unsigned char rec_seq[8]

    struct tls12_crypto_info_chacha20_poly1305:
        tls_crypto_info info
        unsigned char iv[12]
        unsigned char key[32]
        unsigned char rec_seq[8]
