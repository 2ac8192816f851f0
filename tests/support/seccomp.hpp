// A kernel that refuses a system call, as an old one or a sandbox does.
#pragma once

#include <lastcall/detail/config.hpp>

#if LASTCALL_LINUX && (defined(__x86_64__) || defined(__aarch64__))
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#endif

namespace support {

/// From here on this process's system calls of that number fail with `error`. False where no filter can be had.
inline bool refuse_call([[maybe_unused]] int number, [[maybe_unused]] int error) {
#if LASTCALL_LINUX && (defined(__x86_64__) || defined(__aarch64__))
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<unsigned>(number), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<unsigned>(error)),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter{4, program};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
#else
  return false;
#endif
}

}  // namespace support
