// Keeps the code of a signal handler, or of a thread that never ends, in memory.
//
// Nobody can know that no thread is about to run a handler, or that no other handler has ours
// written down as the one to call next; and the timer thread is there as long as the process. So a
// shared object that has once put a handler in place, or started that thread, must never be unloaded:
// this makes its dlclose() do nothing.
#pragma once

#include <lastcall/detail/config.hpp>

#if LASTCALL_LINUX && defined(__GLIBC__) && defined(_GNU_SOURCE)
#include <dlfcn.h>
#include <link.h>
#define LASTCALL_CAN_PIN 1
#else
#define LASTCALL_CAN_PIN 0
#endif

namespace lastcall::detail {

#if LASTCALL_CAN_PIN

// Weak references of our own names: no -ldl is needed where these live there (before glibc 2.34), a
// static program doesn't get a dynamic loader, and the user's own references stay as they are.
static int weak_dladdr1(const void*, Dl_info*, void**, int) __attribute__((weakref("dladdr1")));
static void* weak_dlopen(const char*, int) __attribute__((weakref("dlopen")));

/// Keeps the object that holds `code` loaded until the process ends. Does nothing for the program
/// itself, and nothing where it can't be done. Takes the dynamic loader's lock.
inline void pin_module_of(const void* code) noexcept {
  Dl_info info{};
  void* extra = nullptr;
  if (weak_dladdr1 == nullptr || weak_dlopen == nullptr ||
      weak_dladdr1(code, &info, &extra, RTLD_DL_LINKMAP) == 0) {
    return;
  }
  const auto* module = static_cast<const link_map*>(extra);
  if (module == nullptr || module->l_name == nullptr || module->l_name[0] == '\0') return;
  weak_dlopen(module->l_name, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
}

#else

inline void pin_module_of(const void*) noexcept {}

#endif

}  // namespace lastcall::detail

#undef LASTCALL_CAN_PIN
