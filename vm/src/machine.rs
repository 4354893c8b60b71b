//! One virtual machine: KVM's VM, guest memory, vCPUs and ports, and what can be done with the
//! whole of it. Who asks for that and why is not known here.

mod disks;
mod mirror;
mod outfit;
mod reset;
mod whole;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use decamp_shared::pages::PageSet;
use decamp_shared::workload::Section;
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::boot;
use crate::console::{Console, Gate, Keyboard, Output, Voice};
use crate::cpuid::baseline::Held;
use crate::cpuid::registers::{self, FeatureRegister};
use crate::cpuid::{self, CpuidEntry};
use crate::devices;
use crate::dirty::Tracker;
use crate::disk::Disk;
use crate::error::{Result, VmError};
use crate::files::Files;
use crate::host;
use crate::layout::Slot;
use crate::memory::Memory;
use crate::ports::Ports;
use crate::power::Power;
use crate::serial::SerialPort;
use crate::spec::VmSpec;
use crate::state::clock::ClockState;
use crate::state::msrs;
use crate::state::vcpu::{HostFacts, VcpuState};
use crate::sys::{self, Backed, XsaveSize};
use crate::throttle::Throttle;
use crate::topology;
use crate::vcpu::{OnEvent, Vcpu};
use crate::virtio::bus::{Line, VirtioBus};
use crate::virtio::console::Typing;
use mirror::Mirroring;
pub(crate) use outfit::{ConsolePaths, Outfit};
use whole::Whole;

/// Where KVM on Intel keeps two pages and one of its own: within the hole for devices.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// What the registers of a guest's vCPUs say that a host has to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Registers {
    /// Those that hold anything for the guest, of any vCPU.
    pub(crate) used: Vec<u32>,
    /// What the guest is told of its CPU, the same by each.
    pub(crate) told: Vec<FeatureRegister>,
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
    /// Open while it runs.
    gate: Gate,
    guest: Arc<Backed>,
    host: HostFacts,
    /// How its files are opened.
    files: Files,
    /// What the host's KVM has of what this VMM builds on.
    capabilities: Vec<String>,
    cpuid: Vec<CpuidEntry>,
    tsc_khz: u32,
    spec: VmSpec,
    /// What a reset goes back to.
    first: Whole,
    tracker: Tracker,
    disks: Vec<Arc<Disk>>,
    /// Those of them whose content leaves as pages.
    carried: Vec<Arc<Disk>>,
    /// How far it is, while these are followed without guest memory.
    mirroring: Option<Mirroring>,
    paused: bool,
    made: Instant,
    /// Why nothing of it may ever run again.
    dead: Option<String>,
}

impl Machine {
    /// A machine with the files of `spec` loaded and `nets` for interfaces, standing before its first instruction,
    /// which opens by itself what it needs.
    #[cfg(test)]
    pub(crate) fn boot(
        spec: &VmSpec,
        console: &ConsolePaths,
        nets: Vec<crate::virtio::bus::Named>,
        on_event: OnEvent,
    ) -> Result<Self> {
        Self::build(spec, Outfit::own(console, nets), on_event, true)
    }

    /// A machine in the shape of `spec`, with what it is given in `outfit`: with its files loaded, standing before
    /// its first instruction, or, unless it `boots`, empty, for state that arrives.
    pub(crate) fn build(
        spec: &VmSpec,
        mut outfit: Outfit,
        on_event: OnEvent,
        boots: bool,
    ) -> Result<Self> {
        let memory = Memory::create(spec.memory_bytes)?;
        let files = outfit.files.clone();
        let disks = devices::disks_of(spec, &files);
        if boots {
            disks.iter().try_for_each(|disk| disk.open(Duration::ZERO))?;
        }
        // Before KVM is touched, so that a bad file costs nothing.
        let load = || boot::load(spec, &files, &memory, &devices::slots(spec));
        let entry = boots.then(load).transpose()?;
        let kvm = outfit.take_kvm()?;
        let guest = Backed::new(create_vm(&kvm)?, memory)
            .map_err(|error| VmError::refused("give guest memory to KVM", error))?;
        guest.advise_huge_pages();
        let fds = create_vcpus(guest.vm(), spec.cpus)?;
        let boots_first = fds.first().ok_or_else(|| VmError::State("A VM without vCPUs".into()))?;
        let tsc_khz = boots_first
            .get_tsc_khz()
            .map_err(|error| VmError::refused("read the counter's frequency", error))?;
        let host = HostFacts {
            xsave: XsaveSize::of(guest.vm()),
            msrs: msrs::listed(&kvm)?,
            features: msrs::features(&kvm)?,
            tsc_khz,
            tsc_offset: sys::has_attribute(
                boots_first,
                KVM_VCPU_TSC_CTRL,
                KVM_VCPU_TSC_OFFSET.into(),
            ),
        };
        // An empty machine gets another CPUID with the state that arrives; a vCPU's first state is one that knows
        // what the vCPU is.
        let cpuid = grant_cpuid(&kvm, &fds, tsc_khz, spec.cpu_baseline.as_ref())?;
        if let Some(held) = spec.cpu_baseline.as_ref().filter(|_| boots) {
            held.tell(&kvm, fds.iter(), &cpuid)?;
        }
        let capabilities = host::capabilities(&kvm);
        let ends = outfit.take_ends(spec)?;
        let output = Output::to(ends.log)?;
        let typing = Typing::new()?;
        let devices = devices::of(spec, &disks, &output, &typing, ends.vsock, outfit.nets)?;
        let virtio = VirtioBus::new(devices, guest.memory().map(), |slot| line(&guest, slot))?;
        virtio.register_kicks(&guest)?;
        let serial = SerialPort::new(guest.clone(), output.clone());
        let ports = Ports::new(serial, Power::new(guest.clone()), virtio);
        let all: Vec<_> = fds.iter().collect();
        let first = Whole::read(&ports, &all, &guest, &host, spec.memory_bytes)?;
        if let Some(entry) = entry {
            boot::enter(boots_first, entry)?;
        }
        let gate = Gate::default();
        let keyboard = keyboard(&ports, &output, typing, &gate);
        let console =
            Console::on(ends.console, output.places(), keyboard, None).map_err(VmError::Console)?;
        let vcpus = (0u32..)
            .zip(fds)
            .map(|(number, fd)| {
                Vcpu::start(number, fd, guest.clone(), ports.clone(), on_event.clone())
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            _console: console,
            throttle: None,
            vcpus: Arc::new(vcpus),
            ports,
            output,
            gate,
            guest,
            host,
            files,
            capabilities,
            cpuid,
            tsc_khz,
            spec: spec.clone(),
            first,
            tracker: Tracker::Off,
            disks,
            carried: Vec::new(),
            mirroring: None,
            paused: true,
            made: Instant::now(),
            dead: None,
        })
    }

    /// Guest memory.
    pub(crate) fn memory(&self) -> &Memory {
        self.guest.memory()
    }

    /// A descriptor of guest memory for another process: reads, and writes if `writable`.
    pub(crate) fn memory_descriptor(&self, writable: bool) -> Result<OwnedFd> {
        self.memory().descriptor_by(&self.files, writable)
    }

    /// Names of the capabilities that a guest here builds on.
    pub(crate) fn capabilities(&self) -> &[String] {
        &self.capabilities
    }

    /// What the guest sees of its CPU.
    pub(crate) fn cpuid(&self) -> &[CpuidEntry] {
        &self.cpuid
    }

    /// What its vCPUs' registers say now, whether it runs or not.
    pub(crate) fn registers(&self) -> Result<Registers> {
        let mut used = BTreeSet::new();
        for vcpu in self.vcpus.iter() {
            let read = vcpu.visit(|fd| msrs::read(fd, vcpu.number(), &self.host.msrs))??;
            used.extend(msrs::of_the_guest(&read));
        }
        let told = match self.vcpus.first() {
            Some(first) => first.visit(registers::of_vcpu)??,
            None => Vec::new(),
        };
        Ok(Registers { used: used.into_iter().collect(), told })
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

    /// Lets every device work and every vCPU run. On an error none does.
    pub(crate) fn run(&mut self) -> Result<()> {
        self.must_live()?;
        self.ports.virtio().resume();
        for vcpu in self.vcpus.iter() {
            if let Err(error) = vcpu.run() {
                self.vcpus.iter().for_each(Vcpu::ask_to_park);
                self.ports.virtio().pause();
                return Err(error);
            }
        }
        self.paused = false;
        self.gate.set(true);
        Ok(())
    }

    /// Stops every vCPU, and then every device. On an error it runs on, unless it has ended.
    pub(crate) fn pause(&mut self) -> Result<()> {
        let parked = self.park();
        // Only now: who is woken from a nap before it is asked to park runs on for an instant.
        self.throttle = None;
        if let Err(error) = parked {
            if self.must_live().is_ok() {
                for vcpu in self.vcpus.iter() {
                    let _ = vcpu.run();
                }
            }
            return Err(error);
        }
        self.must_live()?;
        self.paused = true;
        self.gate.set(false);
        // A guest that asked for a reset is moved as one that was reset. When that fails nothing of it may run on:
        // its memory is gone. The caretaker, which was told of the reset too, ends it.
        if let Err(error) = self.reset_if_asked() {
            self.paused = false;
            return Err(error);
        }
        self.ports.virtio().pause();
        Ok(())
    }

    /// Stops what still runs of a guest that has ended. Nothing of it runs after that.
    pub(crate) fn halt(&mut self) {
        self.dead.get_or_insert_with(|| "it was halted".into());
        self.vcpus.iter().for_each(Vcpu::ask_to_park);
        for vcpu in self.vcpus.iter() {
            let _ = vcpu.wait_parked();
        }
        self.ports.virtio().pause();
    }

    fn park(&self) -> Result<()> {
        self.vcpus.iter().for_each(Vcpu::ask_to_park);
        self.vcpus.iter().try_for_each(Vcpu::wait_parked)
    }

    /// Presses the power button of a guest that runs. `false` when it would not notice.
    pub(crate) fn press_power_button(&self) -> bool {
        !self.paused && self.must_live().is_ok() && self.ports.power().press()
    }

    /// As if there had been no move: runs, untracked, at full speed. On an error no vCPU runs: a log
    /// that KVM will not switch off costs speed, and is no reason to call a running guest lost.
    pub(crate) fn resume(&mut self) -> Result<()> {
        self.throttle = None;
        self.end_mirroring();
        self.carried.drain(..).for_each(|disk| disk.stop_tracking());
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
        self.must_not_mirror()?;
        self.carried.iter().for_each(|disk| disk.track());
        self.tracker.start(&self.guest)
    }

    /// Adds what was written since the last harvest, into memory and onto the disks that are carried.
    pub(crate) fn harvest(&mut self, dirty: &mut PageSet) -> Result<()> {
        if self.mirroring.is_some() {
            return self.harvest_mirrored(dirty);
        }
        let all = self.tracker != Tracker::Following;
        self.tracker.harvest(&self.guest, dirty)?;
        self.carried.iter().try_for_each(|disk| disk.harvest(all, dirty))
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
        let fds: Vec<_> = self.vcpus.iter().map(Vcpu::fd).collect();
        let state =
            Whole::read(&self.ports, &fds, &self.guest, &self.host, self.spec.memory_bytes)?;
        Ok(state.encode())
    }

    /// Puts a machine that never ran into the state of `sections`; each must be used up. After an
    /// error it can only be dropped.
    pub(crate) fn load(&mut self, sections: &[Section]) -> Result<()> {
        self.must_stand()?;
        let numbers: Vec<_> = self.vcpus.iter().map(Vcpu::number).collect();
        let arrived = Whole::decode(sections, &numbers, &self.ports, self.spec.memory_bytes)?;
        self.ports.serial().load(arrived.serial)?;
        self.ports.power().load(arrived.power)?;
        let mut virtio: BTreeMap<_, _> =
            arrived.virtio.iter().map(|section| (section.kind.as_str(), section)).collect();
        self.ports.virtio().load(|kind| {
            let came = virtio.remove(kind.as_str());
            came.ok_or_else(|| VmError::section(kind, "it did not come"))
        })?;
        let first = self.first.vcpus.iter_mut();
        for ((vcpu, state), first) in self.vcpus.iter().zip(&arrived.vcpus).zip(first) {
            let (fd, number) = (vcpu.fd(), vcpu.number());
            state.write_identity(&fd, number)?;
            // It is reset as what it is now, not as what this host made of it when it was empty.
            *first = VcpuState::read(&fd, number, &self.host)?;
            state.write_early(&fd, number, &self.host)?;
        }
        // What arrives ran elsewhere when this was made.
        arrived.vm.write(self.guest.vm(), self.made.elapsed())?;
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

    /// That it has not ended.
    fn must_live(&self) -> Result<()> {
        let ended = || self.vcpus.iter().find_map(Vcpu::ended);
        match self.dead.clone().or_else(ended) {
            Some(why) => Err(VmError::State(format!("The guest has ended: {why}"))),
            None => Ok(()),
        }
    }

    fn must_stand(&self) -> Result<()> {
        if self.paused {
            self.vcpus.iter().try_for_each(Vcpu::wait_parked)
        } else {
            Err(VmError::State("The guest must be paused for that".into()))
        }
    }
}

/// The interrupt line of the virtio device in `slot`. Through when it returns, so that nothing is under way when
/// the interrupt chips are saved.
fn line(guest: &Arc<Backed>, slot: Slot) -> Line {
    let guest = guest.clone();
    Box::new(move |high| {
        if let Err(error) = guest.vm().set_irq_line(slot.line, high) {
            tracing::error!("KVM does not take interrupt {}: {error}", slot.line);
        }
    })
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

/// Gives every vCPU, none of which has run, what it shall see of its CPU, held to `baseline` if there is one; what
/// the first has then.
fn grant_cpuid(
    kvm: &Kvm,
    fds: &[VcpuFd],
    tsc_khz: u32,
    baseline: Option<&Held>,
) -> Result<Vec<CpuidEntry>> {
    let own = cpuid::for_guest(kvm, tsc_khz)?;
    let wanted = baseline.map_or(own.clone(), |baseline| baseline.pin(&own));
    let count = fds.len() as u32;
    let mut granted = Vec::new();
    for (number, fd) in (0..count).zip(fds) {
        let mut entries = wanted.clone();
        topology::place(&mut entries, number, count);
        granted.push(cpuid::grant(fd, &entries)?);
    }
    Ok(granted.into_iter().next().unwrap_or_default())
}

/// What is typed goes to the device that the guest printed by last, while `gate` is open.
fn keyboard(ports: &Ports, output: &Output, typing: Typing, gate: &Gate) -> Keyboard {
    let (ports, output, gate) = (ports.clone(), output.clone(), gate.clone());
    Box::new(move |bytes: &[u8]| {
        gate.pass(|| match output.heard() {
            Voice::Serial => ports.serial().type_in(bytes),
            Voice::Virtio => typing.type_in(bytes),
        })
    })
}

#[cfg(test)]
mod tests;
