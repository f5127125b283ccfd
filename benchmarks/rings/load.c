/* The load of benchmarks/rings/run: N connections over TLS 1.3 from one thread, by epoll and OpenSSL.
 *
 * Modes: `echo` (each connection sends a message and waits until it has come back), `sink` (sends as fast as it is taken),
 * `source` (reads as fast as it comes), `plain-echo` (without TLS). What comes back in an echo is compared with what was sent.
 *
 * Prints "warm" when every connection has its handshake behind it, waits for a line on standard input, loads for SECONDS, prints
 * one line of JSON. The socket buffers are left to the kernel on both sides.
 *
 * Usage: load HOST PORT MODE CONNECTIONS MESSAGE_BYTES SECONDS
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 256, PIECE_BYTES = 256 * 1024, TURNS_OF_BULK = 4 };

struct connection {
    int fd;
    SSL *ssl;
    bool ready;
    size_t sent, received; /* of the message under way */
    uint64_t begun_ns;
};

static struct connection *connections;
static size_t message_bytes;
static unsigned char *message, *buffer;
static uint64_t messages, bytes;
static uint32_t *latencies_us;
static size_t latency_count, latency_room;
static char mode;
static bool measuring, plain;

static void die(const char *what)
{
    unsigned long code = ERR_peek_error();
    fprintf(stderr, "load: %s: %s\n", what, code ? ERR_reason_error_string(code) : strerror(errno));
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static double cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) + (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static bool would_block(struct connection *c, int result)
{
    if (plain && (result == 0 || errno != EAGAIN))
        die("a connection ended");
    if (plain)
        return true;
    int error = SSL_get_error(c->ssl, result);
    if (error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE)
        die("a connection ended");
    return true;
}

static void note(uint64_t latency_ns)
{
    if (latency_count == latency_room) {
        latency_room = latency_room ? latency_room * 2 : 1 << 16;
        latencies_us = realloc(latencies_us, latency_room * sizeof *latencies_us);
        if (!latencies_us)
            die("realloc");
    }
    latencies_us[latency_count++] = (uint32_t)(latency_ns / 1000);
}

static int put(struct connection *c, const unsigned char *data, size_t length)
{
    return plain ? (int)send(c->fd, data, length, MSG_NOSIGNAL) : SSL_write(c->ssl, data, (int)length);
}

static int get(struct connection *c)
{
    return plain ? (int)recv(c->fd, buffer, PIECE_BYTES, 0) : SSL_read(c->ssl, buffer, PIECE_BYTES);
}

/* Sends what is left of the message; false if the socket takes no more. */
static bool send_rest(struct connection *c)
{
    while (c->sent < message_bytes) {
        int done = put(c, message + c->sent, message_bytes - c->sent);
        if (done <= 0)
            return !would_block(c, done);
        c->sent += (size_t)done;
    }
    return true;
}

static void echo(struct connection *c)
{
    for (;;) {
        if (!send_rest(c) && !c->sent)
            return;
        int done = get(c);
        if (done <= 0) {
            would_block(c, done);
            return;
        }
        if (c->received + (size_t)done > message_bytes || memcmp(buffer, message + c->received, (size_t)done) != 0) {
            fprintf(stderr, "load: what came back is not what was sent\n");
            exit(1);
        }
        c->received += (size_t)done;
        if (c->received < message_bytes)
            continue;
        if (measuring) {
            uint64_t now = now_ns();
            messages++;
            bytes += message_bytes;
            note(now - c->begun_ns);
            c->begun_ns = now;
        }
        c->sent = c->received = 0;
    }
}

static void bulk(struct connection *c)
{
    for (int turn = 0; turn < TURNS_OF_BULK; turn++) {
        int done = mode == 's' ? put(c, message, message_bytes) : get(c);
        if (done <= 0) {
            would_block(c, done);
            return;
        }
        if (measuring)
            bytes += (uint64_t)done;
    }
}

static int compare(const void *one, const void *other)
{
    uint32_t a = *(const uint32_t *)one, b = *(const uint32_t *)other;
    return (a > b) - (a < b);
}

static void turn(int epoll_fd, int timeout_ms)
{
    struct epoll_event events[EVENTS];
    int count = epoll_wait(epoll_fd, events, EVENTS, timeout_ms);
    for (int i = 0; i < count; i++) {
        struct connection *c = events[i].data.ptr;
        if (mode == 'e')
            echo(c);
        else
            bulk(c);
    }
}

int main(int argc, char **argv)
{
    if (argc != 7) {
        fprintf(stderr, "usage: load HOST PORT echo|plain-echo|sink|source CONNECTIONS MESSAGE_BYTES SECONDS\n");
        return 2;
    }
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[2]))};
    if (inet_pton(AF_INET, argv[1], &address.sin_addr) != 1)
        die("HOST must be an IPv4 address");
    plain = strcmp(argv[3], "plain-echo") == 0;
    mode = strcmp(argv[3], "source") == 0 ? 'o' : plain ? 'e' : argv[3][0];
    size_t count = (size_t)atol(argv[4]);
    message_bytes = (size_t)atol(argv[5]);
    double seconds = atof(argv[6]);
    connections = calloc(count, sizeof *connections);
    message = malloc(message_bytes);
    buffer = malloc(PIECE_BYTES);
    for (size_t i = 0; i < message_bytes; i++)
        message[i] = (unsigned char)(i * 7 + (i >> 8));
    SSL_CTX *context = SSL_CTX_new(TLS_client_method());
    if (!SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) || !SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256"))
        die("setting up");
    SSL_CTX_set_verify(context, SSL_VERIFY_NONE, NULL); /* loopback: what is measured is known */
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_read_ahead(context, 1);
    int epoll_fd = epoll_create1(0), one = 1;
    for (size_t i = 0; i < count; i++) {
        struct connection *c = &connections[i];
        c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0)
            die("connect");
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        c->ssl = SSL_new(context);
        SSL_set_fd(c->ssl, c->fd);
        SSL_set_tlsext_host_name(c->ssl, "localhost");
        if (!plain && SSL_connect(c->ssl) != 1)
            die("handshake");
        fcntl(c->fd, F_SETFL, O_NONBLOCK);
    }
    printf("warm\n");
    fflush(stdout);
    char line[16];
    if (!fgets(line, sizeof line, stdin))
        return 0;
    /* Bulk: level-triggered, a few pieces per event, so that the connections take turns. */
    for (size_t i = 0; i < count; i++) {
        struct epoll_event event = {.data.ptr = &connections[i]};
        event.events = mode == 's' ? EPOLLOUT : mode == 'o' ? EPOLLIN : EPOLLIN | EPOLLET;
        if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, connections[i].fd, &event) < 0)
            die("epoll_ctl");
    }
    uint64_t start_ns = now_ns(), end_ns = start_ns + (uint64_t)(seconds * 1e9);
    double cpu_before = cpu_seconds();
    measuring = true;
    for (size_t i = 0; i < count && mode == 'e'; i++) {
        connections[i].begun_ns = start_ns;
        echo(&connections[i]);
    }
    while (now_ns() < end_ns)
        turn(epoll_fd, 100);
    double elapsed = (double)(now_ns() - start_ns) / 1e9, cpu = cpu_seconds() - cpu_before;
    qsort(latencies_us, latency_count, sizeof *latencies_us, compare);
    printf("{\"messages\": %llu, \"bytes\": %llu, \"seconds\": %.6f, \"cpu_seconds\": %.6f, \"p50_us\": %u, \"p99_us\": %u}\n",
           (unsigned long long)messages, (unsigned long long)bytes, elapsed, cpu,
           latency_count ? latencies_us[latency_count / 2] : 0, latency_count ? latencies_us[latency_count - 1 - latency_count / 100] : 0);
    return 0;
}
