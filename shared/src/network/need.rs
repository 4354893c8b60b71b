//! What a workload needs of the networks of a host that it comes to: told by the source, checked at the destination
//! before anything is touched.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use super::frames::Neighbour;
use super::link::Link;
use super::mac::Mac;
use super::probe;
use crate::protocol::manifest::{NetworkNeed, NetworkNeighbour, Refusal, RefusalCode, VlanUse};

/// So many are named to be asked for.
const MOST: usize = 8;
/// Whoever is there answers within this.
const WITHIN: Duration = Duration::from_secs(1);
/// What has the source leave the question out.
pub const OVERRIDE: &str = "--no-network-check";

/// What is said at the source of an interface on `bridge` whose host's end is called `port`. It carries `mtu` bytes;
/// where nothing is said of that, as many as its host's end. `seen` are those that are known to be on its segment, the
/// workload itself among them; who is wanted most comes first. This host adds whom it knows there.
pub fn need(
    bridge: &str,
    port: &str,
    mtu: Option<u32>,
    seen: impl IntoIterator<Item = Neighbour>,
) -> NetworkNeed {
    let found = Link::bridge(bridge);
    let end = Link::find(port).ok();
    let mut neighbours: Vec<Neighbour> = Vec::new();
    let known = found.iter().flat_map(Link::neighbours);
    for one in seen.into_iter().chain(known) {
        if neighbours.len() < MOST && !neighbours.contains(&one) {
            neighbours.push(one);
        }
    }
    let vlans = found.and_then(|found| found.bridge);
    let filters = vlans.is_some_and(|vlans| vlans.filtering);
    NetworkNeed {
        bridge: bridge.to_owned(),
        mtu: mtu.or(end.as_ref().map(|end| end.mtu)).unwrap_or_default(),
        vlans: match vlans {
            None => VlanUse::Unsaid,
            Some(_) if filters => VlanUse::Filtered,
            Some(_) => VlanUse::Plain,
        }
        .into(),
        vlan: if filters { end.map_or(0, |end| end.port_vlan().into()) } else { 0 },
        neighbours: neighbours.into_iter().map(to_message).collect(),
    }
}

/// Why there is no bridge of this name here, if so.
pub fn bridge_refusal(bridge: &str) -> Option<Refusal> {
    let missing =
        || format!("There is no bridge {bridge}: make it with ip link add {bridge} type bridge");
    Link::bridge(bridge).is_none().then(|| Refusal::new(RefusalCode::Bridge, missing()))
}

/// Every reason why a workload that needs `needs`, and whose interfaces hang on `bridges`, cannot come here, where
/// interfaces that hung on a bridge go to the one that `map` says. Takes about a second where nobody answers.
pub fn refusals<'a>(
    needs: &[NetworkNeed],
    bridges: impl IntoIterator<Item = &'a str>,
    map: &BTreeMap<String, String>,
) -> Vec<Refusal> {
    let mut needs = needs.to_vec();
    for bridge in bridges {
        if !needs.iter().any(|need| need.bridge == bridge) {
            needs.push(NetworkNeed { bridge: bridge.to_owned(), ..NetworkNeed::default() });
        }
    }
    thread::scope(|scope| {
        let begun: Vec<_> = needs
            .iter()
            .map(|need| {
                let bridge = mapped(&need.bridge, map);
                (thread::Builder::new().spawn_scoped(scope, move || of_one(need, bridge)), bridge)
            })
            .collect();
        let one = |(checked, bridge): (std::io::Result<thread::ScopedJoinHandle<'_, _>>, &str)| {
            checked.ok().and_then(|checked| checked.join().ok()).unwrap_or_else(|| {
                let text = format!("Bridge {bridge} could not be looked at");
                vec![Refusal::new(RefusalCode::Other, text)]
            })
        };
        begun.into_iter().flat_map(one).collect()
    })
}

/// The bridge that takes the place of `bridge` here.
pub fn mapped<'a>(bridge: &'a str, map: &'a BTreeMap<String, String>) -> &'a str {
    map.get(bridge).map_or(bridge, String::as_str)
}

fn of_one(need: &NetworkNeed, bridge: &str) -> Vec<Refusal> {
    let Some(found) = Link::bridge(bridge) else {
        return bridge_refusal(bridge).into_iter().collect();
    };
    let mut refusals = Vec::new();
    let mut refuse = |code, text: String| refusals.push(Refusal::new(code, text));
    if found.mtu < need.mtu {
        let text = format!(
            "Bridge {bridge} carries frames of {} bytes, and its interface has {}: set the MTU of the bridge's \
             ports, and of the bridge, to {1}",
            found.mtu, need.mtu
        );
        refuse(RefusalCode::Bridge, text);
    }
    if let Some(text) = vlan_differs(need, &found) {
        refuse(RefusalCode::Bridge, text);
    }
    let asked: Option<Vec<_>> = need.neighbours.iter().take(MOST).map(from_message).collect();
    match asked {
        None => refuse(
            RefusalCode::Request,
            format!("A neighbour on bridge {} in the manifest is none", need.bridge),
        ),
        Some(asked) if asked.is_empty() => {}
        Some(asked) => {
            if let Some(text) = unreached(&found, &asked) {
                refuse(RefusalCode::Bridge, text);
            }
        }
    }
    refusals
}

fn vlan_differs(need: &NetworkNeed, found: &Link) -> Option<String> {
    let here = found.bridge?;
    let name = &found.name;
    let advice = format!("{OVERRIDE} moves it all the same");
    match (need.vlans(), here.filtering) {
        (VlanUse::Filtered, false) => Some(format!(
            "Bridge {name} does not tell VLANs apart, and the one at the source does (its interface is in VLAN \
             {}); {advice}",
            need.vlan
        )),
        (VlanUse::Plain, true) => Some(format!(
            "Bridge {name} tells VLANs apart (a new interface would be in VLAN {}), and the one at the source \
             does not; {advice}",
            here.default
        )),
        (VlanUse::Filtered, true) if need.vlan != u32::from(here.default) => Some(format!(
            "Its interface is in VLAN {} at the source, and would be in VLAN {} on bridge {name}; {advice}",
            need.vlan, here.default
        )),
        _ => None,
    }
}

/// What is to be said when nobody of `asked` is behind `bridge`.
fn unreached(bridge: &Link, asked: &[Neighbour]) -> Option<String> {
    let list = |of: &[IpAddr]| of.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ");
    let addresses: Vec<_> = asked.iter().map(|one| one.address).collect();
    let name = &bridge.name;
    let advice = format!("{OVERRIDE} moves it all the same");
    match probe::ask(bridge, asked, WITHIN) {
        Ok(answers) if answers.found.is_some() => None,
        Ok(answers) => {
            let others: Vec<_> = answers
                .others
                .iter()
                .map(|other| format!("{} is {} there", other.address, other.mac))
                .collect();
            let others =
                if others.is_empty() { String::new() } else { format!(" ({})", others.join(", ")) };
            Some(format!(
                "Bridge {name} does not lead to the segment that it is on: none of {} answered there within a \
                 second{others}. Look at the VLAN and the uplink of {name}; {advice}",
                list(&addresses)
            ))
        }
        Err(error) => Some(format!(
            "Whether bridge {name} leads to the segment that it is on cannot be told: {}; {advice}",
            chain(&error)
        )),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// What a user should know of the networks that a workload is going to, as the source sees them.
pub fn notes(needs: &[NetworkNeed], is_off: bool) -> Vec<String> {
    let unknown = needs.iter().filter(|need| need.neighbours.is_empty());
    let why = if is_off { "that was not wanted" } else { "nobody is known to be on it" };
    unknown
        .map(|need| {
            format!(
                "Whether the destination's bridge leads to the segment of {} was not looked at: {why}",
                need.bridge
            )
        })
        .collect()
}

/// Leaves out what has the destination look at more than whether its bridge is there and carries as much.
pub fn do_not_check(needs: &mut [NetworkNeed]) {
    for need in needs {
        need.neighbours.clear();
        need.set_vlans(VlanUse::Unsaid);
        need.vlan = 0;
    }
}

fn to_message(one: Neighbour) -> NetworkNeighbour {
    let address = match one.address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    NetworkNeighbour { address, mac: one.mac.0.to_vec() }
}

fn from_message(message: &NetworkNeighbour) -> Option<Neighbour> {
    let mac = Mac(message.mac.as_slice().try_into().ok()?);
    let address = match message.address.len() {
        4 => <[u8; 4]>::try_from(message.address.as_slice()).ok().map(IpAddr::from)?,
        _ => <[u8; 16]>::try_from(message.address.as_slice()).ok().map(IpAddr::from)?,
    };
    mac.is_of_one().then_some(Neighbour { address, mac })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_neighbour_survives_the_wire_and_nonsense_does_not() {
        let mac = Mac([2, 0, 0, 0, 0, 1]);
        for address in ["10.0.0.1", "fd00::1"] {
            let one = Neighbour { address: address.parse().expect("an address"), mac };
            assert_eq!(from_message(&to_message(one)), Some(one));
        }
        for (address, mac) in
            [(vec![1; 5], vec![2; 6]), (vec![1; 4], vec![2; 5]), (vec![1; 4], vec![3; 6])]
        {
            assert_eq!(from_message(&NetworkNeighbour { address, mac }), None);
        }
    }

    #[test]
    fn who_has_nobody_to_ask_is_told_so() {
        let neighbours = vec![NetworkNeighbour { address: vec![1; 4], mac: vec![2; 6] }];
        let mut needs = [
            NetworkNeed { bridge: "br0".into(), neighbours, ..NetworkNeed::default() },
            NetworkNeed { bridge: "br1".into(), vlans: 2, vlan: 7, ..NetworkNeed::default() },
        ];
        let said = notes(&needs, false);
        assert!(said.len() == 1 && said[0].contains("br1"), "{said:?}");
        do_not_check(&mut needs);
        assert_eq!(needs[1].vlans(), VlanUse::Unsaid);
        let said = notes(&needs, true);
        assert!(said.len() == 2 && said[0].contains("not wanted"), "{said:?}");
    }

    #[test]
    fn vlans_that_differ_are_named() {
        let bridge = |filtering, default| Link {
            index: 1,
            name: "br0".into(),
            mac: None,
            mtu: 1500,
            is_up: true,
            is_running: true,
            master: None,
            bridge: Some(super::super::Vlans { filtering, default }),
        };
        let need = |vlans: VlanUse, vlan| NetworkNeed {
            vlans: vlans.into(),
            vlan,
            ..NetworkNeed::default()
        };
        let differs = |need: NetworkNeed, found: Link| vlan_differs(&need, &found);
        assert_eq!(differs(need(VlanUse::Unsaid, 0), bridge(true, 1)), None);
        assert_eq!(differs(need(VlanUse::Plain, 0), bridge(false, 1)), None);
        assert_eq!(differs(need(VlanUse::Filtered, 7), bridge(true, 7)), None);
        let text = differs(need(VlanUse::Filtered, 7), bridge(true, 1)).expect("another");
        assert!(text.contains("VLAN 7") && text.contains("VLAN 1"), "{text}");
        assert!(differs(need(VlanUse::Filtered, 7), bridge(false, 0)).is_some());
        let text = differs(need(VlanUse::Plain, 0), bridge(true, 9)).expect("it filters");
        assert!(text.contains("VLAN 9") && text.contains(OVERRIDE), "{text}");
    }
}
