#include "order_store.hpp"

#include <lastcall/blocking.hpp>

#include <sqlite3.h>

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <utility>

namespace orders {

struct OrderStore::Placement {
  enum class State { waiting, in_commit, on_disk, refused };

  std::string item;
  State state = State::waiting;
  std::int64_t number = 0;
  std::string error;
  std::condition_variable settled;

  bool is_settled() const { return state == State::on_disk || state == State::refused; }
};

void OrderStore::Closer::operator()(sqlite3* database) const noexcept { ::sqlite3_close(database); }
void OrderStore::Closer::operator()(sqlite3_stmt* statement) const noexcept {
  ::sqlite3_finalize(statement);
}

OrderStore::OrderStore(const std::string& path) {
  sqlite3* database = nullptr;
  const int result = ::sqlite3_open(path.c_str(), &database);
  database_.reset(database);  // to be closed also when opening has failed
  check(result, ("opening " + path).c_str());
  // FULL: a commit returns when the log is on disk, not when it is on its way.
  execute("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;");
  execute("CREATE TABLE IF NOT EXISTS orders(number INTEGER PRIMARY KEY, item TEXT NOT NULL);");
  sqlite3_stmt* insert = nullptr;
  check(::sqlite3_prepare_v2(database_.get(), "INSERT INTO orders(item) VALUES(?)", -1, &insert,
                             nullptr),
        "preparing");
  insert_.reset(insert);
}

OrderStore::~OrderStore() { close(); }

void OrderStore::close() noexcept {
  insert_.reset();
  database_.reset();  // also moves what is in the log to where it belongs
}

std::optional<std::int64_t> OrderStore::place(std::string item,
                                              const lastcall::CancellationToken& give_up) {
  Placement placement;
  placement.item = std::move(item);

  std::unique_lock lock(mutex_);
  waiting_.push_back(&placement);
  placed_.notify_one();
  const auto settled = [&] { return placement.is_settled(); };
  if (!lastcall::wait(placement.settled, lock, give_up, settled)) {
    if (placement.state == Placement::State::waiting) {
      waiting_.erase(std::find(waiting_.begin(), waiting_.end(), &placement));
      return std::nullopt;
    }
    // Too late to withdraw it. The commit is one fsync away, and the customer must hear how it
    // ended.
    placement.settled.wait(lock, settled);
  }
  if (placement.state == Placement::State::refused) throw std::runtime_error(placement.error);
  return placement.number;
}

void OrderStore::flush_until(const lastcall::CancellationToken& stop) {
  std::unique_lock lock(mutex_);
  while (lastcall::wait(placed_, lock, stop, [this] { return !waiting_.empty(); })) {
    const std::vector<Placement*> batch(waiting_.begin(), waiting_.end());
    waiting_.clear();
    for (Placement* placement : batch) placement->state = Placement::State::in_commit;

    // Others place their orders meanwhile: they are the next batch.
    lock.unlock();
    std::string error;
    try {
      commit(batch);
    } catch (const std::exception& refusal) {
      error = refusal.what();
    }
    lock.lock();

    for (Placement* placement : batch) {
      placement->state = error.empty() ? Placement::State::on_disk : Placement::State::refused;
      placement->error = error;
      placement->settled
          .notify_one();  // under the lock: the placement is gone when its owner wakes
    }
  }
}

void OrderStore::commit(const std::vector<Placement*>& batch) {
  execute("BEGIN IMMEDIATE");
  try {
    for (Placement* placement : batch) {
      const auto length = static_cast<int>(placement->item.size());
      check(::sqlite3_bind_text(insert_.get(), 1, placement->item.data(), length, SQLITE_STATIC),
            "binding");
      const int result = ::sqlite3_step(insert_.get());
      ::sqlite3_reset(insert_.get());
      if (result != SQLITE_DONE) check(result, "inserting");
      placement->number = ::sqlite3_last_insert_rowid(database_.get());
    }
    execute("COMMIT");
  } catch (...) {
    ::sqlite3_exec(database_.get(), "ROLLBACK", nullptr, nullptr, nullptr);
    throw;
  }
}

void OrderStore::execute(const char* sql) {
  check(::sqlite3_exec(database_.get(), sql, nullptr, nullptr, nullptr), sql);
}

void OrderStore::check(int result, const char* doing) const {
  if (result == SQLITE_OK) return;
  throw std::runtime_error("SQLite, " + std::string(doing) + ": " +
                           ::sqlite3_errmsg(database_.get()));
}

}  // namespace orders
