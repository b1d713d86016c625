/* What the hostile callers share: checks that count failures. */
#ifndef HOSTILE_H
#define HOSTILE_H

#include <dirent.h>
#include <nacre.h>
#include <stdio.h>

static int bad;

#define CHECK(what)                                                    \
    do {                                                               \
        if (!(what)) {                                                 \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what); \
            bad = 1;                                                   \
        }                                                              \
    } while (0)

#define EXPECT(what, want)                                                                       \
    do {                                                                                         \
        enum nacre_status got_ = (what);                                                         \
        if (got_ != (want)) {                                                                    \
            fprintf(stderr, "%s:%d: %s = %d, want %d\n", __FILE__, __LINE__, #what, got_, want); \
            bad = 1;                                                                             \
        }                                                                                        \
    } while (0)

/* Entries of a directory, such as one of /proc. */
static inline int entries(const char *path)
{
    int n = 0;
    DIR *d = opendir(path);
    while (readdir(d)) n++;
    closedir(d);
    return n;
}

#endif
