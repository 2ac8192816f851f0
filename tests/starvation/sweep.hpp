// Makes the 1st, 2nd, ... nth allocation of a call fail, up to the first run in which none did.
//
//     struct Entering {                       // a fresh one for every run
//       lastcall::WaitGroup group;
//       lastcall::WaitGroup::Guard guard;
//       void call() { guard = group.enter("a name"); }              // what is starved
//       std::string state() const { return std::to_string(group.count()); }  // optional
//       void check() const { support::expect_equal(...); }          // optional: it has had its effect
//       static constexpr bool changes_on_failure = true;  // optional: what can't be undone
//     };
//     const starvation::Swept swept = starvation::sweep<Entering>();
//     CHECK(swept.problems == "");
//     CHECK(swept.failures >= 2);
//
// Each run is a process of its own, cold (nothing of the library has ever been used in it) and warm (the
// whole case has run once before). A call that throws must have changed nothing: state(), dispositions,
// signal mask, descriptors, threads. Then the same call must succeed. In the end as many objects must be
// alive as after a run in which nothing was refused.
#pragma once

#include "refusals.hpp"
#include "support/coordinator.hpp"
#include "support/process.hpp"

#include <dirent.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>
#include <system_error>
#include <vector>

#if defined(LASTCALL_ASAN)
// As <sanitizer/lsan_interface.h> has it, which not every compiler brings along.
extern "C" int __lsan_do_recoverable_leak_check();
#endif

namespace starvation {

/// The names of the threads, but for the two that stay once they were needed.
inline std::string thread_names() {
  std::vector<std::string> names;
  if (DIR* const tasks = ::opendir("/proc/self/task")) {
    while (const dirent* const entry = ::readdir(tasks)) {
      if (entry->d_name[0] == '.') continue;
      char path[300];
      std::snprintf(path, sizeof path, "/proc/self/task/%s/comm", entry->d_name);
      char name[32] = {};
      if (std::FILE* const file = std::fopen(path, "re")) {
        static_cast<void>(std::fgets(name, sizeof name, file) == nullptr);
        std::fclose(file);
      }
      const std::string whole = name;
      const bool stays = whole == "lastcall-timer\n" || whole == "lastcall-nudge\n";
      if (!whole.empty() && !stays) names.push_back(whole);
    }
    ::closedir(tasks);
  }
  std::sort(names.begin(), names.end());
  std::string all;
  for (const std::string& name : names) all += name;
  return all;
}

inline std::string descriptors() {
  std::string all;
  for (int fd = 0; fd < 256; ++fd) {
    if (::fcntl(fd, F_GETFD) != -1) all += std::to_string(fd) + " ";
  }
  return all + "\n";
}

/// What a failed call must not have changed in the process. Signals that the library may choose to
/// interrupt accept(2) with are left out: that handler does nothing, and stays.
inline std::string process_state() {
  std::string all;
  for (int number = 1; number < SIGRTMIN; ++number) {
    if (number != SIGURG)
      all += std::to_string(number) + ": " + support::disposition_of(number) + "\n";
  }
  return all + "mask " + support::signal_mask() + "\ndescriptors " + descriptors();
}

/// The same once every thread has a name of its own: a new one has its maker's for a moment.
inline std::string settled_thread_names() {
  std::string names;
  support::eventually(
      [&names] {
        names = thread_names();
        char own[32] = {};
        ::prctl(PR_GET_NAME, own);
        const std::size_t first = names.find(std::string(own) + "\n");
        return first == names.rfind(std::string(own) + "\n");
      },
      std::chrono::seconds(2));
  return names;
}

template <class Case>
std::string state_of(const Case& a_case) {
  if constexpr (requires { a_case.state(); }) {
    return a_case.state();
  } else {
    return {};
  }
}

// The first line in which the two differ.
inline std::string difference(const std::string& before, const std::string& after) {
  const auto line = [](const std::string& text, std::size_t from) {
    return text.substr(from, text.find('\n', from) - from);
  };
  std::size_t at = 0;
  std::size_t begin = 0;
  while (at < before.size() && at < after.size() && before[at] == after[at]) {
    if (before[at++] == '\n') begin = at;
  }
  return "\"" + line(before, begin) + "\" became \"" + line(after, begin) + "\"";
}

/// Whether the exception on its way is one by which a lack of memory is reported.
inline bool says_no_memory(std::string& words) {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    return true;
  } catch (const std::system_error& error) {
    words = error.what();
    // pthread_create(3) has no memory for the thread, or the C library for what it was asked.
    return error.code().value() == EAGAIN || error.code().value() == ENOMEM;
  } catch (const std::exception& error) {
    words = error.what();
  } catch (...) {
    words = "something that is no std::exception";
  }
  return false;
}

template <class Case>
void whole_case() {
  Case a_case;
  a_case.call();
}

inline void expect_unchanged(const std::string& before, const std::string& after,
                             const std::string& threads) {
  support::expect(after == before, "changed by a call that failed: " + difference(before, after));
  std::string now;
  support::eventually([&] { return (now = thread_names()) == threads; }, std::chrono::seconds(2));
  support::expect(now == threads, "threads of a call that failed: " + difference(threads, now));
}

/// Whether that many objects are what a run should leave. With several threads it is not exact: for how
/// many of them at a time there are records, which are never given back, is a matter of timing.
inline bool is_as_many(Reach reach, long alive, long live) {
  return std::labs(alive - live) <= (reach == Reach::process ? 4 : 0);
}

/// In a child. Says "refused" if anything was, "threw" if that came out, "live <n>" in the end.
/// `live` is what that should be, or -1 if this is the run that tells.
template <class Case>
void one_run(const Refusal& how, long nth, bool warm, long live) {
  live_objects.store(0);  // what the parent has is not meant
  if (warm) whole_case<Case>();
  bool threw = false;
  {
    Case a_case;
    const std::string before = process_state() + state_of(a_case);
    const std::string threads = settled_thread_names();
    if (nth > 0) {
      std::string words;
      bool documented = true;
      Starving starving(how, nth);
      try {
        a_case.call();
        starving.stop();
      } catch (...) {
        starving.stop();
        threw = true;
        documented = says_no_memory(words);
      }
      if (starving.refused() > 0) support::say("refused\n");
      support::expect(documented, "no documented error: " + words);
      support::expect(!threw || starving.refused() > 0, "it threw without a refusal: " + words);
    }
    if (threw) support::say("threw\n");
    if constexpr (!requires { Case::changes_on_failure; }) {
      if (threw) expect_unchanged(before, process_state() + state_of(a_case), threads);
    }
    if (threw || nth == 0) a_case.call();
    if constexpr (requires { a_case.check(); }) a_case.check();
  }
#if defined(LASTCALL_ASAN)
  support::expect(__lsan_do_recoverable_leak_check() == 0, "LeakSanitizer has found nothing");
#endif
  // A thread of the library's may be about to let go of the last of it.
  if (live < 0) ::usleep(50'000);
  support::eventually([&] { return live < 0 || is_as_many(how.reach, live_objects.load(), live); },
                      std::chrono::seconds(2));
  support::say("live " + std::to_string(live_objects.load()) + "\n");
}

struct Swept {
  std::string problems;  // empty: all was well
  long refusals = 0;     // runs in which something was refused
  long failures = 0;     // runs that threw by it
  long longest = 0;      // the most requests that one call has made
};

inline const char* name_of(Layer layer) { return layer == Layer::malloc ? "malloc" : "new"; }

/// The long form of the sweeps: LASTCALL_STARVE_ALL is set in the environment.
inline bool all_combinations() { return std::getenv("LASTCALL_STARVE_ALL") != nullptr; }

/// Sweeps over everything that a case can be refused, cold and warm. `most` bounds n, for a call that asks
/// for the same again and again.
template <class Case>
Swept sweep(Reach reach = Reach::this_thread, long most = 2000) {
  Swept swept;
  int problems = 0;
  for (const bool warm : {false, true}) {
    for (const Layer layer : {Layer::operator_new, Layer::malloc}) {
      if (layer == Layer::malloc && !support::can_refuse_allocations) continue;
      for (const Lasting lasting : {Lasting::one, Lasting::all}) {
        // A sanitizer's fork takes a hundred times as long: half of the table does there.
        if (support::under_sanitizer && warm != (lasting == Lasting::all) && !all_combinations()) {
          continue;
        }
        long live = -1;
        for (long nth = 0; nth <= most; ++nth) {
          support::Child child = support::Child::run([&] {
            one_run<Case>({layer, lasting, reach}, nth, warm, live);
          });
          const support::Ended ended = child.end(std::chrono::seconds(20));
          const std::size_t at = ended.out.find("live ");
          const long alive = at == std::string::npos ? -1 : std::atol(ended.out.c_str() + at + 5);
          if (nth == 0) live = alive;
          const bool refused = ended.out.find("refused\n") != std::string::npos;
          if (ended.how != "exit 0" || !is_as_many(reach, alive, live)) {
            swept.problems += "request " + std::to_string(nth) +
                              (lasting == Lasting::all ? " and all later ones of " : " of ") +
                              name_of(layer) + (warm ? ", warm: " : ", cold: ") + ended.how + ", " +
                              std::to_string(alive) + " objects alive instead of " +
                              std::to_string(live) + "\n" + ended.err;
            if (++problems >= 4) return swept;
          }
          if (nth > 0 && !refused && ended.how == "exit 0") break;
          if (nth == 0) continue;
          ++swept.refusals;
          if (ended.out.find("threw\n") != std::string::npos) ++swept.failures;
          swept.longest = std::max(swept.longest, nth);
        }
      }
    }
  }
  return swept;
}

}  // namespace starvation
