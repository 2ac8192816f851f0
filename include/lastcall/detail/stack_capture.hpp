// The stack of another thread, taken in that thread by a signal.
//
// Which signal. SIGURG, or SIGWINCH if somebody handles SIGURG: by default both are ignored, so one that
// arrives late, when the handler has been taken away again, does nothing. (Any other signal would end the
// process then, or would need a handler that stays for ever.) The handler is there only while stacks are
// taken; a handler of the program's own is never replaced, and with one on each of the two there are no
// stacks.
//
// What it disturbs. The handler has SA_RESTART, so read, write, accept, futex without timeout and the like
// go on as if nothing had been. Calls that the kernel never restarts return EINTR once: poll, select,
// epoll_wait, nanosleep, sem_timedwait, msgrcv, semop, and sockets with a timeout set (signal(7)).
// Robust code has to expect that of any signal; still, stacks are taken only for a snapshot and at the
// end.
//
// Why it can't hang. The handler takes no lock: it fills a slot of a pool that is never freed, by
// _Unwind_Backtrace, which with GCC 12 and glibc 2.35 finds its tables without a lock. (With older ones it
// takes the loader's lock for a moment: a thread interrupted while another one hangs in dlopen() then
// waits for that one too.) Whoever asks waits no longer than the budget. A thread that blocks the signal,
// hangs in the kernel or is gone has no stack (and under ThreadSanitizer, which puts signals off, few have). A slot whose thread answers too late is given up and only
// used again once that thread is done with it: each use has a number, and the handler can fill a slot only
// under the number that it was asked with.
//
// Where there is no room for it. The handler needs stack: some kilobytes for the registers that the kernel saves, and
// walk_needs for itself and the unwinder. A thread that has less would die of it, so all that is recorded of it
// is where it is. One that runs the handler on a stack for signals sees how much that has. Of one that is
// blocked in a system call the kernel tells how far its stack reaches, and who asks looks whether there is
// memory below; then it is not sent the signal at all. That doesn't see a thread that spins near its stack's end,
// nor a stack without a page below it that can't be read. The main thread's stack grows.
//
// Where a stack ends early. On 32-bit ARM the ABI gives functions that can't throw no entry to go on by, unless
// they are compiled with -funwind-tables: a stack ends at the first of them. So the handler and what it calls on
// its way to the unwinder are not noexcept; nothing that they call throws. With -fno-exceptions no function has one.
//
// Turning addresses into names is a second step, since it allocates and takes the loader's lock
// (dladdr): symbolise(). describe_frame() does without both, and without names.
#pragma once

#include <lastcall/detail/bounded_text.hpp>
#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/config.hpp>

#include <sys/types.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#if LASTCALL_LINUX && __has_include(<unwind.h>) && __has_include(<dlfcn.h>)
#define LASTCALL_HAS_STACKS 1
#include <lastcall/detail/futex.hpp>
#include <lastcall/detail/posix.hpp>
#include <lastcall/detail/thread_id.hpp>
#include <lastcall/detail/thread_probe.hpp>

#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <unwind.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#else
#define LASTCALL_HAS_STACKS 0
#endif

namespace lastcall::detail {

/// Addresses of one thread's frames, innermost first: the first is where it is, the others are where
/// calls will return to.
struct RawStack {
  static constexpr std::size_t most = 64;
  pid_t thread_id = 0;      // in
  std::uint32_t depth = 0;  // out; 0: no stack
  std::array<void*, most> frames;
};

#if LASTCALL_HAS_STACKS

/// The signals used, in the order tried.
inline constexpr std::array<int, 2> probe_signals = {SIGURG, SIGWINCH};

// A slot's word: how often it was used, and in the two lowest bits what for.
inline constexpr std::uint32_t slot_free = 0;
inline constexpr std::uint32_t slot_asked = 1;    // the asker's until somebody fills it
inline constexpr std::uint32_t slot_filling = 2;  // the handler's
inline constexpr std::uint32_t slot_full = 3;     // the asker's again
inline constexpr std::uint32_t slot_use = 4;

struct ProbeSlot {
  Word state{};
  std::atomic<pid_t> thread_id{};
  std::uint32_t depth{};
  std::array<void*, RawStack::most> frames{};
};

struct ProbePool {
  static constexpr std::size_t size = 32;

  std::atomic<pid_t> owner{};  // the process that has a capture going on; 0: none
  Word released{};             // counts captures that are over
  Word answers{};              // counts slots that were filled
  std::atomic<int> inside{};   // threads that are in the handler
  std::array<ProbeSlot, size> slots{};
};
inline constinit ProbePool probe_pool{};

inline void* interrupted_at(const void* context) noexcept {
  const auto& machine = static_cast<const ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  return reinterpret_cast<void*>(machine.gregs[REG_RIP]);
#elif defined(__i386__)
  return reinterpret_cast<void*>(machine.gregs[REG_EIP]);
#elif defined(__aarch64__)
  return reinterpret_cast<void*>(machine.pc);
#elif defined(__arm__)
  return reinterpret_cast<void*>(machine.arm_pc);
#elif defined(__s390x__)
  return reinterpret_cast<void*>(machine.psw.addr);
#elif defined(__riscv)
  return reinterpret_cast<void*>(machine.__gregs[REG_PC]);
#else
  static_cast<void>(machine);
  return nullptr;
#endif
}

struct StackWalk {
  void* from;  // skip frames down to this one; null: skip two, the handler and its trampoline
  void** frames;
  std::uint32_t depth = 0;
  std::uint32_t skipped = 0;
};

inline _Unwind_Reason_Code walk_frame(_Unwind_Context* context, void* argument) {
  auto& walk = *static_cast<StackWalk*>(argument);
  int before = 0;
  void* const at = reinterpret_cast<void*>(_Unwind_GetIPInfo(context, &before));
  if (at == nullptr) return _URC_END_OF_STACK;
  if (walk.depth == 0 && (walk.from != nullptr ? at != walk.from : walk.skipped < 2)) {
    // A deep stack that never shows the interrupted address is some other one.
    return ++walk.skipped < 256 ? _URC_NO_REASON : _URC_END_OF_STACK;
  }
  walk.frames[walk.depth++] = at;
  return walk.depth < RawStack::most ? _URC_NO_REASON : _URC_END_OF_STACK;
}

/// What the handler and the unwinder take of a stack, with as much again in reserve.
inline constexpr std::size_t walk_needs = 4096;

/// Whether the handler runs on a stack for signals (sigaltstack) that is nearly full.
inline bool is_nearly_full(const stack_t& for_signals) {
  const auto at = reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0));
  const auto lowest = reinterpret_cast<std::uintptr_t>(for_signals.ss_sp);
  return at >= lowest && at - lowest < std::min(for_signals.ss_size, walk_needs);
}

/// What a signal may take of a thread's stack.
inline std::size_t probe_needs() noexcept {
  std::size_t saved = 4096;
#if defined(AT_MINSIGSTKSZ)
  saved = std::max<std::size_t>(saved, ::getauxval(AT_MINSIGSTKSZ));
#endif
  return saved + walk_needs;
}

inline void fill_slot(ProbeSlot& slot, const void* context) {
  StackWalk walk{interrupted_at(context), slot.frames.data()};
  if (walk.from == nullptr || !is_nearly_full(static_cast<const ucontext_t*>(context)->uc_stack)) {
    _Unwind_Backtrace(walk_frame, &walk);
  }
  if (walk.depth == 0 && walk.from != nullptr) walk.frames[walk.depth++] = walk.from;
  slot.depth = walk.depth;
}

// Who sent the signal doesn't matter (and isn't known once the queue of pending signals is full): a
// thread that wasn't asked finds no slot. One that was asked twice may get one signal for both.
inline void on_probe(int, siginfo_t*, void* context) {
  const int saved = errno;
  probe_pool.inside.fetch_add(1, std::memory_order_relaxed);
  const pid_t self = current_thread_id();
  for (ProbeSlot& slot : probe_pool.slots) {
    // acquire: with the word comes the thread that the slot is for.
    std::uint32_t state = slot.state.load(std::memory_order_acquire);
    if (state % slot_use != slot_asked) continue;
    if (slot.thread_id.load(std::memory_order_relaxed) != self) continue;
    const std::uint32_t use = state - slot_asked;
    if (!slot.state.compare_exchange_strong(state, use + slot_filling, std::memory_order_acquire,
                                            std::memory_order_relaxed)) {
      continue;  // given up meanwhile
    }
    fill_slot(slot, context);
    slot.state.store(use + slot_full, std::memory_order_release);  // hands over the frames
    probe_pool.answers.fetch_add(1, std::memory_order_release);
    futex_wake_all(&probe_pool.answers);
  }
  errno = saved;
  probe_pool.inside.fetch_sub(1, std::memory_order_relaxed);
}

/// One capture at a time; waits for another one until `deadline`. A process forked in the middle of one
/// finds a lock that belongs to its parent, and takes it over.
class ProbeLock {
 public:
  explicit ProbeLock(Clock::time_point deadline) noexcept {
    const pid_t self = ::getpid();
    for (;;) {
      const std::uint32_t seen = probe_pool.released.load(std::memory_order_acquire);
      pid_t owner = probe_pool.owner.load(std::memory_order_relaxed);
      if (owner != self) {
        held_ = probe_pool.owner.compare_exchange_strong(owner, self, std::memory_order_acquire,
                                                         std::memory_order_relaxed);
        if (held_) return;
        continue;
      }
      if (!futex_wait_until(probe_pool.released, seen, deadline)) return;
    }
  }
  ProbeLock(const ProbeLock&) = delete;
  ProbeLock& operator=(const ProbeLock&) = delete;
  ~ProbeLock() {
    if (!held_) return;
    probe_pool.owner.store(0, std::memory_order_release);
    probe_pool.released.fetch_add(1, std::memory_order_release);
    futex_wake_all(&probe_pool.released);
  }
  explicit operator bool() const noexcept { return held_; }

 private:
  bool held_ = false;
};

/// The handler, in place while it lives.
class ProbeHandler {
 public:
  ProbeHandler() noexcept {
    for (const int number : probe_signals) {
      struct sigaction now {};
      if (::sigaction(number, nullptr, &now) != 0 || !is_unused(now)) continue;
      struct sigaction ours {};
      ours.sa_sigaction = on_probe;
      ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
      sigfillset(&ours.sa_mask);
      if (::sigaction(number, &ours, &before_) != 0) continue;
      if (is_unused(before_)) {
        number_ = number;
        return;
      }
      ::sigaction(number, &before_, nullptr);  // somebody was quicker
    }
  }
  ProbeHandler(const ProbeHandler&) = delete;
  ProbeHandler& operator=(const ProbeHandler&) = delete;
  ~ProbeHandler() {
    struct sigaction now {};
    if (number_ == 0 || ::sigaction(number_, nullptr, &now) != 0) return;
    if ((now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == on_probe) {
      ::sigaction(number_, &before_, nullptr);
    }
  }
  int number() const noexcept { return number_; }  // 0: both are taken

  static bool is_unused(const struct sigaction& action) noexcept {
    return action.sa_handler == SIG_DFL || action.sa_handler == SIG_IGN;
  }

 private:
  struct sigaction before_ {};
  int number_ = 0;
};

/// While it lives the calling thread shows its stack when it is asked for, though it blocks every other
/// signal: for the library's own threads in user code, which may hang. A signal that the program handles
/// stays blocked, since no handler of its is to run here.
class OpenToCapture {
 public:
  OpenToCapture() noexcept {
    sigset_t open;
    sigemptyset(&open);
    for (const int number : probe_signals) {
      struct sigaction now {};
      if (::sigaction(number, nullptr, &now) != 0) continue;
      const bool ours = (now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == on_probe;
      if (ours || ProbeHandler::is_unused(now)) sigaddset(&open, number);
    }
    ::pthread_sigmask(SIG_UNBLOCK, &open, &before_);
  }
  OpenToCapture(const OpenToCapture&) = delete;
  OpenToCapture& operator=(const OpenToCapture&) = delete;
  ~OpenToCapture() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_{};
};

/// Whether the signal has been sent to the thread and waits there, blocked.
inline bool is_refusing(pid_t thread, int number) noexcept {
  char buffer[4096];
  const std::string_view status = read_thread_file(thread, "status", buffer, sizeof buffer);
  std::uint64_t both = std::uint64_t{1} << static_cast<unsigned>(number - 1);
  for (const std::string_view mask : {"\nSigPnd:", "\nSigBlk:"}) {
    const std::size_t at = status.find(mask);
    if (at == std::string_view::npos) return false;
    std::string_view rest = status.substr(at + mask.size());
    both &= parse_number(take_word(rest), 16);
  }
  return both != 0;
}

/// The capture itself: hands out slots, sends the signal, gathers what comes back.
class StackCapture {
 public:
  StackCapture(std::span<RawStack> stacks, int number) noexcept
      : stacks_(stacks), number_(number) {}

  void run(Clock::time_point deadline) noexcept {
    for (;;) {
      const std::uint32_t answers = probe_pool.answers.load(std::memory_order_acquire);
      gather();
      hand_out();
      if (waiting_ == 0 && next_ == stacks_.size()) return;
      const Clock::time_point now = Clock::now();
      if (now >= deadline) break;
      const Clock::time_point quiet = std::min(deadline, now + std::chrono::milliseconds(2));
      if (!futex_wait_until(probe_pool.answers, answers, quiet)) drop_the_silent();
    }
    gather();
    for (std::size_t at = 0; at < asks_.size(); ++at) give_up(at);
  }

 private:
  static constexpr std::size_t nobody = ~std::size_t{0};

  struct Ask {
    std::size_t stack = nobody;  // whose
    std::uint32_t use = 0;       // of the slot
    int refusals = 0;            // how often in a row it was seen to refuse
  };

  void gather() noexcept {
    for (std::size_t at = 0; at < asks_.size(); ++at) {
      Ask& ask = asks_[at];
      ProbeSlot& slot = probe_pool.slots[at];
      // acquire: pairs with the handler's release, the frames are there.
      if (ask.stack == nobody ||
          slot.state.load(std::memory_order_acquire) != ask.use + slot_full) {
        continue;
      }
      RawStack& stack = stacks_[ask.stack];
      stack.depth = slot.depth;
      std::memcpy(stack.frames.data(), slot.frames.data(), slot.depth * sizeof(void*));
      slot.state.store(ask.use + slot_use, std::memory_order_relaxed);
      forget(ask);
    }
  }

  void hand_out() noexcept {
    for (std::size_t at = 0; at < asks_.size() && next_ < stacks_.size(); ++at) {
      Ask& ask = asks_[at];
      ProbeSlot& slot = probe_pool.slots[at];
      if (ask.stack != nobody) continue;
      std::uint32_t state = slot.state.load(std::memory_order_acquire);
      // Full: an answer that came after it had been given up. Filling: still being given.
      if (state % slot_use == slot_filling) continue;
      while (next_ < stacks_.size() && has_no_room(stacks_[next_])) ++next_;
      if (next_ == stacks_.size()) return;
      state = state / slot_use * slot_use + slot_use;
      slot.thread_id.store(stacks_[next_].thread_id, std::memory_order_relaxed);
      slot.state.store(state + slot_asked, std::memory_order_release);
      ask = {next_++, state, 0};
      ++waiting_;
      if (::syscall(SYS_tgkill, ::getpid(), stacks_[ask.stack].thread_id, number_) != 0)
        give_up(at);
    }
  }

  // Then its stack is where it is, and no more.
  bool has_no_room(RawStack& stack) const noexcept {
    if (stack.thread_id == ::getpid()) return false;  // the main thread's grows
    const BlockedAt at = blocked_at(stack.thread_id);
    if (at.stack == 0 || has_stack_below(at.stack, needs_)) return false;
    stack.frames[0] = reinterpret_cast<void*>(at.instruction);
    stack.depth = 1;
    return true;
  }

  // A thread may block signals for a moment, while it makes another thread, so it is asked several times.
  // In the handler it blocks them, too: as long as somebody is in there nobody is judged.
  void drop_the_silent() noexcept {
    const bool fair = probe_pool.inside.load(std::memory_order_relaxed) == 0;
    for (std::size_t at = 0; at < asks_.size(); ++at) {
      if (asks_[at].stack == nobody) continue;
      const pid_t thread = stacks_[asks_[at].stack].thread_id;
      const bool refuses = fair && is_refusing(thread, number_);
      asks_[at].refusals = refuses ? asks_[at].refusals + 1 : 0;
      if (asks_[at].refusals >= 5 || is_thread_gone(thread)) give_up(at);
    }
  }

  void give_up(std::size_t at) noexcept {
    Ask& ask = asks_[at];
    if (ask.stack == nobody) return;
    std::uint32_t asked = ask.use + slot_asked;
    // If this fails the handler is at it or done; the slot says so to whoever comes next.
    probe_pool.slots[at].state.compare_exchange_strong(asked, ask.use + slot_use,
                                                       std::memory_order_relaxed);
    forget(ask);
  }

  void forget(Ask& ask) noexcept {
    ask.stack = nobody;
    --waiting_;
  }

  std::span<RawStack> stacks_;
  int number_;
  const std::size_t needs_ = probe_needs();
  std::size_t next_ = 0;
  std::size_t waiting_ = 0;
  std::array<Ask, ProbePool::size> asks_{};
};

#else

class OpenToCapture {
 public:
  OpenToCapture() noexcept {}  // not trivial: a variable of it counts as used
};

#endif

/// Takes the stacks of the threads named in `stacks`, in place, within `budget`. One whose thread didn't
/// answer has depth 0, one whose thread has no room for it 1. Allocates nothing and takes no lock but its own, for which
/// it waits no longer than that either. Thread-safe; not for signal handlers. Some 20 us a thread.
inline void capture_stacks(std::span<RawStack> stacks, Clock::duration budget) noexcept {
  for (RawStack& stack : stacks) stack.depth = 0;
#if LASTCALL_HAS_STACKS
  if (stacks.empty()) return;
  const Clock::time_point deadline = deadline_after(budget);
  const ProbeLock lock(deadline);
  if (!lock) return;
  const ProbeHandler handler;
  if (handler.number() != 0) StackCapture(stacks, handler.number()).run(deadline);
#else
  static_cast<void>(budget);
#endif
}

/// Waits, until `deadline` at most, for a capture that another thread has going on: then its handler is out
/// of place again.
inline void wait_for_capture(Clock::time_point deadline) noexcept {
#if LASTCALL_HAS_STACKS
  const ProbeLock lock(deadline);
  static_cast<void>(lock);
#else
  static_cast<void>(deadline);
#endif
}

/// What is done lazily on the first use of the unwinder, done now: loading its library, binding its
/// symbols. Call it while all is well, before the first capture_stacks().
inline void warm_up_stack_capture() noexcept {
#if LASTCALL_HAS_STACKS
  std::array<void*, RawStack::most> frames;
  StackWalk walk{nullptr, frames.data()};
  _Unwind_Backtrace(walk_frame, &walk);
  Dl_info info{};
  static_cast<void>(::dladdr(reinterpret_cast<void*>(&probe_pool), &info));
#endif
}

/// Writes "order_service+0x2f1c", or "0x7f..." where the module can't be told, and returns how many
/// bytes. Async-signal-safe. `innermost`: the address is where the thread is, not where a call returns to.
inline std::size_t describe_frame(const void* address, bool innermost, char* out,
                                  std::size_t size) noexcept {
  BoundedText text(out, size);
  // The last byte of the call: addr2line then names the line of the call and not the one after it.
  const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(address) - (innermost ? 0U : 1U);
#if LASTCALL_HAS_STACKS && defined(DLFO_STRUCT_HAS_EH_DBASE)
  dl_find_object found{};
  if (::_dl_find_object(reinterpret_cast<void*>(at), &found) == 0 &&
      found.dlfo_link_map != nullptr) {
    const link_map& module = *found.dlfo_link_map;
    std::string_view name = module.l_name != nullptr ? module.l_name : "";
    if (name.empty()) name = program_invocation_short_name;
    text.add(name.substr(name.rfind('/') + 1)).add('+').add_hex(at - module.l_addr);
    return text.length();
  }
#endif
  return text.add_hex(at).length();
}

/// A frame with as much of a name as the build allows: "order_store::flush(int)+0x1c
/// (order_service+0x2f1c)" where the function is exported (-rdynamic, or in a shared object), else only
/// "order_service+0x2f1c", which addr2line -e order_service takes. Allocates, takes the loader's lock.
inline std::string symbolise(const void* address, bool innermost) {
  char buffer[256];
  std::string place(buffer, describe_frame(address, innermost, buffer, sizeof buffer));
#if LASTCALL_HAS_STACKS
  const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(address) - (innermost ? 0U : 1U);
  Dl_info info{};
  if (::dladdr(reinterpret_cast<void*>(at), &info) == 0) return place;
  if (info.dli_sname == nullptr) {
    if (place.find('+') != std::string::npos || info.dli_fname == nullptr) return place;
    const std::string_view path = info.dli_fname;
    BoundedText text(buffer, sizeof buffer);
    text.add(path.substr(path.rfind('/') + 1)).add('+');
    text.add_hex(at - reinterpret_cast<std::uintptr_t>(info.dli_fbase));
    return std::string(text.view());
  }
  int status = 0;
  char* const readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string out = status == 0 && readable != nullptr ? readable : info.dli_sname;
  std::free(readable);
  constexpr std::size_t most = 120;  // of a template's name all but the beginning is noise
  if (out.size() > most) out.replace(most - 3, std::string::npos, "...");
  BoundedText offset(buffer, sizeof buffer);
  offset.add('+').add_hex(reinterpret_cast<std::uintptr_t>(address) -
                          reinterpret_cast<std::uintptr_t>(info.dli_saddr));
  out += offset.view();
  return out += " (" + place + ")";
#else
  return place;
#endif
}

/// All frames as describe_frame() has them.
inline std::vector<std::string> describe_frames(const RawStack& stack) {
  std::vector<std::string> out;
  out.reserve(stack.depth);
  char buffer[256];
  for (std::size_t at = 0; at < stack.depth; ++at) {
    out.emplace_back(buffer, describe_frame(stack.frames[at], at == 0, buffer, sizeof buffer));
  }
  return out;
}

/// Since glibc 2.41 read(2) and its like make their call some functions further in, which have no names, as
/// locks always did. Who wants to know where a thread waits wants the first that has one.
inline void drop_nameless_libc(std::vector<std::string>& frames) {
  constexpr std::string_view libc = "libc.so";
  const auto named = std::find_if(frames.begin(), frames.end(), [&](const std::string& frame) {
    return std::string_view(frame).substr(0, libc.size()) != libc;
  });
  if (named == frames.end() || named->find(" (libc.so") == std::string::npos) return;
  frames.erase(frames.begin(), named);
}

inline std::vector<std::string> symbolise(const RawStack& stack) {
  std::vector<std::string> out;
  out.reserve(stack.depth);
  for (std::size_t at = 0; at < stack.depth; ++at) {
    out.push_back(symbolise(stack.frames[at], at == 0));
  }
  drop_nameless_libc(out);
  return out;
}

/// Both steps at once: a stack for each of `threads`, in their order, empty where there is none.
inline std::vector<std::vector<std::string>> capture_stacks(std::span<const pid_t> threads,
                                                            Clock::duration budget) {
  std::vector<RawStack> raw(threads.size());
  for (std::size_t at = 0; at < raw.size(); ++at) raw[at].thread_id = threads[at];
  capture_stacks(std::span<RawStack>(raw), budget);
  std::vector<std::vector<std::string>> out;
  out.reserve(raw.size());
  for (const RawStack& stack : raw) out.push_back(symbolise(stack));
  return out;
}

}  // namespace lastcall::detail
