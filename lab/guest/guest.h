/* The lab guest's program: services and loads that judge a move from inside the guest. See docs/lab.md. */
#ifndef GUEST_H
#define GUEST_H

#include <stddef.h>
#include <stdint.h>

#define PAGE 4096

/* CLOCK_MONOTONIC. Under emulation it stands still while the guest is paused. */
uint64_t now_ns(void);
void sleep_ns(uint64_t ns);
void start_thread(void *(*run)(void *), void *argument, int realtime);
/* A word that depends on all bits of both numbers; pages filled with it don't compress. */
uint64_t mix(uint64_t a, uint64_t b);

/* Keeps a loop at a rate: `pace_done` sleeps until that much work is due. A loop that fell behind by a second starts anew. */
struct pace {
  uint64_t began_ns;
  double done_mib;
};
void pace_done(struct pace *pace, double mib, double mib_per_s);

/* Each command writes its answer, one JSON value without a newline. */
void net_start(void);
void net_status(char *out, size_t size);

void ticks_start(void);
void ticks_status(char *out, size_t size);
void ticks_reset(void);
void ticks_stalls(char *out, size_t size);

void dirty_set(unsigned mib, double mib_per_s, char *out, size_t size);
void dirty_off(char *out, size_t size);
void dirty_status(char *out, size_t size);

void journal_start(const char *device, double mib_per_s, unsigned span_mib, char *out, size_t size);
void journal_stop(char *out, size_t size);
void journal_verify(char *out, size_t size);
void journal_status(char *out, size_t size);

#endif
