// Which thread this is, as the kernel counts them.
#pragma once

#include <lastcall/detail/config.hpp>

#include <sys/types.h>
#include <unistd.h>

#if LASTCALL_LINUX
#include <sys/syscall.h>
#endif

namespace lastcall::detail {

/// The kernel's id of this thread (Linux); elsewhere the process id.
inline pid_t current_thread_id() noexcept {
#if LASTCALL_LINUX
  return static_cast<pid_t>(::syscall(SYS_gettid));
#else
  return ::getpid();
#endif
}

}  // namespace lastcall::detail
