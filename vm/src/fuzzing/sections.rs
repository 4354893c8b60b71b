//! State sections of a guest, and what else a peer says of one, in bytes that nobody has looked at.

use decamp_shared::workload::Section;
use vm_memory::{Bytes, GuestAddress};

use super::ports::Ports;
use super::script::Script;
use super::stand::{KINDS, MEMORY, Stand};
use crate::cpuid::Offered;
use crate::cpuid::baseline::{Baseline, Offer};
use crate::needs::Needs;
use crate::spec::VmSpec;
use crate::state::clock::{self, ClockState};
use crate::state::vcpu::VcpuState;
use crate::state::vm::VmState;
use crate::state::{power, serial};
use crate::virtio::tried::Hurry;

/// What the first byte of an input says that the rest is; devices come after these.
pub(super) mod what {
    pub(crate) const VM: u8 = 0;
    pub(crate) const VCPU: u8 = 1;
    pub(crate) const SERIAL: u8 = 2;
    pub(crate) const POWER: u8 = 3;
    pub(crate) const NEEDS: u8 = 4;
    pub(crate) const SPEC: u8 = 5;
    pub(crate) const BASELINE: u8 = 6;
    pub(crate) const DEVICES: u8 = 7;
}

/// A state section from a peer, or what else one says: the first byte says of what, the second its version.
pub fn section(bytes: &[u8]) {
    let [of, version, bytes @ ..] = bytes else { return };
    let section = |kind: &str| Section {
        kind: kind.into(),
        version: u32::from(*version),
        bytes: bytes.to_vec(),
    };
    match *of % (what::DEVICES + KINDS as u8) {
        what::VM => vm(&section("vm")),
        what::VCPU => vcpu(&section("vcpu/0")),
        what::SERIAL | what::POWER => port(&section("serial"), &section("power")),
        what::NEEDS => needs(bytes),
        what::SPEC => spec(bytes),
        what::BASELINE => baseline(bytes),
        device => {
            // Refused, or taken.
            let _ = virtio(device - what::DEVICES, section);
        }
    }
}

fn vm(section: &Section) {
    let Ok(state) = VmState::decode(section) else { return };
    assert_eq!(state.encode(), *section, "it is not what it was");
    let here = ClockState { nanoseconds: section.bytes.len() as u64, ..ClockState::default() };
    for khz in [0, 1_000_000, u32::MAX] {
        let _ = clock::moved_offset(u64::MAX, &state.clock, &here, khz);
        let _ = clock::moved_counter(u64::MAX, &state.clock, &here, khz);
        let _ = clock::is_offset_alone(0, u64::MAX, &state.clock, khz);
    }
}

fn vcpu(section: &Section) {
    let Ok(state) = VcpuState::decode(section) else { return };
    assert_eq!(state.encode(0), *section, "it is not what it was");
    state.work_out();
}

/// The same bytes as a section of each port.
fn port(for_serial: &Section, for_power: &Section) {
    let mut ports = Ports::new();
    if let Ok(state) = serial::decode(for_serial) {
        assert_eq!(serial::encode(&state), *for_serial, "it is not what it was");
        if ports.serial.load(state).is_ok() {
            ports.move_on();
        }
    }
    if let Ok(state) = power::decode(for_power) {
        assert_eq!(power::encode(&state), *for_power, "it is not what it was");
        if ports.power.load(state).is_ok() {
            ports.move_on();
        }
    }
    ports.drive(&mut Script::new(&for_serial.bytes));
}

fn needs(json: &[u8]) {
    let Ok(needs) = Needs::parse(json) else { return };
    let Needs { cpuid, registers, tsc_khz, .. } = needs;
    let nobody = Offered { entries: Vec::new(), registers: Vec::new(), tsc_khz: 0 };
    let _ = nobody.lacks(&cpuid, &registers);
    let same = Offered { entries: cpuid.clone(), registers: registers.clone(), tsc_khz };
    let _ = same.lacks(&cpuid, &registers);
}

fn spec(json: &[u8]) {
    let _ = serde_json::from_slice(json).map(|json| VmSpec::parse(&json));
}

fn baseline(json: &[u8]) {
    let _ = Baseline::parse(json);
    let Ok(offer) = Offer::parse(json) else { return };
    let both = [("one".to_owned(), offer.clone()), ("other".to_owned(), offer)];
    let (common, _) = Baseline::of(&both).expect("the same CPU");
    drop(common.held());
}

/// A device that is loaded goes on, and what it saves can be loaded again and is the same then.
fn virtio(which: u8, section: impl Fn(&str) -> Section) -> Option<()> {
    let mut stand = Stand::new(which.into())?;
    let tried = stand.tried()?;
    let section = section(&tried.kind());
    // Its rings lie in bytes that nobody has looked at either.
    let all = section.bytes.iter().copied().cycle().take(MEMORY as usize / 16);
    stand.memory.map().write(&all.collect::<Vec<_>>(), GuestAddress(0)).ok()?;
    tried.load(&section).ok()?;
    let mut saved = tried.save();
    drop(tried);
    for _ in 0..2 {
        let tried = stand.tried()?;
        tried.load(&saved).expect("what a device saved");
        assert_eq!(tried.save(), saved, "it is not what it was");
        tried.resume();
        stand.act(&mut Script::new(&section.bytes));
        tried.turn(Hurry::None);
        saved = tried.save();
    }
    Some(())
}
