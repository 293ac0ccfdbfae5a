"""Whether KVM works on this machine, found out by running a virtual processor and not by looking for a device.

There are hosts with a /dev/kvm that creates machines and then emulates every instruction in the kernel, or hangs: a
guest on it is slower than without.  So a small loop must run at the speed of hardware, in a process that can be killed.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import struct
import subprocess
import sys
import time
from pathlib import Path

DEVICE = Path("/dev/kvm")
TIMEOUT_SECONDS = 3.0

_CREATE_VM, _VCPU_MMAP_SIZE, _CREATE_VCPU, _RUN = 0xAE01, 0xAE04, 0xAE41, 0xAE80
_SET_MEMORY, _GET_SREGS, _SET_SREGS, _SET_REGS = 0x4020AE46, 0x8138AE83, 0x4138AE84, 0x4090AE82
_EXIT_HLT = 5
_SREGS_BYTES = 312
_MEMORY_BYTES, _CODE_AT = 0x10000, 0x1000
_LOOPS = 200_000
_CODE = (
    b"\x66\xb9" + struct.pack("<I", _LOOPS) + b"\x66\x49\x75\xfc\xf4"
)  # mov ecx, LOOPS; again: dec ecx; jnz again; hlt
_HARDWARE_SECONDS = 0.04  # hardware needs a quarter of a millisecond, emulation in the kernel about 170


def works() -> bool:
    """Whether a guest would run faster with KVM than without."""
    if platform.machine() not in ("x86_64", "AMD64") or not os.access(DEVICE, os.R_OK | os.W_OK):
        return False
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__], timeout=TIMEOUT_SECONDS, capture_output=True, check=False
        )
    except (subprocess.TimeoutExpired, OSError):
        return False
    return done.returncode == 0


def _runs_at_hardware_speed() -> bool:
    """Try it, in this process; the best of three, because the machine may be busy."""
    return min(_seconds_of_a_loop() for _ in range(3)) < _HARDWARE_SECONDS


def _seconds_of_a_loop() -> float:
    kvm = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(kvm, _CREATE_VM, 0)
    memory = mmap.mmap(-1, _MEMORY_BYTES)
    memory[_CODE_AT : _CODE_AT + len(_CODE)] = _CODE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(vm, _SET_MEMORY, struct.pack("<IIQQQ", 0, 0, 0, _MEMORY_BYTES, address))
    cpu = fcntl.ioctl(vm, _CREATE_VCPU, 0)
    state = mmap.mmap(cpu, fcntl.ioctl(kvm, _VCPU_MMAP_SIZE, 0))
    segments = bytearray(_SREGS_BYTES)
    fcntl.ioctl(cpu, _GET_SREGS, segments)
    struct.pack_into("<QIH", segments, 0, 0, 0xFFFF, 0)  # the code segment begins at 0
    fcntl.ioctl(cpu, _SET_SREGS, bytes(segments))
    fcntl.ioctl(cpu, _SET_REGS, struct.pack("<18Q", *[0] * 16, _CODE_AT, 2))
    begun = time.perf_counter()
    fcntl.ioctl(cpu, _RUN, 0)
    seconds = time.perf_counter() - begun
    (reason,) = struct.unpack_from("<I", state, 8)
    for number in (cpu, vm, kvm):
        os.close(number)
    return seconds if reason == _EXIT_HLT else float("inf")


if __name__ == "__main__":
    sys.exit(0 if _runs_at_hardware_speed() else 1)
