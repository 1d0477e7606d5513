/* Notes the clock every millisecond: the longest gap is the longest time that the guest had no processor. Gaps of STALL_NS
 * and more are stalls; the last of them are kept. */
#include <stdatomic.h>
#include <stdio.h>

#include "guest.h"

#define STALL_NS 3000000ull
#define MAX_STALLS 64

static atomic_ulong ticks, longest_ns, longest_at_ns, stall_count;
static atomic_int fresh;
static struct { atomic_ulong began_ns, length_ns; } stalls[MAX_STALLS];

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
    if (!fresh && now - last >= STALL_NS) {
      stalls[stall_count % MAX_STALLS].began_ns = last;
      stalls[stall_count % MAX_STALLS].length_ns = now - last;
      stall_count++;
    }
    fresh = 0;
    ticks++;
    last = now;
  }
}

void ticks_start(void) { start_thread(tick, NULL, 1); }

void ticks_reset(void) {
  longest_ns = longest_at_ns = stall_count = 0;
  fresh = 1;
}

void ticks_status(char *out, size_t size) {
  snprintf(out, size, "{\"ticks\": %lu, \"longest_gap_us\": %lu, \"longest_gap_at_ns\": %lu}", ticks, longest_ns / 1000,
           longest_at_ns);
}

void ticks_stalls(char *out, size_t size) {
  uint64_t count = stall_count, first = count > MAX_STALLS ? count - MAX_STALLS : 0;
  size_t used = snprintf(out, size, "{\"stalls\": [");
  for (uint64_t n = first; n < count && used < size; n++)
    used += snprintf(out + used, size - used, "%s[%lu, %lu]", n > first ? ", " : "", stalls[n % MAX_STALLS].began_ns,
                     stalls[n % MAX_STALLS].length_ns);
  if (used < size) snprintf(out + used, size - used, "]}");
}
