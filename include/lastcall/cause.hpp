// Why something was cancelled.
//
// A Cause is one pointer to an immutable, counted record. The records that everybody uses (plain
// cancellation, an exceeded deadline) are constants, so the common causes allocate nothing.
#pragma once

#include <lastcall/detail/cause_record.hpp>
#include <lastcall/signal_info.hpp>

#include <exception>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

namespace lastcall {

/// Why something was cancelled. Cheap to copy (one counter), immutable, thread-safe.
class Cause {
 public:
  /// No cause: kind() is none, the message is empty.
  Cause() noexcept = default;
  Cause(const Cause& other) noexcept : record_(other.record_) { detail::retain(record_); }
  Cause(Cause&& other) noexcept : record_(std::exchange(other.record_, nullptr)) {}
  Cause& operator=(Cause other) noexcept {
    std::swap(record_, other.record_);
    return *this;
  }
  ~Cause() { detail::release(record_); }

  /// Somebody wanted it. Allocates only for a message of its own; may throw std::bad_alloc then.
  static Cause cancelled(std::string message = {}) {
    using detail::CommonCause;
    if (message.empty()) return Cause(detail::record_of(CommonCause::cancelled));
    for (const CommonCause common : {CommonCause::requested, CommonCause::destroyed}) {
      const detail::CauseRecord* const record = detail::record_of(common);
      if (message == detail::resolve(record).text) return Cause(record);
    }
    return Cause(new detail::TextRecord(CauseKind::cancelled, std::move(message)));
  }

  /// Its time was up. Never allocates.
  static Cause deadline_exceeded() noexcept {
    return Cause(detail::record_of(detail::CommonCause::deadline));
  }

  /// A signal came. The sender's name is read from /proc now, while the sender may still be there.
  static Cause signal(SignalInfo info) {
    auto* record = new detail::SignalCauseRecord;
    record->info = info;
    record->describe();
    return Cause(record);
  }

  /// `error` went wrong; the message is its what() unless one is given. Throws
  /// std::invalid_argument for a null pointer.
  static Cause failure(std::exception_ptr error, std::string message = {}) {
    if (!error) detail::throw_invalid_argument("Cause::failure: the exception_ptr is null");
    if (message.empty()) message = detail::describe_exception(error);
    return Cause(new detail::FailureRecord(std::move(error), std::move(message)));
  }

  /// `none` for an empty cause.
  CauseKind kind() const noexcept { return detail::resolve(record_).kind; }
  /// Whether there is one.
  explicit operator bool() const noexcept { return record_ != nullptr; }

  /// In words: "SIGTERM from pid 812 (kubelet)", an exception's what(), the message given. Lives as
  /// long as any copy of this cause, and is followed by a NUL.
  std::string_view message() const& noexcept { return detail::resolve(record_).message(); }
  std::string message() && { return std::string(static_cast<const Cause&>(*this).message()); }

  /// The signal, or null unless kind() is signal. Lives as long as any copy of this cause.
  const SignalInfo* signal() const noexcept {
    const detail::CauseRecord& record = detail::resolve(record_);
    return record.signal != nullptr ? &record.signal->info : nullptr;
  }

  /// The exception, or null unless kind() is failure; null, too, if a task failed and there was no memory.
  std::exception_ptr exception() const noexcept {
    const detail::CauseRecord& record = detail::resolve(record_);
    return record.error != nullptr ? *record.error : nullptr;
  }

 private:
  friend struct detail::CauseAccess;
  explicit Cause(const detail::CauseRecord* record) noexcept : record_(record) {}

  const detail::CauseRecord* record_ = nullptr;
};

/// Thrown by CancellationToken::throw_if_cancelled(). what() is the cause's message.
class OperationCancelled : public std::exception {
 public:
  explicit OperationCancelled(Cause cause) : cause_(std::move(cause)) {}
  const Cause& cause() const noexcept { return cause_; }
  const char* what() const noexcept override {
    return cause_ ? cause_.message().data() : "operation cancelled";
  }

 private:
  Cause cause_;
};

namespace detail {

// For the tree, which keeps bare records in its nodes, and for the coordinator's signal thread,
// which must not allocate and so fills a record made beforehand.
struct CauseAccess {
  /// A Cause that takes over one reference.
  static Cause adopt(const CauseRecord* record) noexcept { return Cause(record); }
  static Cause share(const CauseRecord* record) noexcept {
    retain(record);
    return Cause(record);
  }
  static const CauseRecord* peek(const Cause& cause) noexcept { return cause.record_; }
};

}  // namespace detail
}  // namespace lastcall
