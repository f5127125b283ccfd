/* Counts the instructions that running processes execute in user mode, by stepping through them one at a time.
 *
 * For machines whose hypervisor hides the performance counters; exact, and thousands of times slower than running, so only for
 * a few requests. Every thread is stepped. What runs in the kernel is one step per system call. An iteration of a repeated string
 * instruction is a step that stays at its address: not counted, as the counters of a CPU do not count it either.
 *
 * Prints "counting" when every thread has been stopped, counts until a line or the end comes on standard input, lets the
 * threads go and prints the count.
 *
 * Usage: instructions PID...
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/time.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum { THREADS_MAX = 256, LOOK_INTERVAL_US = 20000 };

enum state { SEIZED, STEPPED, GONE };

struct thread {
    pid_t id;
    enum state state;
    long address;
};

static struct thread threads[THREADS_MAX];
static int count;
static bool releasing;
static uint64_t instructions;
static volatile sig_atomic_t ticked;

static void tick(int signal_number)
{
    (void)signal_number;
    ticked = 1;
}

static void attach_all(const char *process)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%s/task", process);
    DIR *directory = opendir(path);
    struct dirent *entry;
    while (directory && (entry = readdir(directory))) {
        pid_t id = atoi(entry->d_name);
        if (id == 0 || count == THREADS_MAX)
            continue;
        if (ptrace(PTRACE_SEIZE, id, NULL, NULL) < 0) {
            if (errno == EPERM || errno == ESRCH)
                continue; /* a worker thread of the kernel, or it has ended */
            perror("instructions: PTRACE_SEIZE");
            exit(1);
        }
        threads[count++].id = id;
        ptrace(PTRACE_INTERRUPT, id, NULL, NULL);
    }
    if (directory)
        closedir(directory);
}

static int in_state(enum state state)
{
    int found = 0;
    for (int i = 0; i < count; i++)
        found += threads[i].state == state;
    return found;
}

/* The trap of a last step may still be pending when a thread stops, and would kill a process that nobody traces any more. */
static bool trap_pending(pid_t id)
{
    siginfo_t pending[8];
    struct __ptrace_peeksiginfo_args arguments = {.off = 0, .flags = 0, .nr = 8};
    long found = ptrace(PTRACE_PEEKSIGINFO, id, &arguments, pending);
    for (long i = 0; i < found; i++)
        if (pending[i].si_signo == SIGTRAP)
            return true;
    return false;
}

static void interrupted(struct thread *t)
{
    if (!releasing) {
        t->state = STEPPED;
        ptrace(PTRACE_SINGLESTEP, t->id, NULL, NULL);
    } else if (trap_pending(t->id)) {
        ptrace(PTRACE_CONT, t->id, NULL, NULL); /* it is the next to be reported */
    } else {
        t->state = GONE;
        ptrace(PTRACE_DETACH, t->id, NULL, NULL);
    }
}

/* Waits for one thread to stop, or for the next tick, and lets it go on. */
static void take(void)
{
    int status;
    pid_t id = waitpid(-1, &status, __WALL);
    struct thread *t = NULL;
    for (int i = 0; i < count; i++)
        if (threads[i].id == id)
            t = &threads[i];
    if (!t)
        return;
    if (!WIFSTOPPED(status)) {
        t->state = GONE;
        return;
    }
    int sent = WSTOPSIG(status);
    if (status >> 16 == PTRACE_EVENT_STOP) {
        interrupted(t);
    } else if (sent != SIGTRAP) {
        ptrace(releasing ? PTRACE_CONT : PTRACE_SINGLESTEP, id, NULL, (long)sent);
    } else {
        long address = ptrace(PTRACE_PEEKUSER, id, offsetof(struct user_regs_struct, rip), NULL);
        instructions += address != t->address;
        t->address = address;
        ptrace(releasing ? PTRACE_CONT : PTRACE_SINGLESTEP, id, NULL, NULL);
        if (releasing)
            ptrace(PTRACE_INTERRUPT, id, NULL, NULL);
    }
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        attach_all(argv[i]);
    if (count == 0) {
        fprintf(stderr, "instructions: there is nothing to count\n");
        return 1;
    }
    while (in_state(SEIZED))
        take();
    instructions = 0;
    printf("counting\n");
    fflush(stdout);

    struct sigaction action = {.sa_handler = tick}; /* without SA_RESTART: it ends a wait for threads that all sleep */
    sigaction(SIGALRM, &action, NULL);
    struct itimerval interval = {{0, LOOK_INTERVAL_US}, {0, LOOK_INTERVAL_US}};
    setitimer(ITIMER_REAL, &interval, NULL);
    struct pollfd told = {.fd = STDIN_FILENO, .events = POLLIN};
    while (poll(&told, 1, 0) <= 0) {
        while (!ticked)
            take();
        ticked = 0;
    }
    uint64_t counted = instructions;
    releasing = true;
    for (int i = 0; i < count; i++)
        ptrace(PTRACE_INTERRUPT, threads[i].id, NULL, NULL);
    while (in_state(GONE) < count)
        take();
    printf("%llu\n", (unsigned long long)counted);
    return 0;
}
