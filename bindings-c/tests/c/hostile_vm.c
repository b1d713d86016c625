/* Careless callers of machines; many machines in one process; nothing left behind. */
#include "hostile.h"

#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Guest RAM is in memfds. */
static int mappings(void)
{
    char line[512];
    int n = 0;
    FILE *f = fopen("/proc/self/maps", "r");
    while (fgets(line, sizeof line, f)) n += strstr(line, "memfd:") != NULL;
    fclose(f);
    return n;
}

static void *wait_for(void *vm)
{
    enum nacre_stop_reason reason = 0;
    EXPECT(nacre_vm_wait(vm, -1, &reason, NULL, NULL), NACRE_OK);
    CHECK(reason == NACRE_STOP_STOPPED);
    return NULL;
}

int main(int argc, char **argv)
{
    struct nacre_vm *vm = NULL, *vms[16];
    struct nacre_error *error = NULL;
    enum nacre_stop_reason reason = 0;
    enum nacre_vm_event event;
    char message[256];
    uint8_t code = 77;
    if (argc != 2) return 2;
    int threads = entries("/proc/self/task"), files = entries("/proc/self/fd");

    struct nacre_vm_options o = { .struct_size = sizeof o, .kernel = argv[1], .memory = 16 << 20, .accel = NACRE_ACCEL_SOFT };
    EXPECT(nacre_vm_build(NULL, &vm, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_vm_build(&o, NULL, NULL), NACRE_INVALID_ARGUMENT);
    o.accel = 99;
    EXPECT(nacre_vm_build(&o, &vm, NULL), NACRE_INVALID_ARGUMENT);
    o.accel = NACRE_ACCEL_SOFT;
    o.kernel = NULL;
    EXPECT(nacre_vm_build(&o, &vm, NULL), NACRE_INVALID_ARGUMENT);
    o.kernel = "/nonexistent";
    EXPECT(nacre_vm_build(&o, &vm, &error), NACRE_NOT_FOUND);
    CHECK(nacre_error_message(error, 0, message, sizeof message) > 0 && strstr(message, "/nonexistent"));
    nacre_error_free(error);
    o.firmware = "/nonexistent";
    EXPECT(nacre_vm_build(&o, &vm, NULL), NACRE_INVALID_ARGUMENT); // beside a kernel
    o.kernel = NULL;
    EXPECT(nacre_vm_build(&o, &vm, &error), NACRE_NOT_FOUND);
    CHECK(nacre_error_message(error, 0, message, sizeof message) > 0 && strstr(message, "firmware /nonexistent"));
    nacre_error_free(error);
    o.firmware = NULL;
    o.kernel = argv[1];
    o.memory = 12345;
    EXPECT(nacre_vm_build(&o, &vm, NULL), NACRE_INVALID_ARGUMENT);
    o.memory = 16 << 20;
    o.cpus = 100000;
    EXPECT(nacre_vm_build(&o, &vm, NULL), NACRE_INVALID_ARGUMENT);
    o.cpus = 1;
    o.disk_count = 3;
    EXPECT(nacre_vm_build(&o, &vm, NULL), NACRE_INVALID_ARGUMENT);
    o.disk_count = (size_t)-1;
    EXPECT(nacre_vm_build(&o, &vm, NULL), NACRE_INVALID_ARGUMENT);
    const struct nacre_net_options *nets[1] = { NULL };
    o.disk_count = 0;
    o.nets = nets;
    o.net_count = 1;
    EXPECT(nacre_vm_build(&o, &vm, NULL), NACRE_INVALID_ARGUMENT);
    o.net_count = 0;
    o.console = true;
    o.console_fd = 9999;
    EXPECT(nacre_vm_build(&o, &vm, NULL), NACRE_INVALID_ARGUMENT);
    o.console = false;
    CHECK(vm == NULL);
    EXPECT(nacre_vm_build_json("{\"no such field\": 1}", &vm, NULL), NACRE_INVALID_ARGUMENT);
    EXPECT(nacre_vm_start(NULL, NULL), NACRE_BAD_HANDLE);
    EXPECT(nacre_vm_wait((struct nacre_vm *)message, 0, &reason, NULL, NULL), NACRE_BAD_HANDLE);
    CHECK(nacre_vm_event_fd(NULL) == -1);

    /* The whole life. */
    EXPECT(nacre_vm_build(&o, &vm, NULL), NACRE_OK);
    EXPECT(nacre_vm_wait(vm, 10, &reason, NULL, NULL), NACRE_TIMEOUT);
    EXPECT(nacre_vm_start(vm, NULL), NACRE_OK);
    EXPECT(nacre_vm_wait(vm, 30000, &reason, &code, NULL), NACRE_OK);
    CHECK(reason == NACRE_STOP_POWER_OFF && code == 0);
    struct pollfd p = { .fd = nacre_vm_event_fd(vm), .events = POLLIN };
    CHECK(poll(&p, 1, 0) == 1);
    EXPECT(nacre_vm_next_event(vm, &event, NULL), NACRE_OK);
    CHECK(event == NACRE_EVENT_STARTED);
    EXPECT(nacre_vm_next_event(vm, &event, NULL), NACRE_OK);
    CHECK(event == NACRE_EVENT_STOPPED);
    EXPECT(nacre_vm_next_event(vm, &event, NULL), NACRE_OK);
    CHECK(event == NACRE_EVENT_NONE);
    EXPECT(nacre_vm_start(vm, NULL), NACRE_WRONG_STATE);
    EXPECT(nacre_vm_free(vm, NULL), NACRE_OK);
    EXPECT(nacre_vm_free(vm, NULL), NACRE_BAD_HANDLE);
    EXPECT(nacre_vm_pause(vm, NULL), NACRE_BAD_HANDLE);

    /* A free while another thread waits; many machines at once; machines that never start. */
    EXPECT(nacre_vm_build(&o, &vm, NULL), NACRE_OK);
    pthread_t t;
    pthread_create(&t, NULL, wait_for, vm);
    usleep(20000);
    EXPECT(nacre_vm_free(vm, NULL), NACRE_OK);
    pthread_join(t, NULL);
    for (int i = 0; i < 16; i++) EXPECT(nacre_vm_build(&o, &vms[i], NULL), NACRE_OK);
    CHECK(mappings() >= 16);
    for (int i = 0; i < 16; i += 2) EXPECT(nacre_vm_start(vms[i], NULL), NACRE_OK);
    for (int i = 0; i < 16; i += 2) EXPECT(nacre_vm_wait(vms[i], 60000, &reason, NULL, NULL), NACRE_OK);
    for (int i = 0; i < 16; i++) EXPECT(nacre_vm_free(vms[i], NULL), NACRE_OK);
    CHECK(entries("/proc/self/task") == threads);
    CHECK(entries("/proc/self/fd") == files);
    CHECK(mappings() == 0);
    if (!bad) puts("hostile: ok");
    return bad;
}
