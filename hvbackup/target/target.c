/* hvbackup-target: where QEMU mirrors the writes of a machine to, one NBD export for each disk.
 *
 *   hvbackup-target RING_FD LISTEN_FD SIZE NAME [SIZE NAME]...
 *
 * Each write goes into the ring, a shared file on tmpfs (its layout: ring.py), with its time of arrival, and is answered at
 * once: then it survives the death of every process of ours, and no disk and no network was waited for.  A worker takes
 * rows and bytes out, makes them durable in the machine's journal, and advances the ring's tail.
 *
 * The guest waits for every answer, so nothing here waits: one thread, no locks, no allocation after the start.  When the ring
 * is full, or a client of ours has gone, the stream is broken for good: writes are still answered, and no longer kept, because
 * what is kept has to be a prefix of what the guest was told.  The worker sees it and begins anew.
 *
 * End of file on standard input means that the worker is dead, and ends the program.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { HEADER_BYTES = 4096, DISKS_MAX = 64, CLIENTS_MAX = DISKS_MAX + 16, NAME_MAX_BYTES = 255 };
enum { PAYLOAD_MAX = 32 << 20, OPTION_MAX = 4096, OPTIONS_MAX = 64, BUFFER_BYTES = PAYLOAD_MAX + (64 << 10) };
enum { REPLY_BYTES = 16, REQUEST_BYTES = 28, REPLIES_MAX = 4096, LOOK_MS = 100 };
#define HANDSHAKE_NS INT64_C(10000000000)
#define LOOK_NS (LOOK_MS * INT64_C(1000000))
#define LATE_NS (2 * LOOK_NS)
#define CALL_NS INT64_C(1000000)
#define CLOCK_STEP_NS INT64_C(60000000000) /* the wall clock was set, and times follow it back: the recorder tells of that */
enum { MANY = 10000, FEW = 5000 }; /* writes a second */
enum { HURRY_SHARE = 4 };          /* a quarter of the ring is full */
#define MAGIC UINT64_C(0x31676e5262766800)

/* State of the stream. */
enum { RECORDING = 1, BROKEN = 2 };
/* Why it is broken. */
enum { FULL = 1, DISCONNECTED = 2, REFUSED = 3, ENDED = 4 }; /* the last one by the worker */
/* Kinds of facts, as in the journal. */
enum { FACT_DATA = 1, FACT_ZERO = 2 };

struct row { /* format.FACT */
    int64_t t;
    uint64_t offset, length;
    uint32_t pos;
    uint16_t disk;
    uint8_t kind, flags;
};
_Static_assert(sizeof(struct row) == 32, "a row is a fact of the journal");

struct disk_counters {
    _Atomic uint64_t writes, bytes, connected;
    uint64_t unused;
};

struct ring {
    uint64_t magic, rows_max, data_max; /* a cache line for each writer */
    uint8_t id[16];
    uint64_t pid;
    _Atomic uint64_t idler; /* by the worker: its thread, while that takes what nobody else wants of the processors */
    _Atomic uint64_t calls; /* by us: how often we have called it */
    _Atomic uint64_t rows_head, data_head, alive_ns, state, why, broke_at, lost, flushes; /* by us */
    _Atomic uint64_t rows_tail, data_tail, unused2[6];                                    /* by the worker */
    struct disk_counters disks[DISKS_MAX];
};
_Static_assert(offsetof(struct ring, rows_head) == 64 && offsetof(struct ring, disks) == 192, "as ring.py has it");
_Static_assert(sizeof(struct ring) <= HEADER_BYTES, "the header is a page");

struct export {
    const char *name;
    uint64_t size;
    int taken; /* a client has, or had, it: there is no second one */
};

enum phase { GREETED, OPTIONS, TRANSMISSION };

struct client {
    int fd, disk, options, flags;
    enum phase phase;
    int64_t since;
    unsigned char *buffer; /* kept from client to client */
    size_t start, end;
};

static struct ring *ring;
static struct row *rows;
static unsigned char *data;
static struct export exports[DISKS_MAX];
static int export_count;
static struct client clients[CLIENTS_MAX];
static struct pollfd polls[CLIENTS_MAX + 2];
static int client_count, transmitting;
static int64_t last_t;

/* ---- small things ---- */

static int64_t now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void die(const char *what)
{
    fprintf(stderr, "hvbackup-target: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t get(const unsigned char *at, int bytes)
{
    uint64_t value = 0;
    while (bytes--)
        value = value << 8 | *at++;
    return value;
}

static unsigned char *put(unsigned char *at, uint64_t value, int bytes)
{
    for (int i = bytes - 1; i >= 0; i--, value >>= 8)
        at[i] = (unsigned char)value;
    return at + bytes;
}

/* All of it, or 0: a client that takes no answers is no client. */
static int send_all(int fd, const unsigned char *bytes, size_t length)
{
    while (length) {
        ssize_t n = send(fd, bytes, length, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return 0;
        bytes += n, length -= (size_t)n;
    }
    return 1;
}

/* ---- the ring ---- */

static void break_off(uint64_t why)
{
    if (atomic_load(&ring->state) == BROKEN)
        return;
    atomic_store(&ring->why, why);
    atomic_store(&ring->broke_at, (uint64_t)now(CLOCK_REALTIME));
    atomic_store(&ring->state, BROKEN);
}

/* The worker is late, and may be waiting for a processor that others want all of.  It may have heard us before it stood back: so
 * we call as long as it says that it does. */
static void hurry(void)
{
    static int64_t called;
    pid_t thread = (pid_t)atomic_load(&ring->idler);
    int64_t time = thread ? now(CLOCK_MONOTONIC) : 0;
    if (!thread || time - called < CALL_NS)
        return;
    called = time;
    if (!sched_setscheduler(thread, SCHED_BATCH, &(struct sched_param){0}))
        atomic_fetch_add(&ring->calls, 1);
}

static void copy_in(uint64_t at, const unsigned char *bytes, size_t length)
{
    size_t inside = at % ring->data_max, first = ring->data_max - inside;
    if (first > length)
        first = length;
    memcpy(data + inside, bytes, first);
    memcpy(data, bytes + first, length - first);
}

/* The write, which arrived at `t`, is in the ring when this returns, unless the stream is broken. */
static void record(int64_t t, int disk, int kind, uint64_t offset, uint64_t length, const unsigned char *bytes)
{
    uint64_t row = atomic_load_explicit(&ring->rows_head, memory_order_relaxed);
    uint64_t at = atomic_load_explicit(&ring->data_head, memory_order_relaxed);
    uint64_t size = kind == FACT_DATA ? length : 0;
    if (!length)
        return;
    uint64_t rows_held = row + 1 - atomic_load(&ring->rows_tail), data_held = at + size - atomic_load(&ring->data_tail);
    if (rows_held > ring->rows_max / HURRY_SHARE || data_held > ring->data_max / HURRY_SHARE)
        hurry();
    if (atomic_load(&ring->state) == RECORDING && (rows_held > ring->rows_max || data_held > ring->data_max))
        break_off(FULL);
    if (atomic_load(&ring->state) != RECORDING) {
        atomic_fetch_add(&ring->lost, 1);
        return;
    }
    if (size)
        copy_in(at, bytes, size);
    last_t = t > last_t || last_t - t > CLOCK_STEP_NS ? t : last_t + 1;
    rows[row % ring->rows_max] = (struct row){last_t, offset, length, 0, (uint16_t)disk, (uint8_t)kind, 0};
    atomic_store_explicit(&ring->data_head, at + size, memory_order_release);
    atomic_store_explicit(&ring->rows_head, row + 1, memory_order_release);
    atomic_fetch_add_explicit(&ring->disks[disk].writes, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&ring->disks[disk].bytes, length, memory_order_relaxed);
}

/* A write on one disk may depend on one of another disk whose connection broke: then it must not be kept. */
static void look_at_the_others(const struct client *but)
{
    struct pollfd others[DISKS_MAX];
    nfds_t count = 0;
    for (int i = 0; i < client_count; i++)
        if (clients[i].phase == TRANSMISSION && &clients[i] != but)
            others[count++] = (struct pollfd){clients[i].fd, POLLRDHUP, 0};
    if (count && poll(others, count, 0) > 0)
        break_off(DISCONNECTED);
}

/* ---- the handshake ---- */

enum { OPT_EXPORT_NAME = 1, OPT_ABORT = 2, OPT_LIST = 3, OPT_INFO = 6, OPT_GO = 7 };
enum { REP_ACK = 1, REP_SERVER = 2, REP_INFO = 3 };
#define REP_ERR(n) (UINT32_C(1) << 31 | (n))
enum { ERR_UNSUP = 1, ERR_POLICY = 2, ERR_INVALID = 3, ERR_UNKNOWN = 6 };
enum { HAS_FLAGS = 1, SEND_FLUSH = 4, SEND_FUA = 8, SEND_WRITE_ZEROES = 64, NO_ZEROES = 2 };
#define TRANSMISSION_FLAGS (HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_WRITE_ZEROES)

static int reply_option(int fd, uint32_t option, uint32_t kind, const void *bytes, size_t length)
{
    unsigned char out[20 + NAME_MAX_BYTES + 64], *at = out;
    at = put(at, UINT64_C(0x3e889045565a9), 8);
    at = put(at, option, 4);
    at = put(at, kind, 4);
    at = put(at, length, 4);
    memcpy(at, bytes, length);
    return send_all(fd, out, 20 + length);
}

static int find_export(const unsigned char *name, size_t length)
{
    for (int i = 0; i < export_count; i++)
        if (strlen(exports[i].name) == length && !memcmp(exports[i].name, name, length))
            return i;
    return -1;
}

static void begin_transmission(struct client *c, int disk)
{
    c->disk = disk;
    c->phase = TRANSMISSION;
    exports[disk].taken = 1;
    transmitting++;
    atomic_store(&ring->disks[disk].connected, 1);
}

static int describe(struct client *c, uint32_t option, int disk)
{
    unsigned char info[14];
    put(put(put(info, 0, 2), exports[disk].size, 8), TRANSMISSION_FLAGS, 2);
    if (!reply_option(c->fd, option, REP_INFO, info, 12))
        return 0;
    put(put(put(put(info, 3, 2), 1, 4), 4096, 4), PAYLOAD_MAX, 4);
    return reply_option(c->fd, option, REP_INFO, info, 14) && reply_option(c->fd, option, REP_ACK, "", 0);
}

static int info_or_go(struct client *c, uint32_t option, const unsigned char *bytes, size_t length)
{
    size_t name = length >= 6 ? get(bytes, 4) : 0;
    if (length < 6 || name > length - 6 || (length - 6 - name) != 2 * get(bytes + 4 + name, 2))
        return reply_option(c->fd, option, REP_ERR(ERR_INVALID), "", 0);
    int disk = find_export(bytes + 4, name);
    if (disk < 0)
        return reply_option(c->fd, option, REP_ERR(ERR_UNKNOWN), "", 0);
    if (exports[disk].taken)
        return reply_option(c->fd, option, REP_ERR(ERR_POLICY), "", 0);
    if (!describe(c, option, disk))
        return 0;
    if (option == OPT_GO)
        begin_transmission(c, disk);
    return 1;
}

static int by_name(struct client *c, const unsigned char *bytes, size_t length)
{
    unsigned char out[10 + 124] = {0};
    int disk = find_export(bytes, length);
    if (disk < 0 || exports[disk].taken)
        return 0;
    put(put(out, exports[disk].size, 8), TRANSMISSION_FLAGS, 2);
    begin_transmission(c, disk);
    return send_all(c->fd, out, c->flags & NO_ZEROES ? 10 : sizeof out);
}

static int list(struct client *c)
{
    for (int i = 0; i < export_count; i++) {
        unsigned char entry[4 + NAME_MAX_BYTES];
        size_t length = strlen(exports[i].name);
        memcpy(put(entry, length, 4), exports[i].name, length);
        if (!reply_option(c->fd, OPT_LIST, REP_SERVER, entry, 4 + length))
            return 0;
    }
    return reply_option(c->fd, OPT_LIST, REP_ACK, "", 0);
}

static int answer_option(struct client *c, uint32_t option, const unsigned char *bytes, size_t length)
{
    if (++c->options > OPTIONS_MAX)
        return 0;
    switch (option) {
    case OPT_EXPORT_NAME: return by_name(c, bytes, length);
    case OPT_ABORT: reply_option(c->fd, option, REP_ACK, "", 0); return 0;
    case OPT_LIST: return length ? reply_option(c->fd, option, REP_ERR(ERR_INVALID), "", 0) : list(c);
    case OPT_INFO:
    case OPT_GO: return info_or_go(c, option, bytes, length);
    default: return reply_option(c->fd, option, REP_ERR(ERR_UNSUP), "", 0);
    }
}

/* Bytes taken of the handshake, 0 when more have to come, -1 when the client has to go. */
static ssize_t handshake(struct client *c)
{
    const unsigned char *at = c->buffer + c->start;
    size_t have = c->end - c->start;
    if (c->phase == GREETED) {
        if (have < 4)
            return 0;
        c->flags = (int)get(at, 4);
        c->phase = OPTIONS;
        return c->flags & ~3 ? -1 : 4;
    }
    if (have < 16)
        return 0;
    uint64_t length = get(at + 12, 4);
    if (get(at, 8) != UINT64_C(0x49484156454f5054) || length > OPTION_MAX)
        return -1;
    if (have < 16 + length)
        return 0;
    return answer_option(c, (uint32_t)get(at + 8, 4), at + 16, length) ? (ssize_t)(16 + length) : -1;
}

/* ---- commands ---- */

enum { READ = 0, WRITE = 1, DISCONNECT = 2, FLUSH = 3, WRITE_ZEROES = 6 };
enum { FLAG_FUA = 1, FLAG_NO_HOLE = 2 };
enum { ERR_EINVAL = 22, ERR_ENOSPC = 28 }; /* on the wire */

/* The error of one command, whose payload is there; what it says is kept first. */
static uint32_t carry_out(struct client *c, int64_t t, unsigned flags, unsigned kind, uint64_t offset, uint64_t length,
                          const unsigned char *payload)
{
    uint64_t size = exports[c->disk].size;
    if (kind == FLUSH && !flags) {
        atomic_fetch_add(&ring->flushes, 1);
        return 0;
    }
    if (kind != WRITE && kind != WRITE_ZEROES)
        return ERR_EINVAL;
    int bad_flags = (flags & ~(unsigned)(kind == WRITE ? FLAG_FUA : FLAG_FUA | FLAG_NO_HOLE)) != 0;
    if (bad_flags || offset > size || length > size - offset) {
        break_off(REFUSED); /* the guest is told that it is written all the same */
        return bad_flags ? ERR_EINVAL : ERR_ENOSPC;
    }
    record(t, c->disk, kind == WRITE ? FACT_DATA : FACT_ZERO, offset, length, payload);
    return 0;
}

/* Every whole command in the buffer is carried out and answered; 0 when the client has to go. */
static int commands(struct client *c)
{
    static unsigned char replies[REPLIES_MAX * REPLY_BYTES];
    unsigned char *reply = replies;
    int64_t t = now(CLOCK_REALTIME); /* what is there has arrived */
    int stays = 1;
    if (transmitting > 1)
        look_at_the_others(c);
    while (c->end - c->start >= REQUEST_BYTES) {
        const unsigned char *at = c->buffer + c->start;
        unsigned kind = (unsigned)get(at + 6, 2);
        uint64_t length = get(at + 24, 4), payload = kind == WRITE ? length : 0;
        if (get(at, 4) != 0x25609513 || payload > PAYLOAD_MAX || kind == DISCONNECT) {
            stays = 0;
            break;
        }
        if (c->end - c->start < REQUEST_BYTES + payload)
            break;
        uint32_t error = carry_out(c, t, (unsigned)get(at + 4, 2), kind, get(at + 16, 8), length, at + REQUEST_BYTES);
        reply = put(put(reply, 0x67446698, 4), error, 4);
        memcpy(reply, at + 8, 8);
        reply += 8;
        c->start += REQUEST_BYTES + payload;
        if (reply == replies + sizeof replies) {
            if (!send_all(c->fd, replies, sizeof replies))
                return 0;
            reply = replies;
        }
    }
    return send_all(c->fd, replies, (size_t)(reply - replies)) && stays;
}

/* ---- clients ---- */

/* Make room behind what is not taken yet. */
static void tidy(struct client *c)
{
    size_t have = c->end - c->start;
    if (c->start && (have == 0 || BUFFER_BYTES - c->end < (64 << 10) || have <= 4096)) {
        memmove(c->buffer, c->buffer + c->start, have);
        c->start = 0, c->end = have;
    }
}

/* 0 when the client has to go. */
static int serve(struct client *c)
{
    ssize_t n = recv(c->fd, c->buffer + c->end, BUFFER_BYTES - c->end, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 1;
    if (n <= 0)
        return 0;
    c->end += (size_t)n;
    while (c->phase != TRANSMISSION) {
        ssize_t taken = handshake(c);
        if (taken < 0)
            return 0;
        if (taken == 0)
            break;
        c->start += (size_t)taken;
    }
    int stays = c->phase != TRANSMISSION || commands(c);
    tidy(c);
    return stays;
}

static void greet(int listener)
{
    unsigned char hello[18];
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0)
        return;
    put(put(put(hello, UINT64_C(0x4e42444d41474943), 8), UINT64_C(0x49484156454f5054), 8), 3, 2);
    if (client_count == CLIENTS_MAX || !send_all(fd, hello, sizeof hello)) {
        close(fd);
        return;
    }
    struct client *c = &clients[client_count];
    unsigned char *buffer = c->buffer;
    if (!buffer && !(buffer = malloc(BUFFER_BYTES))) {
        close(fd);
        return;
    }
    *c = (struct client){.fd = fd, .disk = -1, .phase = GREETED, .since = now(CLOCK_MONOTONIC), .buffer = buffer};
    client_count++;
}

static void drop(int i)
{
    struct client gone = clients[i];
    if (gone.phase == TRANSMISSION) {
        break_off(DISCONNECTED);
        atomic_store(&ring->disks[gone.disk].connected, 0);
        transmitting--;
    }
    close(gone.fd);
    clients[i] = clients[--client_count];
    clients[client_count] = (struct client){.fd = -1, .buffer = gone.buffer};
}

static void drop_the_silent(int64_t time)
{
    for (int i = client_count - 1; i >= 0; i--)
        if (clients[i].phase != TRANSMISSION && time - clients[i].since > HANDSHAKE_NS)
            drop(i);
}

/* A write that wakes us pushes QEMU from the processor that it needs to send the next one, and most wake-ups are for one write.
 * Where many come we let it go on, and find several; where few come each is worth it, however busy the host is. */
static void keep_pace(int64_t time)
{
    static int64_t looked;
    static uint64_t seen;
    static int many = -1; /* at first as we were started: our worker gives way to others */
    if (time - looked < LOOK_NS)
        return;
    uint64_t head = atomic_load_explicit(&ring->rows_head, memory_order_relaxed);
    uint64_t rate = (head - seen) * UINT64_C(1000000000) / (uint64_t)(time - looked);
    int wanted = rate > MANY || (many > 0 && rate > FEW);
    if (wanted != many)
        (void)sched_setscheduler(0, wanted ? SCHED_BATCH : SCHED_OTHER, &(struct sched_param){0}); /* a container may forbid it */
    looked = time, seen = head, many = wanted;
}

/* A worker that stands back is back in some milliseconds, whether or not there was anything to take. */
static void look_at_the_worker(int64_t time)
{
    static int64_t moved; /* 0: at our first look, which may come when the worker stands back already */
    static uint64_t seen;
    uint64_t tail = atomic_load(&ring->rows_tail);
    if (!moved || tail != seen || !atomic_load(&ring->idler))
        moved = time, seen = tail;
    else if (time - moved > LATE_NS)
        hurry();
}

static void run(int listener)
{
    for (;;) {
        int64_t time = now(CLOCK_MONOTONIC_COARSE);
        atomic_store(&ring->alive_ns, (uint64_t)time);
        drop_the_silent(time);
        keep_pace(time);
        look_at_the_worker(time);
        polls[0] = (struct pollfd){STDIN_FILENO, POLLIN, 0};
        polls[1] = (struct pollfd){listener, POLLIN, 0};
        for (int i = 0; i < client_count; i++)
            polls[i + 2] = (struct pollfd){clients[i].fd, POLLIN, 0};
        int count = client_count;
        if (poll(polls, (nfds_t)count + 2, LOOK_MS) <= 0)
            continue;
        if (polls[0].revents)
            return;
        for (int i = count - 1; i >= 0; i--) /* from behind: `drop` moves the last one */
            if (polls[i + 2].revents && !serve(&clients[i]))
                drop(i);
        if (polls[1].revents)
            greet(listener);
    }
}

static void map_ring(int fd)
{
    struct stat st;
    if (fstat(fd, &st) || st.st_size < HEADER_BYTES)
        die("no ring");
    ring = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (ring == MAP_FAILED)
        die("cannot map the ring");
    errno = EINVAL;
    if (ring->magic != MAGIC || !ring->rows_max || !ring->data_max || ring->rows_max > UINT32_MAX || ring->data_max > UINT64_C(1) << 40
        || (uint64_t)st.st_size < HEADER_BYTES + ring->rows_max * sizeof(struct row) + ring->data_max)
        die("not a ring");
    rows = (struct row *)((unsigned char *)ring + HEADER_BYTES);
    data = (unsigned char *)(rows + ring->rows_max);
    (void)mlock(ring, (size_t)st.st_size); /* never into swap, where that is allowed: it is plain text */
    ring->pid = (uint64_t)getpid();
}

int main(int argc, char **argv)
{
    errno = EINVAL;
    if (argc < 5 || argc % 2 == 0 || (argc - 3) / 2 > DISKS_MAX)
        die("usage: hvbackup-target RING_FD LISTEN_FD SIZE NAME...");
    for (int i = 3; i < argc; i += 2) {
        if (strlen(argv[i + 1]) > NAME_MAX_BYTES)
            die("a name is too long");
        exports[export_count++] = (struct export){argv[i + 1], strtoull(argv[i], NULL, 10), 0};
    }
    int const signals[] = {SIGTERM, SIGINT, SIGHUP, SIGPIPE}; /* who ends a whole service wants the worker to end us */
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
        signal(signals[i], SIG_IGN);
    map_ring(atoi(argv[1]));
    atomic_store(&ring->state, RECORDING);
    run(atoi(argv[2]));
    return 0;
}
