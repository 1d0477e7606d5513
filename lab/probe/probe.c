/* handoff-probe ADDRESS PORT INTERVAL_US GAP_US: sends a numbered datagram to a UDP echo every interval until standard
 * input ends, waits half a second for late answers, and prints one JSON object. The times of arrival are the kernel's.
 *
 * A gap is the time between two arrivals next to each other, where that is at least GAP_US. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000ull
#define MAX_PROBES (1u << 23)
#define MAX_GAPS 1000
#define LINGER (SECOND / 2)

static uint64_t clock_ns(clockid_t id) {
  struct timespec t;
  clock_gettime(id, &t);
  return t.tv_sec * SECOND + t.tv_nsec;
}

static struct { uint64_t at_ns, length_ns; } gaps[MAX_GAPS];
static unsigned gap_count;
static uint64_t last_ns, longest_ns, longest_at_ns, gap_limit_ns;
static uint64_t received, duplicated, late, highest, slowest_ns, total_ns;
static uint64_t *sent_at;
static uint8_t *seen;

static void arrived(const uint64_t *message, uint64_t at_ns, uint64_t sent) {
  uint64_t number = message[0];
  if (number >= sent) return;
  if (seen[number]) {
    duplicated++;
  } else {
    uint64_t took = at_ns - sent_at[number];
    seen[number] = 1;
    received++;
    total_ns += took;
    if (took > slowest_ns) slowest_ns = took;
    if (number < highest) late++;
    else highest = number;
  }
  if (last_ns && at_ns > last_ns) {
    uint64_t gap = at_ns - last_ns;
    if (gap > longest_ns) {
      longest_ns = gap;
      longest_at_ns = last_ns;
    }
    if (gap >= gap_limit_ns && gap_count < MAX_GAPS) {
      gaps[gap_count].at_ns = last_ns;
      gaps[gap_count++].length_ns = gap;
    }
  }
  last_ns = at_ns;
}

static void receive_all(int s, uint64_t sent) {
  for (;;) {
    uint64_t message[4];
    union { char room[CMSG_SPACE(sizeof(struct timespec))]; struct cmsghdr aligned; } control;
    struct iovec data = {message, sizeof message};
    struct msghdr header = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t size = recvmsg(s, &header, MSG_DONTWAIT);
    if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (size < (ssize_t)sizeof message) continue; /* ECONNREFUSED while the guest boots is no answer */
    uint64_t at_ns = clock_ns(CLOCK_REALTIME);
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&header); c; c = CMSG_NXTHDR(&header, c)) {
      struct timespec stamp;
      if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_TIMESTAMPNS) continue;
      memcpy(&stamp, CMSG_DATA(c), sizeof stamp);
      at_ns = stamp.tv_sec * SECOND + stamp.tv_nsec;
    }
    arrived(message, at_ns, sent);
  }
}

int main(int argc, char **argv) {
  if (argc != 5) {
    fprintf(stderr, "usage: %s ADDRESS PORT INTERVAL_US GAP_US\n", argv[0]);
    return 2;
  }
  struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
  uint64_t interval = strtoull(argv[3], NULL, 10) * 1000;
  int s = socket(AF_INET, SOCK_DGRAM, 0), on = 1, room = 4 << 20;
  gap_limit_ns = strtoull(argv[4], NULL, 10) * 1000;
  sent_at = calloc(MAX_PROBES, sizeof *sent_at);
  seen = calloc(MAX_PROBES, 1);
  if (!sent_at || !seen || !interval || !inet_aton(argv[1], &peer.sin_addr)) return 2;
  setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
  setsockopt(s, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
  if (connect(s, (struct sockaddr *)&peer, sizeof peer)) {
    perror("handoff-probe: connect");
    return 1;
  }
  /* What measures must not wait for what loads. */
  struct sched_param priority = {.sched_priority = 20};
  sched_setscheduler(0, SCHED_FIFO, &priority);

  uint64_t sent = 0, unsent = 0, due = clock_ns(CLOCK_MONOTONIC), stop_at = 0;
  for (;;) {
    uint64_t now = clock_ns(CLOCK_MONOTONIC);
    if (stop_at && now >= stop_at) break;
    if (!stop_at && now >= due) {
      if (sent < MAX_PROBES) {
        uint64_t message[4] = {sent};
        message[1] = sent_at[sent] = clock_ns(CLOCK_REALTIME);
        if (send(s, message, sizeof message, 0) < 0) unsent++;
        sent++;
      }
      due += interval;
      if (now > due + SECOND) due = now;
    }
    receive_all(s, sent);
    uint64_t until = stop_at ? stop_at : due;
    now = clock_ns(CLOCK_MONOTONIC);
    if (until <= now) continue;
    struct pollfd ready[2] = {{s, POLLIN, 0}, {stop_at ? -1 : STDIN_FILENO, POLLIN, 0}};
    struct timespec left = {(until - now) / SECOND, (until - now) % SECOND};
    if (ppoll(ready, 2, &left, NULL) > 0 && ready[1].revents) {
      char ignored[64];
      if (read(STDIN_FILENO, ignored, sizeof ignored) <= 0) stop_at = clock_ns(CLOCK_MONOTONIC) + LINGER;
    }
  }
  /* Silence at the end is a gap as well: up to the last datagram that went unanswered. */
  if (sent && last_ns && !seen[sent - 1] && sent_at[sent - 1] > last_ns && sent_at[sent - 1] - last_ns > longest_ns) {
    longest_ns = sent_at[sent - 1] - last_ns;
    longest_at_ns = last_ns;
  }
  printf("{\"sent\": %" PRIu64 ", \"unsent\": %" PRIu64 ", \"received\": %" PRIu64 ", \"duplicated\": %" PRIu64
         ", \"late\": %" PRIu64 ", \"longest_gap_ns\": %" PRIu64 ", \"longest_gap_at_ns\": %" PRIu64
         ", \"slowest_ns\": %" PRIu64 ", \"mean_ns\": %" PRIu64 ", \"gaps\": [",
         sent, unsent, received, duplicated, late, longest_ns, longest_at_ns, slowest_ns, received ? total_ns / received : 0);
  for (unsigned i = 0; i < gap_count; i++)
    printf("%s[%" PRIu64 ", %" PRIu64 "]", i ? ", " : "", gaps[i].at_ns, gaps[i].length_ns);
  printf("]}\n");
  return 0;
}
