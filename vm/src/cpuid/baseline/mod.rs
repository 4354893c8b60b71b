//! The widest CPU that several hosts can all offer a guest.
//!
//! A baseline is a list of CPUID entries and a list of registers. Feature bits are those that every host has; address
//! widths the narrowest; components of the extended state those that lie at the same place with the same size
//! everywhere, with the features that need them. Who made the CPU and which model it is comes from the first
//! host, and the maker must be the same for all. Here are the words of hosts and the file; [`common`] computes, and
//! [`held`] holds guests to it.

mod common;
mod held;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::registers::{self, FeatureRegister};
use super::{CpuidEntry, HYPERVISOR, MAX_ENTRIES, Offered, filled, find, maker, missing};
use crate::error::{Result, VmError};
use common::{settle, standing_alone};
pub use held::Held;

/// Version of a host's words, and of a file that says nothing of registers: what older versions of decamp know.
const ENTRIES_ALONE: u32 = 1;
/// Version of a file with registers.
const WITH_REGISTERS: u32 = 2;
/// The most bytes of JSON that are read.
const MAX_BYTES: usize = 1 << 20;

/// What a host says that it can offer a guest, for a peer that computes a baseline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Version of what follows. It is still the first: who does not know of registers skips them.
    pub version: u32,
    /// What a fresh guest would see there.
    pub entries: Vec<CpuidEntry>,
    /// What it can be told by registers. An older decamp does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registers: Option<Vec<FeatureRegister>>,
}

/// A baseline, as it stands in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Baseline {
    /// Version of what follows.
    pub version: u32,
    /// The hosts that it was computed from, for people.
    pub hosts: Vec<String>,
    /// What a guest that is held to it sees.
    pub entries: Vec<CpuidEntry>,
    /// What registers tell it, from version 2 on. Without them a guest is told what its host tells unasked. Of
    /// IA32_PERF_CAPABILITIES, which KVM takes as its own CPU has it or not at all, it is told nothing either way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registers: Option<Vec<FeatureRegister>>,
}

impl Offer {
    /// What this host offers.
    ///
    /// # Errors
    /// When KVM cannot be used.
    pub fn of_this_host() -> Result<Self> {
        let here = Offered::here(&crate::host::open_kvm()?)?;
        let (entries, registers) = (here.entries, Some(here.registers));
        Ok(Self { version: ENTRIES_ALONE, entries, registers })
    }

    /// Reads what a peer said.
    ///
    /// # Errors
    /// When it is too long, of another version, or none.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let what = "What the host says of its CPU";
        let mut offer: Self = read(what, json)?;
        if offer.version != ENTRIES_ALONE {
            return Err(unknown_version(what, offer.version, ENTRIES_ALONE));
        }
        // An older decamp says those, too, that its KVM did not fill in.
        offer.entries = filled(offer.entries);
        checked(what, &offer.entries, offer.registers.as_deref())?;
        Ok(offer)
    }
}

impl Baseline {
    /// Reads a file.
    ///
    /// # Errors
    /// When it is none: the text says why.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let what = "The CPU baseline";
        let baseline: Self = read(what, json)?;
        let wrong = |why: &str| VmError::Spec(format!("{what} cannot be used: {why}"));
        match (baseline.version, &baseline.registers) {
            (ENTRIES_ALONE, None) | (WITH_REGISTERS, Some(_)) => {}
            (ENTRIES_ALONE, Some(_)) => return Err(wrong("version 1 has no registers")),
            (WITH_REGISTERS, None) => return Err(wrong("version 2 has registers, and it has not")),
            (version, _) => return Err(unknown_version(what, version, WITH_REGISTERS)),
        }
        checked(what, &baseline.entries, baseline.registers.as_deref())?;
        Ok(baseline)
    }

    /// The widest that all `offers` have in common, and for each host what it has beyond that. Where one of them does
    /// not say what its registers tell, neither does the baseline.
    ///
    /// # Errors
    /// When there is none: CPUs of different makers.
    pub fn of(offers: &[(String, Offer)]) -> Result<(Self, BTreeMap<String, Vec<String>>)> {
        let Some(((first, one), others)) = offers.split_first() else {
            return Err(VmError::Spec("A CPU baseline needs a host".into()));
        };
        let (mut entries, mut registers) = (one.entries.clone(), one.registers.clone());
        for (host, other) in others {
            if maker(&one.entries) != maker(&other.entries) {
                return Err(VmError::Spec(format!(
                    "The CPUs of {first} ({}) and {host} ({}) are of different makers: no guest can move \
                     between them",
                    maker(&one.entries),
                    maker(&other.entries)
                )));
            }
            entries = common::common(&entries, &other.entries);
            let both = registers.zip(other.registers.as_ref());
            registers = both.map(|(ours, theirs)| registers::common(&ours, theirs));
        }
        let alone = offers.iter().map(|(_, offer)| standing_alone(&offer.entries));
        settle(&mut entries, alone.fold(u64::MAX, |all, one| all & one));
        if let Some(all) = &mut registers {
            all.retain(registers::in_baselines);
        }
        let version = if registers.is_some() { WITH_REGISTERS } else { ENTRIES_ALONE };
        let hosts = offers.iter().map(|(host, _)| host.clone()).collect();
        let baseline = Self { version, hosts, entries, registers };
        let lost = offers.iter().map(|(host, offer)| (host.clone(), baseline.beyond(offer)));
        let lost = lost.collect();
        Ok((baseline, lost))
    }

    /// What a host has beyond it.
    fn beyond(&self, offer: &Offer) -> Vec<String> {
        let mut beyond = missing(&offer.entries, &self.entries);
        if let Some((theirs, held)) = offer.registers.as_ref().zip(self.registers.as_ref()) {
            beyond.extend(registers::missing(&offer.entries, theirs, held));
        }
        beyond
    }

    /// What the spec of a guest holds of it.
    pub fn held(self) -> Held {
        Held::new(self.entries, self.registers)
    }
}

fn read<'a, T: Deserialize<'a>>(what: &str, json: &'a [u8]) -> Result<T> {
    if json.len() > MAX_BYTES {
        return Err(VmError::Spec(format!("{what} cannot be read: it has {} bytes", json.len())));
    }
    serde_json::from_slice(json)
        .map_err(|error| VmError::Spec(format!("{what} cannot be read: {error}")))
}

fn unknown_version(what: &str, version: u32, newest: u32) -> VmError {
    VmError::Spec(format!(
        "{what} cannot be used: it is of version {version}, and this decamp knows {newest}"
    ))
}

fn checked(
    what: &str,
    entries: &[CpuidEntry],
    registers: Option<&[FeatureRegister]>,
) -> Result<()> {
    check(entries, registers).map_err(|why| VmError::Spec(format!("{what} cannot be used: {why}")))
}

/// Whether these can be of one CPU.
fn check(
    entries: &[CpuidEntry],
    registers: Option<&[FeatureRegister]>,
) -> std::result::Result<(), String> {
    if entries.len() > MAX_ENTRIES {
        return Err(format!("it has {} CPUID entries, more than KVM takes", entries.len()));
    }
    for leaf in [0, 1, 0x8000_0000, HYPERVISOR] {
        if find(entries, leaf, 0).is_none() {
            return Err(format!("it has no CPUID entry {leaf:#x}"));
        }
    }
    let mut places: Vec<_> = entries.iter().map(|entry| (entry.leaf, entry.subleaf)).collect();
    places.sort_unstable();
    if let Some(pair) = places.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("CPUID entry {:#x}.{} is there twice", pair[0].0, pair[0].1));
    }
    registers::check(registers.unwrap_or_default())
}

#[cfg(test)]
mod tests;
