/* Makes a base disk and a differencing child, writes to the child, and reads the chain back. */
#include <nacre.h>
#include <stdio.h>
#include <string.h>

static int failed(const char *what, struct nacre_error *error)
{
    char message[512];
    fprintf(stderr, "%s failed\n", what);
    for (size_t i = 0; i < nacre_error_depth(error); i++) {
        nacre_error_message(error, i, message, sizeof message);
        fprintf(stderr, "  %s\n", message);
    }
    nacre_error_free(error);
    return 1;
}

int main(int argc, char **argv)
{
    struct nacre_error *error = NULL;
    struct nacre_disk *disk = NULL;
    char base[512], child[512], text[32] = { 0 };
    uint64_t size = 0;

    if (argc != 2) {
        fprintf(stderr, "usage: disk_chain DIRECTORY\n");
        return 2;
    }
    snprintf(base, sizeof base, "%s/base.raw", argv[1]);
    snprintf(child, sizeof child, "%s/child.qcow2", argv[1]);

    struct nacre_disk_create_options create = { .struct_size = sizeof create, .path = base, .format = "raw", .size = 1 << 20 };
    if (nacre_disk_create(&create, &error)) return failed("creating the base", error);
    struct nacre_disk_options open = { .struct_size = sizeof open, .path = base, .format = "raw" };
    if (nacre_disk_open(&open, &disk, &error)) return failed("opening the base", error);
    if (nacre_disk_write(disk, "from the base", 14, 0, &error)) return failed("writing the base", error);
    if (nacre_disk_free(disk, &error)) return failed("closing the base", error);

    struct nacre_disk_create_options clone = { .struct_size = sizeof clone, .path = child, .format = "qcow2",
                                               .backing_path = "base.raw", .backing_format = "raw" };
    if (nacre_disk_create(&clone, &error)) return failed("creating the child", error);
    open.path = child;
    open.format = "qcow2";
    if (nacre_disk_open(&open, &disk, &error)) return failed("opening the child", error);
    if (nacre_disk_size(disk, &size, &error)) return failed("asking for the size", error);
    if (nacre_disk_write(disk, "from the child", 15, 4096, &error)) return failed("writing the child", error);
    if (nacre_disk_flush(disk, &error)) return failed("flushing", error);

    printf("%llu bytes\n", (unsigned long long)size);
    if (nacre_disk_read(disk, text, 14, 0, &error)) return failed("reading", error);
    puts(text);
    if (nacre_disk_read(disk, text, 15, 4096, &error)) return failed("reading", error);
    puts(text);
    return nacre_disk_free(disk, &error) ? failed("closing", error) : 0;
}
