/* handoff-probe ADDRESS PORT INTERVAL_US GAP_US [INTERFACE]: sends a numbered datagram to a UDP echo every interval until
 * standard input ends, waits half a second for late answers, and prints one JSON object. The times of arrival are the
 * kernel's. Port 0: pings instead.
 *
 * A gap is the time between two arrivals next to each other, where that is at least GAP_US; an answer that took as long
 * has waited. The clock is of the quickest answer in each WINDOW: when it arrived, how long it took, and how far ours was
 * ahead of the guest's, which a lab guest puts in its answers; that is as exact as half of the time that it took.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/ip_icmp.h>
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
#define WINDOW (SECOND / 10)

static uint64_t clock_ns(clockid_t id) {
  struct timespec t;
  clock_gettime(id, &t);
  return t.tv_sec * SECOND + t.tv_nsec;
}

static struct { uint64_t at_ns, length_ns; } gaps[MAX_GAPS];
static unsigned gap_count;
static uint64_t last_ns, longest_ns, longest_at_ns, gap_limit_ns;
static uint64_t received, duplicated, late, waited, highest, slowest_ns, total_ns;
static uint64_t *sent_at, *arrived_at, *guest_clock;
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
    arrived_at[number] = at_ns;
    guest_clock[number] = message[2];
    total_ns += took;
    if (took >= gap_limit_ns) waited++;
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

/* The quickest answer of each window, in the order of arrival. */
static void print_clock(uint64_t sent) {
  int64_t best = -1;
  const char *comma = "";
  for (uint64_t n = 0; n <= sent; n++) {
    if (n < sent && !seen[n]) continue;
    if (best >= 0 && (n == sent || arrived_at[n] / WINDOW != arrived_at[best] / WINDOW)) {
      uint64_t took = arrived_at[best] - sent_at[best];
      printf("%s[%" PRIu64 ", %" PRIu64 ", %" PRId64 "]", comma, arrived_at[best], took,
             (int64_t)(arrived_at[best] - took / 2 - guest_clock[best]));
      comma = ", ";
      best = -1;
    }
    if (n < sent && (best < 0 || arrived_at[n] - sent_at[n] < arrived_at[best] - sent_at[best])) best = n;
  }
}

/* When the first MAX_GAPS of those were sent that nobody answered. */
static void print_unanswered(uint64_t sent) {
  unsigned count = 0;
  for (uint64_t n = 0; n < sent && count < MAX_GAPS; n++)
    if (!seen[n]) printf("%s%" PRIu64, count++ ? ", " : "", sent_at[n]);
}

static uint16_t checksum(const void *data, size_t size) {
  const uint16_t *words = data;
  uint32_t sum = 0;
  for (size_t i = 0; i < size / 2; i++) sum += words[i];
  while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
  return ~sum;
}

struct ping {
  struct icmphdr header;
  uint64_t message[4];
} __attribute__((packed));

static ssize_t send_probe(int s, int pings, const uint64_t *message) {
  struct ping ping = {.header = {.type = ICMP_ECHO, .un.echo = {htons(getpid() & 0xffff), htons(message[0] & 0xffff)}}};
  if (!pings) return send(s, message, 4 * sizeof *message, 0);
  memcpy(ping.message, message, sizeof ping.message);
  ping.header.checksum = checksum(&ping, sizeof ping);
  return send(s, &ping, sizeof ping, 0);
}

/* The message in what a socket received; 0 when it is none of ours. */
static int message_of(const uint8_t *data, ssize_t size, int pings, uint64_t *message) {
  struct ping ping;
  size_t skip = pings ? (data[0] & 15) * 4 : 0, length = pings ? sizeof ping : 4 * sizeof *message;
  if (size < (ssize_t)(skip + length)) return 0; /* ECONNREFUSED while the guest boots is no answer */
  if (!pings) {
    memcpy(message, data, length);
    return 1;
  }
  memcpy(&ping, data + skip, sizeof ping);
  memcpy(message, ping.message, sizeof ping.message);
  return ping.header.type == ICMP_ECHOREPLY && ntohs(ping.header.un.echo.id) == (getpid() & 0xffff);
}

static void receive_all(int s, int pings, uint64_t sent) {
  for (;;) {
    uint64_t message[4];
    uint8_t room[128] = {0};
    union { char bytes[CMSG_SPACE(sizeof(struct timespec))]; struct cmsghdr aligned; } control;
    struct iovec data = {room, sizeof room};
    struct msghdr header = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t size = recvmsg(s, &header, MSG_DONTWAIT);
    if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (size < 0 || !message_of(room, size, pings, message)) continue;
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
  if (argc != 5 && argc != 6) {
    fprintf(stderr, "usage: %s ADDRESS PORT INTERVAL_US GAP_US [INTERFACE]\n", argv[0]);
    return 2;
  }
  struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[2]))};
  uint64_t interval = strtoull(argv[3], NULL, 10) * 1000;
  int pings = !atoi(argv[2]), on = 1, room = 8 << 20;
  int s = pings ? socket(AF_INET, SOCK_RAW, IPPROTO_ICMP) : socket(AF_INET, SOCK_DGRAM, 0);
  gap_limit_ns = strtoull(argv[4], NULL, 10) * 1000;
  sent_at = calloc(MAX_PROBES, sizeof *sent_at);
  seen = calloc(MAX_PROBES, 1);
  arrived_at = calloc(MAX_PROBES, sizeof *arrived_at);
  guest_clock = calloc(MAX_PROBES, sizeof *guest_clock);
  if (s < 0 || !sent_at || !arrived_at || !guest_clock || !seen || !interval || !inet_aton(argv[1], &peer.sin_addr)) return 2;
  setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
  setsockopt(s, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
  if (argc == 6 && setsockopt(s, SOL_SOCKET, SO_BINDTODEVICE, argv[5], strlen(argv[5]))) {
    perror("handoff-probe: interface");
    return 1;
  }
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
        if (send_probe(s, pings, message) < 0) unsent++;
        sent++;
      }
      due += interval;
      if (now > due + SECOND) due = now;
    }
    receive_all(s, pings, sent);
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
         ", \"late\": %" PRIu64 ", \"waited\": %" PRIu64
         ", \"longest_gap_ns\": %" PRIu64 ", \"longest_gap_at_ns\": %" PRIu64
         ", \"slowest_ns\": %" PRIu64 ", \"mean_ns\": %" PRIu64 ", \"gaps\": [",
         sent, unsent, received, duplicated, late, waited, longest_ns, longest_at_ns, slowest_ns, received ? total_ns / received : 0);
  for (unsigned i = 0; i < gap_count; i++)
    printf("%s[%" PRIu64 ", %" PRIu64 "]", i ? ", " : "", gaps[i].at_ns, gaps[i].length_ns);
  printf("], \"unanswered\": [");
  print_unanswered(sent);
  printf("], \"clock\": [");
  if (!pings) print_clock(sent);
  printf("]}\n");
  return 0;
}
