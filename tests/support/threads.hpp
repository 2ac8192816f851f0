// What tests of blocking code need: bounded waiting, gates, a look at what a thread is doing, threads
// with a small stack, processes. Nothing here asserts: it reports, and the test's main thread checks.
#pragma once

#include <lastcall/detail/config.hpp>

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <dirent.h>
#include <sys/syscall.h>
#endif

namespace support {

using namespace std::chrono_literals;

#if defined(LASTCALL_TSAN)
inline constexpr bool under_tsan = true;
#else
inline constexpr bool under_tsan = false;
#endif
#if defined(LASTCALL_ASAN)
inline constexpr bool under_asan = true;
#else
inline constexpr bool under_asan = false;
#endif
inline constexpr bool under_sanitizer = under_tsan || under_asan;

/// Upper bound of every wait in a test: only a broken library ever takes this long.
inline constexpr std::chrono::seconds patience{60};

/// Waits until `condition()` holds; false if it doesn't within `limit`.
template <class Condition>
bool eventually(Condition condition, std::chrono::milliseconds limit = patience) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(500us);
  }
  return true;
}

/// A door that threads wait at until somebody opens it.
class Gate {
 public:
  void open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  /// True if it was opened, false if patience ran out.
  bool wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, patience, [this] { return open_; });
  }
  bool is_open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return open_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

/// Lets a known number of threads go at nearly the same instant, again and again.
class StartingLine {
 public:
  explicit StartingLine(int runners) : runners_(runners) {}
  void ready_steady_go() {
    const int round = round_.load();
    if (arrived_.fetch_add(1) + 1 == runners_) {
      arrived_.store(0);
      round_.fetch_add(1);
      return;
    }
    while (round_.load() == round) std::this_thread::yield();
  }

 private:
  const int runners_;
  std::atomic<int> arrived_{0};
  std::atomic<int> round_{0};
};

inline pid_t thread_id() {
#if defined(__linux__)
  return static_cast<pid_t>(::syscall(SYS_gettid));
#else
  return 0;
#endif
}

/// Whether the kernel says that this thread of the process sleeps. Unknown platforms: always false.
inline bool is_asleep(pid_t thread) {
#if defined(__linux__)
  char path[64];
  std::snprintf(path, sizeof path, "/proc/self/task/%d/stat", static_cast<int>(thread));
  std::FILE* file = std::fopen(path, "re");
  if (file == nullptr) return false;
  char line[512] = {};
  const std::size_t got = std::fread(line, 1, sizeof line - 1, file);
  std::fclose(file);
  if (got == 0) return false;
  const char* after_name = std::strrchr(line, ')');
  return after_name != nullptr && after_name[1] == ' ' && after_name[2] == 'S';
#else
  static_cast<void>(thread);
  return false;
#endif
}

/// Gives a thread that ought to block the time to do so: until it has been asleep several looks in a
/// row, or `done`, or a short while. A test's verdict never hangs on the outcome; this only makes
/// sure that a library that fails to block gets the chance to show it.
template <class Done>
void let_it_block(const std::atomic<pid_t>& thread, Done done) {
  const auto end = std::chrono::steady_clock::now() + 2s;
  int asleep = 0;
  while (asleep < 5 && !done() && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(1ms);
    asleep = thread.load() != 0 && is_asleep(thread.load()) ? asleep + 1 : 0;
  }
}
inline void let_it_block(const std::atomic<pid_t>& thread) {
  let_it_block(thread, [] { return false; });
}

/// How many threads the process has; -1 where nobody tells. A thread is still listed for a moment after
/// it can be joined, for a longer one in an emulator.
inline int live_threads() {
#if defined(__linux__)
#if defined(LASTCALL_TSAN)
  // ThreadSanitizer starts one of its own with the first of the program's.
  static const bool started = (std::thread([] {}).join(), true);
  static_cast<void>(started);
#endif
  int count = 0;
  DIR* directory = ::opendir("/proc/self/task");
  if (directory == nullptr) return -1;
  while (const dirent* entry = ::readdir(directory)) {
    if (entry->d_name[0] != '.') ++count;
  }
  ::closedir(directory);
  return count;
#else
  return -1;
#endif
}

/// How many descriptors the process has open.
inline int open_descriptors() {
  int count = 0;
  for (int fd = 0; fd < 4096; ++fd) {
    if (::fcntl(fd, F_GETFD) != -1) ++count;
  }
  return count;
}

/// Whether poll(2) reports POLLIN, within `milliseconds`.
inline bool is_readable(int fd, int milliseconds = 0) {
  pollfd entry{fd, POLLIN, 0};
  int got = 0;
  do {
    got = ::poll(&entry, 1, milliseconds);
  } while (got < 0 && errno == EINTR);
  return got == 1 && (entry.revents & POLLIN) != 0;
}

/// Resident pages of the process in bytes; 0 where nobody tells.
inline std::size_t resident_bytes() {
  std::size_t total = 0;
  std::size_t resident = 0;
  if (std::FILE* file = std::fopen("/proc/self/statm", "re")) {
    if (std::fscanf(file, "%zu %zu", &total, &resident) != 2) resident = 0;
    std::fclose(file);
  }
  return resident * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

inline std::chrono::nanoseconds cpu_time_of_process() {
  timespec spent{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &spent);
  return std::chrono::seconds(spent.tv_sec) + std::chrono::nanoseconds(spent.tv_nsec);
}

/// Runs `body` on a thread whose stack has `bytes` bytes, and waits for it. False: no such thread.
template <class Body>
bool on_stack_of(std::size_t bytes, Body body) {
  pthread_attr_t attributes;
  if (::pthread_attr_init(&attributes) != 0) return false;
  bool made = ::pthread_attr_setstacksize(&attributes, bytes) == 0;
  pthread_t thread{};
  if (made) {
    made = ::pthread_create(
               &thread, &attributes,
               [](void* argument) -> void* {
                 (*static_cast<Body*>(argument))();
                 return nullptr;
               },
               &body) == 0;
  }
  ::pthread_attr_destroy(&attributes);
  if (made) ::pthread_join(thread, nullptr);
  return made;
}

/// How a process ended: its exit code, or 128 + the signal that killed it, or -1 if it had to be
/// killed because patience ran out.
inline int outcome_of(pid_t process) {
  int status = 0;
  const bool over = eventually([&] { return ::waitpid(process, &status, WNOHANG) == process; });
  if (!over) {
    ::kill(process, SIGKILL);
    ::waitpid(process, &status, 0);
    return -1;
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/// Forks, runs `body` in the child, which leaves with the code that it returns.
template <class Body>
int in_child_process(Body body) {
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child < 0) return -2;
  if (child == 0) ::_exit(body());
  return outcome_of(child);
}

/// Threads that are joined at the end of the scope, whatever happens in it.
class Threads {
 public:
  template <class Body>
  void start(Body body) {
    threads_.emplace_back(std::move(body));
  }
  void join() {
    for (std::thread& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
    threads_.clear();
  }
  ~Threads() { join(); }

 private:
  std::vector<std::thread> threads_;
};

/// A small, good enough generator: the same numbers everywhere for one seed.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2654435769U + 88172645463325252U) {}
  std::uint64_t next() {
    state_ ^= state_ << 13U;
    state_ ^= state_ >> 7U;
    state_ ^= state_ << 17U;
    return state_;
  }
  /// From 0 to `bound` - 1.
  std::size_t below(std::size_t bound) {
    return static_cast<std::size_t>((next() >> 11U) % static_cast<std::uint64_t>(bound));
  }
  bool one_in(std::size_t n) { return below(n) == 0; }

 private:
  std::uint64_t state_;
};

}  // namespace support
