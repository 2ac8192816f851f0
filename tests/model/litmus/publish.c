/* I2 of cancellation.hpp: the cause is written, then the flag is released; who acquires the flag sees the cause,
 * and that every descendant has its flag. (Marking::enter() and leave(), is_cancelled().)
 *   BUG 1 (tso, pso) the flag is set before the cause is written
 *   BUG 2 (pso)      the flag is set without release
 *   BUG 3 (pso)      the parent's flag is set without release: it overtakes the child's
 */
#include "order.h"

int cause, flag_of_child, flag;

void canceller(void) {
#if BUG == 1
  flag_of_child = 1;
  FULL_FENCE;
  cause = 7;
#elif BUG == 2
  cause = 7;
  flag_of_child = 1;
#else
  cause = 7;
  STORE_RELEASE(flag_of_child, 1);
#endif
#if BUG == 3
  flag = 1;
#else
  STORE_RELEASE(flag, 1);
#endif
}

int main(void) {
  START(1, canceller);
  const int parent_is = flag;
  ACQUIRE;
  const int child_is = flag_of_child;
  ACQUIRE;
  const int why = cause;
  __CPROVER_assert(!child_is || why == 7, "who sees the flag sees the cause");
  __CPROVER_assert(!parent_is || child_is, "who sees it in a parent sees it in the child");
}
