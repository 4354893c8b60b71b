//! The interface of a container that somebody else started: what is in its network namespace, what of the
//! host it hangs on, and so what the next host has to make for it.

use std::fs;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use decamp_shared::network;
use serde_json::Value;

use crate::error::{ContainerError, Result};
use crate::network::{Network, ip_says};
use crate::spec::{Mac, Net};

/// The name that interfaces have on every host that a container comes to.
const NAME: &str = "eth0";

/// An interface that can be made again elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Interface {
    /// How it is made.
    pub(crate) net: Net,
    /// The host's end of it here.
    pub(crate) outside: String,
}

/// An interface in use in a container's network namespace, and what of the host it hangs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    /// Its name in the container.
    pub(crate) inside: String,
    /// Its hardware address and its IPv4 addresses.
    pub(crate) mac: Option<Mac>,
    pub(crate) addresses: Vec<Ipv4Addr>,
    /// Index of the host's end, where that is a port of a bridge.
    pub(crate) outside: Option<u32>,
    /// Name of the host's end, and whether its port passes nothing.
    pub(crate) name: String,
    pub(crate) disabled: bool,
}

impl Port {
    /// The host's end, where that is a port of a bridge.
    pub(crate) fn outside(&self) -> Option<network::Port> {
        Some(network::Port::numbered(&self.name, self.outside?))
    }
}

/// Every interface in `network` that is in use.
pub(crate) fn ports(network: &Network) -> Result<Vec<Port>> {
    let inside = network.inside(|| json(&ip_says(&["-json", "-details", "address", "show"])?))?;
    let outside = json(&ip_says(&["-json", "-details", "link", "show"])?)?;
    Ok(list(&inside).filter(|link| is_used(link)).map(|link| port(link, &outside)).collect())
}

fn port(link: &Value, outside: &Value) -> Port {
    let bridged = |peer: &&Value| {
        peer.pointer("/linkinfo/info_slave_kind").and_then(Value::as_str) == Some("bridge")
    };
    let peer = peer(link, outside).filter(bridged);
    let state = peer.and_then(|peer| peer.pointer("/linkinfo/info_slave_data/state"));
    let addresses = list(&link["addr_info"]).filter(|address| text(address, "scope") == "global");
    Port {
        inside: text(link, "ifname").to_owned(),
        mac: Mac::try_from(text(link, "address").to_owned()).ok(),
        addresses: addresses.filter_map(|one| text(one, "local").parse().ok()).collect(),
        outside: peer.and_then(|peer| u32::try_from(peer["ifindex"].as_u64()?).ok()),
        name: peer.map(|peer| text(peer, "ifname")).unwrap_or_default().to_owned(),
        disabled: state.and_then(Value::as_str) == Some("disabled"),
    }
}

/// The host's end of the pair whose other end is `link`.
fn peer<'a>(link: &Value, outside: &'a Value) -> Option<&'a Value> {
    list(outside).find(|other| {
        other["ifindex"] == link["link_index"]
            && other["link_index"] == link["ifindex"]
            && other.pointer("/linkinfo/info_kind").and_then(Value::as_str) == Some("veth")
    })
}

/// The one interface in `network`, if there is one; or every reason why it cannot be made elsewhere.
pub(crate) fn find(
    network: &Network,
) -> Result<std::result::Result<Option<Interface>, Vec<String>>> {
    let (inside, routes, rules) = network.inside(|| {
        let inside = json(&ip_says(&["-json", "-details", "address", "show"])?)?;
        let routes = json(&ip_says(&["-json", "route", "show", "table", "all"])?)?;
        Ok((inside, routes, ruleset()))
    })?;
    let outside = json(&ip_says(&["-json", "-details", "link", "show"])?)?;
    let judged = judge(&inside, &routes, &outside, rules == Ok(true));
    Ok(match (judged, rules) {
        (judged, Ok(_)) => judged,
        (judged, Err(unknown)) => {
            Err(judged.err().into_iter().flatten().chain([unknown]).collect())
        }
    })
}

/// The host's end of the pair that the one used interface of `network` is an end of.
pub(crate) fn outside_of(network: &Network) -> Result<String> {
    let inside = network.inside(|| json(&ip_says(&["-json", "-details", "address", "show"])?))?;
    let outside = json(&ip_says(&["-json", "-details", "link", "show"])?)?;
    let used = list(&inside).find(|link| is_used(link));
    let peer = used.and_then(|link| peer(link, &outside));
    peer.map(|peer| text(peer, "ifname").to_owned()).ok_or_else(|| {
        ContainerError::State("The container's interface has no other end on this host".to_owned())
    })
}

/// Whether the namespace filters or rewrites packets, which no other host would do.
///
/// # Errors
/// Why that cannot be told.
fn ruleset() -> std::result::Result<bool, String> {
    // What was made by iptables of old nft does not show.
    let tables = |file: &str| fs::read_to_string(format!("/proc/thread-self/net/{file}"));
    let old = ["ip_tables_names", "ip6_tables_names"].into_iter().filter_map(|it| tables(it).ok());
    if old.into_iter().any(|names| !names.trim().is_empty()) {
        return Ok(true);
    }
    let unknown = |why: String| {
        Err(format!(
            "Whether the container's network namespace has a packet filter of its own, which would be lost, \
             cannot be told ({why}): install nftables"
        ))
    };
    match Command::new("nft").args(["list", "ruleset"]).stdin(Stdio::null()).output() {
        Ok(said) if said.status.success() => Ok(!said.stdout.is_empty()),
        Ok(said) => {
            let said = String::from_utf8_lossy(&said.stderr).trim().to_owned();
            // A kernel without nftables filters nothing by them.
            if said.contains("not supported") { Ok(false) } else { unknown(format!("nft: {said}")) }
        }
        Err(error) => unknown(format!("nft cannot be started: {error}")),
    }
}

fn judge(
    inside: &Value,
    routes: &Value,
    outside: &Value,
    rules: bool,
) -> std::result::Result<Option<Interface>, Vec<String>> {
    let mut against = Vec::new();
    if rules {
        against.push(
            "The container's network namespace has a packet filter of its own, which would be lost"
                .to_owned(),
        );
    }
    let links: Vec<&Value> = list(inside).filter(|link| is_used(link)).collect();
    let found = match links[..] {
        [] => None,
        [link] => interface(link, routes, outside, &mut against),
        _ => {
            let names: Vec<_> = links.iter().map(|link| text(link, "ifname")).collect();
            against.push(format!(
                "The container has several interfaces ({}); one is what is moved",
                names.join(", ")
            ));
            None
        }
    };
    if against.is_empty() { Ok(found) } else { Err(against) }
}

/// Loopback is everywhere, and what is down and has no address (tunnels that the kernel puts into every
/// namespace) is not used.
fn is_used(link: &Value) -> bool {
    let flags = list(&link["flags"]);
    let up = flags.into_iter().any(|flag| flag == "UP");
    text(link, "link_type") != "loopback" && (up || list(&link["addr_info"]).next().is_some())
}

fn interface(
    link: &Value,
    routes: &Value,
    outside: &Value,
    against: &mut Vec<String>,
) -> Option<Interface> {
    let name = text(link, "ifname");
    if text(link, "ifname") != NAME {
        against.push(format!("Its interface is called {name}; on another host it would be {NAME}"));
    }
    if link.pointer("/linkinfo/info_kind").and_then(Value::as_str) != Some("veth") {
        against.push(format!("Its interface {name} is none end of a veth pair"));
    }
    let addresses: Vec<_> =
        list(&link["addr_info"]).filter(|address| text(address, "scope") == "global").collect();
    let (v4, v6): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| text(address, "family") == "inet");
    if !v6.is_empty() {
        against.push(format!("Its interface {name} has an IPv6 address, which is not moved yet"));
    }
    let ip = match v4[..] {
        [address] => Some(format!("{}/{}", text(address, "local"), address["prefixlen"])),
        _ => {
            against.push(format!("Its interface {name} has {} IPv4 addresses, not one", v4.len()));
            None
        }
    };
    let (gateway, strange) = gateway(routes);
    if strange {
        against.push("The container has routes beside the default one, which would be lost".into());
    }
    let peer = peer(link, outside);
    let bridge = peer.map(|peer| text(peer, "master")).filter(|bridge| !bridge.is_empty());
    if bridge.is_none() {
        against.push(format!("Its interface {name} hangs on no bridge of this host"));
    }
    let mac = Mac::try_from(text(link, "address").to_owned()).ok();
    if mac.is_none() {
        against.push(format!("Its interface {name} has no hardware address"));
    }
    let net = Net { bridge: bridge?.to_owned(), ip: ip?, ip6: None, gateway, mac };
    Some(Interface { net, outside: text(peer?, "ifname").to_owned() })
}

/// The default gateway, and whether there are routes that follow from no address.
fn gateway(routes: &Value) -> (Option<Ipv4Addr>, bool) {
    let mut gateway = None;
    let mut strange = false;
    for route in list(routes) {
        let of_kernel = text(route, "protocol") == "kernel" || text(route, "type") == "multicast";
        let hop = text(route, "gateway").parse::<Ipv4Addr>();
        match (text(route, "dst"), hop) {
            ("default", Ok(hop)) if gateway.is_none() => gateway = Some(hop),
            _ => strange |= !of_kernel,
        }
    }
    (gateway, strange)
}

fn json(text: &str) -> Result<Value> {
    // It says nothing at all where there is nothing.
    let text = if text.trim().is_empty() { "[]" } else { text };
    serde_json::from_str(text).map_err(|error| ContainerError::Tool {
        tool: "ip",
        what: "answer in JSON".to_owned(),
        said: error.to_string(),
    })
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn eth0() -> Value {
        json!({"ifindex": 2, "link_index": 7, "ifname": "eth0", "link_type": "ether",
            "flags": ["UP"], "address": "02:00:00:00:00:05", "linkinfo": {"info_kind": "veth"},
            "addr_info": [
                {"family": "inet", "local": "10.0.0.5", "prefixlen": 24, "scope": "global"},
                {"family": "inet6", "local": "fe80::1", "prefixlen": 64, "scope": "link"}]})
    }

    fn lo() -> Value {
        json!({"ifindex": 1, "ifname": "lo", "link_type": "loopback", "flags": ["UP"],
            "addr_info": [{"family": "inet", "local": "127.0.0.1", "prefixlen": 8, "scope": "host"}]})
    }

    fn host() -> Value {
        json!([{"ifindex": 7, "link_index": 3, "ifname": "other", "linkinfo": {"info_kind": "veth"}},
            {"ifindex": 7, "link_index": 2, "ifname": "veth5", "master": "br0",
                "linkinfo": {"info_kind": "veth"}}])
    }

    fn routes() -> Value {
        json!([{"dst": "default", "gateway": "10.0.0.1", "protocol": "boot"},
            {"dst": "10.0.0.0/24", "protocol": "kernel"},
            {"type": "multicast", "dst": "ff00::/8", "protocol": "boot"}])
    }

    #[test]
    fn an_interface_on_a_bridge_can_be_made_again() {
        let tunnel = json!({"ifname": "sit0", "link_type": "sit", "flags": ["NOARP"]});
        let inside = json!([lo(), tunnel, eth0()]);
        let found = judge(&inside, &routes(), &host(), false).expect("nothing against it");
        let found = found.expect("an interface");
        assert_eq!(found.outside, "veth5");
        assert_eq!((found.net.bridge.as_str(), found.net.ip.as_str()), ("br0", "10.0.0.5/24"));
        assert_eq!(found.net.gateway, Some(Ipv4Addr::new(10, 0, 0, 1)));
        assert_eq!(found.net.mac.map(|mac| mac.to_string()).as_deref(), Some("02:00:00:00:00:05"));
        assert_eq!(judge(&json!([lo()]), &json!([]), &host(), false), Ok(None));
    }

    #[test]
    fn a_port_is_known_by_its_bridge() {
        let mut host = host();
        let found = port(&eth0(), &host);
        assert_eq!(
            (found.outside, found.disabled),
            (None, false),
            "of no bridge, as far as is said"
        );
        host[1]["linkinfo"]["info_slave_kind"] = json!("bridge");
        host[1]["linkinfo"]["info_slave_data"] = json!({"state": "disabled"});
        let found = port(&eth0(), &host);
        assert_eq!((found.outside, found.name.as_str(), found.disabled), (Some(7), "veth5", true));
        assert_eq!(found.addresses, [Ipv4Addr::new(10, 0, 0, 5)]);
        assert_eq!(port(&json!({}), &json!([])).outside, None);
    }

    #[test]
    fn what_would_be_lost_is_said_all_at_once() {
        let mut link = eth0();
        link["ifname"] = json!("ens3");
        link["linkinfo"]["info_kind"] = json!("macvlan");
        link["addr_info"][1]["scope"] = json!("global");
        link["link_index"] = json!(99);
        link["address"] = json!("");
        let mut routes = routes();
        routes[1]["protocol"] = json!("static");
        let against = judge(&json!([link]), &routes, &host(), true).expect_err("much");
        assert_eq!(against.len(), 7, "{against:#?}");
        let both = judge(&json!([eth0(), eth0()]), &json!([]), &host(), false);
        assert!(both.expect_err("two")[0].contains("several interfaces"));
    }
}
