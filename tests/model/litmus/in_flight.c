/* I6 of signal_trap.hpp: a handler counts itself in flight, then reads the list; who unlinks does so, then
 * reads the count. All of it is sequentially consistent; the handler's leaving is a release. (One side: the
 * other is for signals that keep coming.)
 *   BUG 1 (tso, pso) the unlinking is a release store
 *   BUG 2 (tso, pso) the handler counts itself by a store
 *   BUG 3 (pso)      the handler leaves without release
 *   BUG 4 (tso, pso) the list is read before the counting
 */
#include "order.h"

int head = 1, in_flight, inbox, freed;

void handler(void) {
#if BUG == 4
  const int at = head;
  ATOMIC(in_flight = 1);
#else
#if BUG == 2
  in_flight = 1;
#else
  ATOMIC(in_flight = 1);
#endif
  const int at = head;
#endif
  if (at) {
    __CPROVER_assert(!freed, "nothing is freed under a handler's hand");
    inbox = 7;
  }
#if BUG != 3
  RELEASE;
#endif
  in_flight = 2; /* has left */
}

int main(void) {
  START(1, handler);
#if BUG == 1
  STORE_RELEASE(head, 0);
#else
  STORE_SEQ_CST(head, 0);
#endif
  const int seen = in_flight;
  __CPROVER_assume(seen != 1); /* waits while it is in flight */
  ACQUIRE;
  const int before = inbox;
  freed = 1;
  FULL_FENCE;
  __CPROVER_assert(inbox == before, "no record reaches what was freed");
}
