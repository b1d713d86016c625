/* Says which accelerators work on this host, how fast, and why one is not taken. */
#include <nacre.h>
#include <stdio.h>

int main(void)
{
    struct nacre_accel_info infos[8];
    struct nacre_error *error = NULL;
    size_t count = 8;
    char message[512];

    if (nacre_accel_probe(infos, &count, &error)) {
        nacre_error_message(error, 0, message, sizeof message);
        nacre_error_free(error);
        fprintf(stderr, "%s\n", message);
        return 1;
    }
    for (size_t i = 0; i < count && i < 8; i++) {
        const struct nacre_accel_info *a = &infos[i];
        printf("%-4s %-10s %-6s kernel %.0f, user %.0f million instructions a second%s%s\n",
               a->kind == NACRE_ACCEL_KVM ? "kvm" : "soft", a->usable ? "usable" : "not usable", a->chosen ? "chosen" : "",
               a->kernel_mips, a->user_mips, a->reason[0] ? ": " : "", a->reason);
    }
    return 0;
}
