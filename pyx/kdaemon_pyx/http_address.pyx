"""Connections and requests per peer address, counted and bounded."""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from kdaemon_pyx.http_log cimport PeerAddress

cdef extern from "<sys/random.h>" nogil:
    ssize_t getrandom(void* buffer, size_t length, unsigned int flags)

cdef enum:
    BUCKETS = 4096
    FORGOTTEN_AT_ONCE = 4
    FULL_AGAIN_NS = 1_000_000_000  # an allowance is one second's


cdef int address_table_setup(
    AddressTable* table, uint32_t connections_max, uint32_t requests_per_second
) noexcept nogil:
    memset(table, 0, sizeof(AddressTable))
    if connections_max == 0 and requests_per_second == 0:
        return 0
    table.buckets = <Address**>calloc(BUCKETS, sizeof(Address*))
    if table.buckets == NULL:
        return -ENOMEM
    getrandom(&table.seed, sizeof(table.seed), 0)
    table.connections_max = connections_max
    table.requests_per_second = requests_per_second
    return 0


cdef void address_table_teardown(AddressTable* table) noexcept nogil:
    while table.oldest_idle != NULL:
        forget(table, table.oldest_idle)
    free(table.buckets)
    table.buckets = NULL


cdef inline Address** bucket_of(AddressTable* table, uint64_t key) noexcept nogil:
    cdef uint64_t value = (key ^ table.seed) * <uint64_t>0x9E3779B97F4A7C15
    return &table.buckets[value >> 52]


cdef void idle_remove(AddressTable* table, Address* address) noexcept nogil:
    if address.newer != NULL:
        address.newer.older = address.older
    else:
        table.newest_idle = address.older
    if address.older != NULL:
        address.older.newer = address.newer
    else:
        table.oldest_idle = address.newer
    address.newer = NULL
    address.older = NULL


cdef void forget(AddressTable* table, Address* address) noexcept nogil:
    cdef Address** link = bucket_of(table, address.key)
    while link[0] != address:
        link = &link[0].next_in_bucket
    link[0] = address.next_in_bucket
    idle_remove(table, address)
    table.count -= 1
    free(address)


cdef Address* address_enter(
    AddressTable* table, const PeerAddress* peer, uint64_t now_ns, bint* allowed
) noexcept nogil:
    cdef uint64_t key = 0
    cdef Address** bucket
    cdef Address* address
    cdef int _n
    allowed[0] = True
    if peer.length == 0:
        return NULL
    for _n in range(FORGOTTEN_AT_ONCE):
        if table.oldest_idle == NULL or now_ns - table.oldest_idle.checked_ns < FULL_AGAIN_NS:
            break
        forget(table, table.oldest_idle)
    memcpy(&key, peer.bytes, 4 if peer.length == 4 else 8)
    bucket = bucket_of(table, key)
    address = bucket[0]
    while address != NULL and (address.key != key or address.ipv6 != (peer.length == 16)):
        address = address.next_in_bucket
    if address == NULL:
        address = <Address*>calloc(1, sizeof(Address))
        if address == NULL:
            return NULL
        address.key = key
        address.ipv6 = peer.length == 16
        address.checked_ns = now_ns
        address.thousandths = <uint64_t>table.requests_per_second * 1000
        address.next_in_bucket = bucket[0]
        bucket[0] = address
        table.count += 1
    elif address.connections == 0:
        idle_remove(table, address)
    address.connections += 1
    allowed[0] = table.connections_max == 0 or address.connections <= table.connections_max
    return address


cdef void refill(AddressTable* table, Address* address, uint64_t now_ns) noexcept nogil:
    cdef uint64_t full = <uint64_t>table.requests_per_second * 1000
    cdef uint64_t elapsed_ns = now_ns - address.checked_ns
    cdef uint64_t gained
    if elapsed_ns >= FULL_AGAIN_NS:
        address.thousandths = full
        address.checked_ns = now_ns
        return
    gained = elapsed_ns * table.requests_per_second // 1_000_000
    if gained != 0:                                        # else the time counts on until it is worth something
        address.thousandths = full if address.thousandths + gained > full else address.thousandths + gained
        address.checked_ns = now_ns


cdef void address_leave(AddressTable* table, Address* address, uint64_t now_ns) noexcept nogil:
    address.connections -= 1
    if address.connections != 0:
        return
    refill(table, address, now_ns)
    address.older = table.newest_idle
    if table.newest_idle != NULL:
        table.newest_idle.newer = address
    else:
        table.oldest_idle = address
    table.newest_idle = address


cdef bint address_may_ask(AddressTable* table, Address* address, uint64_t now_ns) noexcept nogil:
    if table.requests_per_second == 0:
        return True
    refill(table, address, now_ns)
    if address.thousandths < 1000:
        return False
    address.thousandths -= 1000
    return True
