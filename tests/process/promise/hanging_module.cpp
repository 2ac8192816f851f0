// A shared object whose loading never ends.
#include <unistd.h>

[[gnu::constructor]] static void hang() {
  for (;;) ::pause();
}
