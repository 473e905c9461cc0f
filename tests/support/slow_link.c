/* A cable between two network namespaces that carries so many bits a second and no more, for
 * kernels whose traffic control has no shaper: a TUN device in each, and this program carries
 * packets from one to the other, each when the rate has carried its last byte.
 *
 *   slow_link NAMESPACE_A ADDRESS_A NAMESPACE_B ADDRESS_B DEVICE MBIT_PER_S
 *
 * Both directions have the rate each; 0 is as fast as it can. SLOTS packets wait here for their
 * turn, more in the sender's device. Runs until it is ended; the devices go with it. Needs root and
 * /dev/net/tun. */
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

enum { MTU = 9000, SLOTS = 512, SMALL = 128, BURST_NS = 2000000 };

/* Between two looks at a cable in use, so that the machine has its cores for others. What the cable
 * could have carried meanwhile, it carries then. */
static const struct timespec NAP = {.tv_nsec = 1000000};

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

/* One direction: packets that wait for the cable, the first of which arrives at `due_ns`, when its
 * last byte has been carried. */
typedef struct {
    int from, to;
    int64_t due_ns;
    unsigned first, end; /* of the ring, running numbers */
    unsigned started;    /* number behind the packet that the cable carries */
    ssize_t bytes[SLOTS];
    char packet[SLOTS][MTU + 64];
} direction;

/* Take over what the sender has given to its device. Acknowledgements do not wait behind data, as
 * where switches queue fairly; they take next to nothing of the cable. */
static void take_over(direction *d)
{
    while (d->end - d->first < SLOTS) {
        char *packet = d->packet[d->end % SLOTS];
        const ssize_t bytes = read(d->from, packet, sizeof d->packet[0]);
        if (bytes <= 0) {
            return;
        }
        if (bytes <= SMALL) {
            (void)!write(d->to, packet, (size_t)bytes);
        } else {
            d->bytes[d->end++ % SLOTS] = bytes;
        }
    }
}

/* Carry what the rate allows by now. Returns when the next packet arrives; 0: none is on its way.
 */
static int64_t carry(direction *d, double ns_per_byte)
{
    for (;;) {
        const unsigned before = d->first;
        take_over(d);
        for (; d->first != d->end; d->first++) {
            const unsigned at = d->first % SLOTS;
            const int64_t now = now_ns(), takes = (int64_t)((double)d->bytes[at] * ns_per_byte);
            if (d->started != d->first + 1) { /* the cable turns to it */
                const int64_t free_ns = d->due_ns > now - BURST_NS ? d->due_ns : now - BURST_NS;
                d->due_ns = free_ns + takes;
                d->started = d->first + 1;
            }
            if (d->due_ns > now) {
                return d->due_ns;
            }
            (void)!write(d->to, d->packet[at], (size_t)d->bytes[at]); /* full: dropped */
        }
        if (before == d->first) {
            return 0;
        }
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
        struct pollfd ends[2] = {{.fd = a, .events = POLLIN}, {.fd = b, .events = POLLIN}};
        if (next[0] == 0 && next[1] == 0) {
            (void)poll(ends, 2, -1);
        } else {
            nanosleep(&NAP, NULL);
        }
    }
}
