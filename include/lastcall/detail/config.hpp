// Which facilities of the platform are used. Everything Linux-only has a POSIX fallback;
// defining LASTCALL_PORTABLE chooses every fallback at once, so that one CI build proves them.
#pragma once

#if !defined(__cplusplus) || __cplusplus < 202002L
#error "lastcall needs C++20 (-std=c++20)"
#include "lastcall_needs_cxx20"  // there is none: compilers stop here, before errors that bury that one
#endif

#include <version>

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define LASTCALL_TSAN 1
#endif
#if __has_feature(address_sanitizer)
#define LASTCALL_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__) && !defined(LASTCALL_TSAN)
#define LASTCALL_TSAN 1
#endif
#if defined(__SANITIZE_ADDRESS__) && !defined(LASTCALL_ASAN)
#define LASTCALL_ASAN 1
#endif

// futex(2), eventfd(2), /proc/self/task, gettid(2), membarrier(2) and pipe2(2).
#if defined(__linux__) && !defined(LASTCALL_PORTABLE)
#define LASTCALL_LINUX 1
#else
#define LASTCALL_LINUX 0
#endif

// glibc's unwinding of a thread that ends itself is caught by a reference that is bound to nothing.
#define LASTCALL_NO_NULL_CHECK __attribute__((no_sanitize("null")))

// With -fno-exceptions an error ends the process with the message that it would have thrown.
#if defined(__cpp_exceptions) || defined(__EXCEPTIONS)
#define LASTCALL_EXCEPTIONS 1
#define LASTCALL_TRY try
#define LASTCALL_CATCH(...) catch (__VA_ARGS__)
#define LASTCALL_RETHROW throw
#else
#define LASTCALL_EXCEPTIONS 0
#define LASTCALL_TRY if constexpr (true)
#define LASTCALL_CATCH(...) else
#define LASTCALL_RETHROW static_cast<void>(0)
#endif
