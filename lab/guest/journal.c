/* Writes numbered, checksummed records round robin to a region of a disk, past every cache.
 *
 * The region begins 1 MiB into the disk and has `slots` slots of 4096 bytes; record `seq` (1, 2, 3, …) is written to slot
 * (seq - 1) % slots. A record, little endian:
 *      0  u64  magic "HOJRNL01"
 *      8  u64  seq
 *     16  u64  the guest's monotonic clock, ns
 *     24  u64  byte offset on the disk
 *     32  u64  epoch: one random number for each `journal start`
 *     40  u64  slots
 *     48  words mix(seq ^ epoch, word index)
 *   4092  u32  CRC-32 (IEEE) of the 4092 bytes before
 * A record is acknowledged when the write, opened with O_DIRECT | O_SYNC, has returned. From then on it must be in its
 * slot, until the one `slots` later is written there. handoff_lab/journal.py checks an image the same way.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <unistd.h>

#include "guest.h"

#define REGION_BEGIN (1ull << 20)
#define MAX_BATCH 64
#define MAGIC 0x31304c4e524a4f48ull

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* held for one write, or for one command */
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int disk = -1, running, paused;
static char device[64];
static double rate;
static uint64_t epoch, slots, acked, errors, slowest_write_ns;
static int last_error;
static uint32_t crc_table[256];

static uint32_t crc32(const uint8_t *data, size_t size) {
  uint32_t crc = ~0u;
  while (size--) crc = crc_table[(crc ^ *data++) & 255] ^ (crc >> 8);
  return ~crc;
}

static void make_crc_table(void) {
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t c = i;
    for (int k = 0; k < 8; k++) c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
    crc_table[i] = c;
  }
}

static uint64_t offset_of(uint64_t seq) { return REGION_BEGIN + (seq - 1) % slots * PAGE; }

static void make_record(uint8_t *record, uint64_t seq) {
  uint64_t head[6] = {MAGIC, seq, now_ns(), offset_of(seq), epoch, slots};
  uint64_t *words = (uint64_t *)record;
  memcpy(record, head, sizeof head);
  for (size_t i = 6; i < PAGE / 8; i++) words[i] = mix(seq ^ epoch, i);
  uint32_t crc = crc32(record, PAGE - 4);
  memcpy(record + PAGE - 4, &crc, 4);
}

static void *write_journal(void *unused) {
  (void)unused;
  struct pace pace = {0};
  uint8_t *buffer = NULL;
  if (posix_memalign((void **)&buffer, PAGE, MAX_BATCH * PAGE)) abort();
  for (;;) {
    pthread_mutex_lock(&lock);
    while (!running || paused) {
      pthread_cond_wait(&wake, &lock);
      pace = (struct pace){0};
    }
    /* Each write is a flush of the disk: small ones can't reach high rates. */
    uint64_t batch = rate >= 8 ? MAX_BATCH : rate >= 1 ? 8 : 1, to_end = slots - acked % slots;
    if (batch > to_end) batch = to_end;
    for (uint64_t k = 0; k < batch; k++) make_record(buffer + k * PAGE, acked + 1 + k);
    uint64_t began = now_ns();
    ssize_t size = pwrite(disk, buffer, batch * PAGE, offset_of(acked + 1));
    uint64_t took = now_ns() - began;
    if (took > slowest_write_ns) slowest_write_ns = took;
    if (size == (ssize_t)(batch * PAGE)) {
      acked += batch;
    } else {
      last_error = size < 0 ? errno : EIO;
      if (errors++ < 20) printf("guest: journal write failed: %s\n", strerror(last_error));
    }
    double wanted = rate;
    pthread_mutex_unlock(&lock);
    if (size <= 0) sleep_ns(100000000);
    pace_done(&pace, batch * PAGE / 1048576.0, wanted);
  }
}

static void acquire(void) {
  static int started;
  paused = 1;
  pthread_mutex_lock(&lock);
  if (!started) {
    make_crc_table();
    start_thread(write_journal, NULL, 0);
  }
  started = 1;
}

static void yield(void) {
  paused = 0;
  pthread_cond_broadcast(&wake);
  pthread_mutex_unlock(&lock);
}

static void describe(char *out, size_t size) {
  snprintf(out, size,
           "{\"running\": %s, \"device\": \"%s\", \"rate_mib_per_s\": %.3f, \"epoch\": %lu, \"slots\": %lu, "
           "\"acked_seq\": %lu, \"write_errors\": %lu, \"last_errno\": %d, \"slowest_write_us\": %lu}",
           running ? "true" : "false", device, running ? rate : 0, epoch, slots, acked, errors, last_error,
           slowest_write_ns / 1000);
}

static const char *open_disk(const char *path, uint64_t span) {
  uint64_t length = 0;
  int fresh = open(path, O_RDWR | O_DIRECT | O_SYNC | O_CLOEXEC);
  if (fresh < 0) return strerror(errno);
  if (ioctl(fresh, BLKGETSIZE64, &length) || length < REGION_BEGIN + span || !span) {
    close(fresh);
    return "the region does not fit the disk";
  }
  if (disk >= 0) close(disk);
  disk = fresh;
  snprintf(device, sizeof device, "%s", path);
  return NULL;
}

/* While it runs, `start` only sets the rate. */
void journal_start(const char *path, double mib_per_s, unsigned span_mib, char *out, size_t size) {
  acquire();
  const char *problem = NULL;
  uint64_t span = (uint64_t)span_mib << 20;
  if (mib_per_s <= 0) problem = "the rate must be positive";
  else if (running && (strcmp(path, device) || slots * PAGE != span)) problem = "already running elsewhere: stop it first";
  else if (!running) problem = open_disk(path, span);
  if (problem) {
    snprintf(out, size, "{\"error\": \"journal: %s: %s\"}", path, problem);
    yield();
    return;
  }
  if (!running) {
    if (getrandom(&epoch, sizeof epoch, 0) != sizeof epoch) epoch = now_ns();
    epoch >>= 1; /* fits the signed integers of every JSON reader */
    slots = span / PAGE;
    acked = errors = slowest_write_ns = 0;
    last_error = 0;
    running = 1;
  }
  rate = mib_per_s;
  describe(out, size);
  yield();
}

void journal_stop(char *out, size_t size) {
  acquire();
  running = 0;
  describe(out, size);
  yield();
}

void journal_status(char *out, size_t size) {
  acquire();
  describe(out, size);
  yield();
}

/* Rereads what must be on the disk; the writer waits meanwhile.
 * torn: a checksum is wrong; lost: the slot has an older record, or none; misplaced: a record that belongs elsewhere or is
 * newer than what was ever written. */
void journal_verify(char *out, size_t size) {
  acquire();
  uint64_t checked = 0, lost = 0, torn = 0, misplaced = 0, first_bad = 0, unreadable = 0;
  uint64_t used = acked < slots ? acked : slots;
  uint8_t *buffer = NULL;
  if (posix_memalign((void **)&buffer, PAGE, MAX_BATCH * PAGE)) abort();
  for (uint64_t slot = 0; slot < used; slot += MAX_BATCH) {
    uint64_t count = used - slot < MAX_BATCH ? used - slot : MAX_BATCH;
    if (pread(disk, buffer, count * PAGE, REGION_BEGIN + slot * PAGE) != (ssize_t)(count * PAGE)) {
      unreadable += count;
      continue;
    }
    for (uint64_t k = 0; k < count; k++) {
      const uint8_t *record = buffer + k * PAGE;
      uint64_t head[6], expected = slot + k + 1 + (acked - (slot + k + 1)) / slots * slots, was_bad = lost + torn + misplaced;
      uint32_t crc;
      memcpy(head, record, sizeof head);
      memcpy(&crc, record + PAGE - 4, 4);
      checked++;
      if (head[0] != MAGIC || head[4] != epoch) lost++;
      else if (crc != crc32(record, PAGE - 4)) torn++;
      else if (head[3] != offset_of(expected) || head[1] > expected + slots || (head[1] - 1) % slots != slot + k) misplaced++;
      else if (head[1] < expected) lost++;
      if (lost + torn + misplaced > was_bad && !first_bad) first_bad = expected;
    }
  }
  free(buffer);
  snprintf(out, size,
           "{\"epoch\": %lu, \"acked_seq\": %lu, \"checked\": %lu, \"lost\": %lu, \"torn\": %lu, \"misplaced\": %lu, "
           "\"unreadable\": %lu, \"write_errors\": %lu, \"first_bad_seq\": %lu}",
           epoch, acked, checked, lost, torn, misplaced, unreadable, errors, first_bad);
  yield();
}
