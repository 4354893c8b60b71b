"""Run in a host: `hold.py` makes a virtual machine that never runs, and keeps it as long as this process is there.

KVM patches its own code whenever the first or the last virtual processor comes or goes whose APIC is disabled, as it is
before it has booted or been restored. An emulated host (QEMU 7.2, a thread for each processor) was seen to die at a
breakpoint of that patching ("Oops: int3" in apic_has_pending_timer). With one such processor always there nothing is
patched.
"""

import fcntl
import os
import struct
import time

# linux/kvm.h
CREATE_VM, CREATE_VCPU, CREATE_IRQCHIP, GET_SREGS, SET_SREGS = 0xAE01, 0xAE41, 0xAE60, 0x8138AE83, 0x4138AE84
SREGS_SIZE, APIC_BASE = 312, 272
APIC_ENABLED = 1 << 11


def main():
    kvm = os.open("/dev/kvm", os.O_RDWR)
    machine = fcntl.ioctl(kvm, CREATE_VM, 0)
    fcntl.ioctl(machine, CREATE_IRQCHIP, 0)
    # By software its APIC is disabled from its reset on, by hardware when it is told so.
    processor = fcntl.ioctl(machine, CREATE_VCPU, 0)
    registers = bytearray(SREGS_SIZE)
    fcntl.ioctl(processor, GET_SREGS, registers)
    (base,) = struct.unpack_from("<Q", registers, APIC_BASE)
    struct.pack_into("<Q", registers, APIC_BASE, base & ~APIC_ENABLED)
    fcntl.ioctl(processor, SET_SREGS, registers)
    # Nobody waits for it; what it has goes with it.
    print("held", flush=True)
    while True:
        time.sleep(3600)


main()
