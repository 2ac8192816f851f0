// What the kernel knows of the other threads of the process.
#pragma once

#include "support/threads.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#if defined(__linux__)
#include <dirent.h>
#endif

namespace support {

struct OtherThread {
  std::string name;
  std::uint64_t blocked = 0;  // bit n - 1: signal n
  long wakeups = 0;
};

/// Every thread of the process but this one, by name. Nobody, where the kernel can't be asked.
inline std::vector<OtherThread> other_threads() {
  std::vector<OtherThread> all;
#if defined(__linux__)
  DIR* const directory = ::opendir("/proc/self/task");
  if (directory == nullptr) return all;
  while (const dirent* const entry = ::readdir(directory)) {
    if (entry->d_name[0] == '.' || std::atoi(entry->d_name) == thread_id()) continue;
    char path[300];
    std::snprintf(path, sizeof path, "/proc/self/task/%s/status", entry->d_name);
    std::FILE* const file = std::fopen(path, "re");
    if (file == nullptr) continue;
    OtherThread thread;
    char line[256];
    while (std::fgets(line, sizeof line, file) != nullptr) {
      char name[64];
      unsigned long long mask = 0;
      long switches = 0;
      if (std::sscanf(line, "Name: %63s", name) == 1) thread.name = name;
      if (std::sscanf(line, "SigBlk: %llx", &mask) == 1) thread.blocked = mask;
      if (std::sscanf(line, "voluntary_ctxt_switches: %ld", &switches) == 1)
        thread.wakeups = switches;
    }
    std::fclose(file);
    all.push_back(thread);
  }
  ::closedir(directory);
  std::sort(all.begin(), all.end(),
            [](const OtherThread& a, const OtherThread& b) { return a.name < b.name; });
#endif
  return all;
}

}  // namespace support
