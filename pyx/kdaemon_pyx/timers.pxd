"""Timer wheel of one engine thread."""

from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    WHEEL_BUCKETS = 2048
    WHEEL_WORDS = 32
    WHEEL_TICK_SHIFT = 24          # a tick is 2^24 ns = 16.8 ms; the wheel spans 34 s

    TIMER_CONNECTION = 0
    TIMER_ACCEPT = 1
    TIMER_DRAIN = 2
    TIMER_SERVICE = 3
    TIMER_POOL = 4


# Owner: the object it is embedded in. Linked while `armed`.
cdef struct Timer:
    Timer* next
    Timer* previous
    uint64_t deadline_ns           # CLOCK_MONOTONIC; 0: none
    uint64_t tick                  # of the bucket it is in
    uint32_t kind
    uint32_t armed

cdef struct TimerWheel:
    uint64_t tick                  # everything before it has been looked at
    uint64_t count                 # armed timers
    uint64_t occupied[32]
    Timer* buckets[2048]


cdef void timers_setup(TimerWheel* w, uint64_t now_ns) noexcept nogil
cdef void timer_set(TimerWheel* w, Timer* timer, uint64_t deadline_ns) noexcept nogil
cdef void timer_cancel(TimerWheel* w, Timer* timer) noexcept nogil
cdef Timer* timers_expire(TimerWheel* w, uint64_t now_ns) noexcept nogil
cdef uint64_t timers_next_ns(TimerWheel* w, uint64_t now_ns) noexcept nogil
