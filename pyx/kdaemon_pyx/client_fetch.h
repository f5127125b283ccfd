/*
 * The daemon's one way to read what a client wrote: copy once, never look again (ARCHITECTURE.md, invariant 6).
 *
 * Built with -DKDAEMON_CLIENT_ALTER_FETCHED every shared byte is altered right after its single fetch: code that looked at the
 * shared copy a second time would see nonsense and fail its tests.
 */
#ifndef KDAEMON_CLIENT_FETCH_H
#define KDAEMON_CLIENT_FETCH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline void client_fetch(void *copy, void *shared, size_t size)
{
    memcpy(copy, shared, size);
    /* The compiler may otherwise forward the copy's source to later loads: a second fetch that the source does not show. */
    __asm__ volatile("" ::: "memory");
#ifdef KDAEMON_CLIENT_ALTER_FETCHED
    {
        static uint32_t pattern = 0x9e3779b9u;
        uint8_t *bytes = shared;
        for (size_t i = 0; i < size; i++) {
            pattern = pattern * 1664525u + 1013904223u;
            bytes[i] ^= (uint8_t)(pattern >> 24) | 1u;
        }
        __asm__ volatile("" ::: "memory");
    }
#endif
}

static inline int client_fetch_alters(void)
{
#ifdef KDAEMON_CLIENT_ALTER_FETCHED
    return 1;
#else
    return 0;
#endif
}

#endif
