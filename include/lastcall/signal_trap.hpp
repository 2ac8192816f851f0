// Signals, caught and kept until somebody asks: SignalTrap; and signals that are not to be had:
// SignalIgnore.
//
// A handler may do next to nothing, so ours only writes down what came, in each trap's own pipe,
// and calls the handler that was there before. Everything else happens in whoever waits.
//
// Invariants. The code in detail/signal_inbox.hpp (I1 to I4), detail/signal_handler.hpp (I5 to I9,
// I11), detail/signal_lock.hpp (I10), detail/signal_links.hpp (I5 to I9) and detail/signal_core.hpp,
// the tests and the model check refer to them by number.
//
//  I1  A signal is one record, written by one write(2) of at most PIPE_BUF bytes on a non-blocking
//      pipe: it is there in one piece or not at all, whoever writes at the same time.
//  I2  What a full pipe refuses goes to the spill of its number: one record, which later ones of
//      the same number join. After that the handler tries to write a bell. The reader reads the
//      pipe first and the spills afterwards. No wake-up is lost: if the bell went in, it is read
//      after the spill was filled. If it didn't, the pipe was full after the spill was filled; so
//      there is something to read, and whoever reads it looks at the spills still later. (Rejected:
//      a bit that is set before the write and cleared after it, which a second handler's failed
//      write may need; a bit set after the write with no bell, for which the reader may have looked
//      in between and gone to sleep.)
//  I3  fd() is readable while anything is pending: a record in the pipe, a spill by I2, and what a
//      reader has taken out but not handed out by the bell that it rings before it lets go.
//  I4  The reader's buffer has as many places as the pipe, and one more for each number. When only
//      the latter are left, a number that has a place gets no second one. So repeats of one number
//      may merge once the pipe's worth is waiting; different numbers never do.
//  I5  A subscription is complete before it is published, and linked before our handler is put in
//      place: the first signal finds it. A handler reads nothing of the registry but the process
//      id, the epoch, and the list: atomics, or constants behind them.
//  I6  A handler that reads the list is counted in flight on one of two sides, chosen by the epoch.
//      Who unlinks something then sees each side at zero once, turning the epoch before each so
//      that the signals that keep coming count on the other side. Let handler H hold a pointer to
//      what was unlinked. If the one who waits read zero from H's side before H counted itself,
//      then, all being sequentially consistent, H read the list after the unlinking, and doesn't
//      hold it. Else the zero was read after H had left. So subscriptions are freed and descriptors
//      closed under nobody's hand, and no record can reach a descriptor that has become somebody
//      else's.
//  I7  Nothing that can block or leave happens in flight: the pipe is non-blocking, write(2) is
//      called in a way that is no cancellation point, and the previous handler is called after
//      leaving, with nothing of ours held. If it hangs or jumps away, no trap notices.
//  I8  A handler that finds no subscription does what the previous disposition would have done. If
//      ours is the one in place, it puts the previous one back first; then it calls that if it is a
//      function, and raises the signal again (blocked until it returns) if it is SIG_DFL. It takes
//      one flag for that, which the lock of I10 takes too, and looks at the list again under it; so
//      it undoes no trap that comes at this moment. If the flag is taken it raises the signal and
//      returns: it never waits.
//  I9  A number has several handlers of ours, one a layer. A trap joins the layer that is in place,
//      or else puts an unused one over what is. A layer that somebody else's handler covers stays
//      as it is when its traps have gone, and acts by I8 if it is called. No layer is put above a
//      handler that may call it. The handler that a layer was put over may be put over the layer
//      in turn (by who finds it no longer in place, and calls on from then on what is): then the
//      layer ends the chain. That it is so shows when somebody calls the layer, and what is in
//      place is not the layer but that handler, or a later layer was put over it. A seat, empty
//      before we take a layer away ourselves, tells that from a signal that was on its way to the
//      layer then. So each chain ends that ours takes part in, unless a third handler hides the
//      one that came twice.
//  I10 Everything changes under one lock, with every signal blocked. A fork takes it; so in the
//      child the lists are whole, and the hook there empties them, puts the dispositions back,
//      resets the counts of I6 (the threads in flight are the parent's), cuts the traps'
//      descriptors off the parent's pipes, and blocks in the thread what traps unblocked there.
//      Hooks of others that run while a fork has the lock have it, too, on their thread; and the
//      first of them that asks for it in the child finds all that done. A child that the hooks
//      missed makes the lock anew, whose owner may have stayed with the parent, before the first of
//      its threads takes it. A handler that runs in a
//      process that the lists don't speak of (vfork, clone, or before the hook) doesn't read them,
//      and acts by I8.
//  I11 A record is exclusive if no other trap got the signal: none of its layer, whose list is read
//      once, and none of a layer above, which has then counted it as passed on, on this very
//      thread, before it called the handler beneath; the count that is left of what never arrived
//      is struck off when that handler returns. Traps of layers beneath don't matter: under an
//      upper layer lies a function, and nothing of its own is raised again.
//
// What was tried for a short way from the signal to who waits at wait(), and what it gave (sender, reader
// and a worker behind it on one processor of an AMD Zen 3 as a virtual machine): 12.0 us at first. Polling
// before reading instead of after a read that finds nothing: 11.4. Asking getpid() before going to sleep
// instead of after waking: 11.2. A bare self-pipe and a futex hop take 9.4 there; the rest is one getpid()
// in the handler (for children of vfork()) and what the reader does before it sleeps again.
//
// Limits. SIGKILL and SIGSTOP can't be trapped by anybody. A child of vfork() or posix_spawn() gets
// SIG_DFL for what was ignored before it was trapped, and has unblocked what a trap unblocked. A
// trap is the process's: in a forked child it catches nothing. Handlers that others install on top
// must call ours on, or its traps get nothing; so it is if they put back a disposition from before
// a trap was made. A thread that allows its asynchronous cancellation may be torn out of the
// handler, and then traps wait for it for ever. fork() has the registry from our prepare hook on,
// which comes before the prepare hooks that were registered before the first trap. If one of these
// waits for a lock, and a thread makes or destroys a trap while it has that lock, the two wait for
// each other: register such hooks after the first trap, or make no trap under such a lock. A fork
// hook that calls fork() gets no signals until the outer fork is over. A handler that is put over a
// trap a second time, while the first time lies beneath it, misses a signal that comes at that
// moment; and if a third one is put on top before a signal came, the two call each other for ever.
#pragma once

#include <lastcall/cancellation.hpp>
#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/signal_core.hpp>
#include <lastcall/detail/signal_ignore.hpp>
#include <lastcall/detail/throw_system_error.hpp>
#include <lastcall/signal_info.hpp>

#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <span>
#include <string>

namespace lastcall {

/// Catches signals of this process for as long as it lives, and keeps them until they are asked
/// for.
///
///     lastcall::SignalTrap trap{SIGINT, SIGTERM, SIGHUP};
///     const lastcall::SignalInfo got = trap.wait();
///
/// Any number of traps may hold the same signal at once: each gets its own copy. No kind of signal
/// is lost, whatever the load; repeats of one number merge when a pipe's worth (some 2,700) is
/// waiting. A handler function that was installed before is called too. Members are thread-safe,
/// and a signal is handed out once, to one of those who wait. Costs a pipe and some 5 KiB (90 KiB
/// in a storm), no thread. The pipe has two of the last 64 descriptor numbers (below 1024): where the first
/// one is made in a process that has threads, Linux takes some 20 ms to make room for such numbers, once.
class SignalTrap {
 public:
  /// Traps the signals listed (a number named twice counts once), also those that were ignored, and
  /// unblocks them in the calling thread. All or nothing. Throws std::invalid_argument for an empty
  /// list, what is no signal, SIGKILL, SIGSTOP, SIGSEGV, SIGBUS, SIGFPE and SIGILL;
  /// std::logic_error for a number that a live SignalIgnore holds; std::system_error if there are
  /// no descriptors left (EMFILE, ENFILE) or the system refuses a handler.
  // NOLINTNEXTLINE(google-explicit-constructor): so the contract has it
  explicit SignalTrap(std::initializer_list<int> signals = {SIGINT, SIGTERM})
      : SignalTrap(std::span<const int>(signals.begin(), signals.size())) {}

  /// The same for a list that was put together elsewhere.
  explicit SignalTrap(std::span<const int> signals) {
    core_.subscribe(signals, detail::ThreadMask::unblock);
  }

  SignalTrap(const SignalTrap&) = delete;
  SignalTrap& operator=(const SignalTrap&) = delete;

  /// Puts back what was there before, in whatever order traps go; a disposition that somebody else
  /// has changed since stays as it is. The signals that the constructor unblocked are blocked again
  /// if this is the same thread. Then a signal that was caught, that nobody read and no other trap
  /// got, is raised again where SIG_DFL was put back; several in the order in which they came, but
  /// for a stop that a later SIGCONT has undone. Nobody may be waiting any more.
  ~SignalTrap() { core_.unsubscribe_all(detail::Unread::raise_again); }

  /// Waits for a signal: of those pending at once SIGINT first, then SIGTERM, then by number.
  /// Throws std::system_error if the descriptor was closed behind its back, and std::logic_error in
  /// a forked child of the trap's process, where it would wait for ever.
  SignalInfo wait() { return *wait_until(Clock::time_point::max(), nullptr); }

  /// The most urgent signal that is pending, if any. Never blocks: one read(2).
  std::optional<SignalInfo> try_wait() { return core_.is_foreign() ? std::nullopt : take(); }

  /// As wait(), but gives up after `span`; a huge one is "never", a negative one "at once".
  template <class Rep, class Period>
  std::optional<SignalInfo> wait_for(std::chrono::duration<Rep, Period> span) {
    return wait_until(detail::deadline_after(span), nullptr);
  }

  /// As wait(), but empty as soon as the token is cancelled, also if a signal is pending then: that
  /// one stays. Throws what CancellationToken::fd() throws, too.
  std::optional<SignalInfo> wait(const CancellationToken& token) {
    return wait_until(Clock::time_point::max(), &token);
  }

  /// For poll(2) and event loops: readable while a signal is pending (then call try_wait()).
  /// Close-on-exec, owned by the trap: never read or close it. While another thread is inside
  /// try_wait() or wait() it may be unreadable for a moment, and turns readable again.
  int fd() const noexcept { return core_.fd(); }

 private:
  // In the trap's own process.
  std::optional<SignalInfo> take() {
    const std::lock_guard<std::mutex> lock(reading_);
    SignalInfo info;
    if (core_.read_own_batch(&info, 1) == 0) return std::nullopt;
    return info;
  }

  std::optional<SignalInfo> wait_until(Clock::time_point deadline, const CancellationToken* token) {
    int cancelled = -1;
    // Asked once: a thread that is in here doesn't fork.
    const bool foreign = core_.is_foreign();
    const bool for_ever = deadline == Clock::time_point::max();
    // Who waits mostly has to sleep: so it polls first, and reads when there is something. But for a
    // token's descriptor, which isn't made before it is known that there is something to wait for.
    for (bool look = token != nullptr;;) {
      if (token != nullptr && token->is_cancelled()) return std::nullopt;
      const Clock::time_point now = for_ever ? Clock::time_point() : Clock::now();
      const bool over = !for_ever && now >= deadline;
      if ((look || over) && !foreign) {
        if (std::optional<SignalInfo> got = take()) return got;
      }
      if (over) return std::nullopt;
      if (token != nullptr && cancelled < 0) cancelled = token->fd();
      if (foreign && cancelled < 0 && for_ever) {
        detail::throw_logic_error("waiting in process " + std::to_string(::getpid()) +
                                  " for the signals of the process that it was forked from");
      }
      // poll(2) passes over -1.
      pollfd either[] = {{foreign ? -1 : fd(), POLLIN, 0}, {cancelled, POLLIN, 0}};
      if (::poll(either, 2, detail::poll_timeout(now, deadline)) < 0) {
        if (errno != EINTR && errno != EAGAIN) {
          const int error = errno;
          // What has come is handed out all the same: thrown over, it would be raised again.
          if (!foreign && (token == nullptr || !token->is_cancelled())) {
            if (std::optional<SignalInfo> got = take()) return got;
          }
          detail::throw_system_error(error, "polling for a signal");
        }
        look = false;
        continue;
      }
      if (((either[0].revents | either[1].revents) & POLLNVAL) != 0) {
        const int closed = (either[0].revents & POLLNVAL) != 0 ? either[0].fd : either[1].fd;
        detail::throw_system_error(
            EBADF, "polling for a signal: somebody closed descriptor " + std::to_string(closed));
      }
      look = either[0].revents != 0;
    }
  }

  detail::TrapCore core_;
  // The reader's half of the inbox is for one thread at a time. Never held in poll(2).
  std::mutex reading_;
};

/// Ignores a signal for as long as it lives: SIG_IGN, which threads, and programs that are executed
/// meanwhile, inherit. Several for one number count: the last one to go puts back what was there.
class SignalIgnore {
 public:
  /// Throws std::invalid_argument for the numbers that can't be trapped either, std::logic_error
  /// for one that a live SignalTrap or coordinator holds, std::system_error if the system refuses.
  explicit SignalIgnore(int number) : number_(number) { detail::ignore_signal(number); }
  SignalIgnore(const SignalIgnore&) = delete;
  SignalIgnore& operator=(const SignalIgnore&) = delete;

  /// Puts back what was there before, unless somebody else has changed it since.
  ~SignalIgnore() { detail::stop_ignoring_signal(number_); }

 private:
  const int number_;
};

}  // namespace lastcall
