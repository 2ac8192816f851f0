// Counts what is asked of the allocator, and refuses what it is told to. For one source file of an
// executable: with glibc it stands in for malloc() and its kin, under the sanitizers it uses their
// hooks (and can't refuse). Elsewhere nothing is counted, and what is checked with it is vacuous.
#pragma once

#include <lastcall/detail/config.hpp>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>

#if defined(LASTCALL_ASAN) || defined(LASTCALL_TSAN)
// As <sanitizer/allocator_interface.h> has it, which not every compiler brings along.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*on_malloc)(const volatile void*,
                                                                           std::size_t),
                                                         void (*on_free)(const volatile void*));
#endif

namespace support {

/// Of this thread, since it began. Plain words: they are touched inside malloc().
inline thread_local long allocations = 0;
inline thread_local long frees = 0;
/// The so-manieth allocation of this thread from now is refused; 0: none.
inline thread_local long refuse_allocation = 0;
using RefusalRule = bool (*)() noexcept;
/// Whether a request is refused, for who needs more than that counter; null: nobody does.
inline constinit RefusalRule refusal_rule = nullptr;
/// Of the whole process: how many more allocations than frees there were.
inline std::atomic<long> live_allocations{0};

inline void note_allocation() noexcept {
  ++allocations;
  live_allocations.fetch_add(1, std::memory_order_relaxed);
}
inline void note_free() noexcept {
  ++frees;
  live_allocations.fetch_sub(1, std::memory_order_relaxed);
}

struct Calls {
  long allocations;
  long frees;
};
/// What was asked of the allocator on this thread while `body` ran.
template <class Body>
Calls calls_of(Body body) {
  const Calls before{allocations, frees};
  body();
  return {allocations - before.allocations, frees - before.frees};
}

#if defined(LASTCALL_ASAN) || defined(LASTCALL_TSAN)
inline constexpr bool counts_allocations = true;
inline constexpr bool can_refuse_allocations = false;
inline const int allocation_hooks = __sanitizer_install_malloc_and_free_hooks(
    [](const volatile void*, std::size_t) { note_allocation(); },
    [](const volatile void* memory) {
      if (memory != nullptr) note_free();
    });
#elif defined(__GLIBC__)
inline constexpr bool counts_allocations = true;
inline constexpr bool can_refuse_allocations = true;
inline bool refused() noexcept {
  if ((refuse_allocation > 0 && --refuse_allocation == 0) ||
      (refusal_rule != nullptr && refusal_rule())) {
    errno = ENOMEM;
    return true;
  }
  return false;
}
inline void* noted(void* memory) noexcept {
  if (memory != nullptr) note_allocation();
  return memory;
}
#else
inline constexpr bool counts_allocations = false;
inline constexpr bool can_refuse_allocations = false;
#endif

}  // namespace support

#if defined(__GLIBC__) && !defined(LASTCALL_ASAN) && !defined(LASTCALL_TSAN)
extern "C" {

// The allocator itself, under the names that glibc keeps for whoever stands in for it.
void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t count, std::size_t size);
void* __libc_realloc(void* memory, std::size_t size);
void* __libc_memalign(std::size_t alignment, std::size_t size);
void __libc_free(void* memory);

void* malloc(std::size_t size) {
  return support::refused() ? nullptr : support::noted(__libc_malloc(size));
}
void* calloc(std::size_t count, std::size_t size) {
  return support::refused() ? nullptr : support::noted(__libc_calloc(count, size));
}
void* realloc(void* memory, std::size_t size) {
  if (memory == nullptr) return malloc(size);
  return __libc_realloc(memory, size);
}
void* memalign(std::size_t alignment, std::size_t size) {
  return support::refused() ? nullptr : support::noted(__libc_memalign(alignment, size));
}
void* aligned_alloc(std::size_t alignment, std::size_t size) { return memalign(alignment, size); }
int posix_memalign(void** out, std::size_t alignment, std::size_t size) {
  void* const memory = memalign(alignment, size);
  if (memory == nullptr) return ENOMEM;
  *out = memory;
  return 0;
}
void free(void* memory) {
  if (memory != nullptr) support::note_free();
  __libc_free(memory);
}

}  // extern "C"
#endif
