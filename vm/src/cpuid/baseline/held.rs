//! The CPU that a guest is held to, as its spec has it; and whether a host can hold a guest to it.

use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::super::registers::{self, FeatureRegister};
use super::super::{CpuidEntry, Offered, grant, maker, missing, trial};
use super::check;
use super::common::{hide, pin};
use crate::error::Result;

/// What a guest sees wherever it is. In JSON it is the list of the entries where nothing is said of registers, as it
/// was before there were any.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Form", into = "Form")]
pub struct Held {
    entries: Vec<CpuidEntry>,
    registers: Option<Vec<FeatureRegister>>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Form {
    Entries(Vec<CpuidEntry>),
    Both(Both),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Both {
    entries: Vec<CpuidEntry>,
    registers: Vec<FeatureRegister>,
}

impl From<Form> for Held {
    fn from(form: Form) -> Self {
        match form {
            Form::Entries(entries) => Self::new(entries, None),
            Form::Both(Both { entries, registers }) => Self::new(entries, Some(registers)),
        }
    }
}

impl From<Held> for Form {
    fn from(held: Held) -> Self {
        match held {
            Held { entries, registers: None } => Self::Entries(entries),
            Held { entries, registers: Some(registers) } => Self::Both(Both { entries, registers }),
        }
    }
}

impl Held {
    /// Without what no guest can be held to: files and specs of older versions may have it.
    pub(super) fn new(
        mut entries: Vec<CpuidEntry>,
        mut registers: Option<Vec<FeatureRegister>>,
    ) -> Self {
        hide(&mut entries);
        if let Some(all) = &mut registers {
            all.retain(registers::in_baselines);
        }
        Self { entries, registers }
    }

    /// Whether it can be a CPU at all.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        check(&self.entries, self.registers.as_deref())
    }

    /// What a guest that would see `own` sees when it is held to this. Call it only where [`Held::refusals`] has
    /// nothing to say.
    pub(crate) fn pin(&self, own: &[CpuidEntry]) -> Vec<CpuidEntry> {
        pin(own, &self.entries)
    }

    /// Has `vcpus`, none of which has run, and whose guest sees `entries`, tell by their registers what this says.
    pub(crate) fn tell<'a>(
        &self,
        kvm: &Kvm,
        vcpus: impl Iterator<Item = &'a VcpuFd>,
        entries: &[CpuidEntry],
    ) -> Result<()> {
        let held = self.registers.as_deref().unwrap_or_default();
        let here = Offered::here(kvm)?.registers;
        (0u32..).zip(vcpus).try_for_each(|(number, vcpu)| {
            registers::hold(vcpu, number, entries, held, &here).map(drop)
        })
    }

    /// Everything of it that a guest here would lack, and everything beyond it that this KVM cannot hide from one,
    /// in words; empty when a guest can be held to it here.
    pub(crate) fn refusals(&self, kvm: &Kvm) -> Result<Vec<String>> {
        let here = Offered::here(kvm)?;
        let (_vm, vcpu) = trial(kvm)?;
        let granted = grant(&vcpu, &self.pin(&here.entries))?;
        let mut said = Vec::new();
        let (wanted, own) = (maker(&self.entries), maker(&here.entries));
        if wanted != own {
            said.push(format!("a CPU by {wanted} (here {own})"));
        }
        let held = self.registers.as_deref().unwrap_or_default();
        said.extend(here.lacks(&self.entries, held));
        let hidden = |name: String| format!("a way to hide {name} from a guest");
        said.extend(missing(&granted, &self.entries).into_iter().map(hidden));
        let told = registers::hold(&vcpu, 0, &granted, held, &here.registers)?;
        if self.registers.is_some() {
            said.extend(registers::missing(&granted, &told, held).into_iter().map(hidden));
        }
        Ok(said)
    }
}
