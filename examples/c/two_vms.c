/* Two machines on linked clones of one base disk, connected by a switch inside this process. The guests check their
 * disks, ping each other and send 64 MiB by TCP: two_vms KERNEL INITRD BASE.qcow2 DIRECTORY */
#include <nacre.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <unistd.h>

static struct nacre_error *error;

static void check(const char *what, enum nacre_status status)
{
    char message[512];
    if (!status) return;
    fprintf(stderr, "two_vms: %s failed\n", what);
    for (size_t i = 0; i < nacre_error_depth(error); i++) {
        nacre_error_message(error, i, message, sizeof message);
        fprintf(stderr, "  %s\n", message);
    }
    exit(1);
}

int main(int argc, char **argv)
{
    static const char *const names[2] = { "server", "client" };
    static const char *const roles[2] = { "nacre.ip=10.0.0.2/24 nacre.check=server",
                                          "nacre.ip=10.0.0.3/24 nacre.check=client,10.0.0.2" };
    struct nacre_switch *net = NULL;
    struct nacre_vm *vms[2] = { NULL, NULL };
    int good = 0;

    if (argc != 5) return fprintf(stderr, "usage: two_vms KERNEL INITRD BASE.qcow2 DIRECTORY\n"), 2;
    check("making the switch", nacre_switch_new(NULL, &net, &error));
    for (int i = 0; i < 2; i++) {
        char clone[512], console[512], command_line[512];
        snprintf(clone, sizeof clone, "%s/%s.qcow2", argv[4], names[i]);
        snprintf(console, sizeof console, "%s/%s.log", argv[4], names[i]);
        snprintf(command_line, sizeof command_line, "console=ttyS0 root=/dev/vda rw quiet %s", roles[i]);
        struct nacre_disk_create_options create = { .struct_size = sizeof create, .path = clone, .format = "qcow2",
                                                    .backing_path = argv[3], .backing_format = "qcow2" };
        check("cloning the base disk", nacre_disk_create(&create, &error));
        struct nacre_disk_options disk = { .struct_size = sizeof disk, .path = clone, .format = "qcow2",
                                           .trust_headers = true };
        struct nacre_net_options card = { .struct_size = sizeof card, .switch_ = net, .port_name = names[i] };
        const struct nacre_disk_options *disks[] = { &disk };
        const struct nacre_net_options *nets[] = { &card };
        int fd = open(console, O_CREAT | O_TRUNC | O_WRONLY, 0644);
        struct nacre_vm_options options = {
            .struct_size = sizeof options, .kernel = argv[1], .initrd = argv[2], .command_line = command_line,
            .memory = 256u << 20, .console = true, .console_fd = fd, .disks = disks, .disk_count = 1, .nets = nets,
            .net_count = 1, .rng = true,
        };
        check("building a machine", nacre_vm_build(&options, &vms[i], &error));
        close(fd);
        check("starting a machine", nacre_vm_start(vms[i], &error));
    }
    for (int i = 1; i >= 0; i--) {
        enum nacre_stop_reason reason;
        struct nacre_port_stats stats;
        check("waiting", nacre_vm_wait(vms[i], 600000, &reason, NULL, &error));
        check("reading counters", nacre_switch_port_stats(net, names[i], &stats, &error));
        printf("%s: %s, sent %llu bytes, received %llu bytes\n", names[i],
               reason == NACRE_STOP_POWER_OFF ? "powered off" : "stopped", (unsigned long long)stats.rx_bytes,
               (unsigned long long)stats.tx_bytes);
        good += reason == NACRE_STOP_POWER_OFF && stats.rx_bytes + stats.tx_bytes > 64u << 20;
        nacre_vm_free(vms[i], NULL);
    }
    nacre_switch_free(net, NULL);
    return good != 2;
}
