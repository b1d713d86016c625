/* Snapshots a disk in use, merges the snapshot back with a progress display, and moves the disk to another file
 * without closing it: disk_jobs DIRECTORY */
#include <nacre.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct nacre_error *error;

static void check(const char *what, enum nacre_status status)
{
    char message[512];
    if (!status) return;
    fprintf(stderr, "disk_jobs: %s failed\n", what);
    for (size_t i = 0; i < nacre_error_depth(error); i++) {
        nacre_error_message(error, i, message, sizeof message);
        fprintf(stderr, "  %s\n", message);
    }
    exit(1);
}

/* Shows a job's progress until it has ended. The descriptor fits into any event loop. */
static void finish(const char *what, struct nacre_job *job)
{
    struct pollfd ended = { .fd = nacre_job_event_fd(job), .events = POLLIN };
    uint64_t done = 0, total = 0;
    while (poll(&ended, 1, 100) == 0) {
        check("reading the progress", nacre_job_progress(job, &done, &total, &error));
        fprintf(stderr, "%s: %llu of %llu bytes\n", what, (unsigned long long)done, (unsigned long long)total);
    }
    check(what, nacre_job_wait(job, -1, NULL, &error));
    check("freeing a job", nacre_job_free(job, &error));
}

int main(int argc, char **argv)
{
    struct nacre_disk *disk, *target;
    struct nacre_job *job;
    char base[512], snapshot[512], moved[512], text[32] = "";
    size_t layers = 0;

    if (argc != 2) return fprintf(stderr, "usage: disk_jobs DIRECTORY\n"), 2;
    snprintf(base, sizeof base, "%s/base.qcow2", argv[1]);
    snprintf(snapshot, sizeof snapshot, "%s/snapshot.qcow2", argv[1]);
    snprintf(moved, sizeof moved, "%s/moved.vhd", argv[1]);

    struct nacre_disk_create_options create = { .struct_size = sizeof create, .path = base, .format = "qcow2",
                                                .size = 16u << 20 };
    struct nacre_disk_options open = { .struct_size = sizeof open, .path = base, .format = "qcow2" };
    check("creating the disk", nacre_disk_create(&create, &error));
    check("opening the disk", nacre_disk_open(&open, &disk, &error));
    check("writing", nacre_disk_write(disk, "before", 6, 0, &error));

    create.path = snapshot;
    check("taking a snapshot", nacre_disk_snapshot(disk, &create, &error));
    check("writing", nacre_disk_write(disk, "after!", 6, 1 << 20, &error));
    check("counting layers", nacre_disk_layers(disk, &layers, &error));
    printf("%zu layers\n", layers);
    check("starting to merge", nacre_disk_commit(disk, 0, &job, &error));
    finish("merge", job);
    check("counting layers", nacre_disk_layers(disk, &layers, &error));
    printf("%zu layer\n", layers);

    create.path = moved, create.format = "vhd";
    open.path = moved, open.format = "vhd";
    check("creating the target", nacre_disk_create(&create, &error));
    check("opening the target", nacre_disk_open(&open, &target, &error));
    check("starting to move", nacre_disk_mirror(disk, target, NACRE_MIRROR_BACKGROUND, &job, &error));
    check("writing meanwhile", nacre_disk_write(disk, "moving", 6, 2 << 20, &error));
    check("switching over", nacre_job_complete(job, NACRE_MIRROR_PIVOT, -1, &error));
    finish("move", job);
    check("freeing the target", nacre_disk_free(target, &error));
    remove(base); /* the disk is in another file now */
    for (int i = 0; i < 3; i++) {
        check("reading", nacre_disk_read(disk, text, 6, (uint64_t)i << 20, &error));
        puts(text);
    }
    check("freeing the disk", nacre_disk_free(disk, &error));
    return 0;
}
