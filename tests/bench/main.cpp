// lastcall's primitives beside their peers, interleaved in one run: what cmake/bench.cmake builds and starts.
//
//   bench_primitives [--json=<file>] [--repetitions=<n>] [--benchmark_filter=<regex>] [<peer program>...]
#include "batch.hpp"
#include "cases.hpp"
#include "co_process.hpp"
#include "table.hpp"

#include <sys/utsname.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>

namespace {

using bench::Row;
using bench::Unit;

const Row rows[] = {
    {"is_cancelled(), depth 1, 1 thread", "check/1", Unit::nanoseconds, {1.15, {"check/1@bare"}}},
    {"is_cancelled(), depth 8, 1 thread", "check8/1", Unit::nanoseconds, {1.15, {"check8/1@bare"}}},
    {"is_cancelled(), depth 1, 2 threads", "check/2", Unit::nanoseconds, {1.15, {"check/2@bare"}}},
    {"is_cancelled(), depth 8, 2 threads",
     "check8/2",
     Unit::nanoseconds,
     {1.15, {"check8/2@bare"}}},
    {"child made, destroyed, 1 thread", "child/1", Unit::nanoseconds, {0.5, {"child/1@std"}}},
    {"the same, 2 threads, 1 parent", "child/2", Unit::nanoseconds, {1.3, {"child/1@lastcall"}}},
    {"callback in and out, 1 thread", "callback/1", Unit::nanoseconds, {0.5, {"callback/1@std"}}},
    {"the same, 2 threads, 1 token",
     "callback/2",
     Unit::nanoseconds,
     {1.3, {"callback/1@lastcall"}}},
    {"cancel a root with 10^6 children, each",
     "cancel_wide",
     Unit::nanoseconds,
     {0.5, {"cancel_wide@std"}}},
    {"cancel a chain of 10^6, each",
     "cancel_deep",
     Unit::nanoseconds,
     {0.3, {"cancel_deep@tokio"}}},
    {"destroy the wide tree, each", "destroy_wide", Unit::nanoseconds, {0.6, {"destroy_wide@std"}}},
    {"destroy the chain, each", "destroy_deep", Unit::nanoseconds, {0.6, {"destroy_wide@std"}}},
    {"resident bytes a child and its handle", "bytes_child", Unit::bytes, {72}},
    {"guard in and out, 1 thread", "guard/1", Unit::nanoseconds, {0.7, {"guard/1@bare"}}},
    {"the same, 2 threads, 1 group", "guard/2", Unit::nanoseconds, {1.15, {"guard/1@lastcall"}}},
    {"last guard out -> waiter runs, 1 CPU",
     "last_out",
     Unit::nanoseconds,
     {1.15, {"last_out@bare"}}},
    {"the same, 2 CPUs", "last_out_two", Unit::nanoseconds, {}},
    {"cancel() -> waiter runs, 1 CPU", "cancel_wake", Unit::nanoseconds, {}},
    {"the same, 2 CPUs", "cancel_wake_two", Unit::nanoseconds, {}},
    {"SIGTERM -> trap -> worker, 1 CPU",
     "signal",
     Unit::nanoseconds,
     {1.15, {"signal@bare", "last_out@bare"}, true}},
    {"the same, 2 CPUs", "signal_two", Unit::nanoseconds, {}},
    {"SIGTERM -> new coordinator -> worker",
     "first_signal",
     Unit::nanoseconds,
     {1.15, {"first_signal@bare"}}},
    {"the same, 2 CPUs", "first_signal_two", Unit::nanoseconds, {}},
    {"deadline made, cancelled, 1 thread",
     "deadline/1",
     Unit::nanoseconds,
     {0.25, {"deadline/1@go"}}},
    {"the same, 2 threads, 1 parent",
     "deadline/2",
     Unit::nanoseconds,
     {2, {"deadline/1@lastcall"}}},
    {"10^5 deadlines fire in 1 s: CPU",
     "deadlines_fire",
     Unit::milliseconds,
     {2, {"deadlines_fire@bare"}}},
    {"the same: p99 lateness", "deadlines_late", Unit::milliseconds, {1.5e6}},
    {"compile lastcall.hpp", "compile_lastcall", Unit::milliseconds, {1.4, {"compile@std"}}},
    {"compile cancellation.hpp",
     "compile_cancellation",
     Unit::milliseconds,
     {1.0, {"compile@std"}}},
    {"compile wait_group.hpp", "compile_wait_group", Unit::milliseconds, {1.0, {"compile@std"}}},
    {"compile <stop_token> and <thread>", "compile", Unit::milliseconds, {}},
};

std::string processor() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "unknown processor";
}

std::map<std::string, std::string> about_this_machine() {
  utsname system{};
  uname(&system);
  return {{"processor", processor() + " x " + std::to_string(std::thread::hardware_concurrency())},
          {"system", std::string(system.sysname) + " " + system.release},
          {"compiler", LASTCALL_COMPILER}};
}

}  // namespace

int main(int argc, char** argv) {
  std::string json;
  std::string repetitions = "15";
  std::vector<std::string> peers;
  std::vector<std::string> passed_on = {argv[0]};
  for (int at = 1; at < argc; ++at) {
    const std::string argument = argv[at];
    const auto value_of = [&](const char* option, std::string& value) {
      if (argument.rfind(option, 0) != 0) return false;
      value = argument.substr(std::strlen(option));
      return true;
    };
    std::string contender;
    if (value_of("--bytes-of-child=", contender)) {
      std::printf("%.3f\n", bench::bytes_of_child(contender));
      return 0;
    }
    if (value_of("--json=", json) || value_of("--repetitions=", repetitions)) continue;
    (argument.rfind("--", 0) == 0 ? passed_on : peers).push_back(argument);
  }
  passed_on.push_back("--benchmark_repetitions=" + repetitions);
  passed_on.emplace_back("--benchmark_enable_random_interleaving=true");
  std::vector<char*> arguments;
  for (std::string& argument : passed_on) arguments.push_back(argument.data());
  int count = static_cast<int>(arguments.size());
  benchmark::Initialize(&count, arguments.data());

  // A peer that is gone is a line that it doesn't answer.
  std::signal(SIGPIPE, SIG_IGN);
  auto about = about_this_machine();
  std::vector<std::string> contenders = {"lastcall", "bare", "std"};
  bench::add_tree_cases();
  bench::add_group_cases();
  bench::add_wake_cases();
  bench::add_deadline_cases();
  bench::add_size_cases();
  for (const std::string& path : peers) {
    auto peer = std::make_shared<bench::CoProcess>(path);
    if (peer->name().empty()) {
      std::printf("%s is no peer program: skipped\n", path.c_str());
      continue;
    }
    bench::add_peer(peer);
    contenders.push_back(peer->name());
    about[peer->name()] = peer->version();
  }
  for (const auto& [key, value] : about) std::printf("%-10s %s\n", key.c_str(), value.c_str());

  bench::Figures figures;
  benchmark::RunSpecifiedBenchmarks(&figures);
  std::printf("\n");
  bench::Table table(figures, contenders);
  table.print(rows);
  const double early = figures.of("deadlines_early@lastcall");
  if (early >= 0) std::printf("deadlines that fired early: %s\n", early > 0 ? "SOME" : "none");
  const bench::Idle idle = bench::idle_waiters(2);
  std::printf("1,000 waiters, idle for 2 s: %.1f ms of processor time, %ld wake-ups\n",
              idle.cpu_seconds * 1e3, idle.wake_ups);
  std::printf("%d reached, %d missed\n", table.reached(), table.missed());
  bench::print_crowd();
  if (!json.empty()) table.write_json(json, rows, about);
  return 0;
}
