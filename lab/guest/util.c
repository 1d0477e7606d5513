#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "guest.h"

uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ull + t.tv_nsec;
}

void sleep_ns(uint64_t ns) {
  struct timespec t = {ns / 1000000000ull, ns % 1000000000ull};
  nanosleep(&t, NULL);
}

void start_thread(void *(*run)(void *), void *argument, int realtime) {
  pthread_attr_t attributes;
  pthread_t thread;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attributes, 256 << 10);
  if (realtime) {
    /* What measures must not wait for what loads. */
    struct sched_param parameters = {.sched_priority = 10};
    pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED);
    pthread_attr_setschedpolicy(&attributes, SCHED_FIFO);
    pthread_attr_setschedparam(&attributes, &parameters);
  }
  if (pthread_create(&thread, &attributes, run, argument)) {
    perror("guest: pthread_create");
    exit(1);
  }
  pthread_attr_destroy(&attributes);
}

uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15ull + b * 0xbf58476d1ce4e5b9ull + 1; /* splitmix64's constants */
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

void pace_done(struct pace *pace, double mib, double mib_per_s) {
  if (!pace->began_ns) pace->began_ns = now_ns();
  pace->done_mib += mib;
  double due = pace->done_mib / mib_per_s, elapsed = (now_ns() - pace->began_ns) / 1e9;
  if (due > elapsed) {
    sleep_ns((uint64_t)((due - elapsed) * 1e9));
  } else if (elapsed - due > 1) {
    pace->began_ns = now_ns();
    pace->done_mib = 0;
  }
}
