# What one peer address may take: connections at once, requests per second. One table per engine thread, so per worker.
#
# An IPv4 address, or the /64 an IPv6 address lies in, because a host has as many of these as it wants. An entry lives as long as it
# has connections, and then until its allowance would be full again: coming back on a new connection gains nothing.

from libc.stdint cimport uint32_t, uint64_t

from kdaemon_pyx.http_log cimport PeerAddress

cdef struct Address:
    Address* next_in_bucket
    Address* newer                 # of those without connections, in the order they became so
    Address* older
    uint64_t key
    uint64_t checked_ns            # when `thousandths` was right
    uint64_t thousandths           # of requests that may come at once
    uint32_t connections
    bint ipv6

cdef struct AddressTable:
    Address** buckets              # NULL: no limits
    uint64_t seed
    Address* newest_idle
    Address* oldest_idle
    uint32_t connections_max       # 0: any number
    uint32_t requests_per_second   # 0: any number; as many may come at once
    uint32_t count

# 0, or -ENOMEM.
cdef int address_table_setup(
    AddressTable* table, uint32_t connections_max, uint32_t requests_per_second) noexcept nogil
cdef void address_table_teardown(AddressTable* table) noexcept nogil
# One more connection of `peer`; NULL: no memory, or its address is not known. *allowed: it is not one too many.
cdef Address* address_enter(
    AddressTable* table, const PeerAddress* peer, uint64_t now_ns, bint* allowed) noexcept nogil
cdef void address_leave(AddressTable* table, Address* address, uint64_t now_ns) noexcept nogil
# One more request: whether it may be answered.
cdef bint address_may_ask(AddressTable* table, Address* address, uint64_t now_ns) noexcept nogil
