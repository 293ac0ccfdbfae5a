/* writer: the witness inside the lab guest.
 *
 *   writer sequence  [-r RATE] [-n COUNT] [-i RUN] [-u] FILE...         new record after record, in order
 *   writer overwrite [-r RATE] [-n COUNT] [-i RUN] [-u] [-s SPAN] FILE...   records at random places of SPAN bytes
 *   writer verify FILE...                                               is this exactly the first n writes?
 *
 * Each record is one 4 KiB block, written with O_DIRECT and (without -u) fdatasync, then acknowledged as "ack N" on
 * standard output.  With several files the records are spread over them in one numbering, so that `verify` notices when
 * the files come from different moments.  `verify` prints "verified N" when the files hold exactly the writes 1..N and
 * nothing of any later one, else "broken: why", and ends with status 1.  "verified 0" means that nothing was written.
 *
 * Where a record goes follows from (run, number) alone, so `verify` needs no list of what was written.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, FILES_MAX = 16, SEQUENCE = 1, OVERWRITE = 2 };
#define MAGIC UINT64_C(0x3172776261626c76)

struct record {
    uint64_t magic, run, number, time_ns, mode, files, file, slot, slots; /* slots: of each file, in overwrite mode */
    uint64_t payload[(BLOCK - 10 * 8) / 8];
    uint64_t checksum; /* FNV-1a over all 8-byte words before it */
};
_Static_assert(sizeof(struct record) == BLOCK, "a record is one block");

struct place {
    uint64_t file, slot;
};

static uint64_t mix(uint64_t x) /* splitmix64 */
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

static uint64_t checksum(const struct record *r)
{
    const uint64_t *words = (const uint64_t *)r;
    uint64_t sum = UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < BLOCK / 8 - 1; i++)
        sum = (sum ^ words[i]) * UINT64_C(0x100000001b3);
    return sum;
}

static struct place place_of(uint64_t mode, uint64_t run, uint64_t number, uint64_t files, uint64_t slots)
{
    if (mode == SEQUENCE)
        return (struct place){(number - 1) % files, (number - 1) / files};
    uint64_t h = mix(run ^ mix(number));
    return (struct place){h % files, (h >> 16) % slots};
}

static void fill(struct record *r, uint64_t mode, uint64_t run, uint64_t number, uint64_t files, uint64_t slots)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    struct place at = place_of(mode, run, number, files, slots);
    *r = (struct record){.magic = MAGIC, .run = run, .number = number, .mode = mode, .files = files, .slots = slots};
    r->time_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    r->file = at.file, r->slot = at.slot;
    for (size_t i = 0; i < sizeof r->payload / 8; i++)
        r->payload[i] = mix(run + number * 1024 + i);
    r->checksum = checksum(r);
}

static void die(const char *what, const char *path)
{
    printf("broken: %s %s: %s\n", what, path, strerror(errno));
    exit(1);
}

static int broken(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("broken: ");
    vprintf(format, args);
    putchar('\n');
    va_end(args);
    return 1;
}

static int open_direct(const char *path)
{
    int fd = open(path, O_RDWR | O_CREAT | O_DIRECT, 0644);
    if (fd < 0 && errno == EINVAL) /* tmpfs has no O_DIRECT */
        fd = open(path, O_RDWR | O_CREAT, 0644);
    if (fd < 0)
        die("cannot open", path);
    return fd;
}

/* Random places are written only once they are allocated: then no record depends on file system metadata. */
static void allocate(int fd, const char *path, uint64_t slots)
{
    static char *zeroes;
    struct stat st;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode) || (uint64_t)st.st_size >= slots * BLOCK)
        return;
    enum { STEP = 256 * BLOCK };
    if (!zeroes && posix_memalign((void **)&zeroes, BLOCK, STEP))
        die("no memory for", path);
    memset(zeroes, 0, STEP);
    for (uint64_t at = 0; at < slots * BLOCK; at += STEP) {
        uint64_t left = slots * BLOCK - at;
        if (pwrite(fd, zeroes, left < STEP ? left : STEP, (off_t)at) < 0)
            die("cannot fill", path);
    }
    if (fsync(fd))
        die("cannot sync", path);
}

static void pace(const struct timespec *start, uint64_t number, double rate)
{
    double at = (double)start->tv_sec + (double)start->tv_nsec / 1e9 + (double)number / rate;
    struct timespec until = {(time_t)at, (long)((at - (double)(time_t)at) * 1e9)};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
}

static int write_records(uint64_t mode, int argc, char **argv)
{
    double rate = 0;
    uint64_t count = UINT64_MAX, run = 0, span = 16 << 20, sync = 1;
    for (int c; (c = getopt(argc, argv, "r:n:i:s:u")) != -1;) {
        if (c == 'r') rate = atof(optarg);
        else if (c == 'n') count = strtoull(optarg, NULL, 0);
        else if (c == 'i') run = strtoull(optarg, NULL, 0);
        else if (c == 's') span = strtoull(optarg, NULL, 0);
        else if (c == 'u') sync = 0;
        else return 2;
    }
    uint64_t files = (uint64_t)(argc - optind), slots = mode == OVERWRITE ? span / BLOCK / (files ? files : 1) : 0;
    if (!files || files > FILES_MAX || (mode == OVERWRITE && !slots))
        return 2;
    struct timespec start;
    clock_gettime(CLOCK_MONOTONIC, &start);
    if (!run)
        run = mix((uint64_t)start.tv_nsec ^ (uint64_t)time(NULL) << 20 ^ (uint64_t)getpid());
    int fds[FILES_MAX];
    for (uint64_t i = 0; i < files; i++) {
        fds[i] = open_direct(argv[optind + (int)i]);
        allocate(fds[i], argv[optind + (int)i], slots);
    }
    struct record *r;
    if (posix_memalign((void **)&r, BLOCK, BLOCK))
        die("no memory for", "a record");
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (uint64_t number = 1; number <= count; number++) {
        fill(r, mode, run, number, files, slots);
        int fd = fds[r->file];
        if (pwrite(fd, r, BLOCK, (off_t)(r->slot * BLOCK)) != BLOCK)
            die("cannot write", argv[optind + (int)r->file]);
        if (sync && fdatasync(fd))
            die("cannot sync", argv[optind + (int)r->file]);
        printf("ack %" PRIu64 "\n", number);
        fflush(stdout);
        if (rate > 0)
            pace(&start, number, rate);
    }
    return 0;
}

struct blocks {
    struct record *at;
    uint64_t count;
};

static struct blocks load(const char *path)
{
    int fd = open(path, O_RDONLY);
    off_t size = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
    if (size < 0)
        die("cannot open", path);
    struct blocks b = {NULL, (uint64_t)size / BLOCK};
    if (posix_memalign((void **)&b.at, BLOCK, b.count ? b.count * BLOCK : BLOCK))
        die("no memory for", path);
    for (uint64_t done = 0; done < b.count * BLOCK;) {
        uint64_t left = b.count * BLOCK - done;
        ssize_t n = pread(fd, (char *)b.at + done, left < 1 << 20 ? left : 1 << 20, (off_t)done);
        if (n <= 0)
            die("cannot read", path);
        done += (uint64_t)n;
    }
    close(fd);
    return b;
}

static int is_zero(const struct record *r)
{
    const uint64_t *words = (const uint64_t *)r;
    for (size_t i = 0; i < BLOCK / 8; i++)
        if (words[i])
            return 0;
    return 1;
}

/* What write must be at each place after the first `last` writes: the latest that went there, 0 for none. */
static uint64_t **expected(const struct record *first, uint64_t last, const struct blocks *b)
{
    uint64_t **want = calloc(first->files, sizeof *want);
    for (uint64_t f = 0; f < first->files; f++)
        want[f] = calloc(b[f].count + 1, sizeof **want);
    for (uint64_t number = 1; number <= last; number++) {
        struct place at = place_of(first->mode, first->run, number, first->files, first->slots);
        if (at.slot < b[at.file].count)
            want[at.file][at.slot] = number;
        else
            exit(broken("file %" PRIu64 " is too short for write %" PRIu64, at.file, number));
    }
    return want;
}

static int verify(int files, char **paths)
{
    struct blocks b[FILES_MAX];
    const struct record *first = NULL;
    uint64_t last = 0;
    if (files < 1 || files > FILES_MAX)
        return 2;
    for (int f = 0; f < files; f++) {
        b[f] = load(paths[f]);
        for (uint64_t s = 0; s < b[f].count; s++) {
            const struct record *r = &b[f].at[s];
            if (is_zero(r))
                continue;
            if (r->magic != MAGIC || r->checksum != checksum(r))
                return broken("%s: block %" PRIu64 " is no whole record", paths[f], s);
            if (!first)
                first = r;
            if (r->run != first->run || r->mode != first->mode || r->files != (uint64_t)files || r->slots != first->slots)
                return broken("%s: block %" PRIu64 " belongs to another run", paths[f], s);
            if (r->file != (uint64_t)f || r->slot != s)
                return broken("%s: block %" PRIu64 " holds write %" PRIu64 " of block %" PRIu64 " of file %" PRIu64,
                              paths[f], s, r->number, r->slot, r->file);
            if (r->number > last)
                last = r->number;
        }
    }
    uint64_t **want = first ? expected(first, last, b) : NULL;
    for (int f = 0; first && f < files; f++)
        for (uint64_t s = 0; s < b[f].count; s++)
            if (b[f].at[s].number != want[f][s])
                return broken("%s: block %" PRIu64 " holds write %" PRIu64 ", not %" PRIu64 ", although %" PRIu64 " is there",
                              paths[f], s, b[f].at[s].number, want[f][s], last);
    printf("verified %" PRIu64 "\n", last);
    return 0;
}

int main(int argc, char **argv)
{
    const char *verb = argc > 1 ? argv[1] : "";
    int status = 2;
    if (!strcmp(verb, "sequence"))
        status = write_records(SEQUENCE, argc - 1, argv + 1);
    else if (!strcmp(verb, "overwrite"))
        status = write_records(OVERWRITE, argc - 1, argv + 1);
    else if (!strcmp(verb, "verify"))
        status = verify(argc - 2, argv + 2);
    if (status == 2)
        fprintf(stderr, "usage: writer sequence|overwrite [-r RATE] [-n COUNT] [-i RUN] [-s SPAN] [-u] FILE... | verify FILE...\n");
    return status;
}
