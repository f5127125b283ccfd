"""Timer wheel of one engine thread: one level, lazy.

Moving a deadline later only writes it down: the timer is looked at in its old bucket and put into the right one then. So a deadline that is
renewed with every request costs a store. Deadlines are never early, and late by at most a tick (16.8 ms).
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset


cdef extern from *:
    int __builtin_ctzll(unsigned long long x) noexcept nogil


cdef void timers_setup(TimerWheel* w, uint64_t now_ns) noexcept nogil:
    memset(w, 0, sizeof(TimerWheel))
    w.tick = now_ns >> WHEEL_TICK_SHIFT


cdef void link(TimerWheel* w, Timer* timer, uint64_t deadline_ns) noexcept nogil:
    cdef uint64_t tick = (deadline_ns >> WHEEL_TICK_SHIFT) + 1
    cdef uint32_t bucket
    if tick <= w.tick:
        tick = w.tick + 1
    if tick >= w.tick + WHEEL_BUCKETS:
        tick = w.tick + WHEEL_BUCKETS - 1        # too far for the wheel: looked at on the way
    bucket = <uint32_t>(tick & (WHEEL_BUCKETS - 1))
    timer.tick = tick
    timer.previous = NULL
    timer.next = w.buckets[bucket]
    if timer.next != NULL:
        timer.next.previous = timer
    w.buckets[bucket] = timer
    w.occupied[bucket >> 6] |= <uint64_t>1 << (bucket & 63)
    timer.armed = 1
    w.count += 1


cdef void unlink(TimerWheel* w, Timer* timer) noexcept nogil:
    cdef uint32_t bucket = <uint32_t>(timer.tick & (WHEEL_BUCKETS - 1))
    if timer.previous != NULL:
        timer.previous.next = timer.next
    else:
        w.buckets[bucket] = timer.next
        if timer.next == NULL:
            w.occupied[bucket >> 6] &= ~(<uint64_t>1 << (bucket & 63))
    if timer.next != NULL:
        timer.next.previous = timer.previous
    timer.next = NULL
    timer.previous = NULL
    timer.armed = 0
    w.count -= 1


cdef void timer_set(TimerWheel* w, Timer* timer, uint64_t deadline_ns) noexcept nogil:
    """``deadline_ns`` 0 takes the deadline away (the link stays until its bucket is looked at)."""
    timer.deadline_ns = deadline_ns
    if deadline_ns == 0:
        return
    if timer.armed:
        if timer.tick <= (deadline_ns >> WHEEL_TICK_SHIFT) + 1:
            return
        unlink(w, timer)
    link(w, timer, deadline_ns)


cdef void timer_cancel(TimerWheel* w, Timer* timer) noexcept nogil:
    """Takes the timer out of the wheel: its memory may be reused."""
    timer.deadline_ns = 0
    if timer.armed:
        unlink(w, timer)


cdef Timer* timers_expire(TimerWheel* w, uint64_t now_ns) noexcept nogil:
    """The next timer whose deadline has passed, taken out of the wheel with its deadline cleared, or NULL."""
    cdef uint64_t now_tick = now_ns >> WHEEL_TICK_SHIFT
    cdef uint32_t bucket
    cdef Timer* timer
    if w.count == 0:
        w.tick = now_tick
        return NULL
    while True:
        bucket = <uint32_t>(w.tick & (WHEEL_BUCKETS - 1))
        while w.buckets[bucket] != NULL:
            timer = w.buckets[bucket]
            unlink(w, timer)
            if timer.deadline_ns == 0:
                continue
            if timer.deadline_ns > now_ns:
                link(w, timer, timer.deadline_ns)
                continue
            timer.deadline_ns = 0
            return timer
        if w.tick >= now_tick:
            return NULL
        w.tick += 1


cdef uint64_t timers_next_ns(TimerWheel* w, uint64_t now_ns) noexcept nogil:
    """Nanoseconds until the wheel must be looked at again; at most its span."""
    cdef uint64_t tick = w.tick + 1
    cdef uint64_t end = w.tick + WHEEL_BUCKETS
    cdef uint64_t word, at_ns
    cdef uint32_t bucket
    if w.count == 0:
        return <uint64_t>WHEEL_BUCKETS << WHEEL_TICK_SHIFT
    if w.buckets[<uint32_t>(w.tick & (WHEEL_BUCKETS - 1))] != NULL:
        return 0
    while tick < end:
        bucket = <uint32_t>(tick & (WHEEL_BUCKETS - 1))
        word = w.occupied[bucket >> 6] >> (bucket & 63)
        if word:
            tick += __builtin_ctzll(word)
            break
        tick += 64 - (bucket & 63)
    at_ns = tick << WHEEL_TICK_SHIFT
    return at_ns - now_ns if at_ns > now_ns else 0
