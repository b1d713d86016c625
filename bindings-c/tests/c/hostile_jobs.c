/* Careless callers of jobs, leases and locks. Run under valgrind, too. */
#include "hostile.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static struct nacre_disk *make(const char *directory, const char *name, uint64_t size)
{
    char path[512];
    struct nacre_disk *disk = NULL;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    struct nacre_disk_create_options create = { .struct_size = sizeof create, .path = path, .format = "qcow2", .size = size };
    struct nacre_disk_options open = { .struct_size = sizeof open, .path = path, .format = "qcow2" };
    EXPECT(nacre_disk_create(&create, NULL), NACRE_OK);
    EXPECT(nacre_disk_open(&open, &disk, NULL), NACRE_OK);
    return disk;
}

static void *wait_for(void *job)
{
    enum nacre_status status = nacre_job_wait(job, -1, NULL, NULL);
    CHECK(status == NACRE_CANCELLED || status == NACRE_BAD_HANDLE);
    return NULL;
}

static void jobs(const char *directory)
{
    struct nacre_disk *a = make(directory, "a", 8 << 20), *b = make(directory, "b", 8 << 20);
    struct nacre_job *job = (void *)1, *stale;
    uint64_t done, total, result = 9;
    char data[65536];
    pthread_t threads[2];
    memset(data, 7, sizeof data);
    for (int i = 0; i < 64; i++) EXPECT(nacre_disk_write(a, data, sizeof data, (uint64_t)i << 16, NULL), NACRE_OK);

    EXPECT(nacre_disk_commit(NULL, 0, &job, NULL), NACRE_BAD_HANDLE);
    EXPECT(nacre_disk_convert(a, a, false, &job, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_disk_convert(a, b, false, NULL, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_disk_mirror(a, b, 77, &job, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_disk_layers(a, NULL, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_disk_snapshot(a, NULL, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_job_wait(NULL, 0, NULL, NULL), NACRE_BAD_HANDLE);
    EXPECT(nacre_job_cancel((struct nacre_job *)a, NULL), NACRE_BAD_HANDLE);
    EXPECT(nacre_job_free((struct nacre_job *)data, NULL), NACRE_BAD_HANDLE);
    CHECK(nacre_job_event_fd(NULL) == -1);

    /* A layer that does not exist is the job's failure. */
    EXPECT(nacre_disk_commit(a, 12345, &job, NULL), NACRE_OK);
    CHECK(nacre_job_wait(job, -1, &result, NULL) != NACRE_OK && result == 9);
    EXPECT(nacre_job_complete(job, NACRE_MIRROR_FINISH, 0, NULL), NACRE_WRONG_STATE);
    EXPECT(nacre_job_free(job, NULL), NACRE_OK);
    EXPECT(nacre_disk_stream(a, (size_t)-2, NACRE_NO_LAYER, &job, NULL), NACRE_OK);
    CHECK(nacre_job_wait(job, -1, NULL, NULL) != NACRE_OK);
    EXPECT(nacre_job_free(job, NULL), NACRE_OK);

    /* Differences are found. */
    EXPECT(nacre_disk_compare(a, b, &job, NULL), NACRE_OK);
    EXPECT(nacre_job_wait(job, -1, &result, NULL), NACRE_OK);
    CHECK(result == 1);
    EXPECT(nacre_job_free(job, NULL), NACRE_OK);

    /* Slow, then cancelled by free while others wait; the disks' handles are gone already. */
    EXPECT(nacre_disk_mirror(a, b, NACRE_MIRROR_WRITE_BLOCKING, &job, NULL), NACRE_OK);
    EXPECT(nacre_job_set_rate(job, 1, NULL), NACRE_OK);
    EXPECT(nacre_job_progress(job, &done, NULL, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_job_progress(job, &done, &total, NULL), NACRE_OK);
    EXPECT(nacre_job_complete(job, 5, 0, NULL), NACRE_INVALID_ARGUMENT);
    for (int i = 0; i < 2; i++) pthread_create(&threads[i], NULL, wait_for, job);
    EXPECT(nacre_disk_free(a, NULL), NACRE_OK);
    EXPECT(nacre_disk_free(b, NULL), NACRE_OK);
    stale = job;
    EXPECT(nacre_job_free(job, NULL), NACRE_OK);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    EXPECT(nacre_job_free(stale, NULL), NACRE_BAD_HANDLE);
    EXPECT(nacre_job_wait(stale, 0, NULL, NULL), NACRE_BAD_HANDLE);
}

static void leases(const char *directory)
{
    char path[512];
    struct nacre_keeper *keeper = NULL;
    struct nacre_lock *lock = NULL, *other = NULL;
    struct nacre_error *error = NULL;
    enum nacre_keeper_event event;
    struct nacre_fencing_token token;
    uint64_t left;
    bool held = false;
    snprintf(path, sizeof path, "%s/leases", directory);
    struct nacre_disk_create_options create = { .struct_size = sizeof create, .path = path, .format = "raw", .size = 3 << 20 };
    struct nacre_keeper_options o = { .struct_size = sizeof o, .path = path, .space = "space", .name = "me", .host = 1,
                                      .io_timeout = 1, .watchdog_timeout = 10 };
    EXPECT(nacre_keeper_open(&o, &keeper, NULL), NACRE_NOT_FOUND);
    EXPECT(nacre_disk_create(&create, NULL), NACRE_OK);
    EXPECT(nacre_keeper_open(&o, &keeper, NULL), NACRE_CORRUPT); /* not formatted */
    EXPECT(nacre_lease_format_space(NULL, NULL), NACRE_INVALID_ARGUMENT);
    o.sector_size = 1000;
    EXPECT(nacre_lease_format_space(&o, NULL), NACRE_INVALID_ARGUMENT);
    o.sector_size = 0;
    EXPECT(nacre_lease_format_space(&o, NULL), NACRE_OK);
    EXPECT(nacre_lease_format_resource(&o, 0, NULL, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_lease_format_resource(&o, 0, "disk", NULL), NACRE_OK);
    o.space = "a name that is much longer than the 48 bytes that the sector has";
    EXPECT(nacre_keeper_open(&o, &keeper, NULL), NACRE_INVALID_ARGUMENT);
    o.space = "other";
    EXPECT(nacre_keeper_open(&o, &keeper, &error), NACRE_CORRUPT);
    nacre_error_free(error);
    o.space = "space";
    o.host = 2001;
    EXPECT(nacre_keeper_open(&o, &keeper, NULL), NACRE_INVALID_ARGUMENT);
    o.host = 1;
    o.struct_size = 8;
    EXPECT(nacre_keeper_open(&o, &keeper, NULL), NACRE_INVALID_ARGUMENT);
    o.struct_size = sizeof o;
    CHECK(keeper == NULL);
    EXPECT(nacre_keeper_open(&o, &keeper, NULL), NACRE_OK);
    EXPECT(nacre_keeper_wait_held(keeper, 0, NULL), NACRE_TIMEOUT);
    EXPECT(nacre_keeper_wait_held(keeper, -1, NULL), NACRE_OK);
    CHECK(nacre_keeper_event_fd(keeper) >= 0);
    EXPECT(nacre_keeper_next_event(keeper, &event, NULL), NACRE_OK);
    CHECK(event == NACRE_LEASE_ACQUIRED);
    EXPECT(nacre_keeper_expires_in(keeper, &left, NULL), NACRE_OK);
    CHECK(left > 0);
    EXPECT(nacre_keeper_lock(keeper, 0, "disk", 9, 0, &lock, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_keeper_lock(keeper, 0, "disk", NACRE_LOCK_EXCLUSIVE, 0, &lock, NULL), NACRE_OK);
    EXPECT(nacre_keeper_lock(keeper, 0, "disk", NACRE_LOCK_EXCLUSIVE, 0, &other, NULL), NACRE_BUSY);
    CHECK(other == NULL);
    EXPECT(nacre_lock_is_held(lock, &held, NULL), NACRE_OK);
    CHECK(held);
    EXPECT(nacre_lock_token(lock, &token, NULL), NACRE_OK);
    CHECK(token.host == 1 && token.version > 0);
    EXPECT(nacre_lock_token((struct nacre_lock *)keeper, &token, NULL), NACRE_BAD_HANDLE);
    EXPECT(nacre_keeper_free(keeper, NULL), NACRE_OK); /* the lock still works */
    EXPECT(nacre_keeper_free(keeper, NULL), NACRE_BAD_HANDLE);
    EXPECT(nacre_lock_is_held(lock, &held, NULL), NACRE_OK);
    CHECK(held);
    EXPECT(nacre_lock_free(lock, NULL), NACRE_OK);
    EXPECT(nacre_lock_free(lock, NULL), NACRE_BAD_HANDLE);
    EXPECT(nacre_lock_is_held(lock, &held, NULL), NACRE_BAD_HANDLE);
}

int main(int argc, char **argv)
{
    if (argc != 2) return 2;
    int threads = entries("/proc/self/task"), files = entries("/proc/self/fd");
    jobs(argv[1]);
    leases(argv[1]);
    CHECK(entries("/proc/self/task") == threads);
    CHECK(entries("/proc/self/fd") == files);
    if (!bad) puts("hostile: ok");
    return bad;
}
