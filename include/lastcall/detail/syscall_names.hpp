// Names of the system calls that a thread can be found waiting in.
#pragma once

#include <lastcall/detail/config.hpp>

#if LASTCALL_LINUX

#include <sys/syscall.h>

#include <string_view>

namespace lastcall::detail {

struct SyscallName {
  long number;  // -1: this architecture or this kernel's headers don't have it
  std::string_view name;
  bool takes_descriptor;  // as its first argument
};

// Which calls exist differs from one architecture to the next, so each entry would need an #ifdef of
// its own. Instead the macro is turned into text: "42" if it is defined, "SYS_poll" if it isn't. Where
// numbers are sums, "(0x40000000 + 42)", the text is added up.
constexpr long syscall_number(std::string_view text) noexcept {
  long sum = 0;
  long number = 0;
  long base = 10;
  for (std::size_t at = 0; at < text.size(); ++at) {
    const char letter = text[at];
    if (letter == '(' || letter == ')' || letter == ' ') continue;
    if (letter == '+') {
      sum += number;
      number = 0;
      base = 10;
    } else if (letter == 'x' && at > 0 && text[at - 1] == '0') {
      base = 16;
    } else if (letter >= '0' && letter <= '9') {
      number = number * base + (letter - '0');
    } else if (base == 16 && letter >= 'a' && letter <= 'f') {
      number = number * base + (letter - 'a' + 10);
    } else {
      return -1;
    }
  }
  return sum + number;
}
static_assert(syscall_number("42") == 42 && syscall_number("SYS_none") == -1 &&
              syscall_number("(0x40 + 2)") == 66);

#define LASTCALL_TEXT_OF(expanded) #expanded
#define LASTCALL_TEXT(macro) LASTCALL_TEXT_OF(macro)
#define LASTCALL_CALL(name) \
  { syscall_number(LASTCALL_TEXT(SYS_##name)), #name, false }
#define LASTCALL_CALL_ON_FD(name) \
  { syscall_number(LASTCALL_TEXT(SYS_##name)), #name, true }

// The ones that can block, and the ones that a busy thread is likely to be caught in.
inline constexpr SyscallName syscall_names[] = {LASTCALL_CALL(futex),
                                                LASTCALL_CALL(futex_time64),
                                                LASTCALL_CALL(futex_waitv),
                                                LASTCALL_CALL(futex_wait),
                                                LASTCALL_CALL_ON_FD(read),
                                                LASTCALL_CALL_ON_FD(write),
                                                LASTCALL_CALL_ON_FD(readv),
                                                LASTCALL_CALL_ON_FD(writev),
                                                LASTCALL_CALL_ON_FD(pread64),
                                                LASTCALL_CALL_ON_FD(pwrite64),
                                                LASTCALL_CALL_ON_FD(preadv),
                                                LASTCALL_CALL_ON_FD(pwritev),
                                                LASTCALL_CALL_ON_FD(preadv2),
                                                LASTCALL_CALL_ON_FD(pwritev2),
                                                LASTCALL_CALL(poll),
                                                LASTCALL_CALL(ppoll),
                                                LASTCALL_CALL(ppoll_time64),
                                                LASTCALL_CALL(select),
                                                LASTCALL_CALL(_newselect),
                                                LASTCALL_CALL(pselect6),
                                                LASTCALL_CALL(pselect6_time64),
                                                LASTCALL_CALL_ON_FD(epoll_wait),
                                                LASTCALL_CALL_ON_FD(epoll_pwait),
                                                LASTCALL_CALL_ON_FD(epoll_pwait2),
                                                LASTCALL_CALL_ON_FD(epoll_ctl),
                                                LASTCALL_CALL(nanosleep),
                                                LASTCALL_CALL(clock_nanosleep),
                                                LASTCALL_CALL(clock_nanosleep_time64),
                                                LASTCALL_CALL(pause),
                                                LASTCALL_CALL(restart_syscall),
                                                LASTCALL_CALL_ON_FD(accept),
                                                LASTCALL_CALL_ON_FD(accept4),
                                                LASTCALL_CALL_ON_FD(connect),
                                                LASTCALL_CALL_ON_FD(sendto),
                                                LASTCALL_CALL_ON_FD(recvfrom),
                                                LASTCALL_CALL_ON_FD(send),
                                                LASTCALL_CALL_ON_FD(recv),
                                                LASTCALL_CALL_ON_FD(sendmsg),
                                                LASTCALL_CALL_ON_FD(recvmsg),
                                                LASTCALL_CALL_ON_FD(sendmmsg),
                                                LASTCALL_CALL_ON_FD(recvmmsg),
                                                LASTCALL_CALL_ON_FD(recvmmsg_time64),
                                                LASTCALL_CALL_ON_FD(shutdown),
                                                LASTCALL_CALL(socketcall),
                                                LASTCALL_CALL(socket),
                                                LASTCALL_CALL_ON_FD(bind),
                                                LASTCALL_CALL_ON_FD(listen),
                                                LASTCALL_CALL(socketpair),
                                                LASTCALL_CALL_ON_FD(setsockopt),
                                                LASTCALL_CALL_ON_FD(getsockopt),
                                                LASTCALL_CALL(wait4),
                                                LASTCALL_CALL(waitid),
                                                LASTCALL_CALL(waitpid),
                                                LASTCALL_CALL(vfork),
                                                LASTCALL_CALL(fork),
                                                LASTCALL_CALL(clone),
                                                LASTCALL_CALL(clone3),
                                                LASTCALL_CALL(execve),
                                                LASTCALL_CALL(execveat),
                                                LASTCALL_CALL(exit),
                                                LASTCALL_CALL(exit_group),
                                                LASTCALL_CALL(rt_sigsuspend),
                                                LASTCALL_CALL(sigsuspend),
                                                LASTCALL_CALL(rt_sigtimedwait),
                                                LASTCALL_CALL(rt_sigtimedwait_time64),
                                                LASTCALL_CALL(rt_sigaction),
                                                LASTCALL_CALL(rt_sigprocmask),
                                                LASTCALL_CALL(rt_sigreturn),
                                                LASTCALL_CALL_ON_FD(signalfd4),
                                                LASTCALL_CALL(kill),
                                                LASTCALL_CALL(tkill),
                                                LASTCALL_CALL(tgkill),
                                                LASTCALL_CALL(open),
                                                LASTCALL_CALL_ON_FD(openat),
                                                LASTCALL_CALL_ON_FD(openat2),
                                                LASTCALL_CALL(creat),
                                                LASTCALL_CALL_ON_FD(close),
                                                LASTCALL_CALL(close_range),
                                                LASTCALL_CALL_ON_FD(fsync),
                                                LASTCALL_CALL_ON_FD(fdatasync),
                                                LASTCALL_CALL(sync),
                                                LASTCALL_CALL_ON_FD(syncfs),
                                                LASTCALL_CALL_ON_FD(sync_file_range),
                                                LASTCALL_CALL_ON_FD(ftruncate),
                                                LASTCALL_CALL(truncate),
                                                LASTCALL_CALL_ON_FD(fallocate),
                                                LASTCALL_CALL_ON_FD(flock),
                                                LASTCALL_CALL_ON_FD(fcntl),
                                                LASTCALL_CALL_ON_FD(fcntl64),
                                                LASTCALL_CALL_ON_FD(ioctl),
                                                LASTCALL_CALL_ON_FD(lseek),
                                                LASTCALL_CALL_ON_FD(sendfile),
                                                LASTCALL_CALL_ON_FD(sendfile64),
                                                LASTCALL_CALL_ON_FD(splice),
                                                LASTCALL_CALL_ON_FD(tee),
                                                LASTCALL_CALL_ON_FD(vmsplice),
                                                LASTCALL_CALL_ON_FD(copy_file_range),
                                                LASTCALL_CALL_ON_FD(getdents),
                                                LASTCALL_CALL_ON_FD(getdents64),
                                                LASTCALL_CALL(stat),
                                                LASTCALL_CALL(lstat),
                                                LASTCALL_CALL_ON_FD(fstat),
                                                LASTCALL_CALL_ON_FD(newfstatat),
                                                LASTCALL_CALL_ON_FD(statx),
                                                LASTCALL_CALL(statfs),
                                                LASTCALL_CALL_ON_FD(fstatfs),
                                                LASTCALL_CALL(access),
                                                LASTCALL_CALL_ON_FD(faccessat),
                                                LASTCALL_CALL_ON_FD(faccessat2),
                                                LASTCALL_CALL(readlink),
                                                LASTCALL_CALL_ON_FD(readlinkat),
                                                LASTCALL_CALL(rename),
                                                LASTCALL_CALL_ON_FD(renameat),
                                                LASTCALL_CALL_ON_FD(renameat2),
                                                LASTCALL_CALL(unlink),
                                                LASTCALL_CALL_ON_FD(unlinkat),
                                                LASTCALL_CALL(mkdir),
                                                LASTCALL_CALL_ON_FD(mkdirat),
                                                LASTCALL_CALL(rmdir),
                                                LASTCALL_CALL(link),
                                                LASTCALL_CALL_ON_FD(linkat),
                                                LASTCALL_CALL(symlink),
                                                LASTCALL_CALL(mount),
                                                LASTCALL_CALL(umount2),
                                                LASTCALL_CALL(mmap),
                                                LASTCALL_CALL(mmap2),
                                                LASTCALL_CALL(munmap),
                                                LASTCALL_CALL(mremap),
                                                LASTCALL_CALL(mprotect),
                                                LASTCALL_CALL(madvise),
                                                LASTCALL_CALL(msync),
                                                LASTCALL_CALL(mlock),
                                                LASTCALL_CALL(mlockall),
                                                LASTCALL_CALL(munlock),
                                                LASTCALL_CALL(brk),
                                                LASTCALL_CALL(membarrier),
                                                LASTCALL_CALL(sched_yield),
                                                LASTCALL_CALL(getrandom),
                                                LASTCALL_CALL(ptrace),
                                                LASTCALL_CALL(process_vm_readv),
                                                LASTCALL_CALL(msgsnd),
                                                LASTCALL_CALL(msgrcv),
                                                LASTCALL_CALL(semop),
                                                LASTCALL_CALL(semtimedop),
                                                LASTCALL_CALL(semtimedop_time64),
                                                LASTCALL_CALL(ipc),
                                                LASTCALL_CALL_ON_FD(mq_timedsend),
                                                LASTCALL_CALL_ON_FD(mq_timedsend_time64),
                                                LASTCALL_CALL_ON_FD(mq_timedreceive),
                                                LASTCALL_CALL_ON_FD(mq_timedreceive_time64),
                                                LASTCALL_CALL(io_getevents),
                                                LASTCALL_CALL(io_pgetevents),
                                                LASTCALL_CALL(io_submit),
                                                LASTCALL_CALL(io_destroy),
                                                LASTCALL_CALL_ON_FD(io_uring_enter),
                                                LASTCALL_CALL_ON_FD(io_uring_register),
                                                LASTCALL_CALL_ON_FD(timerfd_settime),
                                                LASTCALL_CALL_ON_FD(pidfd_send_signal),
                                                LASTCALL_CALL_ON_FD(pidfd_getfd),
                                                LASTCALL_CALL(clock_gettime),
                                                LASTCALL_CALL(gettimeofday),
                                                LASTCALL_CALL(getpid),
                                                LASTCALL_CALL(gettid),
                                                LASTCALL_CALL(getrusage),
                                                LASTCALL_CALL(prctl),
                                                LASTCALL_CALL_ON_FD(finit_module),
                                                LASTCALL_CALL(init_module),
                                                LASTCALL_CALL(userfaultfd),
                                                LASTCALL_CALL(request_key),
                                                LASTCALL_CALL(keyctl),
                                                LASTCALL_CALL(add_key),
                                                LASTCALL_CALL(seccomp),
                                                LASTCALL_CALL(bpf),
                                                LASTCALL_CALL_ON_FD(setns),
                                                LASTCALL_CALL(unshare),
                                                LASTCALL_CALL(reboot)};

#undef LASTCALL_CALL_ON_FD
#undef LASTCALL_CALL
#undef LASTCALL_TEXT
#undef LASTCALL_TEXT_OF

/// Null for one that isn't listed. Async-signal-safe.
constexpr const SyscallName* find_syscall(long number) noexcept {
  for (const SyscallName& entry : syscall_names) {
    if (entry.number == number && number >= 0) return &entry;
  }
  return nullptr;
}

}  // namespace lastcall::detail

#endif
