/* The lock of one bit (detail/spin_bit.hpp): taken by an exchange that acquires, let go by a plain store that
 * releases, which also sets flags: nobody else changes the word meanwhile.
 *   BUG 1 (pso)      unlocking without release
 *   BUG 2 (tso, pso) the lock is taken by a load and a store
 */
#include "order.h"

unsigned word;
int guarded;
int ended[2];

void locked_increment(void) {
  unsigned seen;
#if BUG == 2
  seen = word;
  __CPROVER_assume((seen & 1U) == 0);
  word = seen | 1U;
  FULL_FENCE;
#else
  ATOMIC(seen = word; __CPROVER_assume((seen & 1U) == 0); word = seen | 1U);
#endif
  guarded = guarded + 1;
#if BUG != 1
  RELEASE;
#endif
  word = (seen & ~1U) + 2U;
}

void other(void) {
  locked_increment();
  END(ended[0]);
}

int main(void) {
  START(1, other);
  locked_increment();
  JOIN(ended[0]);
  __CPROVER_assert(guarded == 2, "no update of what is guarded is lost");
  __CPROVER_assert(word == 4U, "no flag is lost");
}
