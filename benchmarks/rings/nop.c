/*
 * NOP round trips over the client ring, by a C client written from docs/client-ring.md.
 *
 *   cc -O2 -I pyx/kdaemon_pyx -o nop benchmarks/rings/nop.c
 *   ./nop SOCKET ROUNDS            prints JSON: nanoseconds, and operations per second
 *   ./nop --doorbell CPU CPU N     a bare doorbell round trip between two CPUs, to compare with
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "client_abi.h"

struct lane {
    int attach_fd, doorbell_fd;
    struct client_header *header;
    struct client_submission *submissions;
    struct client_completion *completions;
    uint32_t submission_tail, completion_head;
};

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void attach(struct lane *lane, const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct client_hello hello = {.magic = CLIENT_MAGIC, .version_major = CLIENT_VERSION_MAJOR, .version_minor = CLIENT_VERSION_MINOR,
                                 .size = sizeof(hello), .lane = 0, .submission_entries = 256, .completion_entries = 256, .slot_count = 256};
    struct client_hello_reply reply;
    union { struct cmsghdr header; char bytes[CMSG_SPACE(2 * sizeof(int))]; } control;
    struct iovec vector = {&reply, sizeof(reply)};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
    int fds[2];

    lane->attach_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    if (connect(lane->attach_fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        fail(path);
    if (send(lane->attach_fd, &hello, sizeof(hello), 0) != sizeof(hello))
        fail("hello");
    if (recvmsg(lane->attach_fd, &message, MSG_CMSG_CLOEXEC) != sizeof(reply) || reply.error) {
        errno = -reply.error;
        fail("attach");
    }
    memcpy(fds, CMSG_DATA(&control.header), sizeof(fds));
    lane->doorbell_fd = fds[1];
    lane->header = mmap(NULL, reply.memory_size, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
    if (lane->header == MAP_FAILED)
        fail("mmap");
    lane->submissions = (void *)((char *)lane->header + lane->header->submission_offset);
    lane->completions = (void *)((char *)lane->header + lane->header->completion_offset);
}

static void prepare(struct lane *lane, uint32_t slot)
{
    struct client_submission *entry = &lane->submissions[lane->submission_tail & (lane->header->submission_entries - 1)];
    memset(entry, 0, sizeof(*entry));
    entry->opcode = CLIENT_NOP;
    entry->slot = slot;
    entry->user_data = lane->submission_tail++;
}

static void submit(struct lane *lane)
{
    client_publish(&lane->header->submission_tail, lane->submission_tail);
    if (client_must_ring(&lane->header->daemon_state))
        send(lane->doorbell_fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static uint32_t reap(struct lane *lane)
{
    uint32_t tail = client_observe(&lane->header->completion_tail);
    uint32_t count = tail - lane->completion_head;
    for (; lane->completion_head != tail; lane->completion_head++)
        if (lane->completions[lane->completion_head & (lane->header->completion_entries - 1)].result != 0)
            exit(2);
    if (count)
        client_publish(&lane->header->completion_head, lane->completion_head);
    return count;
}

static void sleep_until_rung(struct lane *lane)
{
    struct pollfd fds[2] = {{lane->doorbell_fd, POLLIN, 0}, {lane->attach_fd, POLLRDHUP, 0}};
    char bytes[64];
    client_say_asleep(&lane->header->program_state);
    if (client_observe(&lane->header->completion_tail) == lane->completion_head) {
        poll(fds, 2, -1);
        recv(lane->doorbell_fd, bytes, sizeof(bytes), MSG_DONTWAIT);
    }
    client_say_awake(&lane->header->program_state);
}

static int compare(const void *one, const void *other)
{
    uint64_t a = *(const uint64_t *)one, b = *(const uint64_t *)other;
    return (a > b) - (a < b);
}

static void report(const char *name, uint64_t *samples, int count)
{
    qsort(samples, count, sizeof(*samples), compare);
    printf("\"%s_p50_ns\": %lu, \"%s_p99_ns\": %lu", name, samples[count / 2], name, samples[count - 1 - count / 100]);
}

static void doorbell(int cpu, int other_cpu, int count)
{
    int pair[2];
    char byte = 0;
    uint64_t *samples = calloc(count, sizeof(*samples));
    cpu_set_t set;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0)
        fail("socketpair");
    CPU_ZERO(&set);
    if (fork() == 0) {
        struct pollfd fd = {pair[1], POLLIN, 0};
        close(pair[0]);
        CPU_SET(other_cpu, &set);
        sched_setaffinity(0, sizeof(set), &set);
        while (poll(&fd, 1, -1) == 1 && recv(pair[1], &byte, 1, 0) == 1)
            send(pair[1], &byte, 1, MSG_DONTWAIT | MSG_NOSIGNAL);
        _exit(0);
    }
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof(set), &set);
    close(pair[1]);
    for (int i = 0; i < count; i++) {
        struct pollfd fd = {pair[0], POLLIN, 0};
        struct timespec pause = {0, 200000};
        nanosleep(&pause, NULL);
        samples[i] = now_ns();
        send(pair[0], &byte, 1, MSG_DONTWAIT);
        poll(&fd, 1, -1);
        recv(pair[0], &byte, 1, 0);
        samples[i] = now_ns() - samples[i];
    }
    printf("{");
    report("doorbell", samples, count);
    printf("}\n");
}

int main(int argc, char **argv)
{
    struct lane lane = {0};
    if (argc == 5 && strcmp(argv[1], "--doorbell") == 0) {
        doorbell(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]));
        return 0;
    }
    if (argc != 3) {
        fprintf(stderr, "usage: nop SOCKET ROUNDS | nop --doorbell CPU CPU ROUNDS\n");
        return 2;
    }
    int rounds = atoi(argv[2]), woken = rounds / 100;
    uint64_t *samples = calloc(rounds, sizeof(*samples));
    attach(&lane, argv[1]);

    for (int i = 0; i < rounds; i++) {
        samples[i] = now_ns();
        prepare(&lane, 0);
        submit(&lane);
        while (!reap(&lane))
            client_relax();
        samples[i] = now_ns() - samples[i];
    }
    printf("{");
    report("spinning", samples, rounds);

    for (int i = 0; i < woken; i++) {
        struct timespec pause = {0, 200000};
        nanosleep(&pause, NULL); /* long enough for the daemon to sleep */
        samples[i] = now_ns();
        prepare(&lane, 0);
        submit(&lane);
        while (!reap(&lane))
            sleep_until_rung(&lane);
        samples[i] = now_ns() - samples[i];
    }
    printf(", ");
    report("woken", samples, woken);

    uint64_t begin = now_ns();
    uint32_t in_flight = 0, total = 0, next_slot = 0, wanted = (uint32_t)rounds * 10;
    while (total < wanted) {
        uint32_t count = 0;
        for (; in_flight < 256 && count < 64; count++, in_flight++)
            prepare(&lane, next_slot++ & 255); /* completions of NOPs come in order, so slots are free in order */
        if (count)
            submit(&lane);
        uint32_t done = reap(&lane);
        in_flight -= done;
        total += done;
        if (!done)
            client_relax();
    }
    printf(", \"nops_per_s\": %.0f}\n", total / ((now_ns() - begin) / 1e9));
    return 0;
}
