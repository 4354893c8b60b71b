//! What an archive says of itself: the header at its beginning, the sums at its end. Types and their
//! checks; no I/O.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::workload::{FileTree, Kind, Manifest, NetworkNeed, SpaceInfo};

/// Says that it is ours.
pub const FORMAT: &str = "decamp-checkpoint";
/// Version of the layout; another one is refused.
pub const VERSION: u32 = 1;
/// Name of the first part.
pub const HEADER: &str = "decamp/header.json";
/// Name of the last part.
pub const SUMS: &str = "decamp/sums.json";
/// Bytes of a header, or of the sums, at most.
pub(super) const JSON_MOST: u64 = 32 << 20;
/// Parts of an archive at most.
const PARTS_MOST: usize = 1 << 17;
/// Bytes of a part's name at most: what the plain head of a tar entry holds.
const NAME_MOST: usize = 100;
/// Bytes of all parts at most, far beyond any host and far below overflow.
const BYTES_MOST: u64 = 1 << 50;

/// The first part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// The decamp that wrote it.
    pub decamp: String,
    /// The host that it was written on.
    pub host: String,
    /// When, in milliseconds since 1970.
    pub created_ms: u64,
    /// What is in it.
    pub workload: Described,
    /// Every part between header and sums, in order.
    pub parts: Vec<PartInfo>,
}

/// A part as the header promises it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartInfo {
    /// Its name, a plain relative path.
    pub name: String,
    /// Its bytes.
    pub size: u64,
}

/// The workload, as its manifest has it, in words that people can read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Described {
    /// Its name there.
    pub name: String,
    /// Its identity there; a restored one gets its own.
    pub uuid: String,
    /// Its kind.
    pub kind: Kind,
    /// Memory that it can use at most, in bytes.
    pub memory_bytes: u64,
    /// Its spaces.
    pub spaces: Vec<Space>,
    /// Its files.
    pub files: Vec<Tree>,
    /// Bridges that it hangs on.
    pub networks: Vec<String>,
    /// The backend's own spec.
    pub spec: Value,
    /// What it needs of a host, in the backend's own words.
    pub needs: Value,
}

/// A space; see [`SpaceInfo`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Space {
    /// Its number.
    pub id: u32,
    /// Pages that it has at most.
    pub page_limit: u64,
    /// What people read of it.
    pub label: String,
    /// The process whose memory it is, as the workload numbers it; 0 when it is of none.
    pub process: i32,
}

/// A file tree; see [`FileTree`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tree {
    /// Its number.
    pub id: u32,
    /// What it is to the workload, as [`crate::protocol::manifest::FileRole`] numbers it.
    pub role: i32,
    /// Where it stood.
    pub path: String,
    /// Bytes of its files.
    pub bytes: u64,
    /// Whether the workload writes to it while it runs.
    pub live: bool,
}

/// The last part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sums {
    /// Of each part in its order, the header first.
    pub(super) sha256: Vec<Sum>,
}

/// The sum of one part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sum {
    pub(super) name: String,
    /// In hexadecimal digits.
    pub(super) sum: String,
}

impl Header {
    /// Reads a header and checks all that it says by itself.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        let broken = |error: serde_json::Error| format!("its header cannot be read: {error}");
        let value: Value = serde_json::from_slice(bytes).map_err(broken)?;
        if value.get("format").and_then(Value::as_str) != Some(FORMAT) {
            return Err("it does not say that it is a checkpoint of decamp's".to_owned());
        }
        match value.get("version").and_then(Value::as_u64) {
            Some(version) if version == u64::from(VERSION) => {}
            Some(version) => {
                return Err(format!(
                    "it has version {version} of the format, and this decamp knows version \
                     {VERSION}: use the decamp that wrote it, or a newer one"
                ));
            }
            None => return Err("its header has no version".to_owned()),
        }
        let header: Self = serde_json::from_value(value).map_err(broken)?;
        header.check()?;
        Ok(header)
    }

    pub(super) fn check(&self) -> std::result::Result<(), String> {
        if self.parts.len() > PARTS_MOST {
            return Err(format!("it promises {} parts", self.parts.len()));
        }
        let mut names = BTreeSet::from([HEADER, SUMS]);
        let mut total = 0u64;
        for part in &self.parts {
            if !is_plain_name(&part.name) {
                return Err(format!("it has a part of the name {:?}", part.name));
            }
            if !names.insert(&part.name) {
                return Err(format!("it has part {} twice", part.name));
            }
            total = total.saturating_add(part.size);
        }
        if total > BYTES_MOST {
            return Err(format!("it promises {total} bytes"));
        }
        Ok(())
    }

    /// Bytes of all parts.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.size).sum()
    }

    /// The part of that name.
    pub fn part(&self, name: &str) -> Option<&PartInfo> {
        self.parts.iter().find(|part| part.name == name)
    }

    /// The workload as a destination is told of one.
    pub fn manifest(&self) -> Manifest {
        self.workload.manifest()
    }
}

impl Described {
    /// What `manifest` says.
    ///
    /// # Errors
    /// When spec or needs are no JSON.
    pub fn of(manifest: &Manifest) -> serde_json::Result<Self> {
        let space = |space: &SpaceInfo| Space {
            id: space.id,
            page_limit: space.page_limit,
            label: space.label.clone(),
            process: space.process,
        };
        let tree = |tree: &FileTree| Tree {
            id: tree.id,
            role: tree.role,
            path: tree.path.clone(),
            bytes: tree.bytes,
            live: tree.live,
        };
        Ok(Self {
            name: manifest.name.clone(),
            uuid: manifest.uuid.clone(),
            kind: manifest.kind(),
            memory_bytes: manifest.memory_bytes,
            spaces: manifest.spaces.iter().map(space).collect(),
            files: manifest.files.iter().map(tree).collect(),
            networks: manifest.networks.iter().map(|need| need.bridge.clone()).collect(),
            spec: serde_json::from_slice(&manifest.spec)?,
            needs: serde_json::from_slice(&manifest.needs)?,
        })
    }

    /// As a destination is told of it.
    pub fn manifest(&self) -> Manifest {
        let space = |space: &Space| SpaceInfo {
            id: space.id,
            page_limit: space.page_limit,
            label: space.label.clone(),
            process: space.process,
        };
        let tree = |tree: &Tree| FileTree {
            id: tree.id,
            role: tree.role,
            path: tree.path.clone(),
            bytes: tree.bytes,
            live: tree.live,
            ..FileTree::default()
        };
        let need =
            |bridge: &String| NetworkNeed { bridge: bridge.clone(), ..NetworkNeed::default() };
        Manifest {
            name: self.name.clone(),
            uuid: self.uuid.clone(),
            kind: self.kind.into(),
            memory_bytes: self.memory_bytes,
            spaces: self.spaces.iter().map(space).collect(),
            files: self.files.iter().map(tree).collect(),
            networks: self.networks.iter().map(need).collect(),
            spec: self.spec.to_string().into_bytes(),
            needs: self.needs.to_string().into_bytes(),
        }
    }
}

/// Whether `name` is a relative path without anything that could lead elsewhere.
fn is_plain_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'\\';
    name.len() <= NAME_MOST
        && name.bytes().all(plain)
        && name.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// A sum in hexadecimal digits.
pub(super) fn hex(sum: &[u8; 32]) -> String {
    sum.iter().map(|byte| format!("{byte:02x}")).collect()
}
