//! A container's network: a namespace held by a descriptor, and a veth pair from it to a bridge of
//! the host.
//!
//! The namespace lives as long as the keeper or a task of the container, and takes the pair with it.
//! An interface is taken off the network by disabling its port of the bridge: at once, without loss
//! of carrier, and undone as fast.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};

use decamp_shared::network::announce::of_addresses;
use decamp_shared::network::{Announcer, Neighbour, Port, index_of, packet_socket};
use nix::sched::{CloneFlags, setns, unshare};

use crate::beside;
use crate::error::{ContainerError, Result};
use crate::spec::{Mac, Net};
use crate::sys;

/// Name of the interface in the container.
const INSIDE: &str = "eth0";
/// How a container asks for a neighbour: after 50 ms again instead of a second, and as long as ever.
/// A question that is lost at the switch would hold up every connection for that second.
const ASKING: [(&str, &str); 2] = [("retrans_time_ms", "50"), ("mcast_solicit", "40")];

/// A network namespace and the interface in it.
pub(crate) struct Network {
    namespace: OwnedFd,
    link: Option<Link>,
}

/// The pair, seen from the host.
struct Link {
    port: Port,
    /// What announces it, and its hardware address. Only where it may come to: one that was found never
    /// announces itself.
    announcer: Option<(Announcer, Mac)>,
    /// Whether it goes when this is dropped.
    ours: bool,
}

impl Network {
    /// Makes a namespace, and for `net` a pair whose host end is called `outside`. With `connected`
    /// false no frame passes before [`Network::connect`], not even an answer to ARP.
    pub(crate) fn make(net: Option<(&Net, Mac)>, outside: &str, connected: bool) -> Result<Self> {
        Self::within(fresh_namespace()?, net, outside, connected)
    }

    /// The same in a namespace that somebody else made and nobody has used: who has a user namespace has
    /// rights only over what was made in that.
    pub(crate) fn within(
        namespace: OwnedFd,
        net: Option<(&Net, Mac)>,
        outside: &str,
        connected: bool,
    ) -> Result<Self> {
        let mut network = Self { namespace, link: None };
        if net.is_none() {
            network.inside(|| ip(&["link", "set", "lo", "up"]))?;
        }
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
            Ok(Link { port: Port::find(outside)?, announcer: None, ours: false })
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

    /// Takes the interface off the network: nothing in, nothing out. Twice is as good as once.
    pub(crate) fn disconnect(&mut self) -> Result<()> {
        self.link.as_mut().map_or(Ok(()), |link| Ok(link.port.disconnect()?))
    }

    /// Puts the interface back. Twice is as good as once.
    pub(crate) fn connect(&mut self) -> Result<()> {
        self.link.as_mut().map_or(Ok(()), |link| Ok(link.port.connect()?))
    }

    /// Puts the interface back after somebody took its carrier, turned the spanning tree protocol
    /// on, or took the port out of its bridge; as far as can be.
    pub(crate) fn reconnect(&mut self) -> Result<()> {
        self.link.as_mut().map_or(Ok(()), |link| Ok(link.port.reconnect()?))
    }

    /// Forgets whom the namespace asked for in vain while it was off the network: restored connections speak at
    /// once, and the kernel would ask again only a second after a question that was lost.
    pub(crate) fn forget_neighbours(&self) {
        if let Some((announcer, mac)) = self.link.as_ref().and_then(|link| link.announcer.as_ref())
            && let Err(error) = sys::set_hardware_address(announcer.descriptor(), INSIDE, mac.0)
        {
            tracing::warn!(%error, "Cannot forget the neighbours; first answers may take a second");
        }
    }

    /// Tells the network where the address is now: at once, and several times more from a thread.
    pub(crate) fn announce(&self) {
        if let Some((announcer, _)) = self.link.as_ref().and_then(|link| link.announcer.as_ref()) {
            announcer.begin();
        }
    }

    /// Removes the pair, so that nothing that the tasks still do is seen outside.
    pub(crate) fn remove(&mut self) {
        if let Some(link) = self.link.take() {
            delete_link(link.port.name());
        }
    }

    fn add_link(&mut self, net: &Net, mac: Mac, outside: &str, connected: bool) -> Result<()> {
        let (address, prefix) = net.address()?;
        delete_link(outside);
        let (mac_text, outside_mac) = (mac.to_string(), mac.of_hosts_end().to_string());
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
        let port = Port::find(outside)?;
        let link = self.link.insert(Link { port, announcer: Some(announcer), ours: true });
        if !connected {
            // Before it has an address: an answer to ARP from here would turn the workload's peers
            // away from where it still runs.
            link.port.await_carrier()?;
            link.port.disconnect()?;
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
        beside::apart(|| {
            setns(self.namespace.as_fd(), CloneFlags::CLONE_NEWNET)
                .map_err(ContainerError::errno("enter the network namespace"))?;
            work()
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
fn announcer(mac: Mac, address: std::net::Ipv4Addr) -> Result<(Announcer, Mac)> {
    let socket = packet_socket(index_of(INSIDE)?, 0);
    let socket = socket.map_err(ContainerError::io("open a packet socket"))?;
    let own = Neighbour { address: address.into(), mac };
    Ok((Announcer::new(socket, 0, of_addresses(&[own])), mac))
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
    index_of(name).is_ok()
}

/// The network namespace of process `pid`.
pub(crate) fn namespace_of(pid: i32) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/ns/net");
    let file = File::open(&path).map_err(ContainerError::io(format!("open {path}")))?;
    Ok(file.into())
}

/// A network namespace in which nothing is up.
pub(crate) fn fresh_namespace() -> Result<OwnedFd> {
    beside::apart(|| {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(ContainerError::errno("make a network namespace"))?;
        let file = File::open("/proc/thread-self/ns/net")
            .map_err(ContainerError::io("open a network namespace"))?;
        Ok(file.into())
    })
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
