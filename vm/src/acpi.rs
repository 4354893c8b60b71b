//! The ACPI tables of a guest: its CPUs and interrupt controllers, the ports of [`crate::power`], the serial
//! port, and where its virtio devices are. Static: nothing in them changes while a guest lives.
//!
//! References are to the ACPI specification, version 6.5. The platform is not hardware-reduced, because the
//! power button and S5 are then those of every PC and need no methods.

use acpi_tables::aml::{
    self, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress};

use crate::error::{Result, VmError};
use crate::layout::{Slot, VIRTIO_STRIDE};
use crate::memory::Memory;
use crate::power::{
    CONTROL_PORT, EVENT_BYTES, EVENT_PORT, RESET_PORT, RESET_VALUE, SCI, SLEEP_TYPE_OFF,
};
use crate::serial;

/// Where the tables lie; a kernel that is not told looks for the first of them from here to
/// [`TABLES_END`].
pub(crate) const TABLES: u64 = 0xe_0000;
/// One past the last byte that they may take.
pub(crate) const TABLES_END: u64 = 0x10_0000;

const OEM: [u8; 6] = *b"DECAMP";
const OEM_TABLE: [u8; 8] = *b"DECAMPVM";
const REVISION: u32 = 1;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// The I/O APIC's identity, as KVM's has it when it begins.
const IO_APIC_ID: u8 = 0;
/// There are two 8259 controllers too.
const PC_COMPATIBLE: u32 = 1;

/// Boot flags: there are devices of the PC (the serial port); no display, no clock in CMOS. No bit for a
/// keyboard controller: only its reset line is there.
const HAS_LEGACY_DEVICES: u16 = 1;
const HAS_NO_DISPLAY: u16 = 1 << 2;
const HAS_NO_CMOS_CLOCK: u16 = 1 << 5;
/// Latencies that say: no such state.
const NO_C2: u16 = 0x0fff;
const NO_C3: u16 = 0x0fff;

/// Writes the tables of a machine with `cpus` vCPUs and virtio devices at `devices`; where the first of
/// them is.
///
/// # Errors
/// When there is no room for them.
pub(crate) fn write(memory: &Memory, cpus: u32, devices: &[Slot]) -> Result<u64> {
    let mut room = Room { memory, next: TABLES };
    let rsdp = room.take(Rsdp::len() as u64)?;
    let facs = room.put(&bytes_of(&FACS::new()))?;
    let dsdt = room.put(&described(cpus, devices))?;
    let fadt = room.put(&fixed(facs, dsdt))?;
    let madt = room.put(&interrupts(cpus)?)?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = room.put(&bytes_of(&xsdt))?;
    room.write(rsdp, &bytes_of(&Rsdp::new(OEM, xsdt)))?;
    Ok(rsdp)
}

/// What is left of the place for tables.
struct Room<'a> {
    memory: &'a Memory,
    next: u64,
}

impl Room<'_> {
    /// Tables stand 64 bytes apart, as FACS must.
    fn take(&mut self, bytes: u64) -> Result<u64> {
        let at = self.next;
        self.next = at.saturating_add(bytes).next_multiple_of(64);
        if self.next > TABLES_END {
            return Err(VmError::State("The ACPI tables do not fit below 1 MiB".into()));
        }
        Ok(at)
    }

    fn put(&mut self, table: &[u8]) -> Result<u64> {
        let at = self.take(table.len() as u64)?;
        self.write(at, table)?;
        Ok(at)
    }

    fn write(&self, at: u64, table: &[u8]) -> Result<()> {
        self.memory.map().write_slice(table, GuestAddress(at)).map_err(|error| {
            VmError::refused(
                format!("write an ACPI table to {at:#x}"),
                std::io::Error::other(error),
            )
        })
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Sdt::new(signature, 36, revision, OEM, OEM_TABLE, REVISION);
    table.append_slice(body);
    table.as_slice().to_vec()
}

/// FADT (5.2.9): the fixed hardware.
fn fixed(facs: u64, dsdt: u64) -> Vec<u8> {
    let port = |bytes: u8, access, port: u16| {
        GAS::new(AddressSpace::SystemIo, bytes * 8, 0, access, port.into())
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    // Below 1 MiB: the narrow fields hold them, and the wide ones of the same.
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = (SCI as u16).into();
    fadt.pm1a_evt_blk = u32::from(EVENT_PORT).into();
    fadt.pm1a_cnt_blk = u32::from(CONTROL_PORT).into();
    fadt.pm1_evt_len = EVENT_BYTES;
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_evt_blk = port(EVENT_BYTES, AccessSize::WordAccess, EVENT_PORT);
    fadt.x_pm1a_cnt_blk = port(2, AccessSize::WordAccess, CONTROL_PORT);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.iapc_boot_arch = (HAS_LEGACY_DEVICES | HAS_NO_DISPLAY | HAS_NO_CMOS_CLOCK).into();
    fadt.reset_reg = port(1, AccessSize::ByteAccess, RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    bytes_of(&fadt.finalize())
}

/// MADT (5.2.12): the interrupt controllers. KVM's interval timer is wired to input 0 of the I/O APIC, as line
/// 0 says, so that no line but the SCI's needs an override.
fn interrupts(cpus: u32) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    body.dword(LOCAL_APIC);
    body.dword(PC_COMPATIBLE);
    for number in 0..cpus {
        let number = u8::try_from(number)
            .ok()
            .filter(|number| *number < u8::MAX)
            .ok_or_else(|| VmError::State(format!("{cpus} vCPUs are too many for the MADT")))?;
        ProcessorLocalApic::new(number, number, EnabledStatus::Enabled).to_aml_bytes(&mut body);
    }
    IoApic::new(IO_APIC_ID, IO_APIC, 0).to_aml_bytes(&mut body);
    // Interrupt source override: bus 0 (ISA), active high and level-triggered.
    body.vec(&[2, 10, 0, SCI as u8]);
    body.dword(SCI);
    body.word(0b1101);
    // Local APIC NMI, on input 1 of every processor.
    body.vec(&[4, 6, u8::MAX, 0, 0, 1]);
    Ok(table(*b"APIC", 5, &body))
}

/// DSDT (5.2.11.1): what there is no other way to find.
fn described(cpus: u32, devices: &[Slot]) -> Vec<u8> {
    let mut body = Vec::new();
    let off = SLEEP_TYPE_OFF;
    let sleep = Package::new(vec![&off, &off, &aml::ZERO, &aml::ZERO]);
    Name::new(Path::new("\\_S5_"), &sleep).to_aml_bytes(&mut body);
    let mut inside = Inside::default();
    for number in 0..cpus {
        inside.device(&format!("C{number:03X}"), &"ACPI0007", number, None);
    }
    let io = IO::new(serial::PORT, serial::PORT, 1, 8);
    let line = Interrupt::new(true, true, false, false, serial::INTERRUPT);
    let resources = ResourceTemplate::new(vec![&io, &line]);
    inside.device("COM1", &EISAName::new("PNP0501"), 1, Some(&resources));
    for (number, slot) in (0u32..).zip(devices) {
        // The hole for devices is below 4 GiB.
        let registers = Memory32Fixed::new(true, slot.address as u32, VIRTIO_STRIDE as u32);
        let line = Interrupt::new(true, false, false, false, slot.line);
        let resources = ResourceTemplate::new(vec![&registers, &line]);
        inside.device(&format!("V{number:03X}"), &"LNRO0005", number, Some(&resources));
    }
    inside.scope("\\_SB_").to_aml_bytes(&mut body);
    table(*b"DSDT", 2, &body)
}

/// Devices on their way into a scope.
#[derive(Default)]
struct Inside {
    devices: Vec<Encoded>,
}

/// AML that is encoded already.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

impl Inside {
    fn device(&mut self, name: &str, kind: &dyn Aml, number: u32, resources: Option<&dyn Aml>) {
        let kind = Name::new("_HID".into(), kind);
        let identity = Name::new("_UID".into(), &number);
        let resources = resources.map(|resources| Name::new("_CRS".into(), resources));
        let mut children: Vec<&dyn Aml> = vec![&kind, &identity];
        children.extend(resources.as_ref().map(|resources| resources as &dyn Aml));
        self.devices.push(Encoded(bytes_of(&Device::new(name.into(), children))));
    }

    fn scope(&self, path: &str) -> Encoded {
        let children = self.devices.iter().map(|device| device as &dyn Aml).collect();
        Encoded(bytes_of(&Scope::new(path.into(), children)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(memory: &Memory, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        memory.map().read_slice(&mut bytes, GuestAddress(at)).expect("guest memory");
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// A table whole, its checksum looked at.
    fn table_at(memory: &Memory, at: u64, signature: &[u8; 4]) -> Vec<u8> {
        let length = u32::from_le_bytes(read::<4>(memory, at + 4)) as usize;
        let mut bytes = vec![0; length];
        memory.map().read_slice(&mut bytes, GuestAddress(at)).expect("table");
        assert_eq!(&bytes[..4], signature);
        if signature != b"FACS" {
            assert_eq!(sum(&bytes), 0, "checksum of {}", String::from_utf8_lossy(signature));
        }
        bytes
    }

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("a word"))
    }

    struct Tables {
        fadt: Vec<u8>,
        madt: Vec<u8>,
        dsdt: Vec<u8>,
        facs: Vec<u8>,
    }

    /// Follows the pointers from the first table on.
    fn tables(cpus: u32, devices: &[Slot]) -> Tables {
        let memory = Memory::create(2 << 20).expect("memory");
        let rsdp = write(&memory, cpus, devices).expect("tables");
        assert_eq!((rsdp % 16, &read::<8>(&memory, rsdp)), (0, b"RSD PTR "));
        let root = read::<36>(&memory, rsdp);
        assert_eq!((sum(&root[..20]), sum(&root)), (0, 0));
        let xsdt = u64::from_le_bytes(root[24..32].try_into().expect("address"));
        let xsdt = table_at(&memory, xsdt, b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let (fadt, madt) = (word(&xsdt, 36), word(&xsdt, 44));
        let fadt = table_at(&memory, fadt.into(), b"FACP");
        Tables {
            madt: table_at(&memory, madt.into(), b"APIC"),
            dsdt: table_at(&memory, word(&fadt, 40).into(), b"DSDT"),
            facs: table_at(&memory, word(&fadt, 36).into(), b"FACS"),
            fadt,
        }
    }

    #[test]
    fn the_fixed_hardware_is_that_of_the_power_device() {
        let Tables { fadt, facs, .. } = tables(1, &[]);
        assert_eq!((fadt.len(), fadt[8], facs.len()), (276, 6, 64));
        assert_eq!(fadt[46], SCI as u8);
        assert_eq!((word(&fadt, 48), fadt[52]), (0, 0), "ACPI is always on");
        assert_eq!(word(&fadt, 56), u32::from(EVENT_PORT));
        assert_eq!(word(&fadt, 64), u32::from(CONTROL_PORT));
        assert_eq!(word(&fadt, 76), 0, "no timer");
        assert_eq!((fadt[88], fadt[89]), (4, 2));
        let flags = word(&fadt, 112);
        assert_eq!(flags & (1 << 4), 0, "the power button is fixed hardware");
        assert_eq!(flags & (1 << 20), 0, "not hardware-reduced");
        assert_ne!(flags & (1 << 10), 0, "there is a reset register");
        assert_eq!((fadt[116], word(&fadt, 120)), (1, u32::from(RESET_PORT)));
        assert_eq!(fadt[128], RESET_VALUE);
    }

    #[test]
    fn every_cpu_is_listed_with_its_identity() {
        for cpus in [1, 2, 64, 254] {
            let Tables { madt, .. } = tables(cpus, &[]);
            let mut rest = &madt[44..];
            let mut found = Vec::new();
            let mut kinds = Vec::new();
            while let [kind, length, ..] = *rest {
                let (entry, after) = rest.split_at(length.into());
                match kind {
                    0 => {
                        assert_eq!((entry[2], word(entry, 4)), (entry[3], 1));
                        found.push(u32::from(entry[3]));
                    }
                    _ => kinds.push(entry.to_vec()),
                }
                rest = after;
            }
            assert_eq!(found, (0..cpus).collect::<Vec<_>>());
            assert_eq!(kinds.iter().map(|entry| entry[0]).collect::<Vec<_>>(), [1, 2, 4]);
            assert_eq!(word(&kinds[0], 4), IO_APIC);
            assert_eq!(kinds[1][2..], [0, 9, 9, 0, 0, 0, 0b1101, 0]);
        }
        let memory = Memory::create(2 << 20).expect("memory");
        assert!(write(&memory, 256, &[]).is_err(), "identity 255 is everybody");
    }

    #[test]
    fn devices_are_described_where_they_are() {
        let slots: Vec<_> = (0..3).filter_map(Slot::of).collect();
        let Tables { dsdt, .. } = tables(2, &slots);
        let has =
            |bytes: &[u8]| dsdt.windows(bytes.len()).filter(|window| *window == bytes).count();
        assert_eq!(has(b"ACPI0007\0"), 2);
        assert_eq!(has(b"LNRO0005\0"), 3);
        assert_eq!(has(b"_S5_"), 1);
        for slot in slots {
            // Memory32Fixed, writable; then an extended interrupt: consumer, level, active high, one.
            let mut resources = vec![0x86, 9, 0, 1];
            resources.extend((slot.address as u32).to_le_bytes());
            resources.extend(0x1000u32.to_le_bytes());
            resources.extend([0x89, 6, 0, 1, 1]);
            resources.extend(slot.line.to_le_bytes());
            assert_eq!(has(&resources), 1, "{slot:?}");
        }
    }
}
