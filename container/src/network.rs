//! A container's network: a namespace held by a descriptor, and a veth pair from it to a bridge of
//! the host.
//!
//! The namespace lives as long as the keeper or a task of the container, and takes the pair with it.
//! An interface is taken off the network by disabling its port of the bridge: at once, without loss
//! of carrier, and undone as fast.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};

use crate::announce::Announcer;
use crate::error::{ContainerError, Result};
use crate::port::{PortState, set_port_state};
use crate::spec::{Mac, Net};
use crate::sys;

/// Name of the interface in the container.
const INSIDE: &str = "eth0";
/// How a container asks for a neighbour: after 50 ms again instead of a second, and as long as ever.
/// A question that is lost at the switch would hold up every connection for that second.
const ASKING: [(&str, &str); 2] = [("retrans_time_ms", "50"), ("mcast_solicit", "40")];
/// The kernel tells a bridge of a new carrier within this.
const CARRIER_WITHIN: Duration = Duration::from_secs(2);

/// A network namespace and the interface in it.
pub(crate) struct Network {
    namespace: OwnedFd,
    link: Option<Link>,
}

/// The pair, seen from the host.
struct Link {
    outside: String,
    index: u32,
    /// How it was taken off the network: by its port, or, where the bridge speaks the spanning tree
    /// protocol and does not let us, by taking the interface down.
    by_port: bool,
    /// Only where it may come to: one that was found never announces itself.
    announcer: Option<Announcer>,
    /// Whether it goes when this is dropped.
    ours: bool,
}

impl Network {
    /// Makes a namespace, and for `net` a pair whose host end is called `outside`. With `connected`
    /// false no frame passes before [`Network::connect`], not even an answer to ARP.
    pub(crate) fn make(net: Option<(&Net, Mac)>, outside: &str, connected: bool) -> Result<Self> {
        let namespace = fresh_namespace()?;
        let mut network = Self { namespace, link: None };
        if let Some((net, mac)) = net
            && let Err(error) = network.add_link(net, mac, outside, connected)
        {
            delete_link(outside);
            return Err(error);
        }
        Ok(network)
    }

    /// A namespace that somebody else made, with the host's end of the pair that leads to it.
    pub(crate) fn found(namespace: OwnedFd, outside: Option<&str>) -> Result<Self> {
        let link = |outside: &str| -> Result<Link> {
            let index = sys::interface_index(outside)
                .map_err(ContainerError::io(format!("find {outside}")))?;
            Ok(Link {
                outside: outside.to_owned(),
                index,
                by_port: true,
                announcer: None,
                ours: false,
            })
        };
        Ok(Self { namespace, link: outside.map(link).transpose()? })
    }

    /// Makes of a pair that was found one that announces `net` as it comes here.
    pub(crate) fn arrives(&mut self, net: &Net, mac: Mac) -> Result<()> {
        let (address, _) = net.address()?;
        let announcer = self.inside(|| announcer(mac, address))?;
        if let Some(link) = &mut self.link {
            link.announcer = Some(announcer);
        }
        Ok(())
    }

    /// Path of the namespace for other programs.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd())
    }

    /// The namespace.
    pub(crate) fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// A second descriptor of the namespace.
    pub(crate) fn namespace_again(&self) -> Result<OwnedFd> {
        self.namespace.try_clone().map_err(ContainerError::io("hold the network namespace"))
    }

    /// Lets everybody bind the ports below 1024: root in a user namespace is nobody to a network namespace.
    pub(crate) fn open_low_ports(&self) -> Result<()> {
        const START: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
        self.inside(|| fs::write(START, "0").map_err(ContainerError::io(format!("write {START}"))))
    }

    /// Takes the interface off the network: nothing in, nothing out. Twice is as good as once.
    pub(crate) fn disconnect(&mut self) -> Result<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        if let Err(error) = set_port_state(link.index, PortState::Disabled) {
            tracing::debug!(%error, link = link.outside, "The bridge keeps its ports to itself; taking the interface down");
            link.by_port = false;
            ip(&["link", "set", &link.outside, "down"])?;
        }
        Ok(())
    }

    /// Puts the interface back. Twice is as good as once.
    pub(crate) fn connect(&mut self) -> Result<()> {
        let Some(link) = &mut self.link else { return Ok(()) };
        if !link.by_port {
            ip(&["link", "set", &link.outside, "up"])?;
            link.by_port = true;
            return Ok(());
        }
        set_port_state(link.index, PortState::Forwarding)
            .map_err(ContainerError::io(format!("let {} forward again", link.outside)))
    }

    /// Puts the interface back after somebody took its carrier, turned the spanning tree protocol
    /// on, or took the port out of its bridge; as far as can be.
    pub(crate) fn reconnect(&mut self) -> Result<()> {
        let Err(error) = self.connect() else { return Ok(()) };
        let Some(link) = &mut self.link else { return Ok(()) };
        tracing::warn!(%error, link = link.outside, "Taking the interface down and up");
        // The bridge enables the port of an interface that comes up; one that is up does not.
        link.by_port = false;
        ip(&["link", "set", &link.outside, "down"])?;
        self.connect()
    }

    /// Forgets whom the namespace asked for in vain while it was off the network.
    pub(crate) fn forget_neighbours(&self) {
        if let Some(announcer) = self.link.as_ref().and_then(|link| link.announcer.as_ref()) {
            announcer.forget_neighbours();
        }
    }

    /// Tells the network where the address is now: at once, and several times more from a thread.
    pub(crate) fn announce(&self) {
        if let Some(announcer) = self.link.as_ref().and_then(|link| link.announcer.as_ref()) {
            announcer.begin();
        }
    }

    /// Removes the pair, so that nothing that the tasks still do is seen outside.
    pub(crate) fn remove(&mut self) {
        if let Some(link) = self.link.take() {
            delete_link(&link.outside);
        }
    }

    fn add_link(&mut self, net: &Net, mac: Mac, outside: &str, connected: bool) -> Result<()> {
        let (address, prefix) = net.address()?;
        delete_link(outside);
        let (mac_text, outside_mac) = (mac.to_string(), outside_mac(mac).to_string());
        let path = self.path();
        ip(&[
            "link",
            "add",
            outside,
            "address",
            &outside_mac,
            "type",
            "veth",
            "peer",
            "name",
            INSIDE,
            "address",
            &mac_text,
            "netns",
            &path,
        ])?;
        // The bridge is the host's; the end that hangs on it has no business with addresses.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{outside}/disable_ipv6"), "1");
        ip(&["link", "set", outside, "master", &net.bridge])?;
        let announcer = self.inside(|| {
            let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{INSIDE}/disable_ipv6"), "1");
            for (name, value) in ASKING {
                let _ = fs::write(format!("/proc/sys/net/ipv4/neigh/{INSIDE}/{name}"), value);
            }
            ip(&["link", "set", "lo", "up"])?;
            ip(&["link", "set", INSIDE, "up"])?;
            announcer(mac, address)
        })?;
        ip(&["link", "set", outside, "up"])?;
        let index =
            sys::interface_index(outside).map_err(ContainerError::io(format!("find {outside}")))?;
        let announcer = Some(announcer);
        self.link =
            Some(Link { outside: outside.to_owned(), index, by_port: true, announcer, ours: true });
        if !connected {
            // Before it has an address: an answer to ARP from here would turn the workload's peers
            // away from where it still runs.
            await_carrier(outside)?;
            self.disconnect()?;
        }
        self.inside(|| {
            ip(&["address", "add", &format!("{address}/{prefix}"), "brd", "+", "dev", INSIDE])?;
            if let Some(gateway) = net.gateway {
                ip(&["route", "add", "default", "via", &gateway.to_string(), "dev", INSIDE])?;
            }
            Ok(())
        })
    }

    /// Does `work` on a thread that is in the namespace; programs that it starts are there too.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let there = scope.spawn(|| {
                setns(self.namespace.as_fd(), CloneFlags::CLONE_NEWNET)
                    .map_err(ContainerError::errno("enter the network namespace"))?;
                work()
            });
            there.join().unwrap_or_else(|_| {
                Err(ContainerError::State("A thread in the network namespace panicked".to_owned()))
            })
        })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // One that was found is somebody else's, until it is removed on purpose.
        if self.link.as_ref().is_some_and(|link| link.ours) {
            self.remove();
        }
    }
}

/// For the namespace that the thread is in.
fn announcer(mac: Mac, address: std::net::Ipv4Addr) -> Result<Announcer> {
    let index = sys::interface_index(INSIDE).map_err(ContainerError::io("find eth0"))?;
    let socket = sys::packet_socket(index).map_err(ContainerError::io("open a packet socket"))?;
    Ok(Announcer::new(socket, INSIDE, mac, address))
}

/// Removes the host end `outside`, and with it the pair. What is not there is no error.
pub(crate) fn delete_link(outside: &str) {
    if link_exists(outside)
        && let Err(error) = ip(&["link", "delete", outside])
    {
        tracing::warn!(%error, "Cannot remove an interface");
    }
}

/// Whether the network namespace of this process has an interface of this name.
pub(crate) fn link_exists(name: &str) -> bool {
    sys::interface_index(name).is_ok()
}

/// Whether the network namespace of this process has a bridge of this name.
pub(crate) fn bridge_exists(name: &str) -> bool {
    // /sys/class/net may be of another network namespace than ours, so it is asked by netlink.
    let said = Command::new("ip")
        .args(["-o", "link", "show", "dev", name, "type", "bridge"])
        .stdin(Stdio::null())
        .output();
    said.is_ok_and(|said| said.status.success() && !said.stdout.is_empty())
}

/// The address of the host end of a pair whose other end has `inside`.
///
/// A bridge that was given no address takes the lowest of its ports', and all who spoke to it go on
/// speaking to the one it had. So this one is as high as an address of one interface can be, and
/// follows from the container's: when both ends of a move are ports of one bridge, nothing changes.
fn outside_mac(inside: Mac) -> Mac {
    let mut bytes = inside.0;
    bytes[0] = if bytes[0] == 0xfe { 0xfa } else { 0xfe };
    Mac(bytes)
}

fn fresh_namespace() -> Result<OwnedFd> {
    let made = thread::spawn(|| -> Result<OwnedFd> {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(ContainerError::errno("make a network namespace"))?;
        let file = File::open("/proc/thread-self/ns/net")
            .map_err(ContainerError::io("open a network namespace"))?;
        ip(&["link", "set", "lo", "up"])?;
        Ok(file.into())
    });
    made.join().unwrap_or_else(|_| {
        Err(ContainerError::State("A thread that makes a namespace panicked".to_owned()))
    })
}

/// Waits until the kernel has noticed that both ends are up: what the bridge then does to the port
/// would undo what we do to it.
fn await_carrier(outside: &str) -> Result<()> {
    let begun = Instant::now();
    loop {
        let said = ip_says(&["-o", "link", "show", "dev", outside])?;
        if said.contains("state UP") {
            return Ok(());
        }
        if begun.elapsed() > CARRIER_WITHIN {
            return Err(ContainerError::State(format!(
                "{outside} did not come up: {}",
                said.trim()
            )));
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    ip_says(arguments).map(|_| ())
}

pub(crate) fn ip_says(arguments: &[&str]) -> Result<String> {
    let said = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(ContainerError::io("start ip (of iproute2)"))?;
    if said.status.success() {
        return Ok(String::from_utf8_lossy(&said.stdout).into_owned());
    }
    Err(ContainerError::Tool {
        tool: "ip",
        what: format!("do {:?}", arguments.join(" ")),
        said: String::from_utf8_lossy(&said.stderr).trim().to_owned(),
    })
}
