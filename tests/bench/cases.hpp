// What the benchmark program is made of: each of these registers its cases.
#pragma once

#include <string>
#include <vector>

namespace bench {

void add_tree_cases();      // checks, children, callbacks, big trees
void add_group_cases();     // guards
void add_wake_cases();      // who waits runs: last guard out, a signal
void add_deadline_cases();  // made and cancelled, and all fired
void add_size_cases();      // bytes a child, milliseconds to compile

/// The resident bytes that a million children of `contender` take, each; for the program that
/// add_size_cases() starts.
double bytes_of_child(const std::string& contender);

/// Prints what operations take when there are more threads than processors.
void print_crowd();

/// The one row of the table that is no ratio: 1,000 threads wait on a token for that many seconds.
struct Idle {
  double cpu_seconds;
  long wake_ups;
};
Idle idle_waiters(double seconds);

}  // namespace bench
