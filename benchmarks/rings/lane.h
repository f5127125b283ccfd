/* The program's side of a client ring in C, written from docs/client-ring.md: shared by nop.c and echo.c. */
#ifndef RINGS_LANE_H
#define RINGS_LANE_H
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
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

static void attach(struct lane *lane, const char *path, uint32_t slots, uint64_t arena_size)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct client_hello hello = {.magic = CLIENT_MAGIC, .version_major = CLIENT_VERSION_MAJOR, .version_minor = CLIENT_VERSION_MINOR,
                                 .size = sizeof(hello), .lane = 0, .submission_entries = slots, .completion_entries = slots, .slot_count = slots,
                                 .arena_size = arena_size};
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
    fcntl(lane->doorbell_fd, F_SETFL, 0); /* this end's own flags: sleep_until_rung() waits in recv */
    lane->header = mmap(NULL, reply.memory_size, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
    if (lane->header == MAP_FAILED)
        fail("mmap");
    lane->submissions = (void *)((char *)lane->header + lane->header->submission_offset);
    lane->completions = (void *)((char *)lane->header + lane->header->completion_offset);
}

static void submit(struct lane *lane)
{
    client_publish(&lane->header->submission_tail, lane->submission_tail);
    if (client_must_ring(&lane->header->daemon_state))
        send(lane->doorbell_fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void sleep_until_rung(struct lane *lane)
{
    char bytes[64];
    client_say_asleep(&lane->header->program_state);
    if (client_observe(&lane->header->completion_tail) == lane->completion_head) {
        /* One call instead of poll and recv: there is nothing else to wait for, and the daemon's end goes down with the daemon. */
        if (recv(lane->doorbell_fd, bytes, sizeof(bytes), 0) == 0)
            fail("the daemon is gone");
    }
    client_say_awake(&lane->header->program_state);
}

#endif
