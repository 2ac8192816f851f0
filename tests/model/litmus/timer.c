/* Invariant 3 of detail/timer_service.hpp: arm() publishes the shard's earliest tick, then reads
 * sleeping_until_; the timer thread publishes sleeping_until_, then reads the earliest ticks. One of them sees
 * the other. All four are sequentially consistent.
 *   BUG 1 (tso, pso) arm() publishes with release
 *   BUG 2 (tso, pso) the timer thread publishes with release
 *   BUG 3 (tso, pso) the timer thread looks first and publishes then
 */
#include "order.h"

int earliest = 9; /* 9: never */
int sleeping_until;
int rung, looks_again;
int ended;

void arm(void) {
#if BUG == 1
  STORE_RELEASE(earliest, 5);
#else
  STORE_SEQ_CST(earliest, 5);
#endif
  rung = earliest < sleeping_until;
  END(ended);
}

int main(void) {
  START(1, arm);
#if BUG == 3
  looks_again = earliest < 9;
  FULL_FENCE;
  STORE_SEQ_CST(sleeping_until, 9);
#else
#if BUG == 2
  STORE_RELEASE(sleeping_until, 9);
#else
  STORE_SEQ_CST(sleeping_until, 9);
#endif
  looks_again = earliest < 9;
#endif
  JOIN(ended);
  __CPROVER_assert(rung || looks_again, "no wake-up is lost");
}
