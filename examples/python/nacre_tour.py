#!/usr/bin/env python3
"""Uses libnacre from Python by ctypes, without any binding: which accelerators work here, a differencing disk, and a
machine whose console is a pipe.

    nacre_tour.py LIBNACRE.SO KERNEL DIRECTORY [INITRD [COMMAND-LINE]]
"""
import ctypes
import os
import sys
from ctypes import POINTER, Structure, byref, c_bool, c_char, c_char_p, c_int, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p


class DiskOptions(Structure):
    _fields_ = [("struct_size", c_size_t), ("path", c_char_p), ("format", c_char_p), ("read_only", c_bool),
                ("direct", c_bool), ("trust_headers", c_bool), ("reserved", c_uint8 * 5), ("id", c_char_p)]


class DiskCreateOptions(Structure):
    _fields_ = [("struct_size", c_size_t), ("path", c_char_p), ("format", c_char_p), ("size", c_uint64),
                ("backing_path", c_char_p), ("backing_format", c_char_p)]


class VmOptions(Structure):
    _fields_ = [("struct_size", c_size_t), ("kernel", c_char_p), ("initrd", c_char_p), ("command_line", c_char_p),
                ("memory", c_uint64), ("cpus", c_uint32), ("accel", c_uint32), ("console", c_bool), ("rng", c_bool),
                ("reserved", c_uint8 * 2), ("console_fd", c_int), ("disks", POINTER(POINTER(DiskOptions))),
                ("disk_count", c_size_t), ("nets", c_void_p), ("net_count", c_size_t)]


class NacreError(Exception):
    """A call failed: the message and its causes, outermost first."""


class Nacre:
    """Calls functions of the library; a status other than 0 becomes an exception."""

    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        self.library.nacre_error_depth.restype = c_size_t

    def __getattr__(self, name):
        function = getattr(self.library, "nacre_" + name)

        def call(*arguments):
            error = c_void_p()
            if function(*arguments, byref(error)):
                text = ctypes.create_string_buffer(512)
                messages = []
                for i in range(self.library.nacre_error_depth(error)):
                    self.library.nacre_error_message(error, c_size_t(i), text, c_size_t(len(text)))
                    messages.append(text.value.decode())
                self.library.nacre_error_free(error)
                raise NacreError(": ".join(messages))
        return call


def options(kind, **fields):
    return kind(struct_size=ctypes.sizeof(kind), **fields)


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    nacre, kernel, directory = Nacre(sys.argv[1]), sys.argv[2].encode(), sys.argv[3].encode()

    # A differencing disk: the parent stays as it is.
    base, child = directory + b"/base.qcow2", directory + b"/child.qcow2"
    nacre.disk_create(byref(options(DiskCreateOptions, path=base, format=b"qcow2", size=1 << 20)))
    nacre.disk_create(byref(options(DiskCreateOptions, path=child, format=b"qcow2", backing_path=b"base.qcow2",
                                    backing_format=b"qcow2")))
    disk = c_void_p()
    nacre.disk_open(byref(options(DiskOptions, path=child, format=b"qcow2")), byref(disk))
    nacre.disk_write(disk, b"from python", c_size_t(11), c_uint64(4096))
    text = (c_char * 11)()
    nacre.disk_read(disk, text, c_size_t(11), c_uint64(4096))
    print("disk:", text.value.decode())
    nacre.disk_free(disk)

    # An error is an exception with its causes.
    try:
        nacre.disk_open(byref(options(DiskOptions, path=directory + b"/none.qcow2", format=b"qcow2")), byref(disk))
    except NacreError as error:
        print("error:", error)

    # A machine with that disk; its serial console comes through a pipe.
    reader, writer = os.pipe()
    vm_disk = options(DiskOptions, path=child, format=b"qcow2")
    disks = (POINTER(DiskOptions) * 1)(ctypes.pointer(vm_disk))
    initrd = sys.argv[4].encode() if len(sys.argv) > 4 else None
    command_line = sys.argv[5].encode() if len(sys.argv) > 5 else b"console=ttyS0"
    vm, reason = c_void_p(), c_int()
    nacre.vm_build(byref(options(VmOptions, kernel=kernel, initrd=initrd, command_line=command_line, memory=256 << 20,
                                 console=True, console_fd=writer, disks=disks, disk_count=1)), byref(vm))
    os.close(writer)  # the library has a duplicate
    nacre.vm_start(vm)
    nacre.vm_wait(vm, ctypes.c_int64(-1), byref(reason), None)
    nacre.vm_free(vm)
    with os.fdopen(reader, "rb") as console:
        print("console:", console.read().decode(errors="replace").strip())
    print("reason:", reason.value)


if __name__ == "__main__":
    main()
