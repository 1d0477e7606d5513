"""What domain_xml.py leaves to libvirt, libvirt does: checked with the real one."""

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from handoff_agent.domain_xml import XmlChanges, destination_xml, persistent_xml

QEMU = "/usr/bin/qemu-system-x86_64"
SAME = XmlChanges(emulator=QEMU, source_emulator=QEMU)
MIGRATABLE = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_MIGRATABLE

GUEST = f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>rich</name>
  <uuid>0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0</uuid>
  <metadata><own:owner xmlns:own='http://example.org/fleet' team='a &amp; b'/></metadata>
  <maxMemory slots='4' unit='MiB'>1024</maxMemory>
  <memory unit='MiB'>64</memory>
  <vcpu current='1'>2</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/><apic/></features>
  <cpu mode='host-model'><numa><cell id='0' cpus='0-1' memory='64' unit='MiB'/></numa></cpu>
  <devices>
    <emulator>{QEMU}</emulator>
    <disk type='file'><driver name='qemu' type='raw'/><source file='DISK'/><target dev='vda' bus='virtio'/>
      <alias name='ua-root'/></disk>
    <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/></disk>
    <controller type='scsi' model='virtio-scsi'/>
    <interface type='user'><mac address='52:54:00:00:00:01'/><model type='virtio'/></interface>
    <serial type='pty'/>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <input type='tablet' bus='usb'/>
    <graphics type='vnc' autoport='yes' websocket='-1' listen='127.0.0.1' passwd='secret'/>
    <video><model type='virtio'/></video>
    <watchdog model='i6300esb' action='reset'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target></memory>
  </devices>
  <qemu:commandline><qemu:arg value='-name'/><qemu:arg value='rich,debug-threads=on'/></qemu:commandline>
</domain>"""


@pytest.fixture
def connection(libvirtd: str) -> Iterator[libvirt.virConnect]:
    connection = libvirt.open(libvirtd)
    yield connection
    with contextlib.suppress(libvirt.libvirtError):
        connection.lookupByName("rich").destroy()
    connection.close()


def test_a_moved_guest_is_the_same_machine(connection: libvirt.virConnect, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    domain = connection.createXML(GUEST.replace("DISK", str(disk)), libvirt.VIR_DOMAIN_START_PAUSED)
    plain, migratable = domain.XMLDesc(0), domain.XMLDesc(MIGRATABLE)
    assert "/dev/pts/" in plain
    assert "port='59" in plain
    assert "guest_agent" in plain.split("mode='bind' path='")[1].split("'")[0]
    for host_bound in ("/dev/pts/", "port='59", "mode='bind'", "<domain type='qemu' id=", "alias name='net0'"):
        assert host_bound not in migratable
    assert "alias name='ua-root'" in migratable
    assert "passwd='secret'" in migratable

    for _move in range(2):
        previous = migratable
        domain.destroy()
        domain = connection.createXML(destination_xml(previous, SAME), libvirt.VIR_DOMAIN_START_PAUSED)
        migratable = domain.XMLDesc(MIGRATABLE)
        assert migratable.count("value='-incoming'") == 1
        before, after = (persistent_xml(xml, SAME).splitlines() for xml in (previous, migratable))
        assert list(difflib.unified_diff(before, after, lineterm="")) == []
