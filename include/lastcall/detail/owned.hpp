// One owner on the heap, and a lock held for a scope: what std::unique_ptr and std::lock_guard do. Their
// headers, <memory> and <mutex>, would be half of what the headers of the lower floors take to compile.
#pragma once

#include <cstddef>
#include <utility>

namespace lastcall::detail {

/// Owns a T, or nothing.
template <class T>
class Owned {
 public:
  Owned() noexcept = default;
  explicit Owned(T* object) noexcept : object_(object) {}
  Owned(Owned&& other) noexcept : object_(other.release()) {}
  Owned& operator=(Owned&& other) noexcept {
    Owned taken(std::move(other));
    std::swap(object_, taken.object_);
    return *this;
  }
  ~Owned() { delete object_; }

  T* get() const noexcept { return object_; }
  T* operator->() const noexcept { return object_; }
  explicit operator bool() const noexcept { return object_ != nullptr; }
  T* release() noexcept { return std::exchange(object_, nullptr); }

 private:
  T* object_ = nullptr;
};

/// The same of an array.
template <class T>
class Owned<T[]> {
 public:
  Owned() noexcept = default;
  explicit Owned(T* first) noexcept : first_(first) {}
  Owned(Owned&& other) noexcept : first_(std::exchange(other.first_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    Owned taken(std::move(other));
    std::swap(first_, taken.first_);
    return *this;
  }
  ~Owned() { delete[] first_; }

  T* get() const noexcept { return first_; }
  T& operator[](std::size_t at) const noexcept { return first_[at]; }

 private:
  T* first_ = nullptr;
};

/// Holds a lock for as long as it lives.
template <class Lock>
class Held {
 public:
  explicit Held(Lock& lock) noexcept : lock_(lock) { lock_.lock(); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() { lock_.unlock(); }

 private:
  Lock& lock_;
};

}  // namespace lastcall::detail
