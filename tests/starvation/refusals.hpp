// Refuses memory on demand, from the so-manieth request on or only that one, on one thread or in the
// whole process, and counts what operator new has given out. For one source file of an executable.
//
// Two layers can be starved. operator new is replaced in every build. malloc() beneath it, which also
// serves exceptions and the C library itself, is stood in for where support/allocations.hpp does so
// (glibc, no sanitizer).
#pragma once

#include "support/allocations.hpp"

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace starvation {

enum class Layer { operator_new, malloc };
/// How many requests are refused once it begins.
enum class Lasting { one, all };
enum class Reach { this_thread, process };

struct Refusal {
  Layer layer = Layer::operator_new;
  Lasting lasting = Lasting::one;
  Reach reach = Reach::this_thread;
};

/// What operator new has given out and has not got back.
inline std::atomic<long> live_objects{0};

// Plain constants at start: malloc() is called before any constructor has run.
inline constinit std::atomic<bool> armed{false};
inline constinit std::atomic<long> requests_left{0};  // the one that makes it zero is refused
inline constinit std::atomic<long> refused_count{0};
inline constinit Refusal refusal{};
inline constinit thread_local bool is_starved_thread = false;

/// Whether this request is to be refused.
inline bool refuses(Layer layer) noexcept {
  if (!armed.load(std::memory_order_acquire) || refusal.layer != layer) return false;
  if (refusal.reach == Reach::this_thread && !is_starved_thread) return false;
  const long before = requests_left.fetch_sub(1, std::memory_order_relaxed);
  if (before > 1 || (before < 1 && refusal.lasting == Lasting::one)) return false;
  refused_count.fetch_add(1, std::memory_order_relaxed);
  return true;
}

/// While it lives, the `nth` request from its making (and all after it, if told so) is refused.
class Starving {
 public:
  Starving(const Refusal& how, long nth) noexcept {
    refusal = how;
    requests_left.store(nth, std::memory_order_relaxed);
    refused_count.store(0, std::memory_order_relaxed);
    is_starved_thread = true;
    if (how.layer == Layer::malloc) {
      support::refusal_rule = []() noexcept { return refuses(Layer::malloc); };
    }
    armed.store(true, std::memory_order_release);
  }
  Starving(const Starving&) = delete;
  Starving& operator=(const Starving&) = delete;
  ~Starving() { stop(); }
  void stop() noexcept {
    armed.store(false, std::memory_order_release);
    is_starved_thread = false;
  }
  /// How many requests were refused so far.
  long refused() const noexcept { return refused_count.load(std::memory_order_relaxed); }
};

inline void* take(std::size_t size, std::size_t alignment) noexcept {
  if (refuses(Layer::operator_new)) return nullptr;
  if (size == 0) size = 1;
  void* memory = nullptr;
  if (alignment <= __STDCPP_DEFAULT_NEW_ALIGNMENT__) {
    memory = std::malloc(size);
  } else if (::posix_memalign(&memory, alignment, size) != 0) {
    memory = nullptr;
  }
  if (memory != nullptr) live_objects.fetch_add(1, std::memory_order_relaxed);
  return memory;
}
inline void* take_or_throw(std::size_t size, std::size_t alignment) {
  void* const memory = take(size, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
inline void give_back(void* memory) noexcept {
  if (memory == nullptr) return;
  live_objects.fetch_sub(1, std::memory_order_relaxed);
  std::free(memory);
}
inline constexpr std::size_t usual = __STDCPP_DEFAULT_NEW_ALIGNMENT__;

}  // namespace starvation

// Every form, so that none falls back to one of the standard library's.
void* operator new(std::size_t size) { return starvation::take_or_throw(size, starvation::usual); }
void* operator new[](std::size_t size) {
  return starvation::take_or_throw(size, starvation::usual);
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  return starvation::take_or_throw(size, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return starvation::take_or_throw(size, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return starvation::take(size, starvation::usual);
}
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept {
  return starvation::take(size, starvation::usual);
}
void* operator new(std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return starvation::take(size, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return starvation::take(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { starvation::give_back(memory); }
void operator delete[](void* memory) noexcept { starvation::give_back(memory); }
void operator delete(void* memory, std::size_t) noexcept { starvation::give_back(memory); }
void operator delete[](void* memory, std::size_t) noexcept { starvation::give_back(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { starvation::give_back(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { starvation::give_back(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  starvation::give_back(memory);
}
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept {
  starvation::give_back(memory);
}
void operator delete(void* memory, const std::nothrow_t&) noexcept {
  starvation::give_back(memory);
}
void operator delete[](void* memory, const std::nothrow_t&) noexcept {
  starvation::give_back(memory);
}
void operator delete(void* memory, std::align_val_t, const std::nothrow_t&) noexcept {
  starvation::give_back(memory);
}
void operator delete[](void* memory, std::align_val_t, const std::nothrow_t&) noexcept {
  starvation::give_back(memory);
}
