// Orders in SQLite, many to a commit: whoever places one waits until it is on disk, and one flusher
// commits all that are waiting with a single fsync.
#pragma once

#include <lastcall/cancellation.hpp>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

struct sqlite3;
struct sqlite3_stmt;

namespace orders {

/// Members may be called from any thread, flush_until() from one at a time.
class OrderStore {
 public:
  /// Opens or makes the database. Throws std::runtime_error with SQLite's message.
  explicit OrderStore(const std::string& path);
  ~OrderStore();
  OrderStore(const OrderStore&) = delete;
  OrderStore& operator=(const OrderStore&) = delete;

  /// Returns the order's number when the order is on disk. Empty: `give_up` was cancelled before it
  /// was written, and it never will be. Throws std::runtime_error if SQLite refuses it.
  std::optional<std::int64_t> place(std::string item, const lastcall::CancellationToken& give_up);

  /// The flusher: commits what is placed until it is told to stop and nothing is left.
  void flush_until(const lastcall::CancellationToken& stop);

  /// Closes the database; nothing may be placed any more.
  void close() noexcept;

 private:
  struct Placement;  // lives on the stack of whoever waits for it
  struct Closer {
    void operator()(sqlite3* database) const noexcept;
    void operator()(sqlite3_stmt* statement) const noexcept;
  };

  void commit(const std::vector<Placement*>& batch);
  void execute(const char* sql);
  void check(int result, const char* doing) const;

  std::unique_ptr<sqlite3, Closer> database_;
  std::unique_ptr<sqlite3_stmt, Closer> insert_;
  std::mutex mutex_;
  std::condition_variable placed_;
  std::deque<Placement*> waiting_;
};

}  // namespace orders
