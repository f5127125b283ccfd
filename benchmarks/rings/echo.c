/*
 * An echo server over TLS by the client ring alone: the C program under test of benchmarks/rings/run.
 *
 *   cc -O2 -I pyx/kdaemon_pyx -o echo benchmarks/rings/echo.c
 *   ./echo [SOCKET]     prints its port, serves until it is killed; default: KDAEMON_SOCKET
 *
 * A connection has four slots and two blocks of the arena: a READ is in flight while the WRITE of what came before is. WRITEs are quiet: one
 * that turns out to be waited for gets a BARRIER behind it, whose completion rings.
 */
#define _GNU_SOURCE
#include "lane.h"

enum { CONNECTIONS = 512, BLOCK = 16384, SLOTS_EACH = 4, SLOTS = 4096, ACCEPTS = 16 };
enum kind { LISTENING, DESCRIBING, ACCEPTING, READING, WRITING, CLOSING };

struct connection {
    uint64_t handle;
    uint32_t waiting; /* bytes that came while the last WRITE was in flight */
    uint8_t reading;  /* which block the READ fills */
    uint8_t writing, ended;
};

static struct lane lane;
static uint64_t listener;
static struct connection connections[CONNECTIONS];
static uint32_t free_list[CONNECTIONS], free_count;
static char *arena;

static void post(uint8_t opcode, uint32_t slot, uint64_t handle, uint64_t offset, uint32_t length, uint8_t flags)
{
    struct client_submission *entry = &lane.submissions[lane.submission_tail++ & (lane.header->submission_entries - 1)];
    *entry = (struct client_submission){.opcode = opcode, .flags = flags, .slot = slot, .handle = handle, .user_data = slot,
                                        .offset = offset, .length = length};
}

/* Slots: SLOTS_EACH * connection + 0 READ, 1 WRITE, 2 CLOSE, 3 BARRIER; behind them ACCEPTs. */
static void post_read(uint32_t i)
{
    struct connection *c = &connections[i];
    post(CLIENT_READ, SLOTS_EACH * i, c->handle, (2 * (uint64_t)i + c->reading) * BLOCK, BLOCK, 0);
}

static void echo(uint32_t i, uint32_t length)
{
    struct connection *c = &connections[i];
    c->writing = 1;
    post(CLIENT_WRITE, SLOTS_EACH * i + 1, c->handle, (2 * (uint64_t)i + c->reading) * BLOCK, length, CLIENT_SUBMISSION_QUIET);
    c->reading ^= 1;
    post_read(i);
}

static void completed(const struct client_completion *completion)
{
    uint32_t slot = completion->slot, i = slot / SLOTS_EACH;
    struct connection *c = &connections[i];
    if (slot >= SLOTS_EACH * CONNECTIONS) { /* ACCEPT */
        if (completion->result < 0 || !free_count)
            exit(3);
        i = free_list[--free_count];
        connections[i] = (struct connection){.handle = (uint64_t)completion->result};
        post_read(i);
        post(CLIENT_ACCEPT, slot, listener, 0, 0, 0);
    } else if (slot % SLOTS_EACH == 0) {
        if (completion->result <= 0) {
            c->ended = 1;
            post(CLIENT_CLOSE, SLOTS_EACH * i + 2, c->handle, 0, 0, 0);
        } else if (c->writing) {
            c->waiting = (uint32_t)completion->result;
            post(CLIENT_BARRIER, SLOTS_EACH * i + 3, c->handle, 0, 0, 0);
        } else
            echo(i, (uint32_t)completion->result);
    } else if (slot % SLOTS_EACH == 1) {
        c->writing = 0;
        if (c->waiting && !c->ended) {
            echo(i, c->waiting);
            c->waiting = 0;
        }
    } else if (slot % SLOTS_EACH == 2)
        free_list[free_count++] = i;
}

/* Takes what is there; false: nothing was. */
static int turn(void)
{
    uint32_t tail = client_observe(&lane.header->completion_tail);
    if (tail == lane.completion_head)
        return 0;
    while (lane.completion_head != tail)
        completed(&lane.completions[lane.completion_head++ & (lane.header->completion_entries - 1)]);
    client_publish(&lane.header->completion_head, lane.completion_head);
    submit(&lane);
    return 1;
}

static struct client_completion one(void)
{
    submit(&lane);
    while (client_observe(&lane.header->completion_tail) == lane.completion_head)
        sleep_until_rung(&lane);
    struct client_completion completion = lane.completions[lane.completion_head++ & (lane.header->completion_entries - 1)];
    client_publish(&lane.header->completion_head, lane.completion_head);
    if (completion.result < 0) {
        errno = (int)-completion.result;
        fail("listening");
    }
    return completion;
}

int main(int argc, char **argv)
{
    const char *path = argc == 2 ? argv[1] : getenv("KDAEMON_SOCKET");
    if (argc > 2 || !path) {
        fprintf(stderr, "usage: echo [SOCKET]\n");
        return 2;
    }
    attach(&lane, path, SLOTS, 2ull * CONNECTIONS * BLOCK);
    arena = (char *)lane.header + lane.header->arena_offset;
    if (lane.header->arena_size < 2ull * CONNECTIONS * BLOCK || lane.header->slot_count < SLOTS_EACH * CONNECTIONS + ACCEPTS) {
        fprintf(stderr, "echo: the daemon's limits are too small\n");
        return 1;
    }
    struct client_parameters *parameters = (void *)((char *)lane.header + lane.header->slot_offset);
    memset(parameters, 0, sizeof *parameters);
    parameters->host_length = 9;
    memcpy(parameters->host, "127.0.0.1", 9);
    parameters->certificate_length = 9;
    memcpy(parameters->certificate, "localhost", 9);
    parameters->backlog = 1024;
    post(CLIENT_LISTEN, 0, 0, 0, 0, 0);
    listener = (uint64_t)one().result;
    post(CLIENT_INFO, 0, listener, 0, BLOCK, 0);
    one();
    printf("%u\n", ((struct client_info *)arena)->port);
    fflush(stdout);
    for (uint32_t i = 0; i < CONNECTIONS; i++)
        free_list[free_count++] = CONNECTIONS - 1 - i;
    for (uint32_t i = 0; i < ACCEPTS; i++)
        post(CLIENT_ACCEPT, SLOTS_EACH * CONNECTIONS + i, listener, 0, 0, 0);
    submit(&lane);
    for (;;)
        if (!turn())
            sleep_until_rung(&lane);
}
