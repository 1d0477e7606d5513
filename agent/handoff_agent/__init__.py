"""The agent of one hypervisor: QEMU, disk and Open vSwitch operations through libvirt."""
