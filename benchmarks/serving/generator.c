/* The load of benchmarks/serve: HTTP/1.1 GETs over TLS 1.3 from one thread, by epoll and OpenSSL.
 *
 * Why not wrk: it resumes sessions between connections whatever it is asked for, cannot be paced, so that it is always
 * saturated by a fast server, and tells neither how busy it was nor when its connections were ready.
 *
 * Modes: `keepalive` (N connections, one request at a time each), `full` and `resumed` (a new connection for each request,
 * with a full handshake or a ticket of the slot's last connection), `idle` (N connections, one request each, then nothing).
 *
 * Protocol with benchmarks/serving/load.py: prints "warm" when every connection has had its first response (at once in the
 * modes without lasting connections), waits for a line on standard input, loads for `seconds`, prints one line of JSON.
 * With a rate the load is open: request k is due at start + k / rate, and its latency counts from then, so that a server
 * which stalls cannot hide it by being asked less.
 *
 * A * in the path becomes the connection's number modulo FILES. AGES: connection i of n has asked i * AGES / n times before
 * the load begins, so that a server which closes a connection after so many requests does not close all of them at once.
 *
 * Usage: generator HOST PORT PATH MODE CONNECTIONS SECONDS RATE BODY_BYTES SUITE GROUP AGES FILES     (RATE 0: as fast as it goes)
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
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { HEADER_BYTES_MAX = 8192, READ_BYTES = 128 * 1024, EVENTS = 256, ERRORS_MAX = 1000 };

enum mode { MODE_KEEPALIVE, MODE_FULL, MODE_RESUMED, MODE_IDLE };

enum state { STATE_CLOSED, STATE_HANDSHAKE, STATE_READY, STATE_HEADER, STATE_BODY, STATE_END };

struct connection {
    int fd;
    SSL *ssl;
    SSL_SESSION *session; /* of the slot, not of the connection: what `resumed` offers next time */
    enum state state;
    bool queued, served, last; /* waits for its turn; has had a response; the response said Connection: close */
    uint64_t due_ns;
    uint64_t body_left;
    uint32_t warm_left; /* requests before the load begins, after the first */
    uint32_t asked;
    size_t header_length;
    char header[HEADER_BYTES_MAX];
};

static struct sockaddr_in address;
static enum mode mode;
static uint64_t body_bytes_expected;
static SSL_CTX *context;
static int epoll_fd;
static const char *path_before, *path_after; /* what is before the * in the path, and behind it if there is one */
static size_t files = 1;
static char request[2048];
static int request_length;
static unsigned char read_buffer[READ_BYTES];

static struct connection *connections;
static size_t connection_count;
static struct connection **queue; /* ring of connections that may ask */
static size_t queue_head, queue_length;
static bool measuring; /* between the line on standard input and the end: only then connections queue and events count */

static uint64_t requests, body_bytes, handshakes_full, handshakes_resumed, reconnects, errors, served_connections;
static char first_error[256];
static uint32_t *latencies_us;
static size_t latency_count, latency_room;

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void die(const char *what)
{
    fprintf(stderr, "generator: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void enqueue(struct connection *c)
{
    if (c->queued || !measuring)
        return;
    c->queued = true;
    queue[(queue_head + queue_length++) % connection_count] = c;
}

static void note_latency(uint64_t due_ns)
{
    if (latency_count == latency_room) {
        latency_room = latency_room ? latency_room * 2 : 1 << 16;
        latencies_us = realloc(latencies_us, latency_room * sizeof *latencies_us);
        if (!latencies_us)
            die("realloc");
    }
    uint64_t latency_us = (now_ns() - due_ns) / 1000;
    latencies_us[latency_count++] = latency_us > UINT32_MAX ? UINT32_MAX : (uint32_t)latency_us;
}

/* Takes the newest ticket of a connection for its slot. */
static int on_session(SSL *ssl, SSL_SESSION *session)
{
    struct connection *c = SSL_get_app_data(ssl);
    if (c->session)
        SSL_SESSION_free(c->session);
    c->session = session;
    return 1; /* the reference is ours now */
}

static void disconnect(struct connection *c)
{
    if (c->ssl) {
        SSL_set_shutdown(c->ssl, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN); /* else its ticket counts as bad */
        SSL_free(c->ssl);
        c->ssl = NULL;
    }
    if (c->fd >= 0)
        close(c->fd);
    c->fd = -1;
    c->state = STATE_CLOSED;
}

static void fail(struct connection *c, const char *what)
{
    if (!errors++) {
        unsigned long code = ERR_peek_error();
        snprintf(first_error, sizeof first_error, "%s: %s", what, code ? ERR_reason_error_string(code) : strerror(errno));
        for (char *p = first_error; *p; p++)
            if (*p == '"' || *p == '\\' || *p < ' ')
                *p = '\'';
    }
    ERR_clear_error();
    disconnect(c);
    enqueue(c);
}

static bool open_connection(struct connection *c)
{
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        die("socket");
    int one = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS) {
        fail(c, "connect");
        return false;
    }
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event) < 0)
        die("epoll_ctl");
    c->ssl = SSL_new(context);
    if (!c->ssl)
        die("SSL_new");
    SSL_set_app_data(c->ssl, c);
    SSL_set_fd(c->ssl, c->fd);
    SSL_set_tlsext_host_name(c->ssl, "localhost");
    SSL_set_connect_state(c->ssl);
    if (mode == MODE_RESUMED && c->session)
        SSL_set_session(c->ssl, c->session);
    c->state = STATE_HANDSHAKE;
    c->served = false;
    return true;
}

/* After SSL_* returned <= 0: true if it only wants to wait. */
static bool would_block(struct connection *c, int result)
{
    int error = SSL_get_error(c->ssl, result);
    return error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE;
}

static void ask(struct connection *c, uint64_t due_ns);

static void response_complete(struct connection *c)
{
    if (measuring) {
        requests++;
        note_latency(c->due_ns);
    }
    if (!c->served && c->warm_left == 0) {
        c->served = true;
        served_connections++;
    }
    if (c->last) {
        c->state = STATE_END;
        return;
    }
    c->state = STATE_READY;
    if (c->warm_left) {
        c->warm_left--;
        ask(c, now_ns());
        return;
    }
    if (mode == MODE_KEEPALIVE)
        enqueue(c);
}

/* Parses the collected header; false if it is not the response asked for. */
static bool parse_header(struct connection *c, const char *end)
{
    bool length_seen = false;
    c->last = false;
    if (c->header_length < 12 || memcmp(c->header, "HTTP/1.1 200", 12) != 0)
        return false;
    for (char *line = strstr(c->header, "\r\n"); line && line < end; line = strstr(line, "\r\n")) {
        line += 2;
        if (strncasecmp(line, "content-length:", 15) == 0) {
            c->body_left = strtoull(line + 15, NULL, 10);
            length_seen = true;
        } else if (strncasecmp(line, "connection: close", 17) == 0) {
            c->last = true;
        }
    }
    bool last_expected = mode == MODE_FULL || mode == MODE_RESUMED;
    return length_seen && c->body_left == body_bytes_expected && (c->last || !last_expected);
}

/* Takes `length` bytes of plaintext; false: the response is not what was asked for. */
static bool consume(struct connection *c, const unsigned char *data, size_t length)
{
    if (c->state == STATE_HEADER) {
        size_t room = HEADER_BYTES_MAX - 1 - c->header_length, taken = length < room ? length : room;
        memcpy(c->header + c->header_length, data, taken);
        c->header[c->header_length + taken] = 0;
        char *end = strstr(c->header, "\r\n\r\n");
        if (!end) {
            c->header_length += taken;
            return taken == length;
        }
        size_t used = (size_t)(end + 4 - c->header) - c->header_length;
        c->header_length += used;
        end[2] = 0;
        if (!parse_header(c, end))
            return false;
        c->state = STATE_BODY;
        data += used;
        length -= used;
    }
    if (c->state != STATE_BODY || length > c->body_left)
        return length == 0;
    c->body_left -= length;
    if (measuring)
        body_bytes += length;
    if (c->body_left == 0)
        response_complete(c);
    return true;
}

static int make_request(size_t number)
{
    char file[24] = "";
    if (path_after)
        snprintf(file, sizeof file, "%zu", number % files); /* each connection goes through them, from its own on */
    return snprintf(request, sizeof request, "GET %s%s%s HTTP/1.1\r\nHost: localhost\r\n%s\r\n", path_before, file,
                    path_after ? path_after : "", mode == MODE_FULL || mode == MODE_RESUMED ? "Connection: close\r\n" : "");
}

static void ask(struct connection *c, uint64_t due_ns)
{
    c->due_ns = due_ns;
    if (c->state == STATE_CLOSED) {
        open_connection(c);
        return; /* the request leaves when the handshake is complete */
    }
    c->state = STATE_HEADER;
    c->header_length = 0;
    int length = path_after ? make_request((size_t)(c - connections) + connection_count * c->asked++) : request_length;
    int result = SSL_write(c->ssl, request, length);
    if (result != length)
        fail(c, "write of the request");
}

/* Goes as far as it can without waiting. */
static void drive(struct connection *c)
{
    if (c->state == STATE_HANDSHAKE) {
        int result = SSL_do_handshake(c->ssl);
        if (result != 1) {
            if (!would_block(c, result))
                fail(c, "handshake");
            return;
        }
        if (measuring)
            *(SSL_session_reused(c->ssl) ? &handshakes_resumed : &handshakes_full) += 1;
        c->state = STATE_READY;
        ask(c, c->due_ns);
    }
    while (c->state != STATE_CLOSED) {
        int result = SSL_read(c->ssl, read_buffer, sizeof read_buffer);
        if (result > 0) {
            if (!consume(c, read_buffer, (size_t)result)) {
                errno = EPROTO;
                fail(c, "response (status, Content-Length or bytes after it)");
            }
            continue;
        }
        if (would_block(c, result))
            return;
        bool expected = c->state == STATE_END || (c->state == STATE_READY && mode == MODE_KEEPALIVE);
        if (!expected) {
            fail(c, "closed in the middle of a response");
            return;
        }
        if (c->state == STATE_READY || mode == MODE_KEEPALIVE)
            reconnects++;
        ERR_clear_error();
        disconnect(c);
        enqueue(c);
    }
}

/* One turn: starts what is due, waits at most until `until_ns`, drives what is ready. */
static void turn(uint64_t start_ns, double rate, uint64_t *issued, uint64_t until_ns)
{
    uint64_t now = now_ns(), wake_ns = until_ns;
    while (queue_length && errors < ERRORS_MAX) {
        uint64_t due_ns = now;
        if (rate > 0) {
            due_ns = start_ns + (uint64_t)((double)*issued * 1e9 / rate);
            if (due_ns > now) {
                wake_ns = due_ns < until_ns ? due_ns : until_ns;
                break;
            }
        }
        struct connection *c = queue[queue_head];
        queue_head = (queue_head + 1) % connection_count;
        queue_length--;
        c->queued = false;
        ++*issued;
        ask(c, due_ns);
    }
    struct epoll_event events[EVENTS];
    uint64_t wait_ns = wake_ns > now ? wake_ns - now : 0;
    struct timespec timeout = {.tv_sec = (time_t)(wait_ns / 1000000000u), .tv_nsec = (long)(wait_ns % 1000000000u)};
    int count = epoll_pwait2(epoll_fd, events, EVENTS, &timeout, NULL);
    if (count < 0 && errno != EINTR)
        die("epoll_pwait2");
    for (int i = 0; i < count; i++)
        drive(events[i].data.ptr);
}

static double cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static int compare_latency(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static uint32_t percentile(double fraction)
{
    return latency_count ? latencies_us[(size_t)((double)(latency_count - 1) * fraction)] : 0;
}

static void make_context(const char *suite, const char *group)
{
    context = SSL_CTX_new(TLS_client_method());
    if (!context || !SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) || !SSL_CTX_set_ciphersuites(context, suite) ||
        !SSL_CTX_set1_groups_list(context, group)) {
        fprintf(stderr, "generator: OpenSSL knows no suite %s or group %s\n", suite, group);
        exit(2);
    }
    SSL_CTX_set_verify(context, SSL_VERIFY_NONE, NULL); /* the runner has verified what is served */
    SSL_CTX_set_read_ahead(context, 1);
    SSL_CTX_set_default_read_buffer_len(context, READ_BYTES);
    SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    if (mode == MODE_RESUMED) {
        SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
        SSL_CTX_sess_set_new_cb(context, on_session);
    }
}

int main(int argc, char **argv)
{
    static const char *const mode_names[] = {"keepalive", "full", "resumed", "idle"};
    if (argc != 13) {
        fprintf(stderr, "usage: generator HOST PORT PATH MODE CONNECTIONS SECONDS RATE BODY_BYTES SUITE GROUP AGES FILES\n");
        return 2;
    }
    address.sin_family = AF_INET;
    address.sin_port = htons((uint16_t)atoi(argv[2]));
    if (inet_pton(AF_INET, argv[1], &address.sin_addr) != 1)
        die("HOST must be an IPv4 address");
    mode = MODE_IDLE;
    for (int i = 0; i < 4; i++)
        if (strcmp(argv[4], mode_names[i]) == 0)
            mode = (enum mode)i;
    connection_count = (size_t)atol(argv[5]);
    double seconds = atof(argv[6]), rate = atof(argv[7]);
    body_bytes_expected = strtoull(argv[8], NULL, 10);
    make_context(argv[9], argv[10]);
    uint64_t ages = strtoull(argv[11], NULL, 10);
    files = (size_t)atol(argv[12]);
    char *star = strchr(argv[3], '*');
    path_before = argv[3];
    if (star) {
        *star = 0;
        path_after = star + 1;
    }
    request_length = make_request(0);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    connections = calloc(connection_count, sizeof *connections);
    queue = calloc(connection_count, sizeof *queue);
    if (epoll_fd < 0 || !connections || !queue)
        die("setting up");
    for (size_t i = 0; i < connection_count; i++) {
        connections[i].fd = -1;
        connections[i].warm_left = (uint32_t)(ages * i / connection_count);
    }

    /* Connections are opened a few at a time: a burst of a thousand would measure the listen queue. */
    uint64_t issued = 0, setup_deadline_ns = now_ns() + 300000000000u;
    if (mode == MODE_KEEPALIVE || mode == MODE_IDLE) {
        for (size_t opened = 0; served_connections < connection_count;) {
            while (opened < connection_count && opened - served_connections < 16)
                ask(&connections[opened++], now_ns());
            turn(0, 0, &issued, now_ns() + 100000000u);
            if (errors || now_ns() > setup_deadline_ns) {
                fprintf(stderr, "generator: opening connections: %s\n", errors ? first_error : "too slow");
                return 1;
            }
        }
    }
    printf("warm\n");
    fflush(stdout);
    char line[16];
    if (!fgets(line, sizeof line, stdin))
        return 0;

    uint64_t start_ns = now_ns(), end_ns = start_ns + (uint64_t)(seconds * 1e9);
    double cpu_before = cpu_seconds();
    issued = 0;
    measuring = true;
    for (size_t i = 0; i < connection_count && mode != MODE_IDLE; i++)
        enqueue(&connections[i]);
    while (now_ns() < end_ns && errors < ERRORS_MAX)
        turn(start_ns, rate, &issued, end_ns);
    double elapsed = (double)(now_ns() - start_ns) / 1e9, cpu = cpu_seconds() - cpu_before;
    qsort(latencies_us, latency_count, sizeof *latencies_us, compare_latency);
    printf("{\"requests\": %llu, \"bytes\": %llu, \"handshakes_full\": %llu, \"handshakes_resumed\": %llu, \"reconnects\": %llu, "
           "\"errors\": %llu, \"first_error\": \"%s\", \"seconds\": %.6f, \"cpu_seconds\": %.6f, "
           "\"latency_us\": {\"p50\": %u, \"p90\": %u, \"p99\": %u, \"p999\": %u, \"max\": %u}}\n",
           (unsigned long long)requests, (unsigned long long)body_bytes, (unsigned long long)handshakes_full,
           (unsigned long long)handshakes_resumed, (unsigned long long)reconnects, (unsigned long long)errors, first_error,
           elapsed, cpu, percentile(0.5), percentile(0.9), percentile(0.99), percentile(0.999), percentile(1.0));
    fflush(stdout);
    return 0;
}
