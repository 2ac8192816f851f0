// What a shared object of module.cpp offers, found by dlsym().
#pragma once

extern "C" {
struct CompanyModule {
  /// A trap of these two numbers; null if it throws.
  void* (*make_trap)(int first, int second);
  /// The number of the next signal within that time, or 0.
  int (*wait_for_signal)(void* trap, int milliseconds);
  void (*destroy_trap)(void* trap);

  /// Uses a deadline, a callback, a named guard, a task group; true if all of it went well.
  bool (*use_everything)();
  /// Starts the timer thread, if there is none, with a deadline in 50 ms, and lets go of it.
  bool (*use_deadline)();
  /// Blocks in accept(2) on a listener to which nobody connects, until it is cancelled.
  bool (*accept_until_cancelled)();
  /// Whether a source made here is cancelled with a token of the caller's.
  bool (*follows)(const void* token, void (*cancel)());
  /// Children made here, of a token of the caller's: a std::vector<CancellationSource>*, for the caller to delete.
  void* (*make_children)(const void* token, int count);
  /// Destroys such a vector of the caller's.
  void (*destroy_children)(void* children);
  /// A child of a token of the caller's, with a deadline; for destroy_source().
  void* (*make_timed)(const void* token, int milliseconds);
  void (*destroy_source)(void* source);
  /// A callback on a token of the caller's that destroys itself, and adds to `runs` after that.
  void (*destroy_in_callback)(const void* token, int* runs);
  /// Cancels a source of the caller's, for no particular reason or with these words, if there are any.
  void (*cancel)(void* source, const char* why);
  /// A whole coordinator, by SIGTERM; its exit code.
  int (*drain_once)();
};
const CompanyModule* company_module();
}
