/*
 * What two processes cost that pass each message between them, without TLS: the floor for an echo through a daemon, by benchmarks/rings/run.
 *
 *   cc -O2 -o floor benchmarks/rings/floor.c
 *   ./floor             prints its port, serves until it is killed
 *
 * For each connection one process receives from TCP, puts the message into shared memory and rings; another, the "program", rings back; the first one
 * sends. Each knows what comes next and waits in the call that brings it: six system calls and two switches for a message. A daemon, which has to
 * wait for its sockets and its programs at once, cannot do with less.
 */
#define _GNU_SOURCE
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ARENA = 65536 };

static void check(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
}

static void program(int bell)
{
    char byte;
    while (recv(bell, &byte, 1, 0) == 1 && send(bell, &byte, 1, MSG_NOSIGNAL) == 1)
        ;
}

static void relay(int tcp)
{
    int bells[2], one = 1;
    char byte = '!', *arena = mmap(NULL, ARENA, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ssize_t length;
    check(arena == MAP_FAILED ? -1 : 0, "mmap");
    check(setsockopt(tcp, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one), "TCP_NODELAY");
    check(socketpair(AF_UNIX, SOCK_STREAM, 0, bells), "socketpair");
    pid_t child = fork();
    check(child, "fork");
    if (!child) {
        close(tcp);
        close(bells[0]);
        program(bells[1]);
        _exit(0);
    }
    close(bells[1]);
    while ((length = recv(tcp, arena, ARENA, 0)) > 0)
        if (send(bells[0], &byte, 1, MSG_NOSIGNAL) != 1 || recv(bells[0], &byte, 1, 0) != 1 ||
            send(tcp, arena, (size_t)length, MSG_NOSIGNAL) != length)
            break;
}

int main(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    check(listener, "socket");
    check(bind(listener, (struct sockaddr *)&address, size), "bind");
    check(listen(listener, 1024), "listen");
    check(getsockname(listener, (struct sockaddr *)&address, &size), "getsockname");
    signal(SIGCHLD, SIG_IGN);
    printf("%u\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int tcp = accept(listener, NULL, NULL);
        check(tcp, "accept");
        pid_t child = fork();
        check(child, "fork");
        if (!child) {
            close(listener);
            relay(tcp);
            _exit(0);
        }
        close(tcp);
    }
}
