//! Ways in for fuzzers: bytes that a guest or a peer could have made, given to what has to stand them. What each
//! input must come to is asserted here: it comes back, whatever was accepted is saved as what it was loaded from, and
//! whatever a guest does to its devices, they can be saved and loaded.
//!
//! Each way is also gone by a property test, so that it is never stale. Which fuzzers there are, and how they are
//! built, is not this module's business: see `tests/fuzzers`.
//!
//! | file | what lives there |
//! |---|---|
//! | `script` | bytes as a sequence of numbers |
//! | `stand` | a device with its host around it |
//! | `driver` | a hostile driver of a device |
//! | `ports` | a hostile user of the serial port and the power device |
//! | `sections` | state sections, and what else a peer says of a guest |
//! | `seeds` | inputs to begin with |

mod driver;
mod ports;
mod script;
mod sections;
mod seeds;
mod stand;

pub use self::driver::device;
pub use self::ports::ports;
pub use self::sections::section;
pub use self::seeds::{device_seeds, ports_seeds, section_seeds};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Every seed as it is, and with one byte of it changed.
    fn seeds(all: Vec<Vec<u8>>, way: fn(&[u8])) {
        for mut seed in all {
            way(&seed);
            for at in (0..seed.len()).step_by(seed.len() / 16 + 1) {
                let was = std::mem::replace(&mut seed[at], 0xff);
                way(&seed);
                seed[at] = was;
            }
        }
    }

    #[test]
    fn what_fuzzers_begin_with_comes_back() {
        seeds(section_seeds(), section);
        seeds(device_seeds(), device);
        seeds(ports_seeds(), ports);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn whatever_a_peer_sends_comes_back(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            section(&bytes);
        }

        #[test]
        fn whatever_a_guest_does_comes_back(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
            device(&bytes);
        }

        #[test]
        fn whatever_a_guest_does_to_ports_comes_back(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            ports(&bytes);
        }
    }
}
