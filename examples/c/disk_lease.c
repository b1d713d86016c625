/* Holds the lease of a disk on shared storage while it writes to the disk, so that no other host does:
 * disk_lease LEASES IMAGE HOST-NUMBER
 * Format both once with: disk_lease LEASES IMAGE 0 */
#include <nacre.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct nacre_error *error;

static void check(const char *what, enum nacre_status status)
{
    char message[512];
    if (!status) return;
    fprintf(stderr, "disk_lease: %s failed\n", what);
    for (size_t i = 0; i < nacre_error_depth(error); i++) {
        nacre_error_message(error, i, message, sizeof message);
        fprintf(stderr, "  %s\n", message);
    }
    exit(1);
}

int main(int argc, char **argv)
{
    struct nacre_keeper *keeper;
    struct nacre_lock *lock;
    struct nacre_disk *disk;
    struct nacre_fencing_token token;
    bool held = false;
    char host[16], text[64] = "";

    if (argc != 4) return fprintf(stderr, "usage: disk_lease LEASES IMAGE HOST-NUMBER\n"), 2;
    snprintf(host, sizeof host, "host-%d", atoi(argv[3]));
    struct nacre_keeper_options options = {
        .struct_size = sizeof options, .path = argv[1], .space = "example", .name = host, .host = (uint16_t)atoi(argv[3]),
        .io_timeout = 1, .watchdog_timeout = 10, /* short, so that the example is quick */
    };
    if (options.host == 0) {
        struct nacre_disk_create_options create = { .struct_size = sizeof create, .path = argv[2], .format = "qcow2",
                                                    .size = 1 << 20 };
        struct nacre_disk_create_options leases = { .struct_size = sizeof leases, .path = argv[1], .format = "raw",
                                                    .size = 2 << 20 };
        check("creating the disk", nacre_disk_create(&create, &error));
        check("creating the lease volume", nacre_disk_create(&leases, &error));
        check("formatting the lockspace", nacre_lease_format_space(&options, &error));
        check("formatting the disk's lease", nacre_lease_format_resource(&options, 0, "disk", &error));
        return 0;
    }
    check("opening the lease volume", nacre_keeper_open(&options, &keeper, &error));
    check("taking the host's lease", nacre_keeper_wait_held(keeper, 60000, &error));
    check("taking the disk's lock", nacre_keeper_lock(keeper, 0, "disk", NACRE_LOCK_EXCLUSIVE, 60000, &lock, &error));
    check("reading the token", nacre_lock_token(lock, &token, &error));

    struct nacre_disk_options open = { .struct_size = sizeof open, .path = argv[2], .format = "qcow2" };
    check("opening the disk", nacre_disk_open(&open, &disk, &error));
    check("reading", nacre_disk_read(disk, text, sizeof text - 1, 0, &error));
    printf("host %llu reads '%s' under token %llu\n", (unsigned long long)token.host, text,
           (unsigned long long)token.version);
    snprintf(text, sizeof text, "written by %s", host);
    check("asking for the lock", nacre_lock_is_held(lock, &held, &error));
    if (!held) return fprintf(stderr, "disk_lease: the lease was lost; nothing was written\n"), 1;
    check("writing", nacre_disk_write(disk, text, sizeof text, 0, &error));
    check("flushing", nacre_disk_flush(disk, &error));
    check("closing the disk", nacre_disk_free(disk, &error)); /* before the lock is given back */
    check("giving the lock back", nacre_lock_free(lock, &error));
    check("giving the lease back", nacre_keeper_free(keeper, &error));
    return 0;
}
