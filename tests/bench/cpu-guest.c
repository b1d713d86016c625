/* The compute rows of the CPU benchmark. Runs as /init of a guest: prints `row NAME NANOSECONDS CHECKSUM` for each (or
 * those that the arguments name: what follows `--` on a kernel's command line), the best of three, then powers off. The
 * checksums let the driver see that every machine computed the same. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static uint32_t rng = 12345;
static uint32_t next(void) { rng = rng * 1664525u + 1013904223u; return rng; }

static uint64_t crc(void)
{
    static uint32_t table[256];
    static uint8_t data[1 << 20];
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1;
        table[i] = c;
    }
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)next();
    uint32_t c = ~0u;
    for (int round = 0; round < 8; round++)
        for (size_t i = 0; i < sizeof data; i++) c = table[(c ^ data[i]) & 255] ^ c >> 8;
    return ~c;
}

static uint64_t sieve(void)
{
    enum { N = 4000000 };
    static uint8_t composite[N];
    memset(composite, 0, N);
    uint64_t primes = 0;
    for (uint32_t i = 2; i < N; i++) {
        if (composite[i]) continue;
        primes++;
        for (uint64_t j = (uint64_t)i * i; j < N; j += i) composite[j] = 1;
    }
    return primes;
}

static uint64_t __attribute__((noinline)) fib(unsigned n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
static uint64_t recursion(void) { return fib(32); }

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static uint64_t sort(void)
{
    enum { N = 400000 };
    static uint32_t v[N];
    for (int i = 0; i < N; i++) v[i] = next();
    qsort(v, N, sizeof v[0], by_value);
    uint64_t sum = 0;
    for (int i = 0; i < N; i += 1000) sum = sum * 31 + v[i];
    return sum;
}

static uint64_t chase(void)
{
    enum { N = 1 << 18 };
    struct node { struct node *next; uint64_t value; };
    static struct node nodes[N];
    static uint32_t order[N];
    for (uint32_t i = 0; i < N; i++) order[i] = i;
    for (uint32_t i = N - 1; i > 0; i--) {
        uint32_t j = next() % (i + 1), t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
    for (uint32_t i = 0; i < N; i++) {
        nodes[order[i]].next = &nodes[order[(i + 1) % N]];
        nodes[order[i]].value = i;
    }
    uint64_t sum = 0;
    struct node *p = nodes;
    for (uint32_t i = 0; i < 8 * N; i++) {
        sum += p->value;
        p = p->next;
    }
    return sum;
}

static uint64_t floating(void)
{
    double x = 0, y = 0, energy = 0;
    for (int i = 1; i < 3000000; i++) {
        x = x * 0.999 + 1.0 / i;
        y = y * 0.5 + x * x / (1.0 + y);
        energy += x * y - (double)(i & 7);
    }
    uint64_t bits;
    memcpy(&bits, &energy, sizeof bits);
    return bits;
}

static uint64_t copy(void)
{
    enum { N = 8 << 20 };
    static uint8_t a[N], b[N];
    for (size_t i = 0; i < N; i += 64) a[i] = (uint8_t)next();
    uint64_t sum = 0;
    for (int round = 0; round < 40; round++) {
        memcpy(b, a, N);
        b[round] ^= (uint8_t)round;
        memcpy(a, b, N);
        sum += a[round * 64];
    }
    return sum;
}

static uint64_t syscalls(void)
{
    uint64_t n = 0;
    for (int i = 0; i < 300000; i++) n += syscall(SYS_getppid) >= 0;
    return n;
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int wanted(const char *name, int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], name)) return 1;
    return argc < 2;
}

int main(int argc, char **argv)
{
    static const struct { const char *name; uint64_t (*run)(void); } rows[] = {
        { "crc", crc }, { "sieve", sieve }, { "recursion", recursion }, { "sort", sort }, { "chase", chase },
        { "float", floating }, { "memcpy", copy }, { "syscall", syscalls },
    };
    puts("row userland 0 0");
    fflush(stdout);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        if (!wanted(rows[i].name, argc, argv)) continue;
        uint64_t best = UINT64_MAX, sum = 0;
        for (int k = 0; k < 3; k++) {
            rng = 12345;
            uint64_t start = now();
            sum = rows[i].run();
            uint64_t took = now() - start;
            if (took < best) best = took;
        }
        printf("row %s %llu %llx\n", rows[i].name, (unsigned long long)best, (unsigned long long)sum);
        fflush(stdout);
    }
    if (getpid() == 1) reboot(RB_POWER_OFF);
    return 0;
}
