/* UDP echo (port 7), TCP echo (port 7), TCP counter (port 9). */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest.h"

#define ECHO_PORT 7
#define COUNTER_PORT 9
#define COUNTER_DEFAULT_US 5000

static atomic_ulong udp_echoed, echo_sessions, counter_sessions;

static int bound(int type, int port) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
  int s = socket(AF_INET, type, 0), on = 1;
  setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (s < 0 || bind(s, (struct sockaddr *)&address, sizeof address) || (type == SOCK_STREAM && listen(s, 64))) {
    perror("guest: bind");
    exit(1);
  }
  return s;
}

static int send_all(int s, const void *data, size_t size) {
  const char *at = data;
  while (size) {
    ssize_t sent = send(s, at, size, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return -1;
    at += sent;
    size -= sent;
  }
  return 0;
}

/* Answers each datagram with itself; bytes 16 to 24, where there are that many, become this guest's clock. */
static void *udp_echo(void *unused) {
  (void)unused;
  static char buffer[65536];
  int s = bound(SOCK_DGRAM, ECHO_PORT), room = 4 << 20;
  setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
  for (;;) {
    struct sockaddr_in peer;
    socklen_t length = sizeof peer;
    ssize_t size = recvfrom(s, buffer, sizeof buffer, 0, (struct sockaddr *)&peer, &length);
    if (size < 0) continue;
    if (size >= 24) {
      uint64_t now = now_ns();
      memcpy(buffer + 16, &now, 8);
    }
    sendto(s, buffer, size, 0, (struct sockaddr *)&peer, length);
    udp_echoed++;
  }
}

static void *tcp_echo_session(void *argument) {
  int s = (int)(intptr_t)argument;
  char buffer[16384];
  ssize_t size;
  while ((size = recv(s, buffer, sizeof buffer, 0)) > 0 && send_all(s, buffer, size) == 0)
    ;
  close(s);
  echo_sessions--;
  return NULL;
}

/* Sends 1, 2, 3, … as 8 little-endian bytes each, one every interval; a client sets the interval by sending 4 bytes, in µs. */
static void *tcp_counter_session(void *argument) {
  int s = (int)(intptr_t)argument;
  uint64_t count = 0, due = now_ns(), interval_ns = COUNTER_DEFAULT_US * 1000ull;
  for (;;) {
    uint64_t now = now_ns();
    if (now >= due) {
      count++;
      if (send_all(s, &count, sizeof count)) break;
      due += interval_ns;
      if (now > due + 1000000000ull) due = now;
      continue;
    }
    struct pollfd wait = {s, POLLIN, 0};
    struct timespec left = {(due - now) / 1000000000ull, (due - now) % 1000000000ull};
    if (ppoll(&wait, 1, &left, NULL) > 0) {
      uint32_t us;
      if (recv(s, &us, sizeof us, MSG_WAITALL) != sizeof us) break;
      if (us) {
        interval_ns = us * 1000ull;
        due = now_ns();
      }
    }
  }
  close(s);
  counter_sessions--;
  return NULL;
}

static void *tcp_listener(void *argument) {
  int counter = argument != NULL, s = bound(SOCK_STREAM, counter ? COUNTER_PORT : ECHO_PORT), on = 1;
  for (;;) {
    int session = accept(s, NULL, NULL);
    if (session < 0) continue;
    setsockopt(session, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (counter) counter_sessions++;
    else echo_sessions++;
    start_thread(counter ? tcp_counter_session : tcp_echo_session, (void *)(intptr_t)session, counter);
  }
}

void net_start(void) {
  start_thread(udp_echo, NULL, 1);
  start_thread(tcp_listener, NULL, 0);
  start_thread(tcp_listener, "counter", 0);
}

void net_status(char *out, size_t size) {
  snprintf(out, size, "{\"udp_echoed\": %lu, \"echo_sessions\": %lu, \"counter_sessions\": %lu}", udp_echoed,
           echo_sessions, counter_sessions);
}
