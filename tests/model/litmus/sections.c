/* S1 to S3 and W1 to W3 of detail/thread_sections.hpp, with membarrier(2): it interrupts the other thread
 * somewhere after W1, and that thread does a full fence there.
 *   BUG 1 (tso, pso) no membarrier
 *   BUG 2 (tso, pso) S2 is left out
 *   BUG 3 (tso, pso) W3 is left out
 */
#include "order.h"

int open = 1, slot, work; /* slot: 2 for a member, 1 while inside */
int asked, fenced;
int mine; /* the object, for whoever has it alone */

int nondet_int(void);

/* The interruption, if this is where it comes. */
#if BUG == 1
#define INTERRUPTED(here)
#else
#define INTERRUPTED(here)         \
  do {                            \
    if (place == (here)) {        \
      FULL_FENCE;                 \
      __CPROVER_assume(asked);    \
      FULL_FENCE;                 \
      fenced = 1;                 \
      FULL_FENCE;                 \
    }                             \
  } while (0)
#endif

void member(void) {
  const int place = nondet_int();
  __CPROVER_assume(place >= 0 && place <= 4);
  INTERRUPTED(0);
  work = 1; /* what a member did, and its waiter must see */
  slot = 1; /* S1 */
  INTERRUPTED(1);
#if BUG == 2
  const int let_in = 1;
#else
  const int let_in = open; /* S2 */
#endif
  INTERRUPTED(2);
  if (let_in) __CPROVER_assert(!mine, "nobody counts after W3");
  INTERRUPTED(3);
  STORE_RELEASE(slot, let_in ? 2 : 0); /* S3 */
  INTERRUPTED(4);
}

int main(void) {
  START(1, member);
  ATOMIC(open = 0); /* W1 */
#if BUG != 1
  asked = 1; /* W2 */
  FULL_FENCE;
  __CPROVER_assume(fenced);
  FULL_FENCE;
#endif
#if BUG != 3
  __CPROVER_assume((slot & 1) == 0); /* W3 */
#endif
  FULL_FENCE;
  const int sum = slot / 2;
  mine = 1;
  FULL_FENCE;
  __CPROVER_assert(!sum || work, "what came before S3 is seen");
  __CPROVER_assert(slot / 2 == sum, "no update comes after the sum");
}
