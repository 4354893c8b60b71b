//! One virtual machine: KVM's VM, guest memory, vCPUs and ports, and what can be done with the
//! whole of it. Who asks for that and why is not known here.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use decamp_shared::pages::PageSet;
use decamp_shared::workload::Section;
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::boot;
use crate::console::{Console, Keyboard, Output};
use crate::cpuid::{self, CpuidEntry};
use crate::dirty::Tracker;
use crate::error::{Result, VmError};
use crate::host;
use crate::memory::Memory;
use crate::ports::Ports;
use crate::serial::SerialPort;
use crate::spec::VmSpec;
use crate::state::clock::ClockState;
use crate::state::vcpu::{HostFacts, VcpuState};
use crate::state::vm::VmState;
use crate::state::{msrs, serial, vcpu, vm};
use crate::sys::{self, Backed, XsaveSize};
use crate::throttle::Throttle;
use crate::vcpu::{OnEnd, Vcpu};

/// Where KVM on Intel keeps two pages and one of its own: within the hole for devices.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Where a machine's console goes.
#[derive(Clone, Debug)]
pub(crate) struct ConsolePaths {
    /// What the guest prints is appended here.
    pub(crate) log: PathBuf,
    /// Socket for clients.
    pub(crate) socket: PathBuf,
}

/// A virtual machine. Dropped, it stops and is gone.
#[derive(Debug)]
pub(crate) struct Machine {
    // Fields are dropped in this order: whatever touches vCPUs goes before them.
    _console: Console,
    throttle: Option<Throttle>,
    vcpus: Arc<Vec<Vcpu>>,
    ports: Ports,
    output: Output,
    guest: Arc<Backed>,
    host: HostFacts,
    cpuid: Vec<CpuidEntry>,
    tsc_khz: u32,
    memory_bytes: u64,
    tracker: Tracker,
    paused: bool,
}

impl Machine {
    /// A machine with the files of `spec` loaded, standing before its first instruction.
    pub(crate) fn boot(spec: &VmSpec, console: &ConsolePaths, on_end: OnEnd) -> Result<Self> {
        Self::build(spec, console, on_end, true)
    }

    /// An empty machine in the shape of `spec`, for state that arrives.
    pub(crate) fn empty(spec: &VmSpec, console: &ConsolePaths, on_end: OnEnd) -> Result<Self> {
        Self::build(spec, console, on_end, false)
    }

    fn build(spec: &VmSpec, console: &ConsolePaths, on_end: OnEnd, boots: bool) -> Result<Self> {
        let memory = Memory::create(spec.memory_bytes)?;
        // Before KVM is touched, so that a bad file costs nothing.
        let entry = if boots { Some(boot::load(spec, &memory)?) } else { None };
        let kvm = host::open_kvm()?;
        let guest = Backed::new(create_vm(&kvm)?, memory)
            .map_err(|error| VmError::refused("give guest memory to KVM", error))?;
        guest.advise_huge_pages();
        let fds = create_vcpus(guest.vm(), spec.cpus)?;
        let first = fds.first().ok_or_else(|| VmError::State("A VM without vCPUs".into()))?;
        let tsc_khz = first
            .get_tsc_khz()
            .map_err(|error| VmError::refused("read the counter's frequency", error))?;
        let host = HostFacts {
            xsave: XsaveSize::of(guest.vm()),
            msrs: msrs::listed(&kvm)?,
            tsc_offset: sys::has_attribute(first, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.into()),
        };
        // An empty machine gets its CPUID with the state that arrives.
        let mut cpuid = Vec::new();
        if let Some(entry) = entry {
            let wanted = cpuid::for_guest(&kvm, tsc_khz)?;
            for fd in &fds {
                cpuid = cpuid::grant(fd, &wanted)?;
            }
            boot::enter(first, entry)?;
        }
        let output = Output::to_log(&console.log)?;
        let ports = Ports::new(SerialPort::new(guest.clone(), output.clone()));
        let console = Console::listen(&console.socket, output.clone(), keyboard(&ports))?;
        let vcpus = (0u32..)
            .zip(fds)
            .map(|(number, fd)| {
                Vcpu::start(number, fd, guest.clone(), ports.clone(), on_end.clone())
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            _console: console,
            throttle: None,
            vcpus: Arc::new(vcpus),
            ports,
            output,
            guest,
            host,
            cpuid,
            tsc_khz,
            memory_bytes: spec.memory_bytes,
            tracker: Tracker::Off,
            paused: true,
        })
    }

    /// Guest memory.
    pub(crate) fn memory(&self) -> &Memory {
        self.guest.memory()
    }

    /// What the guest sees of its CPU.
    pub(crate) fn cpuid(&self) -> &[CpuidEntry] {
        &self.cpuid
    }

    /// Frequency of the guest's time stamp counter.
    pub(crate) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Thread numbers of the vCPUs, for who wants to pin or watch them.
    pub(crate) fn vcpu_threads(&self) -> Vec<i32> {
        self.vcpus.iter().map(Vcpu::thread_id).collect()
    }

    /// Console output that a log or a client could not take.
    pub(crate) fn console_losses(&self) -> u64 {
        self.output.lost()
    }

    /// Lets every vCPU run. On an error none does.
    pub(crate) fn run(&mut self) -> Result<()> {
        for vcpu in self.vcpus.iter() {
            if let Err(error) = vcpu.run() {
                self.vcpus.iter().for_each(Vcpu::ask_to_park);
                return Err(error);
            }
        }
        self.paused = false;
        Ok(())
    }

    /// Stops every vCPU. On an error it runs on.
    pub(crate) fn pause(&mut self) -> Result<()> {
        self.vcpus.iter().for_each(Vcpu::ask_to_park);
        for vcpu in self.vcpus.iter() {
            if let Err(error) = vcpu.wait_parked() {
                for other in self.vcpus.iter() {
                    let _ = other.run();
                }
                return Err(error);
            }
        }
        self.paused = true;
        Ok(())
    }

    /// As if there had been no move: runs, untracked, at full speed. On an error no vCPU runs: a log
    /// that KVM will not switch off costs speed, and is no reason to call a running guest lost.
    pub(crate) fn resume(&mut self) -> Result<()> {
        self.throttle = None;
        let tracked = self.tracker.stop(&self.guest);
        if self.paused {
            for vcpu in self.vcpus.iter() {
                // Guests without the paravirtual clock refuse; it only quiets a watchdog.
                let _ = vcpu.fd().kvmclock_ctrl();
            }
        }
        self.run()?;
        if let Err(error) = tracked {
            tracing::warn!("The guest runs on, still tracked: {}", error.with_causes());
        }
        Ok(())
    }

    /// Starts dirty tracking.
    pub(crate) fn track(&mut self) -> Result<()> {
        self.tracker.start(&self.guest)
    }

    /// Adds what was written since the last harvest.
    pub(crate) fn harvest(&mut self, dirty: &mut PageSet) -> Result<()> {
        self.tracker.harvest(&self.guest, dirty)
    }

    /// Takes `percent` of their time from the vCPUs.
    pub(crate) fn throttle(&mut self, percent: u8) -> Result<()> {
        match &self.throttle {
            _ if percent == 0 => self.throttle = None,
            Some(throttle) => throttle.set(percent),
            None => self.throttle = Some(Throttle::start(&self.vcpus, percent)?),
        }
        Ok(())
    }

    /// The state of everything but memory, while paused.
    pub(crate) fn save(&self) -> Result<Vec<Section>> {
        self.must_stand()?;
        // The serial port first: a byte that is typed from here on is in no section, and the
        // interrupt that it raises is one too many, not one too few.
        let mut sections = vec![serial::encode(&self.ports.serial().state())];
        for vcpu in self.vcpus.iter() {
            let state = VcpuState::read(&vcpu.fd(), vcpu.number(), &self.host)?;
            sections.push(state.encode(vcpu.number()));
        }
        sections.push(VmState::read(self.guest.vm(), self.memory_bytes)?.encode());
        Ok(sections)
    }

    /// Puts a machine that never ran into the state of `sections`; each must be used up. After an
    /// error it can only be dropped.
    pub(crate) fn load(&mut self, sections: &[Section]) -> Result<()> {
        self.must_stand()?;
        let arrived = self.sort_out(sections)?;
        self.ports.serial().load(arrived.serial)?;
        for (vcpu, state) in self.vcpus.iter().zip(&arrived.vcpus) {
            state.write_early(&vcpu.fd(), vcpu.number(), &self.host)?;
        }
        arrived.vm.write(self.guest.vm())?;
        let here = ClockState::read(self.guest.vm())?;
        for (vcpu, state) in self.vcpus.iter().zip(&arrived.vcpus) {
            let number = vcpu.number();
            state.write_late(&vcpu.fd(), number, &self.host, &arrived.vm.clock, &here)?;
        }
        if let Some(state) = arrived.vcpus.first() {
            self.cpuid = state.cpuid().to_vec();
            self.tsc_khz = state.tsc_khz();
        }
        Ok(())
    }

    /// Decodes every section, before any of them is put to use.
    fn sort_out(&self, sections: &[Section]) -> Result<Arrived> {
        let mut rest = BTreeMap::new();
        for section in sections {
            if rest.insert(section.kind.clone(), section).is_some() {
                return Err(VmError::section(&section.kind, "it came twice"));
            }
        }
        let mut take = |kind: String| {
            let found = rest.remove(&kind);
            found.ok_or_else(|| VmError::section(kind, "it did not come"))
        };
        let arrived = Arrived {
            serial: serial::decode(take(serial::KIND.into())?)?,
            vm: VmState::decode(take(vm::KIND.into())?)?,
            vcpus: self
                .vcpus
                .iter()
                .map(|vcpu| VcpuState::decode(take(vcpu::kind(vcpu.number()))?))
                .collect::<Result<_>>()?,
        };
        if let Some(kind) = rest.keys().next() {
            return Err(VmError::section(kind, "this VM has nothing that it belongs to"));
        }
        if arrived.vm.memory_bytes != self.memory_bytes {
            let reason = format!(
                "it is of a VM with {} bytes of memory, this one has {}",
                arrived.vm.memory_bytes, self.memory_bytes
            );
            return Err(VmError::section(vm::KIND, reason));
        }
        Ok(arrived)
    }

    fn must_stand(&self) -> Result<()> {
        if self.paused {
            self.vcpus.iter().try_for_each(Vcpu::wait_parked)
        } else {
            Err(VmError::State("The guest must be paused for that".into()))
        }
    }
}

/// Decoded sections.
struct Arrived {
    serial: crate::serial::PortState,
    vm: VmState,
    vcpus: Vec<VcpuState>,
}

fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error: kvm_ioctls::Error| VmError::refused(what, error)
    };
    let vm = kvm.create_vm().map_err(failed("create a VM"))?;
    vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
        .map_err(failed("place KVM's identity map"))?;
    vm.set_tss_address(TSS_ADDRESS).map_err(failed("place KVM's task state"))?;
    vm.create_irq_chip().map_err(failed("create the interrupt chips"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(failed("create the interval timer"))?;
    Tracker::prepare(&vm)?;
    Ok(vm)
}

fn create_vcpus(vm: &VmFd, count: u32) -> Result<Vec<VcpuFd>> {
    (0..count)
        .map(|number| {
            let made = vm.create_vcpu(u64::from(number));
            made.map_err(|error| VmError::refused(format!("create vCPU {number}"), error))
        })
        .collect()
}

/// What is typed goes to the serial port.
fn keyboard(ports: &Ports) -> Keyboard {
    let ports = ports.clone();
    Box::new(move |bytes: &[u8]| {
        let taken = ports.serial().type_in(bytes);
        if taken < bytes.len() {
            tracing::debug!("{} typed bytes were lost", bytes.len() - taken);
        }
    })
}

#[cfg(test)]
mod tests;
