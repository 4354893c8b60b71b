//! What follows from a workload's identity and place by name alone.

use super::mac::Mac;
use crate::workload::Place;

/// FNV-1a, 64 bits: small and the same in every build, unlike the standard library's hasher.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The name of the host's end of interface `number` of the workload in `place`, behind two letters that say of which
/// kind. It follows from the place alone, so that a sweep finds it when the keeper is gone.
pub fn interface_name(kind: [char; 2], place: &Place, number: u8) -> String {
    let mut of = format!("{}\0{}", place.name, place.dir.display());
    if number > 0 {
        of.push_str(&format!("\0{number}"));
    }
    let [first, second] = kind;
    format!("{first}{second}{:012x}", fnv1a(of.as_bytes()) & 0xffff_ffff_ffff)
}

/// Whether the kernel takes `name` for an interface's.
pub fn is_interface_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() < 16
        && name != "."
        && name != ".."
        && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/')
}

impl Mac {
    /// The address of interface `number` of the workload with this identity, where nobody asked for another: the same
    /// on every host, locally administered, and as random as the identity.
    pub fn of_workload(uuid: &str, number: u8) -> Self {
        let of = if number == 0 { uuid.to_owned() } else { format!("{uuid}\0{number}") };
        let [_, _, _, low @ ..] = fnv1a(of.as_bytes()).to_be_bytes();
        Self::local(low)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_fits_the_kernel_and_an_address_one_interface() {
        let place = Place {
            name: "x".repeat(60),
            uuid: "u".into(),
            dir: "/var/lib/decamp/workloads/x".into(),
        };
        let names = [0, 1, 2].map(|number| interface_name(['d', 'v'], &place, number));
        assert!(names.iter().all(|name| name.len() == 14));
        assert!(names[0] != names[1] && names[1] != names[2]);
        let macs = [("a", 0), ("b", 0), ("a", 1)].map(|(uuid, n)| Mac::of_workload(uuid, n));
        assert!(macs.iter().all(|mac| mac.is_of_one() && mac.0[0] & 2 == 2));
        assert!(macs[0] != macs[1] && macs[0] != macs[2]);
        assert_eq!(macs[0], Mac::of_workload("a", 0));
    }
}
