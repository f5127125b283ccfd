/* One run of benchmarks/send_paths: a stream of file ranges over a kTLS socket by one path, and a small echo on a second kTLS connection
 * in the same thread and uring, whose round trips tell what the stream does to others.
 *
 *   paths PATH FILE RANGE_BYTES SECONDS COLD
 *
 * PATH: map-send (IORING_OP_SEND from a mapping), read-send (READ into a buffer, then SEND), preadv-send (preadv2(RWF_NOWAIT), READ where it
 * would block, then SEND), sendfile (sendfile(2), called until EAGAIN, then a poll), splice (IORING_OP_SPLICE file -> pipe -> socket).
 * COLD 1: the file's pages are dropped before each pass.
 * Prints one JSON object. CPU seconds are those of the sending thread and its io-wq workers; the receivers are a child process.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/tls.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef TCP_ULP
#define TCP_ULP 31
#endif
#ifndef SOL_TLS
#define SOL_TLS 282
#endif
#define BATCH 131072
#define ECHO_SAMPLES 2000000

enum { STREAM = 1, FILE_READ, ECHO_SEND, ECHO_RECV, SPLICE_IN, SPLICE_OUT, POLLED };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void fail(const char *what)
{
    fprintf(stderr, "paths: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void keys(int fd, int direction)
{
    struct tls12_crypto_info_aes_gcm_128 info;
    memset(&info, 0, sizeof info);
    info.info.version = TLS_1_3_VERSION;
    info.info.cipher_type = TLS_CIPHER_AES_GCM_128;
    memset(info.key, 7, sizeof info.key);
    if (setsockopt(fd, SOL_TLS, direction, &info, sizeof info) < 0)
        fail("TLS keys");
}

/* A connected pair; both ends speak TLS with known keys. sink: the far end is read raw, its records are nobody's business. */
static void pair(int ends[2], int sink)
{
    int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    if (bind(listener, (void *)&address, sizeof address) < 0 || listen(listener, 1) < 0 ||
        getsockname(listener, (void *)&address, &length) < 0)
        fail("listen");
    ends[0] = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(ends[0], (void *)&address, sizeof address) < 0)
        fail("connect");
    ends[1] = accept(listener, NULL, NULL);
    close(listener);
    for (int i = 0; i < 2; i++) {
        setsockopt(ends[i], SOL_TCP, TCP_NODELAY, &one, sizeof one);
        if (i == 1 && sink)
            break;
        if (setsockopt(ends[i], SOL_TCP, TCP_ULP, "tls", 3) < 0)
            fail("TCP_ULP tls (is there kTLS in this kernel? see scripts/guest)");
        keys(ends[i], TLS_TX);
        if (!sink)
            keys(ends[i], TLS_RX);
    }
}

static pid_t receivers(int sink, int echo)
{
    static char buffer[1 << 20];
    pid_t pid = fork();
    if (pid)
        return pid;
    struct pollfd fds[2] = {{sink, POLLIN, 0}, {echo, POLLIN, 0}};
    while (poll(fds, 2, -1) > 0) {
        if (fds[1].revents) {
            ssize_t n = recv(echo, buffer, 64, MSG_DONTWAIT);
            if (n == 0)
                _exit(0);
            if (n > 0 && send(echo, buffer, n, 0) != n)
                _exit(1);
        }
        if (fds[0].revents && recv(sink, buffer, sizeof buffer, MSG_DONTWAIT) == 0)
            fds[0].fd = -1;
    }
    _exit(0);
}

static int compare(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
    if (argc != 6)
        return 2;
    const char *path = argv[1];
    size_t range = strtoul(argv[3], NULL, 10);
    double seconds = atof(argv[4]);
    int cold = atoi(argv[5]), stream[2], echo[2], pipes[2];
    int file = open(argv[2], O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status) < 0)
        fail(argv[2]);
    size_t size = status.st_size / 4096 * 4096;
    char *map = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0);
    char *buffer = aligned_alloc(4096, BATCH), ping[64] = "ping", pong[64];
    float *samples = malloc(ECHO_SAMPLES * sizeof *samples);
    size_t count = 0, offset = 0, sent = 0, have = 0, have_start = 0, in_pipe = 0, range_left = range;
    if (map == MAP_FAILED || pipe(pipes) < 0)
        fail("mmap or pipe");
    fcntl(pipes[1], F_SETPIPE_SZ, BATCH);
    signal(SIGPIPE, SIG_IGN);
    pair(stream, 1);
    pair(echo, 0);
    pid_t child = receivers(stream[1], echo[1]);
    close(stream[1]);
    close(echo[1]);

    struct io_uring ring;
    struct io_uring_params params = {.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN};
    if ((errno = -io_uring_queue_init_params(64, &ring, &params)))
        fail("io_uring");
#define SQE(prepare, data)                                      \
    do {                                                        \
        struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);     \
        prepare;                                                \
        io_uring_sqe_set_data64(sqe, data);                     \
    } while (0)

    int wants = 1, ended = 0, outstanding = 0;
    double start = now(), echo_at = 0, enter_max = 0;
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    SQE(io_uring_prep_recv(sqe, echo[0], pong, sizeof pong, 0), ECHO_RECV);
    SQE(io_uring_prep_send(sqe, echo[0], ping, sizeof ping, 0), ECHO_SEND);
    echo_at = now();
    while (!ended || outstanding) {
        if (wants && !ended) {
            wants = 0;
            if (offset == 0 && sent % size == 0 && cold && have == 0)
                posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
            size_t left = size - offset, batch = left < BATCH ? left : BATCH;
            if (batch > range_left)
                batch = range_left;
            if (!strcmp(path, "map-send")) {
                SQE(io_uring_prep_send(sqe, stream[0], map + offset, batch, 0), STREAM);
                outstanding++;
            } else if (!strcmp(path, "read-send") || !strcmp(path, "preadv-send")) {
                struct iovec vector = {buffer, batch};
                ssize_t n = -1;
                if (have)
                    n = have;
                else if (path[0] == 'p')
                    n = preadv2(file, &vector, 1, offset, RWF_NOWAIT);
                if (n > 0) {
                    if (!have)
                        have_start = 0;
                    have = n;
                    SQE(io_uring_prep_send(sqe, stream[0], buffer + have_start, have, 0), STREAM);
                } else {
                    SQE(io_uring_prep_read(sqe, file, buffer, batch, offset), FILE_READ);
                }
                outstanding++;
            } else if (!strcmp(path, "sendfile")) {
                off_t at = offset;
                ssize_t n = sendfile(stream[0], file, &at, batch);
                int blocked = n < 0 && errno == EAGAIN;
                if (n < 0 && !blocked)
                    fail("sendfile");
                if (n > 0) {
                    sent += n;
                    offset = (offset + n) % size;
                    range_left -= n;
                }
                if (blocked) {
                    SQE(io_uring_prep_poll_add(sqe, stream[0], POLLOUT), POLLED);
                    outstanding++;
                } else {
                    wants = 1;
                }
            } else { /* splice */
                if (!in_pipe)
                    SQE(io_uring_prep_splice(sqe, file, offset, pipes[1], -1, batch, 0), SPLICE_IN);
                else
                    SQE(io_uring_prep_splice(sqe, pipes[0], -1, stream[0], -1, in_pipe, 0), SPLICE_OUT);
                outstanding++;
            }
            if (range_left == 0)
                range_left = range;
        }
        struct io_uring_cqe *cqe;
        double entered = now();
        if (wants && !ended)
            io_uring_submit_and_get_events(&ring);
        else
            io_uring_submit_and_wait(&ring, 1);
        /* How long a submission kept the thread from everybody else, waiting not counted where something was ready. */
        if (now() - entered > enter_max && io_uring_cq_ready(&ring) == 0)
            enter_max = now() - entered;
        while (io_uring_peek_cqe(&ring, &cqe) == 0) {
            int what = cqe->user_data, result = cqe->res;
            io_uring_cqe_seen(&ring, cqe);
            if (what == ECHO_RECV) {
                if (result <= 0)
                    fail("echo");
                if (count < ECHO_SAMPLES)
                    samples[count++] = now() - echo_at;
                if (!ended) {
                    SQE(io_uring_prep_recv(sqe, echo[0], pong, sizeof pong, 0), ECHO_RECV);
                    SQE(io_uring_prep_send(sqe, echo[0], ping, sizeof ping, 0), ECHO_SEND);
                    echo_at = now();
                }
            } else if (what == STREAM || what == SPLICE_OUT) {
                outstanding--;
                if (result < 0 && result != -EAGAIN) {
                    errno = -result;
                    fail(path);
                }
                if (result == -EAGAIN) {
                    SQE(io_uring_prep_poll_add(sqe, stream[0], POLLOUT), POLLED);
                    outstanding++;
                    continue;
                }
                sent += result;
                offset = (offset + result) % size;
                range_left -= result;
                if (have) {
                    have -= result;
                    have_start += result;
                }
                if (what == SPLICE_OUT)
                    in_pipe -= result;
                if (range_left == 0)
                    range_left = range;
                wants = 1;
            } else if (what == FILE_READ || what == SPLICE_IN) {
                outstanding--;
                if (result <= 0) {
                    errno = -result;
                    fail(what == FILE_READ ? "read" : "splice");
                }
                if (what == FILE_READ) {
                    have = result;
                    have_start = 0;
                } else {
                    in_pipe = result;
                }
                wants = 1;
            } else if (what == POLLED) {
                outstanding--;
                wants = 1;
            }
        }
        if (!ended && now() - start >= seconds)
            ended = 1;
    }
    double elapsed = now() - start;
    getrusage(RUSAGE_SELF, &after);
    double cpu = after.ru_utime.tv_sec - before.ru_utime.tv_sec + (after.ru_utime.tv_usec - before.ru_utime.tv_usec) / 1e6 +
                 after.ru_stime.tv_sec - before.ru_stime.tv_sec + (after.ru_stime.tv_usec - before.ru_stime.tv_usec) / 1e6;
    qsort(samples, count, sizeof *samples, compare);
    printf("{\"path\": \"%s\", \"cold\": %d, \"bytes\": %zu, \"seconds\": %.3f, \"cpu_s_per_gb\": %.3f, \"mb_per_s\": %.1f, "
           "\"echo_p50_us\": %.1f, \"echo_p99_us\": %.1f, \"echo_max_us\": %.1f, \"echoes\": %zu}\n",
           path, cold, sent, elapsed, cpu / (sent / 1e9), sent / 1e6 / elapsed, count ? samples[count / 2] * 1e6 : 0,
           count ? samples[count * 99 / 100] * 1e6 : 0, count ? samples[count - 1] * 1e6 : 0, count);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    return 0;
}
