// The immutable records behind Cause.
#pragma once

#include <lastcall/detail/bounded_text.hpp>
#include <lastcall/detail/config.hpp>
#include <lastcall/detail/signal_pin.hpp>
#include <lastcall/detail/thread_cancellation.hpp>
#include <lastcall/detail/throw.hpp>
#include <lastcall/signal_info.hpp>

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <exception>
#include <string>
#include <string_view>
#include <utility>

namespace lastcall {

/// What sort of thing cancelled.
enum class CauseKind : std::uint8_t { none, cancelled, deadline_exceeded, signal, failure };

namespace detail {

struct CauseAccess;

struct SignalCauseRecord;

struct CauseRecord {
  constexpr CauseRecord(CauseKind of, std::uint64_t count, std::string_view words) noexcept
      : refs(count), text(words), kind(of) {}

  std::string_view message() const noexcept;

  mutable std::atomic<std::uint64_t> refs;
  std::string_view text;  // of a signal: unused, see SignalCauseRecord
  // What a derived record adds, or null. By pointers and not by casts: a compiler that sees one of the
  // constants below would warn of the cast that is never made.
  const SignalCauseRecord* signal = nullptr;
  const std::exception_ptr* error = nullptr;
  void (*destroy)(const CauseRecord*) noexcept = nullptr;
  CauseKind kind;
};

template <class Record>
void destroy_record(const CauseRecord* record) noexcept {
  delete static_cast<const Record*>(record);
}

// The causes that everybody uses. Their records are known by a small number instead of an address: so they are never
// counted, and a million nodes that share one touch no common line; and a shared object that has cancelled may be
// unloaded, since no node has a pointer into it.
enum class CommonCause : std::uintptr_t {
  none,
  cancelled,
  requested,
  destroyed,
  deadline,
  untold_failure
};
inline constexpr std::uintptr_t common_causes = 6;

inline const CauseRecord* record_of(CommonCause cause) noexcept {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): it is never followed, see resolve()
  return reinterpret_cast<const CauseRecord*>(static_cast<std::uintptr_t>(cause));
}
inline bool is_common(const CauseRecord* record) noexcept {
  return reinterpret_cast<std::uintptr_t>(record) < common_causes;
}

inline constinit CauseRecord common_records[common_causes] = {
    {CauseKind::none, 1, {}},
    {CauseKind::cancelled, 1, "cancelled"},
    {CauseKind::cancelled, 1, "requested"},
    {CauseKind::cancelled, 1, "coordinator destroyed"},
    {CauseKind::deadline_exceeded, 1, "deadline exceeded"},
    {CauseKind::failure, 1, "a task failed, and there was no memory to say how"}};

/// The record to look at: of a null pointer one of kind none.
inline const CauseRecord& resolve(const CauseRecord* record) noexcept {
  return is_common(record) ? common_records[reinterpret_cast<std::uintptr_t>(record)] : *record;
}

// A record of another kind is destroyed by the code of the object that made it, which so has to stay loaded.
template <class Record>
void destroy_by(CauseRecord& record) noexcept {
  static constinit std::atomic<bool> stays{false};
  record.destroy = &destroy_record<Record>;
  // relaxed: once more does no harm.
  if (stays.load(std::memory_order_relaxed)) return;
  const int saved = errno;
  pin_module_of(reinterpret_cast<const void*>(&destroy_record<Record>));
  errno = saved;
  stays.store(true, std::memory_order_relaxed);
}

struct TextRecord : CauseRecord {
  TextRecord(CauseKind of, std::string words) : CauseRecord(of, 1, {}), owned(std::move(words)) {
    text = owned;
    destroy_by<TextRecord>(*this);
  }
  std::string owned;
};

struct FailureRecord : TextRecord {
  FailureRecord(std::exception_ptr thrown, std::string words)
      : TextRecord(CauseKind::failure, std::move(words)), thrown_error(std::move(thrown)) {
    error = &thrown_error;
    destroy_by<FailureRecord>(*this);
  }
  std::exception_ptr thrown_error;
};

// Can be filled without allocating. The words are made once, by whoever gets to it first: looking
// the sender up in /proc costs microseconds that a woken worker need not wait for.
struct SignalCauseRecord : CauseRecord {
  SignalCauseRecord() noexcept : CauseRecord(CauseKind::signal, 1, {}) {
    signal = this;
    destroy_by<SignalCauseRecord>(*this);
  }

  /// Makes the words if nobody has. Async-signal-safe.
  void describe() const noexcept {
    std::uint32_t seen = unmade;
    // acquire on failure: pairs with the release below, so that `made` means readable words.
    if (!progress_.compare_exchange_strong(seen, making, std::memory_order_acquire,
                                           std::memory_order_acquire)) {
      return;
    }
    write_words();
    progress_.store(made, std::memory_order_release);
  }

  std::string_view words() const noexcept {
    describe();
    // Another thread is between two system calls on /proc: it holds no lock and soon is done.
    while (progress_.load(std::memory_order_acquire) != made) nap(50'000);
    return {buffer_, length_};
  }

  SignalInfo info{};

 private:
  static constexpr std::uint32_t unmade = 0;
  static constexpr std::uint32_t making = 1;
  static constexpr std::uint32_t made = 2;

  void write_words() const noexcept {
    BoundedText words(buffer_, sizeof buffer_);
    // Not by signal_name(): the name of an unknown one, which the caller may have, is in this thread's buffer.
    add_signal_name(words, info.number);
    if (info.sender_pid <= 0) {
      // A process that this one can't see: who stops a container, from its point of view, is nobody.
      words.add(info.code == SI_USER || info.code == SI_QUEUE ? " from outside this pid namespace"
                                                              : " from the kernel");
    } else {
      words.add(" from pid ").add_number(info.sender_pid);
      add_sender_name(words);
    }
    length_ = words.length();
  }
  void add_sender_name([[maybe_unused]] BoundedText& words) const noexcept {
#if LASTCALL_LINUX
    const NoThreadCancellation whole;
    const int saved = errno;
    char path[48] = {};
    BoundedText(path, sizeof path - 1).add("/proc/").add_number(info.sender_pid).add("/comm");
    const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
      char name[64];
      const auto got = ::read(fd, name, sizeof name);
      ::close(fd);
      if (got > 1) {
        const std::size_t length =
            static_cast<std::size_t>(got) - (name[got - 1] == '\n' ? 1U : 0U);
        words.add(" (").add({name, length}).add(')');
      }
    }
    errno = saved;
#endif
  }

  mutable std::atomic<std::uint32_t> progress_{unmade};
  mutable std::size_t length_ = 0;
  mutable char buffer_[128] = {};
};

inline std::string_view CauseRecord::message() const noexcept {
  return signal != nullptr ? signal->words() : text;
}

inline void retain(const CauseRecord* record, std::uint64_t times = 1) noexcept {
  if (is_common(record)) return;
  // relaxed: whoever retains holds a reference already.
  record->refs.fetch_add(times, std::memory_order_relaxed);
}

inline void release(const CauseRecord* record, std::uint64_t times = 1) noexcept {
  if (is_common(record)) return;
  // acq_rel: the last one out sees all that the others did with the record.
  if (record->refs.fetch_sub(times, std::memory_order_acq_rel) != times) return;
  record->destroy(record);
}

/// what() of a std::exception, or that there is none. Null: what std::current_exception() gives of an exception
/// of another language.
inline std::string describe_exception(const std::exception_ptr& error) {
#if LASTCALL_EXCEPTIONS
  if (error == nullptr) return "an exception of another language";
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& known) {
    const char* const what = known.what();
    return what != nullptr && *what != '\0' ? what : "an exception without a message";
  } catch (...) {
    return "an exception that is no std::exception";
  }
#else
  static_cast<void>(error);
  return "a failure";
#endif
}

}  // namespace detail
}  // namespace lastcall
