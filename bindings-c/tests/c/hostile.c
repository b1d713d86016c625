/* Everything that a careless caller does: each is an error, none is undefined behaviour. Run under valgrind. */
#include "hostile.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static char path[512];

static void *hammer(void *disk)
{
    char data[512];
    for (int i = 0; i < 200; i++) {
        memset(data, i, sizeof data);
        nacre_disk_write(disk, data, sizeof data, (uint64_t)(i % 16) * 512, NULL);
        nacre_disk_read(disk, data, sizeof data, (uint64_t)(i % 16) * 512, NULL);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    struct nacre_error *error = NULL;
    struct nacre_disk *disk = NULL, *stale;
    char buffer[512];
    uint64_t size;
    if (argc != 2) return 2;
    snprintf(path, sizeof path, "%s/hostile.raw", argv[1]);

    /* Null and wrong pointers. */
    EXPECT(nacre_disk_create(NULL, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_disk_open(NULL, &disk, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_disk_size(NULL, &size, NULL), NACRE_BAD_HANDLE);
    EXPECT(nacre_disk_size((struct nacre_disk *)buffer, &size, NULL), NACRE_BAD_HANDLE);
    EXPECT(nacre_disk_size((struct nacre_disk *)~(uintptr_t)0, &size, &error), NACRE_BAD_HANDLE);
    EXPECT(nacre_error_status(error), NACRE_BAD_HANDLE);
    EXPECT(nacre_disk_size((struct nacre_disk *)error, &size, NULL), NACRE_BAD_HANDLE);
    CHECK(nacre_error_message(error, 0, NULL, 0) > 0 && nacre_error_message(error, 9, buffer, 4) == -1);
    memset(buffer, 'x', sizeof buffer);
    CHECK(nacre_error_message(error, 0, buffer, 4) > 3 && strlen(buffer) == 3 && buffer[4] == 'x');
    nacre_error_free(error);
    nacre_error_free(error); /* twice */
    nacre_error_free(NULL);
    CHECK(nacre_error_depth(error) == 0);

    /* Option structures. */
    struct nacre_disk_create_options create = { .struct_size = sizeof create, .path = path, .format = "raw", .size = 8192 };
    create.struct_size = 0;
    EXPECT(nacre_disk_create(&create, NULL), NACRE_INVALID_ARGUMENT);
    create.struct_size = (size_t)-1;
    EXPECT(nacre_disk_create(&create, NULL), NACRE_INVALID_ARGUMENT);
    create.struct_size = sizeof create;
    create.format = NULL;
    EXPECT(nacre_disk_create(&create, NULL), NACRE_INVALID_ARGUMENT);
    create.format = "no such format";
    EXPECT(nacre_disk_create(&create, NULL), NACRE_UNSUPPORTED);
    create.format = "\xff\xfe";
    EXPECT(nacre_disk_create(&create, NULL), NACRE_INVALID_ARGUMENT);
    create.format = "raw";
    create.path = "/nonexistent/directory/x";
    EXPECT(nacre_disk_create(&create, &error), NACRE_NOT_FOUND);
    CHECK(nacre_error_depth(error) >= 2); /* the cause is there */
    nacre_error_free(error);
    create.path = path;
    create.options = "cluster_size=64k"; /* of another format */
    EXPECT(nacre_disk_create(&create, NULL), NACRE_INVALID_ARGUMENT);
    create.options = "preallocation=off,size=1M"; /* the size is that of the structure */
    char *odd = malloc(sizeof create + 9); /* misaligned, and larger than known with zeros behind */
    memset(odd, 0, sizeof create + 9);
    create.struct_size = sizeof create + 8;
    memcpy(odd + 1, &create, sizeof create);
    EXPECT(nacre_disk_create((const void *)(odd + 1), NULL), NACRE_OK);
    EXPECT(nacre_disk_create((const void *)(odd + 1), NULL), NACRE_EXISTS);
    odd[1 + sizeof create] = 1; /* asks for something unknown */
    EXPECT(nacre_disk_create((const void *)(odd + 1), NULL), NACRE_INVALID_ARGUMENT);
    free(odd);

    struct nacre_disk_options open = { .struct_size = sizeof open, .path = path, .format = "raw" };
    EXPECT(nacre_disk_open(&open, NULL, NULL), NACRE_INVALID_ARGUMENT);
    memset((char *)&open + offsetof(struct nacre_disk_options, read_only), 7, 1); /* not a bool */
    EXPECT(nacre_disk_open(&open, &disk, NULL), NACRE_INVALID_ARGUMENT);
    open.read_only = false;
    EXPECT(nacre_disk_open(&open, &disk, NULL), NACRE_OK);
    uint64_t bytes = 0;
    EXPECT(nacre_disk_size(disk, &bytes, NULL), NACRE_OK);
    CHECK(bytes == 8192);

    /* A parent that changes. */
    char child[sizeof path + 8];
    snprintf(child, sizeof child, "%s.child", path);
    struct nacre_disk *top = NULL;
    struct nacre_disk_create_options clone = { .struct_size = sizeof clone, .path = child, .format = "qcow2", .size = 8192,
                                               .backing_path = path, .backing_format = "raw" };
    EXPECT(nacre_disk_create(&clone, NULL), NACRE_OK);
    EXPECT(nacre_disk_resize(disk, 16384, NULL), NACRE_OK);
    EXPECT(nacre_disk_free(disk, NULL), NACRE_OK);
    struct nacre_disk_options changed = { .struct_size = sizeof changed, .path = child, .format = "qcow2" };
    EXPECT(nacre_disk_open(&changed, &top, NULL), NACRE_CORRUPT);
    changed.changed_parents = true;
    EXPECT(nacre_disk_open(&changed, &top, NULL), NACRE_OK);
    EXPECT(nacre_disk_free(top, NULL), NACRE_OK);
    EXPECT(nacre_disk_open(&open, &disk, NULL), NACRE_OK);
    EXPECT(nacre_disk_resize(disk, 8192, NULL), NACRE_OK);
    remove(child);

    /* Buffers and ranges. */
    EXPECT(nacre_disk_read(disk, NULL, 1, 0, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_disk_read(disk, NULL, 0, 0, NULL), NACRE_OK);
    EXPECT(nacre_disk_read(disk, buffer, (size_t)-1, 0, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_disk_read(disk, buffer, 512, 8192, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_disk_read(disk, buffer, 512, (uint64_t)-256, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_disk_write_zeroes(disk, (uint64_t)-1, (uint64_t)-1, true, NULL), NACRE_INVALID_ARGUMENT);

    /* Threads; then free while others use it; then the stale handle. */
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, hammer, disk);
    stale = disk;
    EXPECT(nacre_disk_free(disk, NULL), NACRE_OK);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    EXPECT(nacre_disk_free(stale, NULL), NACRE_BAD_HANDLE);
    EXPECT(nacre_disk_flush(stale, NULL), NACRE_BAD_HANDLE);
    EXPECT(nacre_disk_open(&open, &disk, NULL), NACRE_OK);
    EXPECT(nacre_disk_flush(stale, NULL), NACRE_BAD_HANDLE); /* the slot is used again, by another object */
    EXPECT(nacre_disk_free(disk, NULL), NACRE_OK);

    if (!bad) puts("hostile: ok");
    return bad;
}
