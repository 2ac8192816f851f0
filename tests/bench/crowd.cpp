// More threads than processors, on one parent, one token, one group: processor time an operation. What it
// grows by is what the threads cost each other: lines that travel, locks whose holder was preempted.
#include "batch.hpp"
#include "cases.hpp"

#include <lastcall/cancellation.hpp>
#include <lastcall/wait_group.hpp>

#include <cstdio>
#include <ctime>

namespace bench {
namespace {

using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::WaitGroup;

double cpu_nanoseconds() {
  timespec spent{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &spent);
  return 1e9 * static_cast<double>(spent.tv_sec) + static_cast<double>(spent.tv_nsec);
}

template <class Operation>
double nanoseconds_each(unsigned threads, Operation operation) {
  constexpr std::size_t operations = 2'000'000;
  std::vector<double> rounds;
  for (int round = 0; round < 5; ++round) {
    const double before = cpu_nanoseconds();
    std::vector<std::thread> crowd;
    for (unsigned at = 0; at < threads; ++at) {
      crowd.emplace_back([&] {
        for (std::size_t i = 0; i < operations / threads; ++i) operation();
      });
    }
    for (std::thread& thread : crowd) thread.join();
    rounds.push_back((cpu_nanoseconds() - before) / operations);
  }
  return median(rounds);
}

template <class Operation>
void print_row(const char* what, Operation operation) {
  std::printf("%-40s", what);
  for (const unsigned threads : {1U, 2U, 8U, 32U}) {
    std::printf(" %7.1f ns", nanoseconds_each(threads, operation));
  }
  std::printf("\n");
}

}  // namespace

void print_crowd() {
  const CancellationSource source;
  const CancellationToken token = source.token();
  WaitGroup group;
  std::printf("\nprocessor time an operation, threads:   ");
  for (const int threads : {1, 2, 8, 32}) std::printf(" %7d   ", threads);
  std::printf("\n");
  print_row("is_cancelled()", [&] { benchmark::DoNotOptimize(token.is_cancelled()); });
  print_row("child made, destroyed, 1 parent", [&] {
    CancellationSource child(token);
    benchmark::DoNotOptimize(child);
  });
  print_row("callback in and out, 1 token", [&] {
    CancellationCallback callback(token, [] {});
    benchmark::DoNotOptimize(callback);
  });
  print_row("guard in and out, 1 group", [&] {
    WaitGroup::Guard guard = group.enter();
    benchmark::DoNotOptimize(guard);
  });
  print_row("deadline made, cancelled, 1 parent", [&] {
    CancellationSource child(token, std::chrono::hours(1));
    child.cancel();
  });
}

}  // namespace bench
