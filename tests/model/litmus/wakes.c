/* The coordinator's two threads (detail/engine_state.hpp: signal_thread_wakes; drain_calls.hpp: guarded()).
 * The drain thread enters a section, then loads when the signal thread will wake, and whether there was an
 * abort; the signal thread says when it will wake, then looks at the section, and claims the abort, then
 * looks at the section. All of it is sequentially consistent: one sees the other, both times.
 *   BUG 1 (tso, pso) the section is entered with release
 *   BUG 2 (tso, pso) the time of waking is stored with release
 *   BUG 3 (tso, pso) the abort is claimed by a store with release, not by an exchange
 */
#include "order.h"

int inside, wakes_at, aborted;
int rung, sees_abort;
int ended;

void drain_thread(void) {
#if BUG == 1
  STORE_RELEASE(inside, 1);
#else
  STORE_SEQ_CST(inside, 1);
#endif
  sees_abort = aborted;
  rung = wakes_at == 9;
  END(ended);
}

int main(void) {
  START(1, drain_thread);
#if BUG == 2
  STORE_RELEASE(wakes_at, 9);
#else
  STORE_SEQ_CST(wakes_at, 9);
#endif
  const int planned = inside;
#if BUG == 3
  STORE_RELEASE(aborted, 1);
#else
  ATOMIC(aborted = 1);
#endif
  const int hurried = inside;
  JOIN(ended);
  __CPROVER_assert(planned || rung, "the section's deadline is known");
  __CPROVER_assert(hurried || sees_abort, "the section takes the abort into account");
}
