/* The control port, TCP 5000: a line is a command, the answer is one line of JSON; {"error": …} when it was refused. */
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest.h"

#define CONTROL_PORT 5000
#define DEFAULT_DEVICE "/dev/vda"

static void boot_id(char *out, size_t size) {
  char text[64] = "";
  FILE *file = fopen("/proc/sys/kernel/random/boot_id", "r");
  if (file) {
    if (!fgets(text, sizeof text, file)) text[0] = 0;
    fclose(file);
  }
  text[strcspn(text, "\n")] = 0;
  snprintf(out, size, "%s", text);
}

static void status(char *out, size_t size) {
  char id[64], net[256], ticks[256], dirty[512], journal[512];
  boot_id(id, sizeof id);
  net_status(net, sizeof net);
  ticks_status(ticks, sizeof ticks);
  dirty_status(dirty, sizeof dirty);
  journal_status(journal, sizeof journal);
  snprintf(out, size, "{\"boot_id\": \"%s\", \"monotonic_ns\": %lu, \"net\": %s, \"ticks\": %s, \"dirty\": %s, \"journal\": %s}",
           id, now_ns(), net, ticks, dirty, journal);
}

static void answer(char *line, char *out, size_t size) {
  unsigned mib, span;
  double rate;
  char device[64] = DEFAULT_DEVICE, id[64];
  line[strcspn(line, "\r\n")] = 0;
  if (!strcmp(line, "status")) status(out, size);
  else if (!strcmp(line, "uptime")) snprintf(out, size, "{\"monotonic_ns\": %lu}", now_ns());
  else if (!strcmp(line, "boot-id")) boot_id(id, sizeof id), snprintf(out, size, "{\"boot_id\": \"%s\"}", id);
  else if (!strcmp(line, "ticks")) ticks_status(out, size);
  else if (!strcmp(line, "stalls")) ticks_stalls(out, size);
  else if (!strcmp(line, "ticks reset")) ticks_reset(), ticks_status(out, size);
  else if (!strcmp(line, "dirty off")) dirty_off(out, size);
  else if (sscanf(line, "dirty %u %lf", &mib, &rate) == 2 && mib > 0 && rate >= 0) dirty_set(mib, rate, out, size);
  else if (!strcmp(line, "journal stop")) journal_stop(out, size);
  else if (!strcmp(line, "journal verify")) journal_verify(out, size);
  else if (sscanf(line, "journal start %lf %u %63s", &rate, &span, device) >= 2) journal_start(device, rate, span, out, size);
  else
    snprintf(out, size,
             "{\"error\": \"commands: status, uptime, boot-id, ticks [reset], stalls, dirty MIB MIB_PER_S, dirty off, "
             "journal start MIB_PER_S SPAN_MIB [DEVICE], journal stop, journal verify\"}");
}

static void *control_session(void *argument) {
  FILE *in = fdopen((int)(intptr_t)argument, "r"), *out = fdopen(dup((int)(intptr_t)argument), "w");
  char line[256], reply[4096];
  while (in && out && fgets(line, sizeof line, in)) {
    answer(line, reply, sizeof reply);
    if (fprintf(out, "%s\n", reply) < 0 || fflush(out)) break;
  }
  if (in) fclose(in);
  if (out) fclose(out);
  return NULL;
}

int main(void) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(CONTROL_PORT)};
  int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
  setvbuf(stdout, NULL, _IOLBF, 0);
  signal(SIGPIPE, SIG_IGN);
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  net_start();
  ticks_start();
  if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 16)) {
    perror("guest: control port");
    return 1;
  }
  puts("HANDOFF-GUEST READY");
  for (;;) {
    int session = accept(listener, NULL, NULL);
    if (session < 0) continue;
    setsockopt(session, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    start_thread(control_session, (void *)(intptr_t)session, 0);
  }
}
