/*
 * The client ring: layout of the memory that a program and kdaemon share. docs/client-ring.md explains it.
 *
 * This file is the single source of the layout: the daemon (client_queue.pyx), libtls (client_ring.pyx) and C clients include it.
 * It needs C11 and nothing but the C library. All integers are in the byte order of the host: both sides run on it.
 */
#ifndef KDAEMON_CLIENT_ABI_H
#define KDAEMON_CLIENT_ABI_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define CLIENT_MAGIC 0x6b64746cu /* "kdtl" */
#define CLIENT_VERSION_MAJOR 1   /* changes when an old client cannot work any more: refused with EPROTONOSUPPORT */
#define CLIENT_VERSION_MINOR 2   /* changes when something is added: the lower of the two is in force */

/* ---- hello: the first bytes on the attach socket, in both directions ------------------------------------------------ */

struct client_hello {             /* program -> daemon; zero asks for the daemon's default */
    uint32_t magic;               /*  0: CLIENT_MAGIC */
    uint16_t version_major;       /*  4 */
    uint16_t version_minor;       /*  6 */
    uint32_t size;                /*  8: sizeof(struct client_hello) */
    uint32_t lane;                /* 12: which worker, modulo their number; CLIENT_LANE_ANY lets the daemon choose */
    uint32_t submission_entries;  /* 16: rounded up to a power of two, cut to the daemon's limit */
    uint32_t completion_entries;  /* 20: likewise; at least submission_entries */
    uint32_t slot_count;          /* 24: operations in flight at most */
    uint32_t flags;               /* 28: zero */
    uint64_t arena_size;          /* 32: bytes, rounded up to a page */
    uint64_t reserved[3];         /* 40: zero */
};

#define CLIENT_LANE_ANY 0xffffffffu

struct client_hello_reply {       /* daemon -> program, with SCM_RIGHTS {memfd, doorbell} when error is 0 */
    uint32_t magic;               /*  0 */
    uint16_t version_major;       /*  4 */
    uint16_t version_minor;       /*  6: the version in force */
    uint32_t size;                /*  8: sizeof(struct client_hello_reply) */
    int32_t error;                /* 12: 0 or a negative errno */
    uint64_t memory_size;         /* 16: bytes of the memfd, which is sealed against shrinking, growing and resealing */
    uint32_t lane;                /* 24: the worker that was chosen */
    uint32_t lane_count;          /* 28: number of workers */
    uint64_t reserved[4];         /* 32: zero */
};

/* ---- the shared memory ---------------------------------------------------------------------------------------------- */

#define CLIENT_CACHE_LINE 64
#define CLIENT_PAGE 4096

struct client_line {              /* one index or flag alone on its cache line, so that the two sides do not share lines they write */
    _Atomic uint32_t value;
    uint32_t padding[15];
};

struct client_header {            /* at offset 0; the areas follow at the offsets it names, each aligned to a page */
    uint32_t magic;               /*   0: everything up to `reserved` is written by the daemon before it passes the memfd */
    uint16_t version_major;       /*   4 */
    uint16_t version_minor;       /*   6 */
    uint32_t header_size;         /*   8: sizeof(struct client_header) */
    uint32_t submission_entries;  /*  12: power of two */
    uint32_t completion_entries;  /*  16: power of two */
    uint32_t slot_count;          /*  20 */
    uint32_t slot_size;           /*  24: sizeof(struct client_parameters) */
    uint32_t submission_offset;   /*  28: bytes from the start of the memory */
    uint32_t completion_offset;   /*  32 */
    uint32_t slot_offset;         /*  36 */
    uint64_t arena_offset;        /*  40 */
    uint64_t arena_size;          /*  48: bytes */
    uint64_t reserved;            /*  56 */
    struct client_line submission_tail;  /*  64: written by the program */
    struct client_line submission_head;  /* 128: written by the daemon */
    struct client_line completion_tail;  /* 192: written by the daemon */
    struct client_line completion_head;  /* 256: written by the program */
    struct client_line daemon_state;     /* 320: CLIENT_AWAKE or CLIENT_ASLEEP; who rings sets it back to CLIENT_AWAKE */
    struct client_line program_state;    /* 384: likewise, for the other direction */
};

#define CLIENT_AWAKE 0u
#define CLIENT_ASLEEP 1u

struct client_submission {        /* 64 bytes: one cache line */
    uint8_t opcode;               /*  0 */
    uint8_t flags;                /*  1: CLIENT_SUBMISSION_*, since version 1.1; else zero */
    uint16_t argument;            /*  2: SHUTDOWN: direction; else zero */
    uint32_t slot;                /*  4: names the operation until its completion; < slot_count and not in use */
    uint64_t handle;              /*  8: handle of a connection or listener, 0: the ring itself */
    uint64_t user_data;           /* 16: comes back in the completion */
    uint64_t timeout_ns;          /* 24: the operation ends with ETIMEDOUT after so long; 0: no deadline */
    uint64_t offset;              /* 32: in the data arena */
    uint32_t length;              /* 40: bytes in the data arena */
    uint32_t target_slot;         /* 44: CANCEL: the operation to cancel */
    uint64_t target_user_data;    /* 48: CANCEL: its user_data, which must agree */
    uint64_t reserved;            /* 56: zero */
};

#define CLIENT_SUBMISSION_QUIET 1u /* a completion that is no error does not ring the doorbell */

struct client_completion {        /* 32 bytes */
    uint64_t user_data;           /*  0 */
    int64_t result;               /*  8: bytes, a handle, 0, or a negative errno */
    uint32_t slot;                /* 16: free again when this is read */
    uint32_t detail;              /* 20: CLIENT_DETAIL_*: the TLS fact behind an error */
    uint64_t reserved;            /* 24: zero */
};

enum client_opcode {
    CLIENT_NOP = 0,               /* handle: any; does nothing, in the order that barriers impose */
    CLIENT_BARRIER = 1,           /* handle: any; completes after all before it, nothing behind it starts earlier */
    CLIENT_CANCEL = 2,            /* 0: cancelled or asked to end; ENOENT: no such operation */
    CLIENT_OPEN = 3,              /* CONNECT then START_TLS; result: a handle; parameters in the slot */
    CLIENT_CONNECT = 4,           /* TCP only; result: a handle of a connection without TLS; parameters in the slot */
    CLIENT_START_TLS = 5,         /* handle: a connection without TLS; parameters in the slot; either role */
    CLIENT_LISTEN = 6,            /* result: a handle; parameters in the slot */
    CLIENT_ACCEPT = 7,            /* handle: a listener; result: a handle */
    CLIENT_READ = 8,              /* handle: a connection; result: 1..length bytes, 0: close_notify */
    CLIENT_WRITE = 9,             /* handle: a connection; result: bytes */
    CLIENT_SHUTDOWN = 10,         /* handle: a connection; after the WRITEs before it: close_notify (no TLS: FIN), reading goes on */
    CLIENT_CLOSE = 11,            /* handle: a connection or listener; the handle is dead from here on */
    CLIENT_INFO = 12,             /* handle: a connection or listener; struct client_info into the arena; result: its length */
    CLIENT_ADOPT = 13,            /* a connected socket sent over the attach socket becomes a connection without TLS */
    CLIENT_EXPORT = 14,           /* handle: a connection; its kTLS socket comes over the attach socket, and the handle is dead */
    CLIENT_OPCODE_COUNT = 15
};

#define CLIENT_SHUTDOWN_READ 0
#define CLIENT_SHUTDOWN_WRITE 1

#define CLIENT_PARAMETER_INSECURE 1u     /* OPEN, START_TLS: do not verify the peer's certificate */
#define CLIENT_PARAMETER_SERVER 2u       /* START_TLS: this side is the server (since 1.1) */
#define CLIENT_PARAMETER_PLAIN 4u        /* LISTEN: accepted connections have no TLS until START_TLS (since 1.1) */

/* Operation slot: the parameters that do not fit into a submission. Strings have lengths, no terminator; UTF-8 or bytes as the field says. */
struct client_parameters {
    uint32_t flags;               /*   0: CLIENT_PARAMETER_* */
    uint16_t port;                /*   4 */
    uint16_t backlog;             /*   6: LISTEN */
    uint16_t host_length;         /*   8 */
    uint16_t server_name_length;  /*  10: 0: the host is the name to verify */
    uint16_t alpn_length;         /*  12 */
    uint16_t certificate_length;  /*  14 */
    uint8_t host[256];            /*  16: CONNECT, OPEN: name or address; LISTEN: address */
    uint8_t server_name[256];     /* 272: name that the certificate must have */
    uint8_t alpn[256];            /* 528: protocols as in RFC 7301: each a length octet and the name */
    uint8_t certificate[128];     /* 784: name of the certificate in the daemon's configuration; as a client (OPEN, START_TLS): since 1.2 */
    uint8_t reserved[112];        /* 912: zero */
};

#define CLIENT_RECORD_LAYER_NONE 0
#define CLIENT_RECORD_LAYER_KERNEL 1
#define CLIENT_RECORD_LAYER_USER 2

struct client_info {              /* INFO's answer; the peer's certificate (DER) follows it if it fits */
    uint16_t tls_version;         /*   0: 0x0304; 0: no TLS yet */
    uint16_t cipher_suite;        /*   2 */
    uint16_t named_group;         /*   4 */
    uint8_t record_layer;         /*   6: CLIENT_RECORD_LAYER_* */
    uint8_t resumed;              /*   7 */
    uint16_t port;                /*   8: LISTEN: the port that was bound */
    uint16_t alpn_length;         /*  10 */
    uint16_t reason_length;       /*  12 */
    uint16_t server_name_length;  /*  14 */
    uint32_t certificate_length;  /*  16: of the whole certificate; it is cut if the buffer was short */
    uint32_t reserved;            /*  20 */
    uint8_t alpn[64];             /*  24 */
    uint8_t reason[28];           /*  88: why this record layer, in the words of the daemon's `ready` line */
    uint8_t peer_address[16];     /* 116: IPv6, or IPv4 mapped into it; since 1.2, before in `reason`, whose length was always 0 */
    uint8_t local_address[16];    /* 132 */
    uint16_t peer_port;           /* 148: 0: not known */
    uint16_t local_port;          /* 150 */
    uint8_t server_name[256];     /* 152 */
};                                /* 408 */

/* Facts behind an error, in client_completion.detail: the high half says what kind, the low half which alert (RFC 8446 section 6.2). */
#define CLIENT_DETAIL_NONE 0u
#define CLIENT_DETAIL_ALERT_SENT (1u << 16)
#define CLIENT_DETAIL_ALERT_RECEIVED (2u << 16)
#define CLIENT_DETAIL_TRUNCATED (3u << 16)          /* end of file without close_notify */
#define CLIENT_DETAIL_CERTIFICATE_UNTRUSTED (4u << 16)
#define CLIENT_DETAIL_CERTIFICATE_EXPIRED (5u << 16)
#define CLIENT_DETAIL_CERTIFICATE_NAME (6u << 16)
#define CLIENT_DETAIL_CERTIFICATE_SELF_SIGNED (7u << 16)
#define CLIENT_DETAIL_NAME_RESOLUTION (8u << 16)
#define CLIENT_DETAIL_CERTIFICATE_BAD (9u << 16)

/* Message on the attach socket after the hello, with SCM_RIGHTS {socket}: program -> daemon for ADOPT, daemon -> program for EXPORT. */
struct client_descriptor_message {
    uint32_t magic;               /*  0: CLIENT_MAGIC */
    uint32_t opcode;              /*  4: CLIENT_ADOPT or CLIENT_EXPORT */
    uint64_t user_data;           /*  8: of the operation that it belongs to */
};

_Static_assert(sizeof(struct client_hello) == 64, "hello");
_Static_assert(sizeof(struct client_hello_reply) == 64, "hello reply");
_Static_assert(sizeof(struct client_header) == 448, "header");
_Static_assert(offsetof(struct client_header, arena_offset) == 40, "header");
_Static_assert(offsetof(struct client_header, submission_tail) == 64, "header");
_Static_assert(offsetof(struct client_header, program_state) == 384, "header");
_Static_assert(sizeof(struct client_submission) == 64, "submission");
_Static_assert(sizeof(struct client_completion) == 32, "completion");
_Static_assert(sizeof(struct client_parameters) == 1024, "parameters");
_Static_assert(sizeof(struct client_info) == 408, "info");
_Static_assert(sizeof(struct client_descriptor_message) == 16, "descriptor message");

/* ---- memory ordering: each function names its pair on the other side ------------------------------------------------- */

/* Read an index that the other side publishes. Pairs with client_publish(): what was written before it is visible after this. */
static inline uint32_t client_observe(struct client_line *line)
{
    return atomic_load_explicit(&line->value, memory_order_acquire);
}

/* Publish an index: entries written (tail) or copied out (head) before. Pairs with client_observe() on the other side. */
static inline void client_publish(struct client_line *line, uint32_t value)
{
    atomic_store_explicit(&line->value, value, memory_order_release);
}

/* Say "I sleep", then the caller looks at the other side's index once more. The fence pairs with the one in client_must_ring():
   of two sides that each store and then load, at least one sees the other's store, so no wake-up is lost. */
static inline void client_say_asleep(struct client_line *state)
{
    atomic_store_explicit(&state->value, CLIENT_ASLEEP, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
}

static inline void client_say_awake(struct client_line *state)
{
    atomic_store_explicit(&state->value, CLIENT_AWAKE, memory_order_relaxed);
}

/* After client_publish(): does the other side have to be woken? Pairs with client_say_asleep(). The exchange makes one ring of many. */
static inline int client_must_ring(struct client_line *state)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&state->value, memory_order_relaxed) != CLIENT_ASLEEP)
        return 0;
    return atomic_exchange_explicit(&state->value, CLIENT_AWAKE, memory_order_relaxed) == CLIENT_ASLEEP;
}

static inline void client_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
