// The allocator and the wall clock of the adversaries: the real ones, until somebody breaks them.
#include "adversary.hpp"

#include <lastcall/detail/config.hpp>

#include <sys/time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <new>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

namespace promise {
namespace {

std::atomic<bool> allocator_held{false};
thread_local constinit bool held_here = false;
std::atomic<bool> new_throws{false};
std::atomic<std::int64_t> wall_clock_off{0};

}  // namespace

void hold_allocator() noexcept { allocator_held.store(true); }
void hold_allocator_here() noexcept { held_here = true; }
void exhaust_operator_new() noexcept { new_throws.store(true); }
void step_wall_clock(std::chrono::seconds by) noexcept { wall_clock_off.store(by.count()); }

}  // namespace promise

// ---- malloc ----

#if defined(__GLIBC__) && !defined(LASTCALL_ASAN) && !defined(LASTCALL_TSAN)

extern "C" {
void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t count, std::size_t size);
void* __libc_realloc(void* block, std::size_t size);
void* __libc_memalign(std::size_t alignment, std::size_t size);
void __libc_free(void* block);

static void enter_allocator() {
  while (promise::held_here || promise::allocator_held.load(std::memory_order_relaxed)) ::pause();
}

void* malloc(std::size_t size) {
  enter_allocator();
  return __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size) {
  enter_allocator();
  return __libc_calloc(count, size);
}
void* realloc(void* block, std::size_t size) {
  enter_allocator();
  return __libc_realloc(block, size);
}
void* memalign(std::size_t alignment, std::size_t size) {
  enter_allocator();
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) {
  enter_allocator();
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** out, std::size_t alignment, std::size_t size) {
  enter_allocator();
  *out = __libc_memalign(alignment, size);
  return *out == nullptr ? ENOMEM : 0;
}
void free(void* block) {
  enter_allocator();
  __libc_free(block);
}
}

// ---- operator new ----

void* operator new(std::size_t size) {
  if (promise::new_throws.load(std::memory_order_relaxed)) throw std::bad_alloc();
  void* const block = std::malloc(size);
  if (block == nullptr) throw std::bad_alloc();
  return block;
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return promise::new_throws.load(std::memory_order_relaxed) ? nullptr : std::malloc(size);
}
void operator delete(void* block) noexcept { std::free(block); }
void operator delete(void* block, std::size_t) noexcept { std::free(block); }
void operator delete(void* block, const std::nothrow_t&) noexcept { std::free(block); }

#endif

// ---- the wall clock ----

#if defined(__linux__) && !defined(LASTCALL_ASAN) && !defined(LASTCALL_TSAN)

extern "C" {
int clock_gettime(clockid_t clock, timespec* out) noexcept {
#if defined(SYS_clock_gettime64)
  // A processor of 32 bits, with 64 bits of time if libc was told so.
  constexpr long call =
      sizeof(out->tv_sec) > sizeof(long) ? SYS_clock_gettime64 : SYS_clock_gettime;
#else
  constexpr long call = SYS_clock_gettime;
#endif
  const long result = ::syscall(call, clock, out);
  if (result == 0 && clock == CLOCK_REALTIME) out->tv_sec += promise::wall_clock_off.load();
  return static_cast<int>(result);
}
time_t time(time_t* out) noexcept {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  if (out != nullptr) *out = now.tv_sec;
  return now.tv_sec;
}
int gettimeofday(timeval* out, void*) noexcept {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  out->tv_sec = now.tv_sec;
  out->tv_usec = now.tv_nsec / 1000;
  return 0;
}
}

#endif
