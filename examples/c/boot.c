/* Boots a kernel and shows its serial console: boot KERNEL [INITRD [COMMAND-LINE]] */
#include <nacre.h>
#include <stdio.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct nacre_error *error = NULL;
    struct nacre_vm *vm = NULL;
    enum nacre_stop_reason reason;
    char message[512];

    if (argc < 2) return fprintf(stderr, "usage: boot KERNEL [INITRD [COMMAND-LINE]]\n"), 2;
    struct nacre_vm_options options = {
        .struct_size = sizeof options,
        .kernel = argv[1],
        .initrd = argc > 2 ? argv[2] : NULL,
        .command_line = argc > 3 ? argv[3] : "console=ttyS0",
        .memory = 256u << 20,
        .console = true,
        .console_fd = STDOUT_FILENO,
    };
    enum nacre_status status = nacre_vm_build(&options, &vm, &error);
    if (!status) status = nacre_vm_start(vm, &error);
    if (!status) status = nacre_vm_wait(vm, -1, &reason, NULL, &error);
    if (status) {
        for (size_t i = 0; i < nacre_error_depth(error); i++) {
            nacre_error_message(error, i, message, sizeof message);
            fprintf(stderr, "boot: %s\n", message);
        }
        nacre_error_free(error);
    }
    nacre_vm_free(vm, NULL);
    return status || reason != NACRE_STOP_POWER_OFF;
}
