/* libnacre: the C interface of the Nacre hypervisor engine.
 *
 * Generated; do not edit. Every object is an opaque handle that is checked at each call; every call that can fail
 * returns a status and, through `error`, an error object. Option structures start with `struct_size`. Inputs are
 * copied and descriptors duplicated. All functions may be called from any thread.
 *
 * SPDX-License-Identifier: Apache-2.0 OR MIT */

#ifndef NACRE_H
#define NACRE_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/*
 The result of a call. Numbers never change their meaning; new ones are added at the end.
 */
enum nacre_status {
    /*
     The call did what it says.
     */
    NACRE_OK = 0,
    /*
     An argument is null, out of range, not UTF-8, or contradicts another one.
     */
    NACRE_INVALID_ARGUMENT = 1,
    /*
     The handle is null, was freed, or is of another type.
     */
    NACRE_BAD_HANDLE = 2,
    /*
     The object is not in a state in which this can be done.
     */
    NACRE_WRONG_STATE = 3,
    /*
     A file, device or peer failed.
     */
    NACRE_IO = 4,
    /*
     What was named does not exist.
     */
    NACRE_NOT_FOUND = 5,
    /*
     Somebody else holds it (a locked disk, a lease, an address).
     */
    NACRE_BUSY = 6,
    /*
     The host denied access.
     */
    NACRE_PERMISSION = 7,
    /*
     This build, host or accelerator cannot do it.
     */
    NACRE_UNSUPPORTED = 8,
    /*
     A file or message is malformed.
     */
    NACRE_CORRUPT = 9,
    /*
     The time given ran out first.
     */
    NACRE_TIMEOUT = 10,
    /*
     The operation was cancelled.
     */
    NACRE_CANCELLED = 11,
    /*
     The host has too little memory, space or descriptors.
     */
    NACRE_NO_RESOURCES = 12,
    /*
     Something with this name exists already.
     */
    NACRE_EXISTS = 13,
    /*
     A defect in the library, caught at the border. The object concerned should be freed.
     */
    NACRE_INTERNAL = 14,
};

/*
 An accelerator.
 */
enum nacre_accel {
    /*
     The better one that works on this host.
     */
    NACRE_ACCEL_AUTO = 0,
    /*
     The Linux kernel's KVM.
     */
    NACRE_ACCEL_KVM = 1,
    /*
     The x86-64 CPU in software.
     */
    NACRE_ACCEL_SOFT = 2,
};

/*
 Why a machine stopped.
 */
enum nacre_stop_reason {
    /*
     The guest switched itself off.
     */
    NACRE_STOP_POWER_OFF = 1,
    /*
     The guest asked for a reset: build a new machine from the same options.
     */
    NACRE_STOP_RESET = 2,
    /*
     The guest's kernel panicked.
     */
    NACRE_STOP_PANIC = 3,
    /*
     The guest caused a triple fault.
     */
    NACRE_STOP_TRIPLE_FAULT = 4,
    /*
     A test guest ended with a code.
     */
    NACRE_STOP_EXIT = 5,
    /*
     `nacre_vm_stop` or `nacre_vm_free` was called.
     */
    NACRE_STOP_STOPPED = 6,
    /*
     A vCPU or device failed; `nacre_vm_wait` returned the details as an error.
     */
    NACRE_STOP_ERROR = 7,
};

/*
 What happened to a machine.
 */
enum nacre_vm_event {
    /*
     Nothing: there is no event.
     */
    NACRE_EVENT_NONE = 0,
    /*
     The vCPUs began to run.
     */
    NACRE_EVENT_STARTED = 1,
    /*
     The machine is paused.
     */
    NACRE_EVENT_PAUSED = 2,
    /*
     The machine runs again.
     */
    NACRE_EVENT_RESUMED = 3,
    /*
     The guest's kernel panicked.
     */
    NACRE_EVENT_PANICKED = 4,
    /*
     The machine stopped; the last event.
     */
    NACRE_EVENT_STOPPED = 5,
    /*
     Something that this version of the header has no name for.
     */
    NACRE_EVENT_OTHER = 6,
};

/*
 An open disk: a chain of images. Free it with `nacre_disk_free`.
 */
struct nacre_disk;

/*
 An error object: a code, a message, and the chain of causes. Free it with `nacre_error_free`.
 */
struct nacre_error;

/*
 A virtual switch with its worker threads. Free it with `nacre_switch_free`.
 */
struct nacre_switch;

/*
 A virtual machine. Free it with `nacre_vm_free`, which also stops it.
 */
struct nacre_vm;

/*
 What a probe found out about one accelerator.
 */
struct nacre_accel_info {
    /*
     Which one.
     */
    enum nacre_accel kind;
    /*
     Whether guests can be expected to run.
     */
    bool usable;
    /*
     Whether `NACRE_ACCEL_AUTO` takes this one.
     */
    bool chosen;
    /*
     Speed of guest kernel code in millions of instructions a second; 0 when it was not measured.
     */
    double kernel_mips;
    /*
     Speed of guest user code in millions of instructions a second; 0 when it was not measured.
     */
    double user_mips;
    /*
     Why it is not usable or not chosen, in English; terminated, cut if need be.
     */
    char reason[512];
};

/*
 How an image is created. Set `struct_size` and zero the rest for defaults.
 */
struct nacre_disk_create_options {
    /*
     `sizeof(struct nacre_disk_create_options)`.
     */
    size_t struct_size;
    /*
     The image file to create. Required.
     */
    const char *path;
    /*
     The format. Required.
     */
    const char *format;
    /*
     Size of the disk in bytes. 0 with a backing file: that of the backing file.
     */
    uint64_t size;
    /*
     The parent of a differencing image, or null.
     */
    const char *backing_path;
    /*
     The parent's format. Required with a parent.
     */
    const char *backing_format;
};

/*
 How a disk is opened. Set `struct_size` and zero the rest for defaults.
 */
struct nacre_disk_options {
    /*
     `sizeof(struct nacre_disk_options)`.
     */
    size_t struct_size;
    /*
     The image file. Required.
     */
    const char *path;
    /*
     The format: "raw", "qcow2", ... Required: formats are never guessed, since a guest can rewrite a header.
     */
    const char *format;
    /*
     Refuse writes.
     */
    bool read_only;
    /*
     Bypass the host's page cache.
     */
    bool direct;
    /*
     Open whatever files the image's headers name. By default only those in the image's own directory.
     */
    bool trust_headers;
    /*
     Must be zero.
     */
    uint8_t reserved[5];
    /*
     The serial number that a guest sees, at most 20 bytes; null for none.
     */
    const char *id;
};

/*
 A switch. Set `struct_size` and zero the rest for defaults.
 */
struct nacre_switch_options {
    /*
     `sizeof(struct nacre_switch_options)`.
     */
    size_t struct_size;
    /*
     Worker threads; 0 for one.
     */
    size_t workers;
};

/*
 A port. Set `struct_size` and zero the rest for defaults.
 */
struct nacre_port_options {
    /*
     `sizeof(struct nacre_port_options)`.
     */
    size_t struct_size;
    /*
     The port's name, unique in the switch. Required.
     */
    const char *name;
    /*
     Where it leads to. Required, except for `nacre_vm_options`, which names a port of a machine.
     */
    const char *target;
    /*
     One of `enum nacre_port_kind`.
     */
    uint32_t kind;
    /*
     The VLAN that untagged frames belong to (access port), 1 to 4094; 0 for a port without VLANs.
     */
    uint16_t vlan;
    /*
     Must be zero.
     */
    uint8_t reserved[2];
};

/*
 Counters of a port.
 */
struct nacre_port_stats {
    /*
     Frames that came in.
     */
    uint64_t rx_packets;
    /*
     Bytes that came in.
     */
    uint64_t rx_bytes;
    /*
     Frames that went out.
     */
    uint64_t tx_packets;
    /*
     Bytes that went out.
     */
    uint64_t tx_bytes;
};

/*
 A network card.
 */
struct nacre_net_options {
    /*
     `sizeof(struct nacre_net_options)`.
     */
    size_t struct_size;
    /*
     The Unix stream socket of a switch, passt or gvproxy. Either this, `tap` or `switch_` is required.
     */
    const char *unix_socket;
    /*
     A tap interface of the host.
     */
    const char *tap;
    /*
     MAC address, such as "52:54:00:12:34:56"; null for a random one.
     */
    const char *mac;
    /*
     A switch of this process; the machine gets a new port of it.
     */
    const struct nacre_switch *switch_;
    /*
     The name of that port; null for one made of the MAC address.
     */
    const char *port_name;
    /*
     The VLAN that the machine's frames belong to, 1 to 4094; 0 for none. Only with `switch_`.
     */
    uint16_t vlan;
    /*
     Must be zero.
     */
    uint8_t reserved[6];
};

/*
 A machine. Set `struct_size` and `kernel`, and zero the rest for defaults.
 */
struct nacre_vm_options {
    /*
     `sizeof(struct nacre_vm_options)`.
     */
    size_t struct_size;
    /*
     A Linux bzImage or an ELF file. Required.
     */
    const char *kernel;
    /*
     An initial RAM disk, or null.
     */
    const char *initrd;
    /*
     The kernel's command line, or null.
     */
    const char *command_line;
    /*
     RAM in bytes, a multiple of 4096; 0 for 256 MiB.
     */
    uint64_t memory;
    /*
     vCPUs; 0 for one.
     */
    uint32_t cpus;
    /*
     The accelerator, one of `enum nacre_accel`.
     */
    uint32_t accel;
    /*
     Whether `console_fd` is used; otherwise the serial console is silent.
     */
    bool console;
    /*
     Offer an entropy device.
     */
    bool rng;
    /*
     Must be zero.
     */
    uint8_t reserved[2];
    /*
     A descriptor that the serial console's output is written to. Duplicated.
     */
    int console_fd;
    /*
     Disks; all their options count. Null when `disk_count` is 0.
     */
    const struct nacre_disk_options *const *disks;
    /*
     Number of disks.
     */
    size_t disk_count;
    /*
     Network cards. Null when `net_count` is 0.
     */
    const struct nacre_net_options *const *nets;
    /*
     Number of network cards.
     */
    size_t net_count;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 Measures which accelerators work here; takes some tens of milliseconds. Fills at most `*count` entries of `infos`
 and sets `*count` to the number of accelerators that there are.

 # Safety
 `count` is null or points to a `size_t`; `infos` has room for `*count` entries; `error` is null or points to room
 for a pointer.
 */
enum nacre_status nacre_accel_probe(struct nacre_accel_info *infos,
                                    size_t *count,
                                    struct nacre_error **error);

/*
 Creates an image file.

 # Safety
 `options` is null or points to a structure with `struct_size` set; its strings are null or terminated. `error` is
 null or points to room for a pointer.
 */
enum nacre_status nacre_disk_create(const struct nacre_disk_create_options *options,
                                    struct nacre_error **error);

/*
 Opens a disk and its parents.

 # Safety
 `options` is null or points to a structure with `struct_size` set; its strings are null or terminated. `disk` and
 `error` are null or point to room for a pointer.
 */
enum nacre_status nacre_disk_open(const struct nacre_disk_options *options,
                                  struct nacre_disk **disk,
                                  struct nacre_error **error);

/*
 The disk's size in bytes.

 # Safety
 `size` is null or points to room for a `uint64_t`; `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_disk_size(const struct nacre_disk *disk, uint64_t *size, struct nacre_error **error);

/*
 Reads `len` bytes at `offset`.

 # Safety
 `buffer` has room for `len` bytes; `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_disk_read(const struct nacre_disk *disk,
                                  void *buffer,
                                  size_t len,
                                  uint64_t offset,
                                  struct nacre_error **error);

/*
 Writes `len` bytes at `offset`. They are on stable storage after the next successful `nacre_disk_flush`.

 # Safety
 `buffer` holds `len` readable bytes; `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_disk_write(const struct nacre_disk *disk,
                                   const void *buffer,
                                   size_t len,
                                   uint64_t offset,
                                   struct nacre_error **error);

/*
 Makes everything written so far durable.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_disk_flush(const struct nacre_disk *disk, struct nacre_error **error);

/*
 Makes a range read as zeros; with `unmap` its space is given back where the format can.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_disk_write_zeroes(const struct nacre_disk *disk,
                                          uint64_t offset,
                                          uint64_t len,
                                          bool unmap,
                                          struct nacre_error **error);

/*
 Tells the disk that a range's contents are no longer needed.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_disk_discard(const struct nacre_disk *disk,
                                     uint64_t offset,
                                     uint64_t len,
                                     struct nacre_error **error);

/*
 Changes the disk's size while it is open.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_disk_resize(const struct nacre_disk *disk, uint64_t size, struct nacre_error **error);

/*
 Flushes, closes and frees a disk. The handle is stale afterwards, whatever the result says. A call that another
 thread has under way completes first in the background; the files close after it.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_disk_free(struct nacre_disk *disk,
                                  struct nacre_error **error);

/*
 The status that the failed call returned; `NACRE_BAD_HANDLE` when `error` is not an error object.
 */
enum nacre_status nacre_error_status(const struct nacre_error *error);

/*
 The number of messages: 1 for the failure itself, and one for each cause. 0 when `error` is not an error object.
 */
size_t nacre_error_depth(const struct nacre_error *error);

/*
 Copies message `index` (0: the failure itself, then its causes) into `buffer` of `size` bytes, cut if need be and
 always terminated. Returns the message's whole length without the terminator, or -1 when there is no such message.

 # Safety
 `buffer` is null, or has room for `size` bytes.
 */
int nacre_error_message(const struct nacre_error *error,
                        size_t index,
                        char *buffer,
                        size_t size);

/*
 Frees an error object. Null and stale handles are ignored.
 */
void nacre_error_free(struct nacre_error *error);

/*
 Makes a switch without ports; its workers start at once.

 # Safety
 `options` is null (for defaults) or points to a structure with `struct_size` set. `switch_` and `error` are null or
 point to room for a pointer.
 */
enum nacre_status nacre_switch_new(const struct nacre_switch_options *options,
                                   struct nacre_switch **switch_,
                                   struct nacre_error **error);

/*
 Adds a port. For a port of a machine, name the switch in `nacre_net_options` instead.

 # Safety
 `options` is null or points to a structure with `struct_size` set, whose strings are null or terminated. `error` is
 null or points to room for a pointer.
 */
enum nacre_status nacre_switch_add_port(const struct nacre_switch *switch_,
                                        const struct nacre_port_options *options,
                                        struct nacre_error **error);

/*
 Removes a port. A machine that is attached to it sees its link go down.

 # Safety
 `name` is null or a terminated string; `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_switch_remove_port(const struct nacre_switch *switch_,
                                           const char *name,
                                           struct nacre_error **error);

/*
 Reads a port's counters.

 # Safety
 `name` is null or a terminated string; `stats` and `error` are null or point to room for their values.
 */
enum nacre_status nacre_switch_port_stats(const struct nacre_switch *switch_,
                                          const char *name,
                                          struct nacre_port_stats *stats,
                                          struct nacre_error **error);

/*
 Stops and frees a switch. Machines that are attached to it see their links go down.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_switch_free(struct nacre_switch *switch_, struct nacre_error **error);

/*
 Builds a machine; start it with `nacre_vm_start`.

 # Safety
 `options` is null or points to a structure with `struct_size` set, whose strings are null or terminated and whose
 lists are as long as it says. `vm` and `error` are null or point to room for a pointer.
 */
enum nacre_status nacre_vm_build(const struct nacre_vm_options *options,
                                 struct nacre_vm **vm,
                                 struct nacre_error **error);

/*
 Builds a machine from a JSON configuration, as `nacre run --config` takes it and `nacre schema` describes it.

 # Safety
 `json` is null or a terminated string; `vm` and `error` are null or point to room for a pointer.
 */
enum nacre_status nacre_vm_build_json(const char *json, struct nacre_vm **vm, struct nacre_error **error);

/*
 Lets the machine run, at first or after `nacre_vm_pause`.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_vm_start(const struct nacre_vm *vm, struct nacre_error **error);

/*
 Stops the vCPUs, then the devices. Afterwards guest memory and disks do not change until `nacre_vm_start`.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_vm_pause(const struct nacre_vm *vm, struct nacre_error **error);

/*
 Presses the power button: a guest that listens shuts down.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_vm_press_power_button(const struct nacre_vm *vm, struct nacre_error **error);

/*
 Stops the machine at once, as if the power failed. `nacre_vm_wait` returns afterwards.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_vm_stop(const struct nacre_vm *vm, struct nacre_error **error);

/*
 Waits until the machine has stopped, at most `timeout_ms` milliseconds (for ever when negative), and says why.
 Returns `NACRE_TIMEOUT` when it still runs then. With `NACRE_STOP_ERROR` the result is `NACRE_IO` and the error
 says what failed. `exit_code` (may be null) receives the code of `NACRE_STOP_EXIT`, otherwise 0.

 # Safety
 `reason`, `exit_code` and `error` are null or point to room for their values.
 */
enum nacre_status nacre_vm_wait(const struct nacre_vm *vm,
                                int64_t timeout_ms,
                                enum nacre_stop_reason *reason,
                                uint8_t *exit_code,
                                struct nacre_error **error);

/*
 A descriptor that polls as readable while there are events. It belongs to the machine: poll it, do not read or
 close it. -1 when the handle is bad.
 */
int nacre_vm_event_fd(const struct nacre_vm *vm);

/*
 Takes the oldest event; `NACRE_EVENT_NONE` when there is none.

 # Safety
 `event` and `error` are null or point to room for their values.
 */
enum nacre_status nacre_vm_next_event(const struct nacre_vm *vm,
                                      enum nacre_vm_event *event,
                                      struct nacre_error **error);

/*
 Stops and frees a machine. Calls that wait for it return. Threads, files and memory are released when the last
 call that is under way in another thread has returned.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_vm_free(struct nacre_vm *vm,
                                struct nacre_error **error);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* NACRE_H */
