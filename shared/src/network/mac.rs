//! Hardware addresses of Ethernet.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A hardware address, written as `02:00:5e:10:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// All of a segment.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it can be the address of one interface: neither of a group nor all zeros.
    pub fn is_of_one(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }

    /// A locally administered address of one interface with these low bytes.
    pub fn local(low: [u8; 5]) -> Self {
        let [b, c, d, e, f] = low;
        Self([0x02, b, c, d, e, f])
    }

    /// The address of the host's end of an interface whose other end, the workload's, has this one.
    ///
    /// A bridge that was given no address takes the lowest of its ports', and all who spoke to it go on
    /// speaking to the one it had. So this one is as high as an address of one interface can be, and
    /// follows from the workload's: when both ends of a move are ports of one bridge, nothing changes.
    pub fn of_hosts_end(self) -> Self {
        let mut bytes = self.0;
        bytes[0] = if bytes[0] == 0xfe { 0xfa } else { 0xfe };
        Self(bytes)
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            *byte = parts
                .next()
                .filter(|part| part.len() == 2)
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(|| format!("{text:?} is no hardware address"))?;
        }
        if parts.next().is_some() {
            return Err(format!("{text:?} is no hardware address"));
        }
        Ok(Self(bytes))
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_it_is_written() {
        let mac = Mac([0x02, 0, 0x5e, 0x10, 0, 1]);
        assert_eq!(mac.to_string(), "02:00:5e:10:00:01");
        assert_eq!(Mac::try_from(mac.to_string()), Ok(mac));
        for bad in
            ["", "02:00:5e:10:00", "02:00:5e:10:00:01:02", "2:0:5e:10:0:1", "02-00-5e-10-00-01"]
        {
            assert!(Mac::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_hosts_end_has_another_one_of_one_interface() {
        for mac in
            [Mac([2, 0, 0, 0, 0, 9]), Mac([0xfe, 1, 2, 3, 4, 5]), Mac::local([1, 2, 3, 4, 5])]
        {
            let outside = mac.of_hosts_end();
            assert!(mac.is_of_one() && outside.is_of_one() && outside != mac);
        }
        assert!(!Mac::BROADCAST.is_of_one() && !Mac([0; 6]).is_of_one());
    }
}
