/* A cable between two network namespaces that carries so many bits a second and no more, for
 * kernels whose traffic control has no shaper: a TUN device in each, and this program carries
 * packets from one to the other, each when the rate has carried its last byte.
 *
 *   slow_link NAMESPACE_A ADDRESS_A NAMESPACE_B ADDRESS_B DEVICE MBIT_PER_S     (0: as fast as it
 * can)
 *
 * Both directions have the rate each. A packet waits in the sender's device when its turn has not
 * come, so that nothing is dropped but by a full queue there, as on a real link. Runs until it is
 * ended; the devices go with it. Needs root and /dev/net/tun. */
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum { MTU = 9000, BURST_NS = 500000 }; /* a sleeping writer may catch up half a millisecond */

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void enter(const char *name)
{
    char path[128];
    snprintf(path, sizeof path, "/run/netns/%s", name);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || setns(fd, CLONE_NEWNET) != 0) {
        fail(path);
    }
    close(fd);
}

/* A TUN device in the namespace, with its address, up. Stays in that namespace. */
static int open_end(const char *name, const char *address, const char *device)
{
    char command[256];
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    enter(name);
    const int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", device);
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request) != 0) {
        fail("/dev/net/tun");
    }
    snprintf(command, sizeof command,
             "ip addr add %s/24 dev %s && ip link set %s mtu %d txqueuelen 1000 up", address,
             device, device, MTU);
    if (system(command) != 0) {
        fail(command);
    }
    return fd;
}

/* One direction, and the packet that is on its way: it arrives at `due_ns`, when the cable has
 * carried its last byte. */
typedef struct {
    int from, to;
    int64_t due_ns;
    ssize_t bytes; /* 0: none */
    char packet[MTU + 64];
} direction;

/* Carry what the rate allows by now. Returns when the next packet arrives; 0: none is on its way.
 */
static int64_t carry(direction *d, double ns_per_byte)
{
    for (;;) {
        const int64_t now = now_ns();
        if (d->bytes > 0) {
            if (d->due_ns > now) {
                return d->due_ns;
            }
            (void)!write(d->to, d->packet, (size_t)d->bytes); /* full: dropped, as by a switch */
        }
        d->bytes = read(d->from, d->packet, sizeof d->packet);
        if (d->bytes <= 0) {
            d->bytes = 0;
            return 0;
        }
        const int64_t start = d->due_ns > now - BURST_NS ? d->due_ns : now - BURST_NS;
        d->due_ns = start + (int64_t)((double)d->bytes * ns_per_byte);
    }
}

static void sleep_until(int64_t then_ns)
{
    const int64_t left = then_ns - now_ns();
    const struct timespec pause = {left / 1000000000, left % 1000000000};
    if (left > 0) {
        nanosleep(&pause, NULL);
    }
}

int main(int argc, char **argv)
{
    if (argc != 7) {
        fprintf(stderr, "usage: slow_link NAMESPACE_A ADDRESS_A NAMESPACE_B ADDRESS_B DEVICE "
                        "MBIT_PER_S\n");
        return 2;
    }
    const double rate = atof(argv[6]), ns_per_byte = rate > 0 ? 8000.0 / rate : 0;
    const int a = open_end(argv[1], argv[2], argv[5]), b = open_end(argv[3], argv[4], argv[5]);
    static direction there, back;
    there.from = back.to = a;
    there.to = back.from = b;
    printf("ready\n");
    fflush(stdout);
    for (;;) {
        const int64_t next[2] = {carry(&there, ns_per_byte), carry(&back, ns_per_byte)};
        struct pollfd ends[2] = {{.fd = next[0] == 0 ? a : -1, .events = POLLIN},
                                 {.fd = next[1] == 0 ? b : -1, .events = POLLIN}};
        if (next[0] == 0 && next[1] == 0) {
            (void)poll(ends, 2, -1);
        } else if (poll(ends, 2, 0) == 0) {
            const int64_t soonest = next[0] == 0                        ? next[1]
                                    : next[1] == 0 || next[0] < next[1] ? next[0]
                                                                        : next[1];
            const int64_t short_nap = now_ns() + 200000; /* the other end may get a packet */
            sleep_until(soonest < short_nap ? soonest : short_nap);
        }
    }
}
