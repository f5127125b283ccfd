# Declarations of client_abi.h, the single source of the client ring's layout.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "client_abi.h" nogil:
    enum:
        CLIENT_MAGIC
        CLIENT_VERSION_MAJOR
        CLIENT_VERSION_MINOR
        CLIENT_SUBMISSION_QUIET
        CLIENT_LANE_ANY
        CLIENT_PAGE
        CLIENT_AWAKE
        CLIENT_ASLEEP
        CLIENT_NOP
        CLIENT_BARRIER
        CLIENT_CANCEL
        CLIENT_OPEN
        CLIENT_CONNECT
        CLIENT_START_TLS
        CLIENT_LISTEN
        CLIENT_ACCEPT
        CLIENT_READ
        CLIENT_WRITE
        CLIENT_SHUTDOWN
        CLIENT_CLOSE
        CLIENT_INFO
        CLIENT_ADOPT
        CLIENT_EXPORT
        CLIENT_OPCODE_COUNT
        CLIENT_SHUTDOWN_READ
        CLIENT_SHUTDOWN_WRITE
        CLIENT_PARAMETER_INSECURE
        CLIENT_PARAMETER_SERVER
        CLIENT_PARAMETER_PLAIN
        CLIENT_RECORD_LAYER_NONE
        CLIENT_RECORD_LAYER_KERNEL
        CLIENT_RECORD_LAYER_USER
        CLIENT_DETAIL_NONE
        CLIENT_DETAIL_ALERT_SENT
        CLIENT_DETAIL_ALERT_RECEIVED
        CLIENT_DETAIL_TRUNCATED
        CLIENT_DETAIL_CERTIFICATE_UNTRUSTED
        CLIENT_DETAIL_CERTIFICATE_EXPIRED
        CLIENT_DETAIL_CERTIFICATE_NAME
        CLIENT_DETAIL_CERTIFICATE_SELF_SIGNED
        CLIENT_DETAIL_NAME_RESOLUTION
        CLIENT_DETAIL_CERTIFICATE_BAD

    struct client_hello:
        uint32_t magic
        uint16_t version_major
        uint16_t version_minor
        uint32_t size
        uint32_t lane
        uint32_t submission_entries
        uint32_t completion_entries
        uint32_t slot_count
        uint32_t flags
        uint64_t arena_size
        uint64_t reserved[3]

    struct client_hello_reply:
        uint32_t magic
        uint16_t version_major
        uint16_t version_minor
        uint32_t size
        int32_t error
        uint64_t memory_size
        uint32_t lane
        uint32_t lane_count
        uint64_t reserved[4]

    struct client_line:
        pass

    struct client_header:
        uint32_t magic
        uint16_t version_major
        uint16_t version_minor
        uint32_t header_size
        uint32_t submission_entries
        uint32_t completion_entries
        uint32_t slot_count
        uint32_t slot_size
        uint32_t submission_offset
        uint32_t completion_offset
        uint32_t slot_offset
        uint64_t arena_offset
        uint64_t arena_size
        client_line submission_tail
        client_line submission_head
        client_line completion_tail
        client_line completion_head
        client_line daemon_state
        client_line program_state

    struct client_submission:
        uint8_t opcode
        uint8_t flags
        uint16_t argument
        uint32_t slot
        uint64_t handle
        uint64_t user_data
        uint64_t timeout_ns
        uint64_t offset
        uint32_t length
        uint32_t target_slot
        uint64_t target_user_data
        uint64_t reserved

    struct client_completion:
        uint64_t user_data
        int64_t result
        uint32_t slot
        uint32_t detail
        uint64_t reserved

    struct client_parameters:
        uint32_t flags
        uint16_t port
        uint16_t backlog
        uint16_t host_length
        uint16_t server_name_length
        uint16_t alpn_length
        uint16_t certificate_length
        uint8_t host[256]
        uint8_t server_name[256]
        uint8_t alpn[256]
        uint8_t certificate[128]
        uint8_t reserved[112]

    struct client_info:
        uint16_t tls_version
        uint16_t cipher_suite
        uint16_t named_group
        uint8_t record_layer
        uint8_t resumed
        uint16_t port
        uint16_t alpn_length
        uint16_t reason_length
        uint16_t server_name_length
        uint32_t certificate_length
        uint32_t reserved
        uint8_t alpn[64]
        uint8_t reason[28]
        uint8_t peer_address[16]
        uint8_t local_address[16]
        uint16_t peer_port
        uint16_t local_port
        uint8_t server_name[256]

    struct client_descriptor_message:
        uint32_t magic
        uint32_t opcode
        uint64_t user_data

    uint32_t client_observe(client_line* line) noexcept
    void client_publish(client_line* line, uint32_t value) noexcept
    void client_say_asleep(client_line* state) noexcept
    void client_say_awake(client_line* state) noexcept
    bint client_must_ring(client_line* state) noexcept
    void client_relax() noexcept

# Pack the keys of `values` (fields of client_parameters) into a slot. ValueError when a text is too long.
cdef int fill_parameters(client_parameters* shared, dict values) except -1
