/* Dirties memory at a rate and verifies what it wrote before: a write that a move lost shows as a bad page.
 *
 * Page i holds mix(i, j) in each word j, except for three words that change with every pass over the working set:
 * word 0 is the pass, word 100 three times the pass, word 511 mix(i, pass).
 * Each pass checks these three; `dirty off` and every change of the working set check all words of all pages.
 */
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guest.h"

#define WORDS (PAGE / 8)
#define BATCH 32

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* held for one batch, or for one command */
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static uint64_t *memory;
static size_t pages, next_page;
static uint64_t pass, bad, verified_pages, written_pages;
static double rate;
static int paused; /* a command waits for the lock: mutexes are not fair */

static void write_marks(uint64_t *page, size_t index, uint64_t of_pass) {
  page[0] = of_pass;
  page[100] = 3 * of_pass;
  page[WORDS - 1] = mix(index, of_pass);
}

static int marks_are(const uint64_t *page, size_t index, uint64_t of_pass) {
  return page[0] == of_pass && page[100] == 3 * of_pass && page[WORDS - 1] == mix(index, of_pass);
}

static void complain(size_t index, const uint64_t *page, uint64_t of_pass) {
  if (bad++ < 20)
    printf("guest: BAD page %zu in pass %lu: has %lu %lu\n", index, of_pass, page[0], page[100] / 3);
}

/* The pass that page `index` was last written in. */
static uint64_t pass_of(size_t index) { return index < next_page ? pass + 1 : pass; }

static void verify_all(void) {
  for (size_t i = 0; i < pages; i++) {
    const uint64_t *page = memory + i * WORDS;
    int good = marks_are(page, i, pass_of(i));
    for (size_t j = 1; good && j < WORDS - 1; j++) good = j == 100 || page[j] == mix(i, j);
    if (!good) complain(i, page, pass_of(i));
    verified_pages++;
  }
}

static void release(void) {
  if (!memory) return;
  verify_all();
  munmap(memory, pages * PAGE);
  memory = NULL;
  pages = 0;
}

static void *dirty(void *unused) {
  (void)unused;
  if (nice(5) == -1) perror("guest: nice"); /* the control port answers while the loads are at work */
  struct pace pace = {0};
  double paced_rate = 0;
  for (;;) {
    pthread_mutex_lock(&lock);
    while (!memory || rate <= 0 || paused) {
      pthread_cond_wait(&wake, &lock);
      pace = (struct pace){0};
    }
    for (int k = 0; k < BATCH; k++) {
      uint64_t *page = memory + next_page * WORDS;
      if (!marks_are(page, next_page, pass)) complain(next_page, page, pass);
      write_marks(page, next_page, pass + 1);
      written_pages++;
      if (++next_page == pages) {
        next_page = 0;
        pass++;
      }
    }
    double wanted = rate;
    pthread_mutex_unlock(&lock);
    if (wanted != paced_rate) pace = (struct pace){0};
    paced_rate = wanted;
    pace_done(&pace, BATCH * PAGE / 1048576.0, wanted);
  }
}

static void acquire(void) {
  static int started;
  paused = 1;
  pthread_mutex_lock(&lock);
  if (!started) start_thread(dirty, NULL, 0);
  started = 1;
}

static void yield(void) {
  paused = 0;
  pthread_cond_broadcast(&wake);
  pthread_mutex_unlock(&lock);
}

static void describe(char *out, size_t size) {
  snprintf(out, size,
           "{\"working_set_mib\": %zu, \"rate_mib_per_s\": %.3f, \"passes\": %lu, \"written_pages\": %lu, "
           "\"verified_pages\": %lu, \"bad_pages\": %lu}",
           pages * PAGE >> 20, memory ? rate : 0, pass, written_pages, verified_pages, bad);
}

void dirty_set(unsigned mib, double mib_per_s, char *out, size_t size) {
  acquire();
  if (pages * PAGE >> 20 != mib) {
    release();
    size_t wanted = (size_t)mib << 20;
    uint64_t *fresh = mmap(NULL, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) {
      snprintf(out, size, "{\"error\": \"no memory for %u MiB\"}", mib);
      yield();
      return;
    }
    memory = fresh;
    pages = wanted / PAGE;
    pass = next_page = 0;
    for (size_t i = 0; i < pages; i++) {
      for (size_t j = 0; j < WORDS; j++) memory[i * WORDS + j] = mix(i, j);
      write_marks(memory + i * WORDS, i, 0);
    }
  }
  rate = mib_per_s;
  describe(out, size);
  yield();
}

void dirty_off(char *out, size_t size) {
  acquire();
  release();
  describe(out, size);
  yield();
}

void dirty_status(char *out, size_t size) {
  acquire();
  describe(out, size);
  yield();
}
