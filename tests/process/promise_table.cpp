// The promise, put to the test: whatever user code does, the process is gone within its grace period and
// 100 ms, with the right exit code, and whoever hung is named.
//
//   promise_table                        each adversary once, with patience for a busy machine
//   promise_table --runs 20 --strict     the long form: 100 ms and not one more
//   promise_table --only worker          those whose names begin with it
//
// Each adversary is a process of its own: this program, executed again. The clock runs from the request
// (just before kill(2), or when the adversary says that it asks) until waitid(2) has seen it gone.
#include "../support/emulation.hpp"
#include "promise/adversary.hpp"

#include <lastcall/signal_info.hpp>

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace promise {
namespace {

using lastcall::Clock;

// ---- the adversary's side ----------------------------------------------------------------------

int tell_fd = -1;
std::atomic<bool> told_ready{false};

struct Note {
  char what = 'r';  // ready, or 'q': requested
  Clock::rep when = 0;
};

void tell(char what) noexcept {
  const Note note{what, Clock::now().time_since_epoch().count()};
  static_cast<void>(::write(tell_fd, &note, sizeof note) < 0);
}

int play(const Adversary& adversary, milliseconds grace, int fd) {
  tell_fd = fd;
  ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  Stand stand(grace);
  adversary.body(stand);
  return 99;  // it was to end in another way
}

// ---- one run, as the table sees it -----------------------------------------------------------------

struct Run {
  std::string how;
  Clock::duration took{};
  bool was_asked = false;
  std::string out;
  std::string err;
};

class Fd {
 public:
  explicit Fd(int fd = -1) noexcept : fd_(fd) {}
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() { close(); }
  int get() const noexcept { return fd_; }
  void reset(int fd) noexcept {
    close();
    fd_ = fd;
  }
  void close() noexcept {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

 private:
  int fd_;
};

struct Pipe {
  Fd read_end;
  Fd write_end;
  Pipe() {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) std::perror("pipe2"), std::exit(2);
    read_end.reset(ends[0]);
    write_end.reset(ends[1]);
    ::fcntl(ends[0], F_SETFL, O_NONBLOCK);
  }
  void fill() const {
    const int flags = ::fcntl(write_end.get(), F_GETFL);
    ::fcntl(write_end.get(), F_SETFL, flags | O_NONBLOCK);
    const char filling[512] = {};
    while (::write(write_end.get(), filling, sizeof filling) > 0) {
    }
    while (::write(write_end.get(), filling, 1) > 0) {
    }
    ::fcntl(write_end.get(), F_SETFL, flags);
  }
  void read_into(std::string& text) const {
    char buffer[16384];
    for (;;) {
      const ssize_t got = ::read(read_end.get(), buffer, sizeof buffer);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) return;
      text.append(buffer, static_cast<std::size_t>(got));
    }
  }
};

std::string in_words(const siginfo_t& info) {
  if (info.si_code == CLD_EXITED) return "exit " + std::to_string(info.si_status);
  return std::string(lastcall::signal_name(info.si_status));
}

// Only what is async-signal-safe: the table has threads.
[[noreturn]] void become(const char* const* argv, const int* fds) noexcept {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  for (int number = 1; number < 32; ++number) ::signal(number, SIG_DFL);
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  // Away from the numbers that they get, in whatever order they came.
  int safe[4];
  for (int i = 0; i < 4; ++i) safe[i] = ::fcntl(fds[i], F_DUPFD_CLOEXEC, 10);
  for (int i = 0; i < 4; ++i) ::dup2(safe[i], i);
  ::execv(argv[0], const_cast<char* const*>(argv));
  ::_exit(126);
}

class Trial {
 public:
  Trial(const Adversary& adversary, milliseconds grace) : adversary_(adversary), grace_(grace) {}

  Run run() {
    const std::string grace = std::to_string(grace_.count());
    const std::vector<std::string> words =
        support::this_program({"--adversary", adversary_.name, "--grace", grace});
    std::vector<const char*> argv;
    for (const std::string& word : words) argv.push_back(word.c_str());
    argv.push_back(nullptr);
    if (adversary_.streams == Streams::unread) {
      out_.fill();
      err_.fill();
    }
    const int fds[] = {null_.get(), out_.write_end.get(), err_.write_end.get(),
                       tell_.write_end.get()};
    child_ = ::fork();
    if (child_ < 0) std::perror("fork"), std::exit(2);
    if (child_ == 0) become(argv.data(), fds);
    out_.write_end.close();
    err_.write_end.close();
    tell_.write_end.close();
    handle_.reset(static_cast<int>(::syscall(SYS_pidfd_open, child_, 0)));

    Run result;
    Target target(child_, grace_);
    if (watch(result, Clock::now() + 30s, true)) {
      const timespec moment{0, 20'000'000};  // from "in a moment" to being in it
      ::nanosleep(&moment, nullptr);
      adversary_.provoke(target);
      const bool gone = watch(result, Clock::now() + grace_ + adversary_.extra + 20s, false);
      const Clock::time_point end = Clock::now();
      if (!gone) result.how = "still there";
      read_notes();
      result.was_asked = true;
      result.took = end - std::min(target.begin(), requested_);
    } else {
      result.how = "never ready";
    }
    ::kill(child_, SIGKILL);
    siginfo_t info{};
    while (::waitid(P_PID, static_cast<id_t>(child_), &info, WEXITED) != 0 && errno == EINTR) {
    }
    if (result.how.empty()) result.how = in_words(info);
    if (adversary_.clean_up != nullptr) adversary_.clean_up(child_);
    if (adversary_.streams == Streams::read) {
      out_.read_into(result.out);
      err_.read_into(result.err);
    }
    return result;
  }

 private:
  // Reads what it writes until it is gone, or until it is ready. False: the time was up before that.
  bool watch(Run& result, Clock::time_point until, bool for_ready) {
    const bool reads = adversary_.streams == Streams::read;
    for (;;) {
      if (for_ready && ready_) return true;
      const auto left = std::chrono::ceil<milliseconds>(until - Clock::now()).count();
      if (left <= 0) return false;
      pollfd all[] = {{handle_.get(), POLLIN, 0},
                      {tell_.read_end.get(), POLLIN, 0},
                      {reads ? out_.read_end.get() : -1, POLLIN, 0},
                      {reads ? err_.read_end.get() : -1, POLLIN, 0}};
      if (told_all_) all[1].fd = -1;
      if (out_over_) all[2].fd = -1;
      if (err_over_) all[3].fd = -1;
      if (::poll(all, 4, static_cast<int>(left)) < 0) continue;
      if ((all[0].revents & POLLIN) != 0) return !for_ready;
      if (all[1].revents != 0) read_notes();
      if (all[2].revents != 0) out_.read_into(result.out);
      if (all[3].revents != 0) err_.read_into(result.err);
      // A hang-up stays; there may be more to read before it, which is read at the end.
      told_all_ = told_all_ || (all[1].revents & (POLLIN | POLLHUP)) == POLLHUP;
      out_over_ = out_over_ || (all[2].revents & (POLLIN | POLLHUP)) == POLLHUP;
      err_over_ = err_over_ || (all[3].revents & (POLLIN | POLLHUP)) == POLLHUP;
    }
  }

  void read_notes() {
    Note note;
    while (::read(tell_.read_end.get(), &note, sizeof note) == sizeof note) {
      if (note.what == 'r') ready_ = true;
      if (note.what == 'q' && requested_ == Clock::time_point::max()) {
        requested_ = Clock::time_point(Clock::duration(note.when));
      }
    }
  }

  const Adversary& adversary_;
  const milliseconds grace_;
  const Fd null_{::open("/dev/null", O_RDONLY | O_CLOEXEC)};
  Pipe out_;
  Pipe err_;
  Pipe tell_;
  Fd handle_;
  pid_t child_ = -1;
  bool ready_ = false;
  bool told_all_ = false;
  bool out_over_ = false;
  bool err_over_ = false;
  Clock::time_point requested_ = Clock::time_point::max();
};

// ---- the table -------------------------------------------------------------------------------------

struct Options {
  int runs = 1;
  unsigned jobs = 1;
  milliseconds grace{600};
  bool strict = false;
  bool list = false;
  bool verbose = false;
  std::string only;
  std::string adversary;
};

struct Row {
  const Adversary* adversary = nullptr;
  int runs = 0;
  Clock::duration worst{};
  std::string how;     // the first one that was wrong, else the right one
  std::string unsaid;  // what was missing on stderr
  std::string complaint;
};

milliseconds bound_of(const Adversary& adversary, const Options& options) {
  return adversary.bound == Bound::grace ? options.grace : 0ms;
}

void judge(Row& row, const Run& run, const Options& options) {
  const Adversary& adversary = *row.adversary;
  ++row.runs;
  row.worst = std::max(row.worst, run.took);
  std::string wrong;
  if (run.how != adversary.how) {
    wrong = "ended by " + run.how + " instead of " + adversary.how;
  } else if (row.how.empty()) {
    row.how = run.how;
  }
  for (const std::string& words : adversary.says) {
    if (run.err.find(words) != std::string::npos) continue;
    if (row.unsaid.empty()) row.unsaid = words;
    if (wrong.empty()) wrong = "'" + words + "' is not on its stderr";
  }
  milliseconds limit = bound_of(adversary, options) + 100ms + adversary.extra;
  if (!options.strict) limit += sanitized ? 8000ms : 1500ms;
  if (wrong.empty() && run.took > limit) {
    wrong = "it took " + std::to_string(std::chrono::ceil<milliseconds>(run.took).count()) + " ms";
  }
  if (!wrong.empty() && row.complaint.empty()) {
    row.how = run.how;
    row.complaint = wrong + "\n---- its stdout\n" + run.out.substr(0, 4000) + "---- its stderr\n" +
                    run.err.substr(0, 6000) + "----\n";
  }
}

std::string padded(std::string text, std::size_t width, bool right = false) {
  const std::size_t blanks = text.size() < width ? width - text.size() : 0;
  return right ? std::string(blanks, ' ') + text : text + std::string(blanks, ' ');
}

void print_row(const Row& row, const Options& options) {
  const Adversary& adversary = *row.adversary;
  const milliseconds bound = bound_of(adversary, options) + adversary.extra;
  const auto worst = std::chrono::ceil<milliseconds>(row.worst);
  const auto over = std::max(worst - bound, milliseconds(0));
  std::string named = adversary.says.empty() ? "-" : row.unsaid.empty() ? "yes" : "NO";
  std::printf("%s %s %s %s  %s %s%s\n", padded(adversary.name, 34).c_str(),
              padded(std::to_string((bound + 100ms).count()), 8, true).c_str(),
              padded(std::to_string(worst.count()), 8, true).c_str(),
              padded(std::to_string(over.count()), 9, true).c_str(), padded(row.how, 12).c_str(),
              padded(named, 6).c_str(), row.complaint.empty() ? "" : "  FAILED");
}

int run_table(std::vector<Adversary>& all, const Options& options) {
  std::vector<Row> rows;
  std::vector<std::string> left_out;
  for (const Adversary& adversary : all) {
    if (adversary.name.compare(0, options.only.size(), options.only) != 0) continue;
    if (adversary.needs.long_form && options.runs < 20 && options.only.empty()) continue;
    if ((sanitized && adversary.needs.plain_build) ||
        (!support::emulator.empty() && adversary.needs.own_kernel)) {
      left_out.push_back(adversary.name);
      continue;
    }
    Row row;
    row.adversary = &adversary;
    rows.push_back(row);
  }
  std::mutex mutex;
  std::size_t next = 0;
  const std::size_t total = rows.size() * static_cast<std::size_t>(options.runs);
  const auto work = [&] {
    for (;;) {
      Row* row = nullptr;
      {
        const std::lock_guard<std::mutex> lock(mutex);
        if (next == total) return;
        row = &rows[next++ % rows.size()];
      }
      Trial trial(*row->adversary, options.grace);
      const Run run = trial.run();
      const std::lock_guard<std::mutex> lock(mutex);
      judge(*row, run, options);
      if (options.verbose)
        std::fprintf(stderr, "%s: %s\n%s\n", row->adversary->name.c_str(), run.how.c_str(),
                     run.err.c_str());
    }
  };
  std::vector<std::thread> workers;
  for (unsigned i = 1; i < options.jobs; ++i) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();

  std::printf("%s %s %s %s  %s %s\n", padded("adversary", 34).c_str(),
              padded("bound/ms", 8, true).c_str(), padded("worst/ms", 8, true).c_str(),
              padded("over/ms", 9, true).c_str(), padded("ended by", 12).c_str(), "named");
  bool all_well = true;
  Clock::duration worst_over{};
  for (const Row& row : rows) {
    print_row(row, options);
    all_well = all_well && row.complaint.empty();
    worst_over =
        std::max(worst_over, row.worst - bound_of(*row.adversary, options) - row.adversary->extra);
  }
  std::printf(
      "%zu adversaries, %d run%s each; bound: the grace period of %lld ms (or at once) and 100 ms; "
      "worst overshoot %lld ms\n",
      rows.size(), options.runs, options.runs == 1 ? "" : "s",
      static_cast<long long>(options.grace.count()),
      static_cast<long long>(std::chrono::ceil<milliseconds>(worst_over).count()));
  for (const std::string& name : left_out)
    std::printf("left out in this build: %s\n", name.c_str());
  for (const Row& row : rows) {
    if (!row.complaint.empty()) {
      std::printf("\n%s: %s", row.adversary->name.c_str(), row.complaint.c_str());
    }
  }
  return all_well ? 0 : 1;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int at = 1; at < argc; ++at) {
    const std::string_view word = argv[at];
    const auto value = [&]() -> const char* {
      if (++at < argc) return argv[at];
      std::fprintf(stderr, "%s wants a value\n", argv[at - 1]);
      std::exit(2);
    };
    if (word == "--runs") {
      options.runs = std::max(1, std::atoi(value()));
    } else if (word == "--jobs") {
      options.jobs = static_cast<unsigned>(std::max(1, std::atoi(value())));
    } else if (word == "--grace") {
      options.grace = milliseconds(std::atoi(value()));
    } else if (word == "--only") {
      options.only = value();
    } else if (word == "--adversary") {
      options.adversary = value();
    } else if (word == "--strict") {
      options.strict = true;
    } else if (word == "--list") {
      options.list = true;
    } else if (word == "--verbose") {
      options.verbose = true;
    } else {
      std::fprintf(stderr, "promise_table: no such option: %s\n", argv[at]);
      std::exit(2);
    }
  }
  return options;
}

}  // namespace

void Stand::ready() const noexcept {
  if (!told_ready.exchange(true)) tell('r');
}
void Stand::requested() const noexcept { tell('q'); }

void Target::send(int number) {
  if (begin_ == Clock::time_point::max()) begin_ = Clock::now();
  ::kill(process_, number);
}
void Target::poke(int number) const { ::kill(process_, number); }
void Target::wait(milliseconds span) const { std::this_thread::sleep_for(span); }

}  // namespace promise

int main(int argc, char** argv) {
  using namespace promise;
  const Options options = parse(argc, argv);
  std::vector<Adversary> all;
  add_workers(all);
  add_user_code(all);
  add_locks(all);
  add_memory(all);
  add_process_wide(all);
  add_inside(all);
  if (!options.adversary.empty()) {
    for (const Adversary& adversary : all) {
      if (adversary.name == options.adversary) return play(adversary, options.grace, 3);
    }
    std::fprintf(stderr, "no such adversary: %s\n", options.adversary.c_str());
    return 98;
  }
  if (options.list) {
    for (const Adversary& adversary : all) {
      if (adversary.name.compare(0, options.only.size(), options.only) == 0) {
        std::printf("%s\n", adversary.name.c_str());
      }
    }
    return 0;
  }
  ::signal(SIGPIPE, SIG_IGN);
  return run_table(all, options);
}
