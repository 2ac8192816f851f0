// Whole processes, from SIGTERM to their end: lastcall beside the bare limit and the peers, interleaved in
// one run.
//
//   bench_process [--rounds=<n>] [--peers=<peers.txt>] [--json=<file>] [--only=exit|waiters|idle|signal]
//
// exit and waiters: from just before kill() until waitid() has returned, with no workers and with 1,000
// threads that wait. idle: what 1,000 waiters cost while nothing happens. signal: SIGTERM from another
// process until a worker runs, which is not the thread that received it; sender, receiver and worker on one
// processor, and wherever the kernel puts them.
#include "subjects.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Words = std::vector<std::string>;

constexpr int many = 1000;
constexpr int awaited_a_round = 20;

void nap(std::chrono::microseconds span) { std::this_thread::sleep_for(span); }

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "bench_process: %s\n", what.c_str());
  std::exit(1);
}

// ---- a process with a pipe on its standard output ----

class Process {
 public:
  explicit Process(const Words& command) : name_(command.front()) {
    int out[2];
    int in[2];
    if (::pipe2(out, O_CLOEXEC) != 0 || ::pipe2(in, O_CLOEXEC) != 0) fail("no pipe");
    std::vector<char*> argv;
    for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
    argv.push_back(nullptr);
    id_ = ::fork();
    if (id_ < 0) fail("no process");
    if (id_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      ::dup2(in[0], STDIN_FILENO);
      ::dup2(out[1], STDOUT_FILENO);
      ::execv(argv[0], argv.data());
      ::_exit(127);
    }
    ::close(out[1]);
    ::close(in[0]);
    output_ = out[0];
    input_ = in[1];
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;
  ~Process() {
    if (id_ > 0) {
      ::kill(id_, SIGKILL);
      ::waitpid(id_, nullptr, 0);
    }
    ::close(output_);
    ::close(input_);
  }

  pid_t id() const { return id_; }

  /// The next line that it prints.
  std::string line() {
    for (;;) {
      const std::size_t end = seen_.find('\n');
      if (end != std::string::npos) {
        std::string line = seen_.substr(0, end);
        seen_.erase(0, end + 1);
        return line;
      }
      pollfd watched{output_, POLLIN, 0};
      if (::poll(&watched, 1, 30'000) == 0) fail(name_ + " says nothing");
      char buffer[4096];
      const ssize_t got = ::read(output_, buffer, sizeof buffer);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) fail(name_ + " ended too soon");
      seen_.append(buffer, static_cast<std::size_t>(got));
    }
  }
  void expect_ready() {
    if (const std::string said = line(); said != "ready") fail(name_ + " said: " + said);
  }

  /// Nanoseconds from just before a SIGTERM until the process is gone.
  double end() {
    siginfo_t info{};
    const std::int64_t begin = bench::now();
    ::kill(id_, SIGTERM);
    while (::waitid(P_PID, static_cast<id_t>(id_), &info, WEXITED) != 0 && errno == EINTR) {
    }
    const std::int64_t took = bench::now() - begin;
    id_ = -1;
    if (info.si_code != CLD_EXITED || info.si_status != 0) fail(name_ + " did not end well");
    return static_cast<double>(took);
  }

 private:
  std::string name_;
  pid_t id_ = -1;
  int output_ = -1;
  int input_ = -1;
  std::string seen_;
};

// ---- what is measured ----

struct Subject {
  std::string title;
  Words command;
  std::vector<double> samples;
  bool is_latency = true;  // of await: it prints a time; else a span
};

double median(std::vector<double> samples) {
  if (samples.empty()) return -1;
  const auto middle = samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 2);
  std::nth_element(samples.begin(), middle, samples.end());
  return *middle;
}

struct Peers {
  std::map<std::string, std::string> programs;  // by name
  std::vector<std::string> skipped;
};

// The list that tests/bench/peers/peers.cmake writes.
Peers read_peers(const std::string& file) {
  Peers peers;
  std::ifstream lines(file);
  if (!lines) {
    peers.skipped.push_back("skipped: all peers: there is no list of them; see tests/bench/peers");
    return peers;
  }
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("skipped", 0) == 0) {
      peers.skipped.push_back(line);
    } else if (const std::size_t at = line.rfind("/peer_"); at != std::string::npos) {
      peers.programs[line.substr(at + 6)] = line;
    }
  }
  return peers;
}

std::string itself() {
  char path[4096];
  const ssize_t size = ::readlink("/proc/self/exe", path, sizeof path);
  return {path, static_cast<std::size_t>(std::max<ssize_t>(size, 0))};
}

std::mt19937& dice() {
  static std::mt19937 generator{20'240'527};
  return generator;
}

void each_in_some_order(std::vector<Subject>& subjects, void (*measure)(Subject&)) {
  std::vector<Subject*> order;
  for (Subject& subject : subjects) order.push_back(&subject);
  std::shuffle(order.begin(), order.end(), dice());
  for (Subject* subject : order) measure(*subject);
}

void measure_exit(Subject& subject) {
  for (int i = 0; i < 3; ++i) {
    Process process(subject.command);
    process.expect_ready();
    nap(std::chrono::milliseconds(3));
    subject.samples.push_back(process.end());
  }
}

void measure_exit_of_many(Subject& subject) {
  Process process(subject.command);
  process.expect_ready();
  // All are asleep then.
  nap(std::chrono::milliseconds(50));
  subject.samples.push_back(process.end());
}

void measure_await(Subject& subject) {
  Process process(subject.command);
  // The first ones find cold caches and unbound symbols.
  for (int i = -3; i < awaited_a_round; ++i) {
    process.expect_ready();
    nap(std::chrono::milliseconds(1));
    const std::int64_t begin = bench::now();
    ::kill(process.id(), SIGTERM);
    const std::int64_t said = std::atoll(process.line().c_str());
    if (i < 0) continue;
    subject.samples.push_back(static_cast<double>(subject.is_latency ? said - begin : said));
  }
}

void pin_to_first() {
  cpu_set_t first;
  CPU_ZERO(&first);
  CPU_SET(0, &first);
  ::sched_setaffinity(0, sizeof first, &first);
}

void measure_await_pinned(Subject& subject) {
  cpu_set_t before;
  ::sched_getaffinity(0, sizeof before, &before);
  // What is started from here inherits it.
  pin_to_first();
  measure_await(subject);
  ::sched_setaffinity(0, sizeof before, &before);
}

// ---- idle ----

struct Effort {
  double cpu_nanoseconds = 0;
  double switches = 0;
};

std::string text_of(const std::string& file) {
  std::ifstream in(file);
  return {std::istreambuf_iterator<char>(in), {}};
}

Effort effort_of(pid_t process) {
  Effort effort;
  const std::string folder = "/proc/" + std::to_string(process) + "/task";
  DIR* const tasks = ::opendir(folder.c_str());
  if (tasks == nullptr) fail("no " + folder);
  while (const dirent* const task = ::readdir(tasks)) {
    if (task->d_name[0] == '.') continue;
    const std::string path = folder + "/" + task->d_name;
    effort.cpu_nanoseconds += std::atof(text_of(path + "/schedstat").c_str());
    const std::string status = text_of(path + "/status");
    for (const char* const key : {"\nvoluntary_ctxt_switches:", "\nnonvoluntary_ctxt_switches:"}) {
      const std::size_t at = status.find(key);
      if (at != std::string::npos) effort.switches += std::atof(&status[at + std::strlen(key)]);
    }
  }
  ::closedir(tasks);
  return effort;
}

struct Idle {
  std::string title;
  Effort effort;
};

// All of them at once, for so long.
std::vector<Idle> measure_idle(const std::vector<Subject>& subjects, std::chrono::seconds span) {
  std::vector<std::unique_ptr<Process>> processes;
  for (const Subject& subject : subjects) {
    processes.push_back(std::make_unique<Process>(subject.command));
    processes.back()->expect_ready();
  }
  nap(std::chrono::seconds(1));
  std::vector<Effort> before;
  for (const auto& process : processes) before.push_back(effort_of(process->id()));
  nap(span);
  std::vector<Idle> all;
  for (std::size_t i = 0; i < processes.size(); ++i) {
    const Effort after = effort_of(processes[i]->id());
    all.push_back(
        {subjects[i].title,
         {after.cpu_nanoseconds - before[i].cpu_nanoseconds, after.switches - before[i].switches}});
  }
  return all;
}

// ---- the table ----

std::string readable(double nanoseconds) {
  char text[32];
  if (nanoseconds < 0) return "-";
  if (nanoseconds < 1e6) {
    std::snprintf(text, sizeof text, "%.2f us", nanoseconds / 1e3);
  } else {
    std::snprintf(text, sizeof text, "%.2f ms", nanoseconds / 1e6);
  }
  return text;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char letter : text) {
    if (letter == '"' || letter == '\\') out += '\\';
    if (static_cast<unsigned char>(letter) >= 0x20) out += letter;
  }
  return out + "\"";
}

struct Row {
  std::string section;
  std::string subject;
  double median = -1;
  double beside = -1;  // what it is compared with
  double target = 0;   // of the ratio; 0: nothing is asked of it
  std::size_t samples = 0;
};

class Table {
 public:
  void section(const std::string& title, const std::string& beside) {
    section_ = title;
    std::printf("\n%-52s %11s %24s %7s\n", title.c_str(), "median", ("/ " + beside).c_str(),
                "target");
  }
  void add(const Subject& subject, double beside, double target = 0) {
    const Row row{section_, subject.title, median(subject.samples),
                  beside,   target,        subject.samples.size()};
    const double ratio = row.beside > 0 ? row.median / row.beside : -1;
    std::printf("  %-50s %11s", row.subject.c_str(), readable(row.median).c_str());
    if (ratio > 0) std::printf(" %24.2f", ratio);
    if (target > 0) std::printf(" %7.2f  %s", target, ratio <= target ? "reached" : "MISSED");
    std::printf("\n");
    std::fflush(stdout);
    rows_.push_back(row);
  }
  void idle(const std::vector<Idle>& all, double seconds) {
    std::printf("\n%-52s %11s %24s\n", "1,000 waiters, idle", "CPU / s", "context switches / s");
    for (const Idle& one : all) {
      std::printf("  %-50s %11s %24.2f\n", one.title.c_str(),
                  readable(one.effort.cpu_nanoseconds / seconds).c_str(),
                  one.effort.switches / seconds);
      idle_.push_back(
          {one.title, {one.effort.cpu_nanoseconds / seconds, one.effort.switches / seconds}});
    }
  }
  void write_json(const std::string& file, const Peers& peers) const {
    std::ofstream out(file);
    utsname machine{};
    ::uname(&machine);
    out << "{\n  \"machine\": "
        << quoted(std::string(machine.sysname) + " " + machine.release + " " + machine.machine)
        << ",\n  \"processors\": " << std::thread::hardware_concurrency() << ",\n  \"rows\": [";
    const char* separator = "\n";
    for (const Row& row : rows_) {
      out << separator << "    {\"section\": " << quoted(row.section)
          << ", \"subject\": " << quoted(row.subject) << ", \"median_ns\": " << row.median
          << ", \"samples\": " << row.samples;
      if (row.beside > 0) out << ", \"ratio\": " << row.median / row.beside;
      if (row.target > 0) out << ", \"target\": " << row.target;
      out << "}";
      separator = ",\n";
    }
    out << "\n  ],\n  \"idle\": [";
    separator = "\n";
    for (const Idle& one : idle_) {
      out << separator << "    {\"subject\": " << quoted(one.title)
          << ", \"cpu_ns_per_s\": " << one.effort.cpu_nanoseconds
          << ", \"context_switches_per_s\": " << one.effort.switches << "}";
      separator = ",\n";
    }
    out << "\n  ],\n  \"skipped\": [";
    separator = "\n";
    for (const std::string& line : peers.skipped) {
      out << separator << "    " << quoted(line);
      separator = ",\n";
    }
    out << "\n  ]\n}\n";
    if (!out.flush()) fail("writing " + file);
  }

 private:
  std::string section_;
  std::vector<Row> rows_;
  std::vector<Idle> idle_;
};

// ---- the subjects ----

Words ours(const char* subject, const char* how, int waiters = -1) {
  Words words{itself(), "--be", subject, how};
  if (waiters >= 0) words.push_back(std::to_string(waiters));
  return words;
}

std::vector<Subject> that_serve(const Peers& peers, int waiters) {
  std::vector<Subject> all{
      {"bare: self-pipe, _exit", ours("bare", "serve", waiters), {}},
      {"lastcall: run()", ours("lastcall", "serve", waiters), {}},
      {"std: sigwait, jthreads joined", ours("std", "serve", waiters), {}},
  };
  if (waiters > 0) {
    all[0].title = "bare: self-pipe, _exit, nobody told or joined";
    all[1].title = "lastcall: run(), tasks told and waited for";
    all.push_back({"lastcall: run(), threads told, not waited for",
                   ours("lastcall_threads", "serve", waiters),
                   {}});
    all.push_back({"bare: the same, but threads told by a condition",
                   ours("bare_woken", "serve", waiters),
                   {}});
  } else {
    // As many threads as a coordinator has; std tells and joins its own.
    all.push_back({"bare: with two more threads", ours("bare", "serve", 2), {}});
    all.push_back({"std: with two more threads", ours("std", "serve", 2), {}});
  }
  for (const char* const name : {"go", "tokio"}) {
    const auto program = peers.programs.find(name);
    if (program == peers.programs.end()) continue;
    all.push_back({name, {program->second, "serve", std::to_string(waiters)}, {}});
  }
  return all;
}

std::vector<Subject> that_await(const Peers& peers) {
  std::vector<Subject> all{
      {"bare self-pipe, read by the worker itself", ours("pipe", "await"), {}},
      {"bare futex hop (no signal)", ours("futex", "await"), {}, false},
      {"lastcall: worker waits on the coordinator's token", ours("lastcall", "await"), {}},
      {"bare self-pipe and futex hop, in one program", ours("pipe_and_futex", "await"), {}},
      {"lastcall: SignalTrap, waited for by the worker itself", ours("trap", "await"), {}},
      {"std: sigwait, condition_variable_any", ours("std", "await"), {}},
  };
  const std::pair<const char*, const char*> names[] = {{"asio", "Boost.Asio"},
                                                       {"libuv", "libuv"},
                                                       {"go", "Go"},
                                                       {"tokio", "tokio"},
                                                       {"signal_hook", "signal-hook"}};
  for (const auto& [name, title] : names) {
    const auto program = peers.programs.find(name);
    if (program != peers.programs.end()) all.push_back({title, {program->second, "await"}, {}});
  }
  return all;
}

void report_signals(Table& table, const std::vector<Subject>& subjects) {
  const double bare = median(subjects[0].samples) + median(subjects[1].samples);
  for (std::size_t i = 0; i < subjects.size(); ++i) table.add(subjects[i], bare, i == 2 ? 1.15 : 0);
}

struct Options {
  int rounds = 15;
  std::string peers;
  std::string json;
  std::string only;
};

int run(const Options& options) {
  const Peers peers = read_peers(options.peers);
  for (const std::string& line : peers.skipped) std::printf("%s\n", line.c_str());
  const auto wants = [&](const char* part) { return options.only.empty() || options.only == part; };
  std::vector<Subject> none = that_serve(peers, 0);
  std::vector<Subject> thousand = that_serve(peers, many);
  std::vector<Subject> one_processor = that_await(peers);
  std::vector<Subject> any_processor = that_await(peers);
  for (int round = 0; round < options.rounds; ++round) {
    if (wants("exit")) each_in_some_order(none, &measure_exit);
    if (wants("waiters")) each_in_some_order(thousand, &measure_exit_of_many);
    if (wants("signal")) {
      each_in_some_order(one_processor, &measure_await_pinned);
      each_in_some_order(any_processor, &measure_await);
    }
  }
  Table table;
  if (wants("exit")) {
    table.section("SIGTERM -> process reaped, no workers", "bare");
    const double bare = median(none[0].samples);
    for (std::size_t i = 0; i < none.size(); ++i) table.add(none[i], bare, i == 1 ? 1.3 : 0);
  }
  if (wants("waiters")) {
    table.section("SIGTERM -> process reaped, 1,000 threads waiting", "bare");
    const double bare = median(thousand[0].samples);
    for (std::size_t i = 0; i < thousand.size(); ++i) {
      table.add(thousand[i], bare, i == 1 ? 1.15 : 0);
    }
  }
  if (wants("signal")) {
    table.section("SIGTERM -> worker runs, all on one processor", "self-pipe + futex hop");
    report_signals(table, one_processor);
    table.section("SIGTERM -> worker runs, on any processor", "self-pipe + futex hop");
    report_signals(table, any_processor);
  }
  if (wants("idle")) {
    constexpr std::chrono::seconds span(3);
    table.idle(measure_idle(thousand, span), static_cast<double>(span.count()));
  }
  if (!options.json.empty()) table.write_json(options.json, peers);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const Words words(argv + 1, argv + argc);
  if (words.size() == 4 && words[0] == "--be" && words[2] == "serve") {
    return bench::serve(words[1], std::atoi(words[3].c_str()));
  }
  if (words.size() == 3 && words[0] == "--be" && words[2] == "await") return bench::await(words[1]);
  Options options;
  for (const std::string& word : words) {
    const auto value = [&](const char* key) -> std::optional<std::string> {
      if (word.rfind(key, 0) != 0) return std::nullopt;
      return word.substr(std::strlen(key));
    };
    if (const auto given = value("--rounds=")) {
      options.rounds = std::max(1, std::atoi(given->c_str()));
    } else if (const auto file = value("--peers=")) {
      options.peers = *file;
    } else if (const auto json = value("--json=")) {
      options.json = *json;
    } else if (const auto only = value("--only=")) {
      options.only = *only;
    } else {
      fail("what is " + word + "?");
    }
  }
  return run(options);
}
