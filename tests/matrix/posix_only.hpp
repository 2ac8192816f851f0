// Included before everything else where the headers are compiled with nothing but POSIX.1-2008 in sight:
// what the standard library itself takes from GNU/Linux, so that whatever else is missed is lastcall's.
#pragma once

#include <pthread.h>

#include <ctime>

extern "C" {
long syscall(long, ...) noexcept;
int pthread_cond_clockwait(pthread_cond_t*, pthread_mutex_t*, clockid_t, const timespec*);
int pthread_mutex_clocklock(pthread_mutex_t*, clockid_t, const timespec*) noexcept;
}
