/* Sleeping on a word (detail/futex.hpp): the waker stores the word, with release, and wakes by address; the
 * kernel compares the word under a lock of its own before it lets the waiter sleep.
 *   BUG 1 (tso, pso) the waker looks, without the kernel, whether anybody sleeps
 *   BUG 2 (tso, pso) the waiter sleeps whatever the word is by then
 *   BUG 3 (pso)      the word is stored without release
 *   BUG 4 (tso, pso) the waker wakes first and stores the word then
 */
#include "order.h"

int word, sleeps, told;
int ended;

void waker(void) {
  told = 7;
#if BUG == 4
  ATOMIC(sleeps = 0);
#endif
#if BUG == 3
  word = 1;
#else
  STORE_RELEASE(word, 1);
#endif
#if BUG == 1
  if (sleeps) sleeps = 0;
#elif BUG != 4
  ATOMIC(sleeps = 0);
#endif
  END(ended);
}

int main(void) {
  START(1, waker);
  const int first = word;
  ACQUIRE;
  if (first) {
    const int what = told;
    __CPROVER_assert(what == 7, "what the word announces is there");
  } else {
#if BUG == 2
    ATOMIC(sleeps = 1);
#else
    ATOMIC(if (word == 0) sleeps = 1);
#endif
  }
  JOIN(ended);
  __CPROVER_assert(!sleeps, "nobody sleeps on a word that has changed");
}
