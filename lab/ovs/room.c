/* Preloaded into the lab's ovs-vswitchd, see docs/lab.md.
 *
 * In user space, Open vSwitch reads veths and guests' taps by packet sockets, which hold net.core.rmem_default: some 250
 * small frames. A switch that waits for a processor for a tenth of a second, as on a machine with a fleet on two cores,
 * has lost frames by then, and no counter of its own says so. A site's kernel datapath has no such queue. The default is
 * the whole machine's, which the lab leaves alone, so each of these sockets gets room of its own.
 */
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ROOM_BYTES (8 << 20)

int socket(int domain, int type, int protocol) {
  int s = syscall(SYS_socket, domain, type, protocol), room = ROOM_BYTES;
  if (s >= 0 && domain == AF_PACKET) setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
  return s;
}
