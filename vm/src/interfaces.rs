//! A VM's network interfaces as the host has them: one tap device each, a port of a bridge. They live as long as
//! this; who looks after frames is the device.

use std::os::fd::{AsFd, OwnedFd};

use decamp_shared::network::announce::of_machine;
use decamp_shared::network::{Announcer, Link, Mac, Neighbour, Port, interface_name};
use decamp_shared::workload::Place;
use serde::{Deserialize, Serialize};

use crate::error::{Result, VmError};
use crate::monitor::{Change, Monitor, Request};
use crate::spec::{NetSpec, VmSpec};
use crate::sys::tap::make_tap;
use crate::virtio::bus::Named;
use crate::virtio::net::{Frames, HEADER, Knowledge, Net};

/// What the names of their tap devices begin with.
const KIND: [char; 2] = ['d', 'v'];
/// Bytes that a guest may have under way on the host before it has to wait.
const UNSENT: usize = 4 << 20;

/// The interfaces of one VM.
#[derive(Debug, Default)]
pub(crate) struct Interfaces {
    all: Vec<Interface>,
}

#[derive(Debug)]
struct Interface {
    bridge: String,
    mac: Mac,
    end: HostsEnd,
    connected: bool,
    /// The guest's end, for what is said in its name.
    tap: OwnedFd,
    knowledge: Knowledge,
}

/// The host's end of an interface.
#[derive(Debug)]
enum HostsEnd {
    /// Which this process itself takes off its network, and puts back.
    Own(Port),
    /// Which the monitor does that to.
    Monitored { name: String, number: u8, monitor: Monitor },
}

impl HostsEnd {
    fn name(&self) -> &str {
        match self {
            Self::Own(port) => port.name(),
            Self::Monitored { name, .. } => name,
        }
    }

    fn change(&mut self, change: Change) -> Result<()> {
        match self {
            Self::Own(port) => match change {
                Change::Disconnect => port.disconnect(),
                Change::Connect => port.connect(),
                Change::Reconnect => port.reconnect(),
            }
            .map_err(VmError::Network),
            Self::Monitored { number, monitor, .. } => {
                monitor.ask(&Request::Port { number: *number, change }).map(drop)
            }
        }
    }
}

/// What is to be said of an interface, for the agent and its users.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InterfaceFacts {
    /// The bridge that it is on.
    pub(crate) bridge: String,
    /// Its tap device.
    pub(crate) tap: String,
    /// Its hardware address.
    pub(crate) mac: Mac,
    /// Bytes that a frame of the guest's carries at most.
    pub(crate) mtu: u16,
    /// Addresses that the guest said to have, the newest last.
    pub(crate) own: Vec<Neighbour>,
    /// Whom it spoke to, the newest last.
    pub(crate) neighbours: Vec<Neighbour>,
}

impl Interfaces {
    /// The interfaces that `spec` means, with their devices. With `connected` false no frame passes before
    /// [`Interfaces::connect`].
    ///
    /// # Errors
    /// When a bridge is not there, or the kernel refuses; then none is left.
    pub(crate) fn make(
        spec: &VmSpec,
        place: &Place,
        connected: bool,
    ) -> Result<(Self, Vec<Named>)> {
        let mut made = Self::default();
        let mut devices = Vec::new();
        for (number, net) in (0u8..).zip(&spec.net) {
            let (interface, device) = Interface::make(net, place, number, connected)?;
            made.all.push(interface);
            devices.push(Named::new(format!("net{number}"), device));
        }
        Ok((made, devices))
    }

    /// The host's ends, for a monitor that is to look after them.
    pub(crate) fn ports(&self) -> Vec<Port> {
        let own = |interface: &Interface| match &interface.end {
            HostsEnd::Own(port) => Some(port.clone()),
            HostsEnd::Monitored { .. } => None,
        };
        self.all.iter().filter_map(own).collect()
    }

    /// From now on `monitor`, which was given [`Interfaces::ports`], looks after the host's ends.
    pub(crate) fn monitored(mut self, monitor: &Monitor) -> Self {
        for (number, interface) in (0u8..).zip(&mut self.all) {
            let name = interface.end.name().to_owned();
            interface.end = HostsEnd::Monitored { name, number, monitor: monitor.clone() };
        }
        self
    }

    /// Takes all of them off the network: nothing in, nothing out.
    ///
    /// # Errors
    /// When one cannot be; then all are on the network as before.
    pub(crate) fn disconnect(&mut self) -> Result<()> {
        for interface in &mut self.all {
            if let Err(error) = interface.end.change(Change::Disconnect) {
                self.reconnect();
                return Err(error);
            }
            interface.connected = false;
        }
        Ok(())
    }

    /// Puts all of them on the network.
    ///
    /// # Errors
    /// When one cannot be; then none is.
    pub(crate) fn connect(&mut self) -> Result<()> {
        for at in 0..self.all.len() {
            let interface = &mut self.all[at];
            if interface.connected {
                continue;
            }
            if let Err(error) = interface.end.change(Change::Connect) {
                self.disconnect()?;
                return Err(error);
            }
            interface.connected = true;
        }
        Ok(())
    }

    /// Puts back what was taken off, as far as can be: a guest that runs on does so in any case.
    pub(crate) fn reconnect(&mut self) {
        for interface in self.all.iter_mut().filter(|interface| !interface.connected) {
            match interface.end.change(Change::Reconnect) {
                Ok(()) => interface.connected = true,
                Err(error) => {
                    let error = error.with_causes();
                    tracing::error!(tap = interface.end.name(), error, "It stays off the network");
                }
            }
        }
    }

    /// Whether any of them is off the network.
    pub(crate) fn is_off(&self) -> bool {
        self.all.iter().any(|interface| !interface.connected)
    }

    /// Tells the networks where the guest is now: at once, and several times more from threads.
    pub(crate) fn announce(&self) {
        self.all.iter().for_each(Interface::announce);
    }

    /// What is to be said of them.
    pub(crate) fn facts(&self) -> Vec<InterfaceFacts> {
        self.all.iter().map(Interface::facts).collect()
    }
}

impl Interface {
    fn make(net: &NetSpec, place: &Place, number: u8, connected: bool) -> Result<(Self, Net)> {
        let bridge = Link::bridge(&net.bridge)
            .ok_or_else(|| VmError::State(format!("There is no bridge {}", net.bridge)))?;
        let name = interface_name(KIND, place, number);
        let mac = net.mac_of(&place.uuid, number);
        let failed = |error| VmError::refused(format!("make the tap device {name}"), error);
        let tap = make_tap(&name, HEADER, UNSENT).map_err(failed)?;
        let link = Link::find(&name).map_err(VmError::Network)?;
        link.join(&bridge, mac.of_hosts_end(), bridge.mtu).map_err(VmError::Network)?;
        link.set_up(true).map_err(VmError::Network)?;
        let mut port = Port::numbered(&name, link.index);
        if !connected {
            port.await_carrier().map_err(VmError::Network)?;
            port.disconnect().map_err(VmError::Network)?;
        }
        let knowledge = Knowledge::default();
        let frames = Frames::tap(tap.try_clone().map_err(failed)?);
        let mtu = u16::try_from(bridge.mtu).unwrap_or(u16::MAX);
        let device = Net::new(frames, mac, mtu, knowledge.clone());
        let bridge = net.bridge.clone();
        let end = HostsEnd::Own(port);
        Ok((Self { bridge, mac, end, connected, tap, knowledge }, device))
    }

    fn announce(&self) {
        match self.tap.as_fd().try_clone_to_owned() {
            Ok(tap) => {
                let frames = of_machine(self.mac, self.knowledge.lock().own());
                Announcer::new(tap, HEADER, frames).begin();
            }
            Err(error) => tracing::warn!(%error, tap = self.end.name(), "Cannot announce it"),
        }
    }

    fn facts(&self) -> InterfaceFacts {
        let known = self.knowledge.lock();
        InterfaceFacts {
            bridge: self.bridge.clone(),
            tap: self.end.name().to_owned(),
            mac: self.mac,
            mtu: self.knowledge.mtu(),
            own: known.own().to_vec(),
            neighbours: known.neighbours().to_vec(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
