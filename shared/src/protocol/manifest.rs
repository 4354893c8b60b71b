//! What a workload is, as the source tells the destination before anything is touched.

use serde::{Deserialize, Serialize};

/// The two kinds of workload.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    prost::Enumeration,
    Serialize,
    Deserialize,
)]
#[serde(rename_all = "lowercase")]
#[repr(i32)]
pub enum Kind {
    /// Never valid on the wire.
    Unspecified = 0,
    /// A KVM virtual machine.
    Vm = 1,
    /// A container restored by CRIU.
    Container = 2,
}

impl Kind {
    /// As it is written in reports and on the command line.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Unspecified => "unspecified",
            Kind::Vm => "vm",
            Kind::Container => "container",
        }
    }
}

/// One space of pages.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SpaceInfo {
    /// Number of the space within this workload.
    #[prost(uint32, tag = "1")]
    pub id: u32,
    /// Upper bound of page numbers in it, exclusive. A peer's page beyond it is an error.
    #[prost(uint64, tag = "2")]
    pub page_limit: u64,
    /// For people: `guest memory`, `process 17`. Of a container's shared memory (spaces from 2^22 on) it is
    /// `shared memory ` and the name that the segment has, `System V segment ` and its number, or
    /// `tmpfs NUMBER SOURCE PATH`.
    #[prost(string, tag = "3")]
    pub label: String,
    /// The process behind the space as the backend knows it (a container's namespace pid), or 0.
    #[prost(int32, tag = "4")]
    pub process: i32,
}

/// What a file tree is to the workload.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    prost::Enumeration,
    Serialize,
    Deserialize,
    PartialOrd,
    Ord,
)]
#[repr(i32)]
pub enum FileRole {
    /// Never valid on the wire.
    Unspecified = 0,
    /// A VM's kernel image: one file that nobody writes while it runs.
    Kernel = 1,
    /// A VM's initial ramdisk.
    Initrd = 2,
    /// A container's OCI bundle, root file system included; the container writes in it.
    Bundle = 3,
    /// A directory that is mounted into a container.
    Volume = 4,
    /// A single file that is mounted into a container.
    VolumeFile = 5,
    /// A VM's disk: one file, or a block device.
    Disk = 6,
}

impl FileRole {
    /// Whether it is mounted into a container, a directory or a file.
    pub fn is_volume(self) -> bool {
        matches!(self, Self::Volume | Self::VolumeFile)
    }

    /// Whether it may lie on storage that hosts share, so that somebody has to say what becomes of it.
    pub fn is_storage(self) -> bool {
        self.is_volume() || self == Self::Disk
    }
}

/// What becomes of a file tree in a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, prost::Enumeration, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(i32)]
pub enum Storage {
    /// Nobody said. What is mounted into a container, or is a VM's disk, is shared if both hosts see the very
    /// same, else refused; everything else is copied.
    Unsaid = 0,
    /// It is copied.
    Copy = 1,
    /// Both hosts see the very same: it stays where it is, and nobody ever removes any of it.
    Shared = 2,
}

/// A file or directory of the workload that must stand on the destination too.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct FileTree {
    /// Number within this workload.
    #[prost(uint32, tag = "1")]
    pub id: u32,
    /// What it is to the workload.
    #[prost(enumeration = "FileRole", tag = "2")]
    pub role: i32,
    /// Absolute path on the source.
    #[prost(string, tag = "3")]
    pub path: String,
    /// Bytes that its files hold now.
    #[prost(uint64, tag = "4")]
    pub bytes: u64,
    /// Whether the running workload may write in it, so that the difference must be sent again
    /// while it stands still.
    #[prost(bool, tag = "5")]
    pub live: bool,
    /// What becomes of it.
    #[prost(enumeration = "Storage", tag = "6")]
    pub storage: i32,
    /// Where the workload sees it, of what is mounted into a container: it may be in several places.
    #[prost(string, repeated, tag = "7")]
    pub mounts: Vec<String>,
    /// Where it goes on the destination when nobody says otherwise; nothing where it goes to the same path.
    #[prost(string, tag = "8")]
    pub place: String,
    /// The space that its content travels as while it is copied, so that what the workload writes meanwhile is
    /// followed; 0 where it travels as files do.
    #[prost(uint32, tag = "9")]
    pub space: u32,
}

impl FileTree {
    /// Whether its content travels as pages.
    pub fn is_paged(&self) -> bool {
        self.space != 0 && self.storage() == Storage::Copy
    }
}

/// A bridge that the workload's interface hangs on.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct NetworkNeed {
    /// Name of the bridge.
    #[prost(string, tag = "1")]
    pub bridge: String,
    /// Bytes that a frame of its carries at most; 0 where nothing is said.
    #[prost(uint32, tag = "2")]
    pub mtu: u32,
    /// Whether the bridge tells virtual networks apart.
    #[prost(enumeration = "VlanUse", tag = "3")]
    pub vlans: i32,
    /// The virtual network that its frames without a tag are in, where the bridge tells them apart.
    #[prost(uint32, tag = "4")]
    pub vlan: u32,
    /// Who is on its segment, itself among them: at least one of them must answer on the bridge there. With none
    /// nobody is asked.
    #[prost(message, repeated, tag = "5")]
    pub neighbours: Vec<NetworkNeighbour>,
}

/// Whether a bridge tells virtual networks apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum VlanUse {
    /// Nothing is said.
    Unsaid = 0,
    /// It does not.
    Plain = 1,
    /// It does.
    Filtered = 2,
}

/// Somebody on a segment.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct NetworkNeighbour {
    /// An address of IPv4 (4 bytes) or IPv6 (16 bytes).
    #[prost(bytes = "vec", tag = "1")]
    pub address: Vec<u8>,
    /// The hardware address, 6 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub mac: Vec<u8>,
}

/// All that the destination checks before anything is touched.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Manifest {
    /// Name of the workload.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Identity of the workload, the same on every host that it visits.
    #[prost(string, tag = "2")]
    pub uuid: String,
    /// Its kind.
    #[prost(enumeration = "Kind", tag = "3")]
    pub kind: i32,
    /// Memory that it can use at most, in bytes; what the destination must have free.
    #[prost(uint64, tag = "4")]
    pub memory_bytes: u64,
    /// Its spaces as they are now.
    #[prost(message, repeated, tag = "5")]
    pub spaces: Vec<SpaceInfo>,
    /// Files that must stand on the destination.
    #[prost(message, repeated, tag = "6")]
    pub files: Vec<FileTree>,
    /// Bridges that must exist there.
    #[prost(message, repeated, tag = "7")]
    pub networks: Vec<NetworkNeed>,
    /// The backend's own spec, as JSON.
    #[prost(bytes = "vec", tag = "8")]
    pub spec: Vec<u8>,
    /// CPU, kernel and tool needs in the backend's own JSON; its preflight reads them.
    #[prost(bytes = "vec", tag = "9")]
    pub needs: Vec<u8>,
}

/// A piece of a workload's state that only its backend understands.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Section {
    /// Which state: `vcpu/0`, `irqchip`, `criu/core-1.img`.
    #[prost(string, tag = "1")]
    pub kind: String,
    /// Version of the payload's format.
    #[prost(uint32, tag = "2")]
    pub version: u32,
    /// The payload.
    #[prost(bytes = "vec", tag = "3")]
    pub bytes: Vec<u8>,
}

/// Why a destination refuses, for machines.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    prost::Enumeration,
    Serialize,
    Deserialize,
    PartialOrd,
    Ord,
)]
#[serde(rename_all = "kebab-case")]
#[repr(i32)]
pub enum RefusalCode {
    /// A reason that this build does not know.
    Other = 0,
    /// The name is in use there.
    NameTaken = 1,
    /// Not enough memory.
    Memory = 2,
    /// Not enough room on a disk.
    Disk = 3,
    /// A bridge is missing, its name is wrong, or it does not lead or carry what it must.
    Bridge = 4,
    /// The container runtime is missing or too old.
    Runtime = 5,
    /// CRIU is missing or too old.
    Criu = 6,
    /// No usable `/dev/kvm`.
    Kvm = 7,
    /// The CPU lacks something that the workload sees.
    Cpu = 8,
    /// The kernel lacks something.
    Kernel = 9,
    /// A file would be written onto itself.
    SameFile = 10,
    /// A path is taken by something that does not belong to this workload.
    PathTaken = 11,
    /// A file is missing or is not what it should be.
    File = 12,
    /// The workload uses something that cannot be moved.
    Unsupported = 13,
    /// The workload, or the host, is busy with another move.
    Busy = 14,
    /// The request itself is wrong.
    Request = 15,
}

/// One reason why something was refused before anything was touched.
#[derive(Clone, PartialEq, Eq, prost::Message, Serialize, Deserialize)]
pub struct Refusal {
    /// For machines.
    #[prost(enumeration = "RefusalCode", tag = "1")]
    pub code: i32,
    /// For people: what is wrong, and what to do.
    #[prost(string, tag = "2")]
    pub text: String,
}

impl Refusal {
    /// A refusal with its code and its sentence.
    pub fn new(code: RefusalCode, text: impl Into<String>) -> Self {
        Self { code: code.into(), text: text.into() }
    }
}
