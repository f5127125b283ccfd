"""Atomic loads, stores and fences for memory shared between threads or with a client. C11 memory model, GCC builtins.

Each use names its pair on the other side in a comment.
"""

from libc.stdint cimport uint32_t, uint64_t


cdef extern from *:
    """
    #include <stdint.h>
    static inline uint32_t kd_load_acquire_u32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline uint32_t kd_load_relaxed_u32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static inline void kd_store_release_u32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline void kd_store_relaxed_u32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
    static inline uint32_t kd_exchange_u32(uint32_t *p, uint32_t v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
    static inline uint64_t kd_load_relaxed_u64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static inline void kd_store_relaxed_u64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
    static inline void *kd_load_acquire_ptr(void *const *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void kd_store_release_ptr(void **p, void *v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline void kd_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    """
    uint32_t load_acquire_u32 "kd_load_acquire_u32"(const uint32_t* p) noexcept nogil
    uint32_t load_relaxed_u32 "kd_load_relaxed_u32"(const uint32_t* p) noexcept nogil
    void store_release_u32 "kd_store_release_u32"(uint32_t* p, uint32_t v) noexcept nogil
    void store_relaxed_u32 "kd_store_relaxed_u32"(uint32_t* p, uint32_t v) noexcept nogil
    uint32_t exchange_u32 "kd_exchange_u32"(uint32_t* p, uint32_t v) noexcept nogil
    uint64_t load_relaxed_u64 "kd_load_relaxed_u64"(const uint64_t* p) noexcept nogil
    void store_relaxed_u64 "kd_store_relaxed_u64"(uint64_t* p, uint64_t v) noexcept nogil
    void* load_acquire_ptr "kd_load_acquire_ptr"(void** p) noexcept nogil
    void store_release_ptr "kd_store_release_ptr"(void** p, void* v) noexcept nogil
    void fence_seq_cst "kd_fence"() noexcept nogil
