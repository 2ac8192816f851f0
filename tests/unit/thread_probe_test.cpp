#include <lastcall/detail/stack_capture.hpp>
#include <lastcall/detail/thread_probe.hpp>

#include "../support/catch.hpp"
#include "../support/emulation.hpp"
#include "../support/threads.hpp"

#include <lastcall/detail/posix.hpp>

#include <dlfcn.h>
#include <poll.h>
#include <pthread.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <sched.h>
#include <sys/syscall.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace detail = lastcall::detail;
using lastcall::Clock;
using support::eventually;
using namespace std::chrono_literals;

// Blocks in read(2) with a frame that has a name; returns the letter read, or a negative errno. TSan puts a
// signal off until read() is over, but not while its thread sleeps.
extern "C" [[gnu::noinline]] int lastcall_test_waits_here(int fd) {
  if (support::under_tsan) {
    const timespec nap{0, 2'000'000};
    pollfd entry{fd, POLLIN, 0};
    while (::poll(&entry, 1, 0) == 0) ::nanosleep(&nap, nullptr);
  }
  char letter = 0;
  return ::read(fd, &letter, 1) < 0 ? -errno : letter;
}

namespace {

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

/// A thread that does `body` and whose kernel id is known.
class Subject {
 public:
  template <class Body>
  explicit Subject(Body body)
      : thread_([this, body] {
          id_ = support::thread_id();
          body();
        }) {
    eventually([this] { return id_.load() != 0; });
  }
  Subject(const Subject&) = delete;
  Subject& operator=(const Subject&) = delete;
  ~Subject() { join(); }
  void join() {
    if (thread_.joinable()) thread_.join();
  }
  pid_t id() const { return id_; }
  pthread_t handle() { return thread_.native_handle(); }
  /// What it waits in, once that is `wanted`; else what it was last.
  std::string waits_in(std::string_view wanted) const {
    std::string last;
    eventually([&] { return contains(last = detail::waiting_in(id_), wanted); }, 10s);
    return last;
  }

 private:
  std::atomic<pid_t> id_{0};
  std::thread thread_;
};

/// A thread that waits in lastcall_test_waits_here until it is sent a letter, or the test is over.
class Reader {
 public:
  enum class Signals { open, blocked };
  explicit Reader(Signals signals = Signals::open) {
    int ends[2] = {-1, -1};
    if (::pipe(ends) != 0) ::abort();
    read_end_ = ends[0];
    write_end_ = ends[1];
    subject_ = std::make_unique<Subject>([this, signals] {
      std::optional<detail::BlockAllSignals> block;
      if (signals == Signals::blocked) block.emplace();
      got_ = lastcall_test_waits_here(read_end_);
    });
    waits_in();
  }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  ~Reader() {
    finish();
    ::close(read_end_);
  }
  pid_t id() const { return subject_->id(); }
  pthread_t handle() { return subject_->handle(); }
  int descriptor() const { return read_end_; }
  std::string waits_in() const {
    return subject_->waits_in(support::under_tsan ? "nanosleep" : support::told_of_read);
  }
  /// Sends it a letter and returns the one it got.
  int send(char letter) {
    if (::write(write_end_, &letter, 1) != 1) ::abort();
    subject_->join();
    return got_;
  }
  void finish() {
    if (write_end_ >= 0) ::close(write_end_);
    write_end_ = -1;
    subject_->join();
  }

 private:
  int read_end_ = -1;
  int write_end_ = -1;
  std::atomic<int> got_{0};
  std::unique_ptr<Subject> subject_;
};

std::vector<std::string> stack_of(pid_t thread, Clock::duration budget = 10s) {
  return detail::capture_stacks(std::span<const pid_t>(&thread, 1), budget).at(0);
}

bool mentions(const std::vector<std::string>& stack, std::string_view part) {
  return std::any_of(stack.begin(), stack.end(),
                     [&](const std::string& frame) { return contains(frame, part); });
}

}  // namespace

#if LASTCALL_LINUX

TEST_CASE("waiting_in names the system call and its descriptor") {
  SECTION("read") {
    const Reader reader;
    if (!support::under_tsan) CHECK(support::tells_read(reader.waits_in(), reader.descriptor()));
  }
  SECTION("recvfrom") {
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    Subject subject([&] {
      char letter = 0;
      while (::recv(ends[0], &letter, 1, 0) < 0) {
      }
    });
    CHECK(subject.waits_in("recvfrom") == "recvfrom(" + std::to_string(ends[0]) + ")");
    ::shutdown(ends[1], SHUT_RDWR);
    subject.join();
    ::close(ends[0]);
    ::close(ends[1]);
  }
  SECTION("poll") {
    int ends[2];
    REQUIRE(::pipe(ends) == 0);
    Subject subject([&] { support::is_readable(ends[0], -1); });
    const std::string said = subject.waits_in("poll");
    CHECK((said == "poll" || said == "ppoll"));
    ::close(ends[1]);
    subject.join();
    ::close(ends[0]);
  }
  SECTION("a mutex") {
    std::mutex mutex;
    mutex.lock();
    Subject subject([&] { const std::lock_guard<std::mutex> lock(mutex); });
    CHECK(subject.waits_in("futex") == "futex");
    mutex.unlock();
  }
  SECTION("a sleep") {
    std::atomic<bool> over{false};
    Subject subject([&] {
      while (!over) std::this_thread::sleep_for(20ms);
    });
    CHECK(contains(subject.waits_in("nanosleep"), "nanosleep"));
    over = true;
  }
}

TEST_CASE("waiting_in says of a thread that spins how much CPU time it has had") {
  std::atomic<bool> over{false};
  Subject subject([&] {
    while (!over.load(std::memory_order_relaxed)) {
    }
  });
  const std::string said = subject.waits_in("running (0.1");
  over = true;
  CHECK(contains(said, "running (0.1"));
  CHECK(contains(said, " s CPU)"));
}

TEST_CASE("waiting_in says of the calling thread that it runs, and of one that isn't there, gone") {
  CHECK(contains(detail::waiting_in(support::thread_id()), "running ("));
  pid_t id = 0;
  {
    Subject subject([] {});
    id = subject.id();
  }
  // Joined is a moment earlier than gone.
  CHECK(eventually([&] { return detail::waiting_in(id) == "gone"; }));
  CHECK(detail::thread_name(id).empty());
  CHECK(eventually([&] { return stack_of(id).empty(); }));
}

TEST_CASE("waiting_in says of a main thread that has left alone that it is gone") {
  const int code = support::in_child_process([] {
    const pid_t main_thread = ::getpid();
    std::thread([main_thread] {
      const bool gone = eventually([&] { return detail::waiting_in(main_thread) == "gone"; }, 10s);
      ::_exit(gone ? 0 : 1);
    }).detach();
    ::syscall(SYS_exit, 0);  // what pthread_exit ends in, without unwinding this test
    return 2;
  });
  CHECK(code == 0);
}

TEST_CASE("waiting_in sees through vfork, which looks uninterruptible") {
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  Subject subject([&] {
    // The parent is held until the child, which borrows its memory, has gone.
    const pid_t child = ::vfork();
    if (child == 0) {
      char letter = 0;
      ::_exit(::read(ends[0], &letter, 1) == 1 ? 0 : 1);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
  });
  // TSan turns vfork into fork.
  const std::string call = support::under_tsan ? "wait4" : "vfork";
  CHECK(contains(subject.waits_in(call), call));
  // A thread that can't be interrupted has no stack, and costs no more than the budget.
  const auto begin = Clock::now();
  const std::vector<std::string> stack = stack_of(subject.id(), 50ms);
  CHECK(Clock::now() - begin < 5s);
  if (!support::under_tsan) CHECK(stack.empty());
  CHECK(::write(ends[1], "x", 1) == 1);
  subject.join();
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST_CASE("thread_name is the kernel's name of the thread, whatever bytes are in it") {
  Reader reader;
  const std::string name = "a)b (c\n\xFF 12345";
  REQUIRE(::pthread_setname_np(reader.handle(), name.c_str()) == 0);
  CHECK(detail::thread_name(reader.id()) == name);
  CHECK(!reader.waits_in().empty());
}

TEST_CASE("The functions for the last words stay inside their buffer and keep errno") {
  const Reader reader;
  char buffer[8];
  std::fill(std::begin(buffer), std::end(buffer), '#');
  errno = 77;
  CHECK(detail::waiting_in(reader.id(), buffer, 3) == 3);
  CHECK(buffer[3] == '#');
  CHECK(detail::thread_name(reader.id(), buffer, 0) == 0);
  CHECK(detail::waiting_in(999'999'999, buffer, sizeof buffer) == 4);
  CHECK(errno == 77);
}

TEST_CASE("An emulator's kernel, which has other numbers of system calls, is told by them") {
  const std::string read = std::to_string(SYS_read);
  CHECK(!detail::tells_other_numbers(read + " 0x5 0x7ffd0 0x100 0x0 0x0 0x0 0x7ffd8 0x7f14\n"));
  CHECK(detail::tells_other_numbers(std::to_string(SYS_read + 1) + " 0x5 0x7ffd0\n"));
  CHECK(detail::tells_other_numbers("1" + read + " 0x5 0x7ffd0\n"));
  // It doesn't tell.
  CHECK(!detail::tells_other_numbers("running\n"));
  CHECK(!detail::tells_other_numbers("-1 0x7ffd8 0x7f14\n"));
  CHECK(!detail::tells_other_numbers(""));
  CHECK(detail::kernel_has_our_numbers() == support::emulator.empty());
}

TEST_CASE("A system call is known by its name on this architecture, or by its number") {
  CHECK(detail::find_syscall(SYS_read)->name == "read");
  CHECK(detail::find_syscall(SYS_futex)->name == "futex");
  CHECK(detail::find_syscall(SYS_openat)->takes_descriptor);
  CHECK(detail::find_syscall(-1) == nullptr);
  CHECK(detail::find_syscall(100'000) == nullptr);
}

TEST_CASE("A system call's number is read from what its macro stands for") {
  const auto number = [](const std::string& text) { return detail::syscall_number(text); };
  CHECK(number("0") == 0);
  CHECK(number("42") == 42);
  CHECK(number("(90+17)") == 107);
  CHECK(number("(0x40000000 + 520)") == 0x40000000 + 520);
  CHECK(number("0xf0a + 1 + 0x10") == 0xf0a + 1 + 0x10);
  CHECK(number("SYS_none") == -1);
  CHECK(number("12f") == -1);
  CHECK(number("x10") == -1);
  CHECK(number("1x0") == -1);
  CHECK(number("0x1g") == -1);
}

#if LASTCALL_HAS_STACKS

namespace {

std::string own_module() { return std::string(::program_invocation_short_name) + "+0x"; }

std::string place_of_this_function() {
  // The name if the test was linked with -rdynamic, else the place in the module.
  return ::dlsym(RTLD_DEFAULT, "lastcall_test_waits_here") != nullptr
             ? "lastcall_test_waits_here+0x"
             : own_module();
}

void set_handler(int number, void (*handler)(int)) {
  struct sigaction action {};
  action.sa_handler = handler;
  ::sigaction(number, &action, nullptr);
}
void (*handler_of(int number))(int) {
  struct sigaction action {};
  ::sigaction(number, nullptr, &action);
  return action.sa_handler;
}

/// Puts back what was there.
class KeepDisposition {
 public:
  explicit KeepDisposition(int number) : number_(number) { ::sigaction(number, nullptr, &before_); }
  KeepDisposition(const KeepDisposition&) = delete;
  KeepDisposition& operator=(const KeepDisposition&) = delete;
  ~KeepDisposition() { ::sigaction(number_, &before_, nullptr); }

 private:
  int number_;
  struct sigaction before_ {};
};

std::atomic<int> own_handler_calls{0};
void own_handler(int) { ++own_handler_calls; }

}  // namespace

TEST_CASE("A blocked thread's stack begins where it is, and names who called") {
  detail::warm_up_stack_capture();
  Reader reader;
  const std::vector<std::string> stack = stack_of(reader.id());
  std::string all;
  for (const std::string& frame : stack) all += frame + "\n";
  INFO(all);
  REQUIRE(stack.size() >= 3);
  CHECK((support::under_tsan ? contains(stack[0], "nanosleep") : support::is_in_read(stack[0])));
  CHECK(mentions(stack, place_of_this_function()));
  CHECK(!mentions(stack, "on_probe"));
  CHECK(!mentions(stack, "Unwind"));
  // The call went on as if nothing had been: no EINTR.
  CHECK(reader.send('x') == 'x');
}

TEST_CASE("A stack begins with the first function of libc that has a name") {
  using Frames = std::vector<std::string>;
  const auto dropped = [](Frames frames) {
    detail::drop_nameless_libc(frames);
    return frames;
  };
  const Frames named = {"read+0x16 (libc.so.6+0x103de5)", "service+0x20839"};
  CHECK(dropped({"libc.so.6+0x9a72c", "libc.so.6+0x8f387", named[0], named[1]}) == named);
  CHECK(dropped(named) == named);
  // What has no name and is not libc's says where the user's code is.
  const Frames own = {"service+0x1c", "read+0x16 (libc.so.6+0x103de5)"};
  CHECK(dropped(own) == own);
  const Frames nameless = {"libc.so.6+0x9a72c", "service+0x20839"};
  CHECK(dropped(nameless) == nameless);
  const Frames libc_only = {"libc.so.6+0x9a72c"};
  CHECK(dropped(libc_only) == libc_only);
  CHECK(dropped({}).empty());
}

TEST_CASE("A spinning thread has a stack, and its errno is its own") {
  std::atomic<bool> over{false};
  std::atomic<int> changed{0};
  Subject subject([&] {
    errno = 77;
    while (!over.load(std::memory_order_relaxed)) {
      // A sanitizer that puts signals off needs a call that it knows.
      if (support::under_tsan) ::sched_yield();
      if (errno != 77) ++changed;
    }
  });
  for (int round = 0; round < 20; ++round) CHECK(!stack_of(subject.id()).empty());
  over = true;
  subject.join();
  CHECK(changed == 0);
}

#if !defined(__arm__)  // there it ends at once, in what asks: see stack_capture.hpp
TEST_CASE("A thread can take its own stack") {
  const std::vector<std::string> stack = stack_of(support::thread_id());
  CHECK(stack.size() > (support::under_tsan ? 0U : 3U));
}
#endif

TEST_CASE("A thread that is named twice has its stack twice") {
  const Reader reader;
  const pid_t threads[] = {reader.id(), reader.id(), support::thread_id(), support::thread_id()};
  const auto begin = Clock::now();
  const auto stacks = detail::capture_stacks(std::span<const pid_t>(threads), 60s);
  CHECK(Clock::now() - begin < 30s);
  for (const auto& stack : stacks) CHECK(!stack.empty());
}

TEST_CASE("A thread that blocks the signal has no stack, and is not waited for") {
  const Reader deaf(Reader::Signals::blocked);
  const Reader other;
  const auto begin = Clock::now();
  const pid_t threads[] = {deaf.id(), other.id(), 999'999'999};
  const auto stacks = detail::capture_stacks(std::span<const pid_t>(threads), 60s);
  CHECK(Clock::now() - begin < 30s);
  REQUIRE(stacks.size() == 3);
  CHECK(stacks[0].empty());
  CHECK(!stacks[1].empty());
  CHECK(stacks[2].empty());
}

namespace {

// Memory with a page below it that can't be touched.
class GuardedMemory {
 public:
  explicit GuardedMemory(std::size_t size) : all_(size + below) {
    void* const mapped =
        ::mmap(nullptr, all_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED || ::mprotect(mapped, below, PROT_NONE) != 0) ::abort();
    memory_ = static_cast<char*>(mapped) + below;
  }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() { ::munmap(memory_ - below, all_); }
  char* begin() const { return memory_; }
  std::size_t size() const { return all_ - below; }

 private:
  static constexpr std::size_t below = 65'536;  // as large as any page
  std::size_t all_;
  char* memory_ = nullptr;
};

// Sleeps with some `room` below it on the stack that begins at `lowest`.
[[gnu::noinline]] void sleep_above(const char* lowest, std::size_t room) {
  const auto here = reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0));
  const std::size_t used = here - reinterpret_cast<std::uintptr_t>(lowest) - room;
  volatile char* const filled = static_cast<volatile char*>(__builtin_alloca(used));
  filled[0] = 0;
  while (filled[0] == 0) ::poll(nullptr, 0, -1);
}

// How many frames of a thread can be seen that sleeps with so much room below it; it may die of being asked.
std::string frames_with_room(std::size_t room) {
  const pid_t child = ::fork();
  if (child == 0) {
    detail::warm_up_stack_capture();
    static GuardedMemory stack(262'144);
    static std::atomic<pid_t> id{0};
    static std::size_t left = room;
    pthread_attr_t attributes;
    ::pthread_attr_init(&attributes);
    ::pthread_attr_setstack(&attributes, stack.begin(), stack.size());
    pthread_t thread{};
    const auto body = [](void*) -> void* {
      ::poll(nullptr, 0, 0);  // the loader looks it up the first time, which takes stack
      id = support::thread_id();
      sleep_above(stack.begin(), left);
      return nullptr;
    };
    if (::pthread_create(&thread, &attributes, body, nullptr) != 0) ::_exit(100);
    eventually([] { return id != 0 && contains(detail::waiting_in(id), "poll"); });
    ::_exit(static_cast<int>(stack_of(id).size()));
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? std::to_string(WEXITSTATUS(status)) + " frames" : "killed";
}

// The same with a stack for signals of `size` bytes.
std::string frames_with_stack_for_signals(std::size_t size) {
  const pid_t child = ::fork();
  if (child == 0) {
    detail::warm_up_stack_capture();
    static GuardedMemory memory(size);
    static std::atomic<pid_t> id{0};
    const Subject subject([] {
      stack_t own{};
      own.ss_sp = memory.begin();
      own.ss_size = memory.size();
      if (::sigaltstack(&own, nullptr) != 0) ::_exit(100);
      id = support::thread_id();
      for (;;) ::pause();
    });
    eventually([] { return id != 0; });
    ::_exit(static_cast<int>(stack_of(id).size()));
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? std::to_string(WEXITSTATUS(status)) + " frames" : "killed";
}

}  // namespace

TEST_CASE("A thread with hardly any stack left says where it is, and lives") {
  if (support::under_sanitizer || !support::emulator.empty()) return;
  CHECK(frames_with_room(2500) == "1 frames");
  CHECK(frames_with_room(5000) == "1 frames");
  const std::string with_room = frames_with_room(65'536);
  CHECK(with_room != "killed");
  CHECK(with_room != "0 frames");
  CHECK(with_room != "1 frames");
}

TEST_CASE("A thread whose stack for signals is small says where it is, and lives") {
  if (support::under_sanitizer || !support::emulator.empty()) return;
  std::size_t least = 4096;
#if defined(AT_MINSIGSTKSZ)
  least = std::max<std::size_t>(least, ::getauxval(AT_MINSIGSTKSZ));
#endif
  CHECK(frames_with_stack_for_signals(least) == "1 frames");
  const std::string with_room = frames_with_stack_for_signals(least + 16'384);
  CHECK(with_room != "killed");
  CHECK(with_room != "0 frames");
  CHECK(with_room != "1 frames");
}

TEST_CASE("Memory below a stack is looked for as far down as it is wanted") {
  const GuardedMemory memory(131'072);
  const auto lowest = reinterpret_cast<std::uintptr_t>(memory.begin());
  errno = ERANGE;
  CHECK(detail::is_readable(lowest));
  CHECK(detail::is_readable(lowest + memory.size() - 1));
  CHECK_FALSE(detail::is_readable(lowest - 1));
  CHECK_FALSE(detail::is_readable(0));
  CHECK(detail::has_stack_below(lowest + 100'000, 100'000));
  CHECK_FALSE(detail::has_stack_below(lowest + 100'000, 100'001));
  CHECK_FALSE(detail::has_stack_below(lowest + 8, 16));
  CHECK_FALSE(detail::has_stack_below(64, 8192));
  CHECK(errno == ERANGE);
}

TEST_CASE("An answer that comes after it was given up goes nowhere") {
  std::atomic<bool> unblock{false};
  std::atomic<bool> unblocked{false};
  std::atomic<bool> over{false};
  Subject subject([&] {
    {
      const detail::BlockAllSignals block;
      while (!unblock) std::this_thread::sleep_for(1ms);
    }
    unblocked = true;
    while (!over) std::this_thread::sleep_for(1ms);
  });
  const auto filled = [] {
    return std::count_if(detail::probe_pool.slots.begin(), detail::probe_pool.slots.end(),
                         [](const detail::ProbeSlot& slot) { return slot.state % 4 >= 2; });
  };
  {
    // Keeps the handler in place, so that the signal is still of use when it is delivered at last.
    const detail::ProbeHandler handler;
    REQUIRE(handler.number() != 0);
    detail::RawStack stack;
    stack.thread_id = subject.id();
    const std::uint32_t answers = detail::probe_pool.answers;
    detail::StackCapture(std::span(&stack, 1), handler.number()).run(Clock::now() + 20ms);
    CHECK(stack.depth == 0);
    unblock = true;
    CHECK(eventually([&] { return unblocked.load(); }));
    CHECK(detail::probe_pool.answers == answers);
    CHECK(filled() == 0);
  }
  CHECK(!stack_of(subject.id()).empty());
  over = true;
}

TEST_CASE("A slot that its thread is still filling is left alone, and used again when it is done") {
  detail::ProbeSlot& slot = detail::probe_pool.slots[0];
  const std::uint32_t before = slot.state;
  slot.state = before / 4 * 4 + detail::slot_filling;
  CHECK(!stack_of(support::thread_id()).empty());
  CHECK(slot.state == before / 4 * 4 + detail::slot_filling);
  slot.state = before / 4 * 4 + detail::slot_full;
  CHECK(!stack_of(support::thread_id()).empty());
  CHECK(slot.state % 4 == detail::slot_free);
  CHECK(slot.state != before);
}

TEST_CASE("The disposition is as it was after a capture") {
  const KeepDisposition urgent(SIGURG);
  for (void (*before)(int) : {SIG_DFL, SIG_IGN}) {
    set_handler(SIGURG, before);
    CHECK(!stack_of(support::thread_id()).empty());
    CHECK(handler_of(SIGURG) == before);
  }
}

TEST_CASE("A handler of the program's own is never replaced, nor called") {
  const KeepDisposition urgent(SIGURG);
  const KeepDisposition winch(SIGWINCH);
  own_handler_calls = 0;
  set_handler(SIGURG, own_handler);
  CHECK(!stack_of(support::thread_id()).empty());  // there is another signal
  CHECK(handler_of(SIGURG) == own_handler);
  CHECK(handler_of(SIGWINCH) == SIG_DFL);
  set_handler(SIGWINCH, own_handler);
  CHECK(stack_of(support::thread_id()).empty());
  CHECK(handler_of(SIGURG) == own_handler);
  CHECK(handler_of(SIGWINCH) == own_handler);
  CHECK(own_handler_calls == 0);
}

TEST_CASE("A signal that is not the library's own is ignored by the handler") {
  const detail::ProbeHandler handler;
  const std::uint32_t answers = detail::probe_pool.answers;
  ::kill(::getpid(), handler.number());
  ::raise(handler.number());
  CHECK(detail::probe_pool.answers == answers);
}

TEST_CASE("More threads than there are slots all have a stack") {
  constexpr std::size_t count = 3 * detail::ProbePool::size + 5;
  std::vector<std::unique_ptr<Reader>> readers;
  std::vector<pid_t> threads;
  for (std::size_t made = 0; made < count; ++made) {
    readers.push_back(std::make_unique<Reader>());
    threads.push_back(readers.back()->id());
  }
  const auto stacks = detail::capture_stacks(std::span<const pid_t>(threads), 30s);
  const auto complete = std::count_if(stacks.begin(), stacks.end(), [](const auto& stack) {
    return mentions(stack, place_of_this_function());
  });
  CHECK(complete > (support::under_tsan ? 0 : static_cast<long>(count) - 1));
}

TEST_CASE("Several threads may take stacks at once, while others come and go") {
  const Reader reader;
  std::atomic<int> missed{0};
  std::atomic<bool> over{false};
  std::atomic<pid_t> latest{reader.id()};
  support::Threads coming_and_going;
  coming_and_going.start([&] {
    while (!over) std::thread([&] { latest = support::thread_id(); }).join();
  });
  {
    support::Threads takers;
    for (int taker = 0; taker < 4; ++taker) {
      takers.start([&] {
        for (int round = 0; round < 50; ++round) {
          const pid_t threads[] = {latest.load(), reader.id()};
          if (detail::capture_stacks(std::span<const pid_t>(threads), 30s)[1].empty()) ++missed;
        }
      });
    }
  }
  over = true;
  // TSan delivers signals later than they come, with all of them blocked meanwhile.
  if (!support::under_tsan) CHECK(missed == 0);
}

TEST_CASE("A capture waits no longer than its budget for another one") {
  const pid_t nobody = 0;
  detail::probe_pool.owner = ::getpid();
  const auto begin = Clock::now();
  CHECK(stack_of(support::thread_id(), 20ms).empty());
  CHECK(Clock::now() - begin >= 20ms);
  CHECK(Clock::now() - begin < 10s);
  detail::probe_pool.owner = nobody;
  CHECK(!stack_of(support::thread_id()).empty());
}

TEST_CASE("A process forked in the middle of a capture can take stacks") {
  detail::probe_pool.owner = ::getpid();
  const int code =
      support::in_child_process([] { return stack_of(support::thread_id()).empty() ? 1 : 0; });
  detail::probe_pool.owner = 0;
  CHECK(code == 0);
}

TEST_CASE("A frame without a name is its module and an offset that addr2line takes") {
  char buffer[256];
  const auto* const here = reinterpret_cast<const void*>(&lastcall_test_waits_here);
  const std::size_t length = detail::describe_frame(here, true, buffer, sizeof buffer);
  const std::string frame(buffer, length);
  INFO(frame);
#if defined(DLFO_STRUCT_HAS_EH_DBASE)
  CHECK(contains(frame, own_module()));
#else
  CHECK(frame.substr(0, 2) == "0x");
#endif
  // A return address belongs to the call before it.
  const auto* const after = static_cast<const char*>(here) + 1;
  const std::size_t again = detail::describe_frame(after, false, buffer, sizeof buffer);
  CHECK(std::string(buffer, again) == frame);
  CHECK(detail::describe_frame(nullptr, true, buffer, sizeof buffer) == 3);
  CHECK(std::string_view(buffer, 3) == "0x0");
}

TEST_CASE("With no time left for names a stack is its frames' modules and offsets") {
  const auto* const here = reinterpret_cast<const char*>(&lastcall_test_waits_here);
  detail::RawStack stack;
  CHECK(detail::describe_frames(stack).empty());
  // The last byte of the third frame's call is where the thread is according to the first.
  stack.frames[0] = const_cast<char*>(here);
  stack.frames[1] = const_cast<char*>(here + 9);
  stack.frames[2] = const_cast<char*>(here + 1);
  stack.frames[3] = nullptr;  // beyond what was captured
  stack.depth = 3;
  const std::vector<std::string> frames = detail::describe_frames(stack);
  REQUIRE(frames.size() == 3);
  const auto offset_of = [](const std::string& frame) {
    return std::stoull(frame.substr(frame.rfind("0x")), nullptr, 16);
  };
  CHECK(offset_of(frames[1]) == offset_of(frames[0]) + 8);
  CHECK(frames[2] == frames[0]);
#if defined(DLFO_STRUCT_HAS_EH_DBASE)
  for (const std::string& frame : frames) CHECK(frame.rfind(own_module(), 0) == 0);
  // Where there is time a name comes before the same.
  CHECK(contains(detail::symbolise(stack.frames[1], false), frames[1]));
#endif
}

TEST_CASE("A function of a shared object has its name") {
  const void* const address = ::dlsym(RTLD_DEFAULT, "sigwaitinfo");
  REQUIRE(address != nullptr);
  const std::string frame = detail::symbolise(address, true);
  INFO(frame);
  CHECK(contains(frame, "+0x"));
  if (!support::under_sanitizer) CHECK(contains(frame, "sigwaitinfo+0x0 (libc.so"));
}

#endif

#else

TEST_CASE("Where the system does not tell, there is nothing, and nothing fails") {
  CHECK(detail::waiting_in(support::thread_id()).empty());
  CHECK(detail::thread_name(support::thread_id()).empty());
  const pid_t self = support::thread_id();
  detail::warm_up_stack_capture();
  const auto stacks = detail::capture_stacks(std::span<const pid_t>(&self, 1), 1s);
  REQUIRE(stacks.size() == 1);
  CHECK(stacks[0].empty());
  CHECK(stack_of(self).empty());
  CHECK(!mentions({}, ""));
}

#endif
