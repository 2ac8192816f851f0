// Included before everything else in a build with mutants: LASTCALL_MUTANT(n) says whether mutant n is
// the one to run, and notes that it could have been. Async-signal-safe, and false in constant expressions.
#pragma once

extern "C" {
extern unsigned lastcall_mutant;                  // 0: none
extern unsigned char* volatile lastcall_reached;  // a byte for each mutant
}

constexpr bool lastcall_mutant_is_on(unsigned number) noexcept {
  if (__builtin_is_constant_evaluated()) return false;
  lastcall_reached[number] = 1;
  return number == lastcall_mutant;
}

#define LASTCALL_MUTANT(number) lastcall_mutant_is_on(number)
