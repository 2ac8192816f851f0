// Linked into every program of a build with mutants. LASTCALL_MUTANT_ON is the number of the one to run;
// LASTCALL_MUTANTS_REACHED is a file with a byte for each, which all processes of a test share, so that
// one that is killed has said what it reached.
#include "switches.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>

namespace {
constexpr unsigned limit = 65536;
unsigned char nowhere[limit];
}  // namespace

extern "C" {
unsigned lastcall_mutant = 0;
unsigned char* volatile lastcall_reached = nowhere;
}

// Before the constructors of static objects.
__attribute__((constructor(101))) static void choose() {
  if (const char* number = std::getenv("LASTCALL_MUTANT_ON")) {
    lastcall_mutant = static_cast<unsigned>(std::strtoul(number, nullptr, 10));
  }
  const char* const path = std::getenv("LASTCALL_MUTANTS_REACHED");
  if (path == nullptr) return;
  const int file = ::open(path, O_RDWR | O_CLOEXEC);
  if (file < 0) return;
  void* const map = ::mmap(nullptr, limit, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (map != MAP_FAILED) lastcall_reached = static_cast<unsigned char*>(map);
  ::close(file);
}
