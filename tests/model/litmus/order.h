/* What the litmus tests are written in: the C++ memory orders as fences of cbmc's.
 *
 * Under --mm tso a load may overtake an earlier store to another place; under --mm pso a store may too. Loads
 * are never reordered there, nor stores with earlier loads: what acquire is for is argued in ../README.md.
 * An atomic read-modify-write, and a system call, is a full fence, as on the processors with these models.
 */
#ifndef LASTCALL_LITMUS_ORDER_H
#define LASTCALL_LITMUS_ORDER_H

#ifndef BUG
#define BUG 0
#endif

#define FULL_FENCE __CPROVER_fence("WWfence", "RRfence", "RWfence", "WRfence")
/* What comes before a store, or after a load. */
#define RELEASE __CPROVER_fence("WWfence", "RWfence")
#define ACQUIRE __CPROVER_fence("RRfence", "RWfence")

#define STORE_RELEASE(to, value) \
  do {                           \
    RELEASE;                     \
    (to) = (value);              \
  } while (0)
#define STORE_SEQ_CST(to, value) \
  do {                           \
    RELEASE;                     \
    (to) = (value);              \
    FULL_FENCE;                  \
  } while (0)

/* A read-modify-write, or what the kernel does in one piece. */
#define ATOMIC(...)          \
  do {                       \
    FULL_FENCE;              \
    __CPROVER_atomic_begin(); \
    __VA_ARGS__;             \
    __CPROVER_atomic_end();  \
    FULL_FENCE;              \
  } while (0)

#define START(number, thread) __CPROVER_ASYNC_##number: thread()
/* The end of a thread, and that it has ended. */
#define END(flag) \
  do {            \
    FULL_FENCE;   \
    (flag) = 1;   \
  } while (0)
#define JOIN(flag)             \
  do {                         \
    __CPROVER_assume(flag);    \
    FULL_FENCE;                \
  } while (0)

#endif
