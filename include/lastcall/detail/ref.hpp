// A counted pointer to something that counts itself: one word, and no control block.
#pragma once

#include <atomic>
#include <cstddef>
#include <utility>

namespace lastcall::detail {

/// Base of what a Ref keeps alive. It is made with a count of one, which Ref::adopt() takes over.
class Counted {
 public:
  Counted() noexcept = default;
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;

  // relaxed: who takes another reference has one already.
  void add_ref() const noexcept { count_.fetch_add(1, std::memory_order_relaxed); }
  // acq_rel: all that was done through any reference happens before the destructor.
  bool drop_ref() const noexcept { return count_.fetch_sub(1, std::memory_order_acq_rel) == 1; }

 protected:
  ~Counted() = default;

 private:
  mutable std::atomic<std::size_t> count_{1};
};

/// Shares ownership of a T, which derives from Counted. When the last goes, T::last_ref_gone() is
/// called if there is one, then it is deleted.
template <class T>
class Ref {
 public:
  Ref() noexcept = default;
  static Ref adopt(T* object) noexcept {
    Ref made;
    made.object_ = object;
    return made;
  }
  static Ref share(T* object) noexcept {
    object->add_ref();
    return adopt(object);
  }
  Ref(const Ref& other) noexcept : object_(other.object_) {
    if (object_ != nullptr) object_->add_ref();
  }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() {
    if (object_ == nullptr || !object_->drop_ref()) return;
    if constexpr (requires(T & object) { object.last_ref_gone(); }) object_->last_ref_gone();
    delete object_;
  }

  T* get() const noexcept { return object_; }
  T* operator->() const noexcept { return object_; }
  T& operator*() const noexcept { return *object_; }
  explicit operator bool() const noexcept { return object_ != nullptr; }

 private:
  T* object_ = nullptr;
};

}  // namespace lastcall::detail
