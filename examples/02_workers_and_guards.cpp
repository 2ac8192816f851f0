// 02: workers and guards.
//
// Press Ctrl-C while it runs.
//
// What to watch for: two different questions, answered by two different things. A worker asks
// "shall I take another job?" of its token. The end of the process asks "is anything still under
// way?" of the guards. The jobs that were accepted before the signal are all finished, the one
// after it is refused, and the numbers in the last line agree.
#include <lastcall/lastcall.hpp>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using namespace std::chrono_literals;

int main() {
  std::atomic<int> accepted{0};
  std::atomic<int> finished{0};
  std::vector<std::jthread> pool;  // somebody else's threads: the coordinator knows nothing of them

  lastcall::ShutdownCoordinator coordinator;

  coordinator.spawn("acceptor", [&](lastcall::CancellationToken token) {
    for (int number = 1; lastcall::sleep_for(100ms, token); ++number) {
      // The guard is what the process will wait for. It goes where the job goes.
      auto guard = coordinator.try_enter("job " + std::to_string(number));
      if (!guard) break;  // the signal came in between
      ++accepted;
      std::printf("job %d accepted\n", number);
      pool.emplace_back([&finished, number, job = std::move(guard)] {
        std::this_thread::sleep_for(300ms);  // no token in sight: a job is not interrupted
        ++finished;
        std::printf("job %d finished\n", number);
      });
    }
    std::puts("acceptor: no more jobs");
  });

  try {
    coordinator.on_drained("count", [&] {
      // Everybody has left by now, so nobody gets in any more.
      if (!coordinator.try_enter()) std::puts("a late job: refused");
      std::printf("%d jobs accepted, %d finished: %s\n", accepted.load(), finished.load(),
                  accepted == finished ? "none lost" : "SOME ARE LOST");
    });
  } catch (const std::logic_error&) {
    // A signal may come so early that all is over before this line.
    if (coordinator.is_ready()) throw;
  }
  coordinator.run();
}
