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

/* Names no layer. */
#define NACRE_NO_LAYER ((size_t)-1)

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
 What happened to a lease.
 */
enum nacre_keeper_event {
    /*
     Nothing: there is no event.
     */
    NACRE_LEASE_NONE = 0,
    /*
     The lease is held.
     */
    NACRE_LEASE_ACQUIRED = 1,
    /*
     The lease was renewed.
     */
    NACRE_LEASE_RENEWED = 2,
    /*
     No renewal succeeded for a while; it will expire if that goes on.
     */
    NACRE_LEASE_WARNING = 3,
    /*
     The lease is gone, and every lock with it: stop what they protect at once, and free them.
     */
    NACRE_LEASE_LOST = 4,
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
 Where a port of a switch leads to.
 */
enum nacre_port_kind {
    /*
     A Unix stream socket that the switch listens on (`target`: its path); QEMU's and passt's framing.
     */
    NACRE_PORT_UNIX = 1,
    /*
     A Unix stream socket that the switch connects to (`target`: its path), for example passt's.
     */
    NACRE_PORT_UNIX_CONNECT = 2,
    /*
     A tap interface, made when it does not exist (`target`: its name).
     */
    NACRE_PORT_TAP = 3,
    /*
     A DHCP server and gateway inside the switch (`target`: its network, such as "10.0.0.0/24").
     */
    NACRE_PORT_DHCP = 4,
};

/*
 How a mirror follows its source.
 */
enum nacre_mirror_mode {
    /*
     Changes are copied some time after they happened.
     */
    NACRE_MIRROR_BACKGROUND = 1,
    /*
     A write of the source is complete when the target has it too.
     */
    NACRE_MIRROR_WRITE_BLOCKING = 2,
};

/*
 How a mirror ends.
 */
enum nacre_mirror_end {
    /*
     The source stays in use; the target is a copy of this moment.
     */
    NACRE_MIRROR_FINISH = 1,
    /*
     The source's handle, and every machine that uses it, goes on with the target.
     */
    NACRE_MIRROR_PIVOT = 2,
};

/*
 How a lock is held.
 */
enum nacre_lock_mode {
    /*
     By this host alone.
     */
    NACRE_LOCK_EXCLUSIVE = 1,
    /*
     By any number of hosts that only read.
     */
    NACRE_LOCK_SHARED = 2,
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
 Work on disks that runs in a thread of its own. Free it with `nacre_job_free`, which cancels it if need be.
 */
struct nacre_job;

/*
 Holds this host's lease on a shared volume and renews it. Free it with `nacre_keeper_free`.
 */
struct nacre_keeper;

/*
 A lock that this host holds. Free it with `nacre_lock_free`.
 */
struct nacre_lock;

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
    /*
     Options of the format with the names and values of qemu-img, separated by commas, as
     "cluster_size=128k,extended_l2=on"; null for none.
     */
    const char *options;
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
    /*
     Open the disk even if a parent changed since its child was made, which may have made the child useless.
     */
    bool changed_parents;
    /*
     Must be zero.
     */
    uint8_t reserved2[7];
};

/*
 A lease volume and this host's place on it. Set `struct_size` and the required fields, and zero the rest.
 */
struct nacre_keeper_options {
    /*
     `sizeof(struct nacre_keeper_options)`.
     */
    size_t struct_size;
    /*
     The shared file or block device. Required.
     */
    const char *path;
    /*
     The lockspace's name, at most 48 bytes. Required.
     */
    const char *space;
    /*
     This host's name, at most 48 bytes. Required, except to format.
     */
    const char *name;
    /*
     Where the lockspace begins on the volume, in bytes.
     */
    uint64_t offset;
    /*
     This host's number, 1 to `hosts`, which no other host may have. Required, except to format.
     */
    uint16_t host;
    /*
     The highest host number in use; 0 for 64.
     */
    uint16_t hosts;
    /*
     How long one lease I/O may take, in seconds; the same on every host; 0 for 10. Eight times this after the last
     renewal, a lease has expired.
     */
    uint16_t io_timeout;
    /*
     How long after its last feeding a watchdog resets its host, in seconds; the same on every host; 0 for 60.
     */
    uint16_t watchdog_timeout;
    /*
     Sector size, 512 or 4096; 0 for 512.
     */
    uint32_t sector_size;
    /*
     Every host has a working watchdog, so that one that is silent for the dead-time is gone. Without this, its
     locks can be taken only after `nacre_keeper_declare_gone`.
     */
    bool watchdogs;
    /*
     Must be zero.
     */
    uint8_t reserved[3];
    /*
     Feed this watchdog device while the lease is fresh or no lock is held; null for none.
     */
    const char *watchdog;
};

/*
 A fencing token: `version` rises with every change of a lock's owner, so storage that remembers the highest one can
 refuse a late writer.
 */
struct nacre_fencing_token {
    /*
     Higher than that of every earlier owner of the lock.
     */
    uint64_t version;
    /*
     How many times the owner's host has taken its lease.
     */
    uint64_t generation;
    /*
     The owner's host number.
     */
    uint64_t host;
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
 A machine. Set `struct_size` and either `kernel` or `firmware`, and zero the rest for defaults.
 */
struct nacre_vm_options {
    /*
     `sizeof(struct nacre_vm_options)`.
     */
    size_t struct_size;
    /*
     A Linux bzImage or an ELF file. Required without `firmware`.
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
    /*
     A BIOS image, such as SeaBIOS's bios-256k.bin, which boots from a disk; instead of a kernel. Or null.
     */
    const char *firmware;
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
 The number of images in the disk's chain; layer 0 is the active one, the last has no parent.

 # Safety
 `layers` is null or points to room for a `size_t`; `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_disk_layers(const struct nacre_disk *disk,
                                    size_t *layers,
                                    struct nacre_error **error);

/*
 Takes an external snapshot of a disk in use: creates the image `options->path` on top of the present one and
 continues in it. Of the other options only the format and its options count. A qcow2 image has subclusters, so that small
 writes copy nothing from the image below; QEMU before 5.2 reads it with the option "extended_l2=off" only.

 # Safety
 `options` is null or points to a structure with `struct_size` set; its strings are null or terminated. `error` is
 null or points to room for a pointer.
 */
enum nacre_status nacre_disk_snapshot(const struct nacre_disk *disk,
                                      const struct nacre_disk_create_options *options,
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
 Merges a layer of a disk into its parent and removes it from the chain. Layer 0 is the active one; the disk stays in
 use meanwhile.

 # Safety
 `job` and `error` are null or point to room for a pointer.
 */
enum nacre_status nacre_disk_commit(const struct nacre_disk *disk,
                                    size_t layer,
                                    struct nacre_job **job,
                                    struct nacre_error **error);

/*
 Pulls what the layers between `layer` and `base` hold up into `layer` and removes them from the chain. With
 `NACRE_NO_LAYER` as `base`, `layer` depends on nothing afterwards. The disk stays in use meanwhile.

 # Safety
 `job` and `error` are null or point to room for a pointer.
 */
enum nacre_status nacre_disk_stream(const struct nacre_disk *disk,
                                    size_t layer,
                                    size_t base,
                                    struct nacre_job **job,
                                    struct nacre_error **error);

/*
 Copies all of a disk that nobody writes to a new and empty one of at least its size. `compress` stores compressed
 clusters, which only qcow2 has.

 # Safety
 `job` and `error` are null or point to room for a pointer.
 */
enum nacre_status nacre_disk_convert(const struct nacre_disk *source,
                                     const struct nacre_disk *target,
                                     bool compress,
                                     struct nacre_job **job,
                                     struct nacre_error **error);

/*
 Copies a disk as it is at this moment, while it stays in use, to one of at least its size.

 # Safety
 `job` and `error` are null or point to room for a pointer.
 */
enum nacre_status nacre_disk_backup(const struct nacre_disk *source,
                                    const struct nacre_disk *target,
                                    struct nacre_job **job,
                                    struct nacre_error **error);

/*
 Compares two disks; the job's result is 0 when they read the same (the longer one may end with zeros), otherwise 1
 plus the offset of the first difference.

 # Safety
 `job` and `error` are null or point to room for a pointer.
 */
enum nacre_status nacre_disk_compare(const struct nacre_disk *a,
                                     const struct nacre_disk *b,
                                     struct nacre_job **job,
                                     struct nacre_error **error);

/*
 Copies a disk to another one of at least its size and follows its changes until `nacre_job_complete`. `mode` is one
 of `enum nacre_mirror_mode`.

 # Safety
 `job` and `error` are null or point to room for a pointer.
 */
enum nacre_status nacre_disk_mirror(const struct nacre_disk *source,
                                    const struct nacre_disk *target,
                                    uint32_t mode,
                                    struct nacre_job **job,
                                    struct nacre_error **error);

/*
 Waits until a mirror follows its source, at most `timeout_ms` milliseconds (for ever when negative), and completes
 it: `end` is one of `enum nacre_mirror_end`. Returns `NACRE_TIMEOUT` when it is not ready then; `NACRE_WRONG_STATE`
 when the job has ended or its completion was asked for already. Any other kind of job completes by itself.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_job_complete(const struct nacre_job *job,
                                     uint32_t end,
                                     int64_t timeout_ms,
                                     struct nacre_error **error);

/*
 Waits until a job has ended, at most `timeout_ms` milliseconds (for ever when negative). Returns the job's own
 status, or `NACRE_TIMEOUT` while it runs. `result` (may be null) receives what the job found out, 0 for most.

 # Safety
 `result` and `error` are null or point to room for their values.
 */
enum nacre_status nacre_job_wait(const struct nacre_job *job,
                                 int64_t timeout_ms,
                                 uint64_t *result,
                                 struct nacre_error **error);

/*
 How far a job is, in bytes: those dealt with and those to deal with in total, as far as is known. The total of a
 mirror grows with its source's changes.

 # Safety
 `done`, `total` and `error` are null or point to room for their values.
 */
enum nacre_status nacre_job_progress(const struct nacre_job *job,
                                     uint64_t *done,
                                     uint64_t *total,
                                     struct nacre_error **error);

/*
 Limits a job to this many bytes a second; 0 lifts the limit.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_job_set_rate(const struct nacre_job *job,
                                     uint64_t bytes_per_second,
                                     struct nacre_error **error);

/*
 Asks a job to end soon; it ends with `NACRE_CANCELLED` unless it was over already. The disks stay usable; commit,
 stream and a new convert may be started again.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_job_cancel(const struct nacre_job *job,
                                   struct nacre_error **error);

/*
 A descriptor that polls as readable when the job has ended. It belongs to the job: poll it, do not read or close
 it. -1 when the handle is bad.
 */
int nacre_job_event_fd(const struct nacre_job *job);

/*
 Cancels a job if it runs, waits for its end, and frees it.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_job_free(struct nacre_job *job, struct nacre_error **error);

/*
 Formats a lockspace on an existing file or device, once, before any host uses it. It needs room for one area (1 MiB
 with 512-byte sectors, 8 MiB with 4096-byte ones), and one more for each resource behind it.

 # Safety
 `options` is null or points to a structure with `struct_size` set; its strings are null or terminated. `error` is
 null or points to room for a pointer.
 */
enum nacre_status nacre_lease_format_space(const struct nacre_keeper_options *options,
                                           struct nacre_error **error);

/*
 Formats the lease area number `index` (from 0) behind a lockspace for a resource, such as a disk, of this name.

 # Safety
 As `nacre_lease_format_space`; `resource` is null or a terminated string.
 */
enum nacre_status nacre_lease_format_resource(const struct nacre_keeper_options *options,
                                              uint32_t index,
                                              const char *resource,
                                              struct nacre_error **error);

/*
 Opens a lease volume and begins to take this host's lease on it; see `nacre_keeper_wait_held`.

 # Safety
 `options` is null or points to a structure with `struct_size` set; its strings are null or terminated. `keeper` and
 `error` are null or point to room for a pointer.
 */
enum nacre_status nacre_keeper_open(const struct nacre_keeper_options *options,
                                    struct nacre_keeper **keeper,
                                    struct nacre_error **error);

/*
 Waits until the lease is held, at most `timeout_ms` milliseconds (for ever when negative). It takes two to five I/O
 timeouts, or the dead-time when another host had the number.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_keeper_wait_held(const struct nacre_keeper *keeper,
                                         int64_t timeout_ms,
                                         struct nacre_error **error);

/*
 How many milliseconds locks may still be used if no renewal succeeds from now on; 0 without a lease.

 # Safety
 `milliseconds` and `error` are null or point to room for their values.
 */
enum nacre_status nacre_keeper_expires_in(const struct nacre_keeper *keeper,
                                          uint64_t *milliseconds,
                                          struct nacre_error **error);

/*
 A descriptor that polls as readable while there are events. It belongs to the keeper: poll it, do not read or close
 it. -1 when the handle is bad.
 */
int nacre_keeper_event_fd(const struct nacre_keeper *keeper);

/*
 Takes the oldest event; `NACRE_LEASE_NONE` when there is none.

 # Safety
 `event` and `error` are null or point to room for their values.
 */
enum nacre_status nacre_keeper_next_event(const struct nacre_keeper *keeper,
                                          enum nacre_keeper_event *event,
                                          struct nacre_error **error);

/*
 Says that a host's power was seen off, so that its locks can be taken. A host that is merely silent may still write:
 call this only after fencing.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_keeper_declare_gone(const struct nacre_keeper *keeper,
                                            uint16_t host,
                                            struct nacre_error **error);

/*
 Frees a keeper. Its lease is given back when its last lock has been freed, too.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_keeper_free(struct nacre_keeper *keeper, struct nacre_error **error);

/*
 Takes the lock of a resource, trying again while another host holds it until `timeout_ms` milliseconds are over (for
 ever when negative, once when 0). `mode` is one of `enum nacre_lock_mode`. Returns `NACRE_BUSY` when another host
 holds it.

 # Safety
 `resource` is null or a terminated string. `lock` and `error` are null or point to room for a pointer.
 */
enum nacre_status nacre_keeper_lock(const struct nacre_keeper *keeper,
                                    uint32_t index,
                                    const char *resource,
                                    uint32_t mode,
                                    int64_t timeout_ms,
                                    struct nacre_lock **lock,
                                    struct nacre_error **error);

/*
 Whether a lock may be used now: the lease that it was taken under has not expired since. Ask before every write
 that must not happen without the lock.

 # Safety
 `held` and `error` are null or point to room for their values.
 */
enum nacre_status nacre_lock_is_held(const struct nacre_lock *lock,
                                     bool *held,
                                     struct nacre_error **error);

/*
 The lock's fencing token.

 # Safety
 `token` and `error` are null or point to room for their values.
 */
enum nacre_status nacre_lock_token(const struct nacre_lock *lock,
                                   struct nacre_fencing_token *token,
                                   struct nacre_error **error);

/*
 Makes another host the owner of an exclusive lock in one step, for a live migration: stop writing first. The other
 host then calls `nacre_keeper_lock`. After `NACRE_WRONG_STATE` the lock may be the other host's; it must not be used
 any more. After other errors `nacre_lock_is_held` tells the truth.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_lock_hand_over(const struct nacre_lock *lock,
                                       uint16_t host,
                                       struct nacre_error **error);

/*
 Gives a lock back, waits until other hosts can take it, and frees it. Close what it protects first. On failure it is
 freed as well, and others can take it once the lease has expired. While another thread uses the lock, it is given
 back when that call returns.

 # Safety
 `error` is null or points to room for a pointer.
 */
enum nacre_status nacre_lock_free(struct nacre_lock *lock,
                                  struct nacre_error **error);

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
