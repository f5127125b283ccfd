/*
 * LD_PRELOAD for user-mode Linux on processors with AVX-512 or AMX.
 *
 * UML keeps the floating-point state of a guest task in a buffer that ends with AVX (832 bytes) and restores it by
 * PTRACE_SETREGSET(NT_X86_XSTATE), which the host refuses with EFAULT unless it gets the processor's whole XSAVE area (11,008 bytes with AMX):
 * the guest dies at its first process ("ptrace set fp regs failed, errno = 14"). This puts the part UML has no room
 * for aside, per buffer (a guest task has one), and gives it back behind the part UML knows.
 *
 * Remaining gap: a signal handler in the guest does not preserve that upper part. scripts/guest therefore
 * tells glibc, OpenSSL and the engine in the guest to leave AVX-512 alone.
 *
 * Thread-safety: UML calls ptrace from one host thread, never from a signal handler.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/ptrace.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>

#define NT_X86_XSTATE 0x202
#define XSTATE_SIZE_MAX 16384
#define SLOT_BITS 12

struct slot {
    const void *owner; /* UML's buffer */
    size_t length;
    unsigned char state[XSTATE_SIZE_MAX];
};

static struct slot slots[1 << SLOT_BITS];
static unsigned char scratch[XSTATE_SIZE_MAX];

/* A collision costs the earlier owner its upper state only: never fatal. */
static struct slot *slot_of(const void *buffer)
{
    return &slots[((uintptr_t)buffer >> 6) * UINT64_C(0x9E3779B97F4A7C15) >> (64 - SLOT_BITS)];
}

long ptrace(int request, pid_t pid, void *address, void *data)
{
    static long (*libc_ptrace)(int, pid_t, void *, void *);
    if (!libc_ptrace)
        libc_ptrace = (long (*)(int, pid_t, void *, void *))dlsym(RTLD_NEXT, "ptrace");
    if ((request != PTRACE_GETREGSET && request != PTRACE_SETREGSET) || (uintptr_t)address != NT_X86_XSTATE)
        return libc_ptrace(request, pid, address, data);

    struct iovec *known = data;
    struct iovec whole = {scratch, sizeof scratch};
    struct slot *slot = slot_of(known->iov_base);

    if (request == PTRACE_GETREGSET) {
        if (libc_ptrace(PTRACE_GETREGSET, pid, address, &whole))
            return -1;
        if (known->iov_len > whole.iov_len)
            known->iov_len = whole.iov_len;
        memcpy(known->iov_base, scratch, known->iov_len);
        memcpy(slot->state, scratch, whole.iov_len);
        slot->owner = known->iov_base;
        slot->length = whole.iov_len;
        return 0;
    }

    if (slot->owner == known->iov_base)
        whole = (struct iovec){slot->state, slot->length};
    else if (libc_ptrace(PTRACE_GETREGSET, pid, address, &whole))
        return -1;
    memcpy(whole.iov_base, known->iov_base, known->iov_len < whole.iov_len ? known->iov_len : whole.iov_len);
    return libc_ptrace(PTRACE_SETREGSET, pid, address, &whole);
}
