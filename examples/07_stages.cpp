// 07: stages. A pipeline: requests put records into a queue, a writer takes them out, a database is
// last. Press Ctrl-C when you have seen some records.
//
// What to watch for: everything stops in the order of its declaration. The writer goes on until the
// last producer has left, so that no record stays in the queue; the database is closed when the
// writer has left. Each stage has its budget: one that hangs is written down, and the next one has
// its turn.
#include <lastcall/lastcall.hpp>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <mutex>
#include <stdexcept>

using namespace std::chrono_literals;

namespace {

class Queue {
 public:
  void put(int record) {
    const std::lock_guard lock(mutex_);
    records_.push_back(record);
    filled_.notify_one();
  }
  // Waits for a record. False: told to stop, and nothing is left.
  bool take(int& record, const lastcall::CancellationToken& token) {
    std::unique_lock lock(mutex_);
    if (!lastcall::wait(filled_, lock, token, [this] { return !records_.empty(); })) return false;
    record = records_.front();
    records_.pop_front();
    return true;
  }

 private:
  std::mutex mutex_;
  std::condition_variable filled_;
  std::deque<int> records_;
};

}  // namespace

int main() {
  // What tasks and hooks use is declared before the coordinator, and so outlives it.
  Queue queue;
  int put = 0;
  int written = 0;

  lastcall::ShutdownCoordinator coordinator;  // is itself the first stage: "service"
  try {
    lastcall::Stage& writing = coordinator.stage("writing", 3s);
    lastcall::Stage& database = coordinator.stage("database", 2s);

    // Last things first: who is to write is there before there is anything to be written.
    database.on_stop("checkpoint", [] { std::puts("database: checkpoint"); });
    database.on_drained("close", [&] {
      std::printf("database: closed; %s\n", put == written ? "none lost" : "SOME ARE LOST");
    });
    writing.spawn("writer", [&](lastcall::CancellationToken token) {
      for (int record = 0; queue.take(record, token);) {
        lastcall::sleep_for(30ms, {});  // slower than the producer: the queue fills up
        if (++written % 10 == 0) std::printf("writer: %d records\n", written);
      }
      std::printf("writer: wrote %d records\n", written);
    });
    coordinator.spawn("producer", [&](lastcall::CancellationToken token) {
      while (lastcall::sleep_for(20ms, token)) queue.put(++put);
      std::printf("producer: put %d records\n", put);
    });
  } catch (const std::logic_error&) {
    // A signal came before all of it was declared: run() ends what there is.
    if (coordinator.is_ready()) throw;
  }

  coordinator.run();
}
