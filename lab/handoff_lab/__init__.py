"""A whole fleet on one machine, real parts: hosts in namespaces, each with libvirtd, Open vSwitch and an agent."""
