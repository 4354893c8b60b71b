//! Section `vcpu/N`: all of one vCPU's state, and the order in which KVM gives and takes it.
//!
//! Reading: MP_STATE first, because asking for it makes KVM take in pending events; events last.
//! Writing, into a vCPU that never ran: the counter's frequency and CPUID before anything that
//! depends on them; the local APIC after SREGS2, which holds its base; the deadline after the local
//! APIC; events last, because REGS clears pending exceptions. The VM's own state goes in between
//! ([`VcpuState::write_identity`] and [`VcpuState::write_early`], then the VM, then [`VcpuState::write_late`]), because the clock must
//! stand before registers that make KVM write the time into guest memory.

use decamp_shared::workload::Section;
use kvm_ioctls::VcpuFd;

use super::clock::{ClockState, is_offset_alone, moved_counter, moved_offset};
use super::fields::{FieldReader, FieldWriter};
use super::msrs::{self, Msr};
use super::payload;
use crate::cpuid::{self, CpuidEntry};
use crate::error::{Result, VmError};
use crate::sys::{
    self, Block, DEBUGREGS, LAPIC, MP_STATE, REGS, SREGS2, VCPU_EVENTS, XCRS, XsaveSize,
};

const VERSION: u32 = 1;

/// Blocks and the number of the field that holds each.
const FIELDS: [(u16, &Block); 7] = [
    (1, &MP_STATE),
    (2, &REGS),
    (3, &SREGS2),
    (4, &XCRS),
    (5, &DEBUGREGS),
    (6, &LAPIC),
    (7, &VCPU_EVENTS),
];
/// Extended state, as long as the source's KVM has it.
const XSAVE: u16 = 8;
/// Frequency of the time stamp counter in kHz, `u32`.
const TSC_KHZ: u16 = 9;
/// CPUID entries.
const CPUID: u16 = 10;
/// Model-specific registers.
const MSRS: u16 = 11;
/// What is added to the host's counter, `u64`; empty where KVM cannot say.
const TSC_OFFSET: u16 = 12;

/// The most bytes of extended state that are taken from a peer.
const MAX_XSAVE: usize = 64 * 1024;

/// Where the local APIC's timer register stands in its page, and how it names TSC-deadline mode.
const APIC_TIMER_AT: usize = 0x320;
const APIC_TIMER_MODE: u32 = 0b11 << 17;
const APIC_TIMER_DEADLINE: u32 = 0b10 << 17;

/// All of one vCPU's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VcpuState {
    /// In the order of [`FIELDS`].
    blocks: [Vec<u8>; 7],
    xsave: Vec<u8>,
    tsc_khz: u32,
    cpuid: Vec<CpuidEntry>,
    msrs: Vec<Msr>,
    tsc_offset: Option<u64>,
}

/// What this host knows that reading and writing need.
#[derive(Clone, Debug)]
pub(crate) struct HostFacts {
    /// Bytes of extended state in this VM.
    pub(crate) xsave: XsaveSize,
    /// Registers that this host's KVM lists.
    pub(crate) msrs: Vec<u32>,
    /// Those of them, and others, that say what a CPU is.
    pub(crate) features: Vec<u32>,
    /// Frequency of the time stamp counter that KVM gives to a vCPU unasked, kHz.
    pub(crate) tsc_khz: u32,
    /// Whether KVM says and takes TSC offsets.
    pub(crate) tsc_offset: bool,
}

/// The section's kind for vCPU `number`.
pub(crate) fn kind(number: u32) -> String {
    format!("vcpu/{number}")
}

impl VcpuState {
    /// Reads it from KVM, the vCPU parked.
    pub(crate) fn read(vcpu: &VcpuFd, number: u32, host: &HostFacts) -> Result<Self> {
        let get = |block: &Block| {
            let mut bytes = vec![0; block.size];
            sys::get_block(vcpu, block, &mut bytes)
                .map_err(|error| refused("read", block.name, number, error))?;
            Ok(bytes)
        };
        let mp_state = get(&MP_STATE)?;
        let (regs, sregs) = (get(&REGS)?, get(&SREGS2)?);
        let xsave = sys::get_xsave(vcpu, host.xsave)
            .map_err(|error| refused("read", "XSAVE2", number, error))?;
        let (xcrs, debug, lapic) = (get(&XCRS)?, get(&DEBUGREGS)?, get(&LAPIC)?);
        let tsc_khz =
            vcpu.get_tsc_khz().map_err(|error| refused("read", "TSC_KHZ", number, error.into()))?;
        let cpuid =
            cpuid::read(vcpu).map_err(|error| refused("read", "CPUID2", number, error.into()))?;
        let tsc_offset = if host.tsc_offset {
            let offset = sys::get_tsc_offset(vcpu);
            Some(offset.map_err(|error| refused("read", "TSC_OFFSET", number, error))?)
        } else {
            None
        };
        let msrs = msrs::read(vcpu, number, &host.msrs)?;
        let events = get(&VCPU_EVENTS)?;
        let blocks = [mp_state, regs, sregs, xcrs, debug, lapic, events];
        Ok(Self { blocks, xsave, tsc_khz, cpuid, msrs, tsc_offset })
    }

    /// Makes a fresh vCPU what this one is: its counter's frequency and its CPUID. What the vCPU holds then is
    /// what it goes back to at a reset.
    pub(crate) fn write_identity(&self, vcpu: &VcpuFd, number: u32) -> Result<()> {
        // Without TSC scaling KVM refuses even its own frequency: ask for a change only.
        let khz = vcpu.get_tsc_khz().ok();
        if khz != Some(self.tsc_khz) {
            vcpu.set_tsc_khz(self.tsc_khz)
                .map_err(|error| refused("set", "TSC_KHZ", number, error.into()))?;
        }
        vcpu.set_cpuid2(&cpuid::to_kvm(&self.cpuid)?)
            .map_err(|error| refused("set", "CPUID2", number, error.into()))
    }

    /// Gives a fresh vCPU that is what this one is everything that does not need the VM's clock.
    pub(crate) fn write_early(&self, vcpu: &VcpuFd, number: u32, host: &HostFacts) -> Result<()> {
        self.write_registers(vcpu, number, host, &self.early(&host.features))
    }

    /// Puts a vCPU that has run back into this, its first state. What a vCPU is cannot be given again, and need
    /// not: its CPUID, its feature registers and its counter's frequency are the same. The counter runs on, as it
    /// does on a processor that is reset.
    pub(crate) fn write_again(&self, vcpu: &VcpuFd, number: u32, host: &HostFacts) -> Result<()> {
        let mut early = self.early(&host.features);
        early.retain(|msr| !host.features.contains(&msr.index));
        self.write_registers(vcpu, number, host, &early)?;
        let late = |msr: &&Msr| msrs::is_late(msr.index) && msr.index != msrs::TSC;
        let late: Vec<_> = self.msrs.iter().filter(late).copied().collect();
        msrs::write(vcpu, number, &late, &host.msrs)?;
        self.write_events(vcpu, number)
    }

    /// The model-specific registers that need not wait for the clock. Of them `features` come first: what they say
    /// decides what KVM takes for others (PERF_CAPABILITIES, for those that count events).
    fn early(&self, features: &[u32]) -> Vec<Msr> {
        let early = self.msrs.iter().filter(|msr| !msrs::is_late(msr.index)).copied();
        let (mut first, rest): (Vec<_>, Vec<_>) =
            early.partition(|msr| features.contains(&msr.index));
        first.extend(rest);
        first
    }

    fn write_registers(
        &self,
        vcpu: &VcpuFd,
        number: u32,
        host: &HostFacts,
        early: &[Msr],
    ) -> Result<()> {
        let [mp_state, regs, sregs, xcrs, debug, lapic, _] = &self.blocks;
        let set = |block: &Block, bytes: &[u8]| {
            sys::set_block(vcpu, block, bytes)
                .map_err(|error| refused("set", block.name, number, error))
        };
        set(&MP_STATE, mp_state)?;
        set(&REGS, regs)?;
        set(&SREGS2, sregs)?;
        sys::set_xsave(vcpu, host.xsave, &self.fitted_xsave(number, host.xsave)?)
            .map_err(|error| refused("set", "XSAVE2", number, error))?;
        set(&XCRS, xcrs)?;
        set(&DEBUGREGS, debug)?;
        set(&LAPIC, lapic)?;
        msrs::write(vcpu, number, early, &host.msrs)
    }

    /// What is added to the counter of a host to get the guest's, if that is all that is done to it there, where
    /// the clock read `there`, and on a host where counters run at `khz`.
    fn unscaled_offset(&self, khz: u32, there: &ClockState) -> Option<u64> {
        let counter = self.msrs.iter().find(|msr| msr.index == msrs::TSC);
        self.tsc_offset.filter(|offset| {
            let alone = |msr: &Msr| is_offset_alone(msr.value, *offset, there, self.tsc_khz);
            khz == self.tsc_khz && counter.is_none_or(alone)
        })
    }

    fn write_events(&self, vcpu: &VcpuFd, number: u32) -> Result<()> {
        let [.., events] = &self.blocks;
        sys::set_block(vcpu, &VCPU_EVENTS, events)
            .map_err(|error| refused("set", VCPU_EVENTS.name, number, error))
    }

    /// Gives the vCPU the rest, once the VM's clock stands. `there` is the clock as it was saved,
    /// `here` as it reads now.
    pub(crate) fn write_late(
        &self,
        vcpu: &VcpuFd,
        number: u32,
        host: &HostFacts,
        there: &ClockState,
        here: &ClockState,
    ) -> Result<()> {
        let by_offset = self
            .unscaled_offset(host.tsc_khz, there)
            .filter(|_| host.tsc_offset && there.is_complete() && here.is_complete());
        if let Some(offset) = by_offset {
            let offset = moved_offset(offset, there, here, self.tsc_khz);
            sys::set_tsc_offset(vcpu, offset)
                .map_err(|error| refused("set", "TSC_OFFSET", number, error))?;
        }
        // Otherwise the counter goes on from its saved value. It is written once, and by one vCPU after the other
        // at once: KVM takes values of several vCPUs that are less than a second apart for the same one.
        let late: Vec<_> = self
            .msrs
            .iter()
            .filter(|msr| msrs::is_late(msr.index))
            .filter(|msr| msr.index != msrs::TSC || by_offset.is_none())
            .map(|msr| match msr.index {
                msrs::TSC => {
                    let value = moved_counter(msr.value, there, here, self.tsc_khz);
                    Msr { value, ..*msr }
                }
                _ => self.without_lost_deadline(*msr),
            })
            .collect();
        msrs::write(vcpu, number, &late, &host.msrs)?;
        self.write_events(vcpu, number)?;
        // Tells a guest's watchdog that time passed; a guest without the paravirtual clock refuses.
        match vcpu.kvmclock_ctrl() {
            Err(error) if error.errno() != libc::EINVAL => {
                Err(refused("set", "KVMCLOCK_CTRL", number, error.into()))
            }
            _ => Ok(()),
        }
    }

    /// What the guest sees of its CPU.
    pub(crate) fn cpuid(&self) -> &[CpuidEntry] {
        &self.cpuid
    }

    /// Frequency of its time stamp counter.
    pub(crate) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// What is worked out of it before KVM is given anything, for fuzzers.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn work_out(&self) {
        let numbers: Vec<u32> = self.msrs.iter().step_by(2).map(|msr| msr.index).collect();
        let early = self.early(&numbers);
        assert!(early.len() <= self.msrs.len());
        let clock = ClockState::default();
        let _ = self.unscaled_offset(self.tsc_khz, &clock);
        for msr in &self.msrs {
            let _ = self.without_lost_deadline(*msr);
        }
        drop(cpuid::missing(&self.cpuid, &self.cpuid));
        drop(cpuid::to_kvm(&self.cpuid));
    }

    /// One in which nothing ever ran, for fuzzers.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn blank() -> Self {
        Self {
            blocks: FIELDS.map(|(_, block)| vec![0; block.size]),
            xsave: vec![0; 4096],
            tsc_khz: 2_000_000,
            cpuid: vec![CpuidEntry { leaf: 1, ..CpuidEntry::default() }],
            msrs: [msrs::TSC, msrs::TSC_DEADLINE].map(|index| Msr { index, value: 0 }).to_vec(),
            tsc_offset: Some(0),
        }
    }

    /// Flips the lowest bit of a register, if it is there; for tests.
    #[cfg(test)]
    pub(crate) fn flip_msr(&mut self, index: u32) -> bool {
        let found = self.msrs.iter_mut().find(|msr| msr.index == index);
        found.map(|msr| msr.value ^= 1).is_some()
    }

    /// What is added to the host's counter, for tests.
    #[cfg(test)]
    pub(crate) fn tsc_offset(&self) -> Option<u64> {
        self.tsc_offset
    }

    /// What is not the same in `other`, for tests; leaves out what time changes.
    #[cfg(test)]
    pub(crate) fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        for ((_, block), (ours, theirs)) in FIELDS.iter().zip(self.blocks.iter().zip(&other.blocks))
        {
            let differs = ours.iter().zip(theirs).enumerate().filter(|(_, (a, b))| a != b);
            found.extend(
                differs.map(|(at, (a, b))| format!("{} {at:#x}: {a:#x} {b:#x}", block.name)),
            );
        }
        found.extend((self.xsave != other.xsave).then(|| "XSAVE2".to_owned()));
        found.extend((self.tsc_khz != other.tsc_khz).then(|| "TSC_KHZ".to_owned()));
        found.extend((self.cpuid != other.cpuid).then(|| "CPUID2".to_owned()));
        // The counter, and Hyper-V's two clocks, which KVM lists.
        let clocks = [msrs::TSC, 0x4000_0010, 0x4000_0020];
        let timeless = |msr: &&Msr| !clocks.contains(&msr.index);
        let ours: Vec<_> = self.msrs.iter().filter(timeless).collect();
        let theirs: Vec<_> = other.msrs.iter().filter(timeless).collect();
        let differs = ours.iter().zip(&theirs).filter(|(a, b)| a != b);
        found.extend(differs.map(|(a, b)| format!("{a:x?} {b:x?}")));
        found.extend((ours.len() != theirs.len()).then(|| "number of MSRs".to_owned()));
        found
    }

    /// Writes the section.
    pub(crate) fn encode(&self, number: u32) -> Section {
        let mut fields = FieldWriter::default();
        FIELDS.iter().zip(&self.blocks).for_each(|((field, _), bytes)| fields.put(*field, bytes));
        fields.put(XSAVE, &self.xsave);
        fields.put(TSC_KHZ, &self.tsc_khz.to_le_bytes());
        let cpuid: Vec<u8> = self.cpuid.iter().flat_map(|entry| entry.to_bytes()).collect();
        fields.put(CPUID, &cpuid);
        let msrs: Vec<u8> = self.msrs.iter().flat_map(|msr| msr.to_bytes()).collect();
        fields.put(MSRS, &msrs);
        let offset = self.tsc_offset.map(u64::to_le_bytes);
        fields.put(TSC_OFFSET, offset.as_ref().map_or(&[], |bytes| &bytes[..]));
        Section { kind: kind(number), version: VERSION, bytes: fields.finish() }
    }

    /// Reads the section.
    pub(crate) fn decode(section: &Section) -> Result<Self> {
        let name = &section.kind;
        let mut fields = FieldReader::new(name, payload(section, VERSION)?)?;
        let mut blocks = [const { Vec::new() }; 7];
        for (block, (field, shape)) in blocks.iter_mut().zip(FIELDS) {
            *block = fields.take_exact(field, shape.size)?.to_vec();
        }
        let xsave = fields.take(XSAVE)?;
        if xsave.len() < 4096 || xsave.len() > MAX_XSAVE {
            let reason = format!("{} bytes of extended state", xsave.len());
            return Err(VmError::section(name, reason));
        }
        let tsc_khz = u32::from_le_bytes(fields.take_array(TSC_KHZ)?);
        let cpuid = fields.take_rows(CPUID, cpuid::MAX_ENTRIES)?;
        let msrs = fields.take_rows(MSRS, msrs::MAX)?;
        let tsc_offset = match fields.take_rows::<8>(TSC_OFFSET, 1)?[..] {
            [] => None,
            [bytes, ..] => Some(u64::from_le_bytes(bytes)),
        };
        fields.finish()?;
        Ok(Self {
            blocks,
            xsave: xsave.to_vec(),
            tsc_khz,
            cpuid: cpuid.into_iter().map(CpuidEntry::from_bytes).collect(),
            msrs: msrs.into_iter().map(Msr::from_bytes).collect(),
            tsc_offset,
        })
    }

    /// The extended state in this host's length. The standard format has the same places on both
    /// hosts (preflight compared them), so what is longer here is zero, and what would be cut off
    /// must be zero.
    fn fitted_xsave(&self, number: u32, here: XsaveSize) -> Result<Vec<u8>> {
        let mut bytes = self.xsave.clone();
        let cut = bytes.get(here.bytes()..).unwrap_or_default();
        if cut.iter().any(|byte| *byte != 0) {
            return Err(VmError::section(
                kind(number),
                format!(
                    "its extended state uses {} bytes, this host has {}",
                    self.xsave.len(),
                    here.bytes()
                ),
            ));
        }
        bytes.resize(here.bytes(), 0);
        Ok(bytes)
    }

    /// A deadline of zero in deadline mode may be a timer that has fired and was not delivered yet;
    /// a deadline that has just passed delivers it. A guest that had none sees one interrupt more,
    /// which deadline timers allow for.
    fn without_lost_deadline(&self, msr: Msr) -> Msr {
        let lapic = &self.blocks[5];
        let timer = lapic
            .get(APIC_TIMER_AT..APIC_TIMER_AT + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u32::from_le_bytes);
        let in_deadline_mode = timer & APIC_TIMER_MODE == APIC_TIMER_DEADLINE;
        if msr.index == msrs::TSC_DEADLINE && msr.value == 0 && in_deadline_mode {
            let now = self.msrs.iter().find(|other| other.index == msrs::TSC);
            return Msr { index: msr.index, value: now.map_or(1, |tsc| tsc.value.max(1)) };
        }
        msr
    }
}

fn refused(what: &str, block: &str, number: u32, error: std::io::Error) -> VmError {
    VmError::refused(format!("{what} {block} of vCPU {number}"), error)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests_support::refuses_damage;
    use super::*;

    fn state(seed: u8, tsc_offset: Option<u64>, rows: usize) -> VcpuState {
        let bytes = |length: usize, salt: u8| -> Vec<u8> {
            (0..length).map(|at| (at as u8).wrapping_mul(seed).wrapping_add(salt)).collect()
        };
        VcpuState {
            blocks: FIELDS.map(|(field, block)| bytes(block.size, field as u8)),
            xsave: bytes(4096 + 64 * rows, 9),
            tsc_khz: u32::from(seed) * 1000,
            cpuid: (0..rows as u32)
                .map(|leaf| CpuidEntry { leaf, eax: u32::from(seed), ..Default::default() })
                .collect(),
            msrs: (0..rows as u32)
                .map(|index| Msr { index, value: u64::from(index) << 40 })
                .collect(),
            tsc_offset,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn a_vcpu_comes_back_and_damage_is_found(seed: u8, offset: Option<u64>, rows in 0usize..100) {
            let state = state(seed, offset, rows);
            let section = state.encode(0);
            prop_assert_eq!(VcpuState::decode(&section).expect("own section"), state);
            refuses_damage(&section, |section| VcpuState::decode(section).is_ok());
        }
    }

    #[test]
    fn too_many_rows_and_too_little_extended_state_are_refused() {
        assert!(VcpuState::decode(&state(1, None, cpuid::MAX_ENTRIES + 1).encode(0)).is_err());
        let mut short = state(1, None, 3);
        short.xsave.truncate(4095);
        assert!(VcpuState::decode(&short.encode(0)).is_err());
    }

    #[test]
    fn registers_that_say_what_a_cpu_is_come_before_those_that_depend_on_it() {
        let mut state = state(2, None, 0);
        let indexes = [0x4c1, 0x38f, msrs::TSC, 0x345, 0xc1, 0x10a, msrs::TSC_DEADLINE];
        state.msrs = indexes.map(|index| Msr { index, value: u64::from(index) }).to_vec();
        let early = state.early(&[0x10a, 0x345, 0x480]);
        assert!(early.iter().all(|msr| msr.value == u64::from(msr.index)));
        let order: Vec<_> = early.iter().map(|msr| msr.index).collect();
        assert_eq!(order, [0x345, 0x10a, 0x4c1, 0x38f, 0xc1]);
    }

    #[test]
    fn an_offset_is_used_where_neither_host_scales() {
        let mut state = state(2, Some(300), 0);
        let there = ClockState { host_tsc: 1000, ..ClockState::default() };
        assert_eq!(
            state.unscaled_offset(2000, &there),
            Some(300),
            "there is no counter to compare"
        );
        state.msrs.push(Msr { index: msrs::TSC, value: 1290 });
        assert_eq!(state.unscaled_offset(2000, &there), Some(300));
        assert_eq!(state.unscaled_offset(3000, &there), None, "it is scaled here");
        state.msrs[0].value = 1300 + 3_000_000;
        assert_eq!(state.unscaled_offset(2000, &there), None, "it was scaled there");
        state.tsc_offset = None;
        assert_eq!(state.unscaled_offset(2000, &there), None);
    }

    #[test]
    fn a_fired_deadline_is_not_lost() {
        let mut state = state(0, None, 0);
        let deadline = Msr { index: msrs::TSC_DEADLINE, value: 0 };
        state.blocks[5][APIC_TIMER_AT..APIC_TIMER_AT + 4].fill(0);
        assert_eq!(state.without_lost_deadline(deadline).value, 0, "not in deadline mode");
        state.blocks[5][APIC_TIMER_AT + 2] = 0b100;
        state.msrs.push(Msr { index: msrs::TSC, value: 77 });
        assert_eq!(state.without_lost_deadline(deadline).value, 77);
    }
}
