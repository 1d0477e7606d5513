/* Notes the clock every millisecond: the longest gap is the longest time that the guest had no processor. */
#include <stdatomic.h>
#include <stdio.h>

#include "guest.h"

static atomic_ulong ticks, longest_ns, longest_at_ns;
static atomic_int fresh;

static void *tick(void *unused) {
  (void)unused;
  uint64_t last = now_ns();
  for (;;) {
    sleep_ns(1000000);
    uint64_t now = now_ns();
    if (!fresh && now - last > longest_ns) {
      longest_ns = now - last;
      longest_at_ns = now;
    }
    fresh = 0;
    ticks++;
    last = now;
  }
}

void ticks_start(void) { start_thread(tick, NULL, 1); }

void ticks_reset(void) {
  longest_ns = longest_at_ns = 0;
  fresh = 1;
}

void ticks_status(char *out, size_t size) {
  snprintf(out, size, "{\"ticks\": %lu, \"longest_gap_us\": %lu, \"longest_gap_at_ns\": %lu}", ticks, longest_ns / 1000,
           longest_at_ns);
}
