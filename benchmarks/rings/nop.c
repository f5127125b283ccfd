/*
 * NOP round trips over the client ring, by a C client written from docs/client-ring.md.
 *
 *   cc -O2 -I pyx/kdaemon_pyx -o nop benchmarks/rings/nop.c
 *   ./nop SOCKET ROUNDS            prints JSON: nanoseconds, and operations per second
 *   ./nop --doorbell CPU CPU N     a bare doorbell round trip between two CPUs, to compare with
 */
#define _GNU_SOURCE
#include <poll.h>
#include <sched.h>
#include <time.h>

#include "lane.h"

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void prepare(struct lane *lane, uint32_t slot)
{
    struct client_submission *entry = &lane->submissions[lane->submission_tail & (lane->header->submission_entries - 1)];
    memset(entry, 0, sizeof(*entry));
    entry->opcode = CLIENT_NOP;
    entry->slot = slot;
    entry->user_data = lane->submission_tail++;
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
    attach(&lane, argv[1], 256, 0);

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
