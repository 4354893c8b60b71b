//! Inputs for fuzzers to begin with: sections as they are saved, and drivers that do what drivers do. Without them
//! no fuzzer finds the lengths of a vCPU's fields, or a chain that a device can serve.

use super::driver::{piece, step};
use super::ports;
use super::sections::what;
use super::stand::{CID, KINDS, PORT, Stand};
use crate::cpuid::CpuidEntry;
use crate::needs::Needs;
use crate::power::PowerState;
use crate::serial::PortState;
use crate::state::vcpu::VcpuState;
use crate::state::vm::VmState;
use crate::state::{power, serial};

/// Inputs of [`super::section`].
pub fn section_seeds() -> Vec<Vec<u8>> {
    let port = PortState { device: Default::default(), queue: b"typed".to_vec() };
    let cpuid = vec![CpuidEntry { leaf: 1, ecx: 1 << 31, ..CpuidEntry::default() }];
    let needs = Needs {
        vmm: "1".into(),
        cpuid,
        tsc_khz: 2_000_000,
        capabilities: vec!["KVM_CAP_XSAVE2".into()],
        msrs: vec![0x10],
        registers: Vec::new(),
    };
    let entries = serde_json::json!(needs.cpuid);
    let offer = serde_json::json!({ "version": 1, "entries": entries, "registers": [] });
    let spec = serde_json::json!({
        "kernel": "/boot/vmlinuz", "cmdline": "console=ttyS0", "cpus": 2, "memory_bytes": 64 << 20,
        "disks": [{ "path": "/srv/a" }], "net": [{ "bridge": "br0" }],
    });
    let json = |value: serde_json::Value| value.to_string().into_bytes();
    let mut all: Vec<Vec<u8>> = [
        (what::VM, VmState::blank().encode().bytes),
        (what::VCPU, VcpuState::blank().encode(0).bytes),
        (what::SERIAL, serial::encode(&port).bytes),
        (what::POWER, power::encode(&PowerState::default()).bytes),
        (what::NEEDS, json(serde_json::json!(needs))),
        (what::SPEC, json(spec)),
        (what::BASELINE, json(offer)),
    ]
    .into_iter()
    .map(|(of, bytes)| [&[of, 1], &bytes[..]].concat())
    .collect();
    for kind in 0..KINDS {
        let found = Stand::new(kind).and_then(|stand| stand.tried());
        all.extend(
            found.map(|tried| [&[what::DEVICES + kind as u8, 1], &tried.save().bytes[..]].concat()),
        );
    }
    all
}

/// Inputs of [`super::device`]: what a driver does, for each device, before and after a move, and without features.
pub fn device_seeds() -> Vec<Vec<u8>> {
    // A header of a request: type, reserved, sector; its data, or room for it; its status.
    let block = |kind: u32, data: u8| {
        let header = [&kind.to_le_bytes()[..], &[0; 12]].concat();
        offer(0, &[read(0, &header), (data, 16, 512, Vec::new()), (1, 64, 1, Vec::new())])
    };
    // From the guest's program 1000 to the host's program.
    let packet = |op: u16, data: &[u8]| {
        let mut header = [u64::from(CID).to_le_bytes(), 2u64.to_le_bytes()].concat();
        header.extend([1000, PORT, data.len() as u32].map(u32::to_le_bytes).concat());
        header.extend([1u16.to_le_bytes(), op.to_le_bytes()].concat());
        header.extend([0u32, 65536, 0].map(u32::to_le_bytes).concat());
        offer(1, &[read(0, &[&header, data].concat())])
    };
    let frame = [0; 74];
    let room = |queue: u8| offer(queue, &[(piece::WRITABLE, 256, 4096, Vec::new())]);
    let control = |command: &[u8]| offer(2, &[read(0, command), (1, 64, 1, Vec::new())]);
    let arrival = vec![step::ACT, 74, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    let config = |at: u16, value: u64| {
        [&[step::WRITE][..], &(0x100 + at).to_le_bytes(), &[0], &value.to_le_bytes()].concat()
    };
    let pages = [5u32, 6, 200].map(u32::to_le_bytes).concat();
    let steps: Vec<(u8, Vec<Vec<u8>>)> = vec![
        (0, vec![room(0)]),
        (1, vec![offer(0, &[read(0, &pages)]), room(2), room(4), config(12, 1), room(2)]),
        (2, vec![offer(1, &[read(0, b"hello")]), room(0), vec![step::ACT, 3, b'a', b'b', b'c']]),
        (
            3,
            vec![
                packet(1, &[]),
                room(0),
                vec![step::ACT, 2],
                packet(5, b"data"),
                vec![step::ACT, 3, 9, 0],
            ],
        ),
        (
            3,
            vec![
                room(0),
                vec![step::ACT, 0, 9],
                packet(2, &[]),
                room(2),
                packet(4, &[]),
                packet(3, &[]),
            ],
        ),
        (4, vec![offer(1, &[read(0, &frame)]), room(0), arrival.clone(), arrival]),
        (4, vec![control(&[0, 0, 1]), control(&[1, 1, 2, 0, 0, 0, 0, 5]), control(&[3, 0])]),
        (5, vec![block(0, 1), block(1, 0), block(4, 0), block(8, 1), config(32, 0), block(1, 0)]),
        (5, vec![block(11, 0), block(13, 0)]),
        (6, vec![block(0, 1), block(1, 0)]),
    ];
    steps
        .into_iter()
        .map(|(which, steps)| {
            let begins = [&[which], &u64::MAX.to_le_bytes()[..]].concat();
            let (steps, plain) = (steps.concat(), [&[step::SET_UP][..], &[0; 8]].concat());
            [&begins[..], &steps, &[step::MOVE], &steps, &plain, &steps].concat()
        })
        .collect()
}

/// Inputs of [`super::ports`].
pub fn ports_seeds() -> Vec<Vec<u8>> {
    use ports::step;
    let enable =
        [step::SERIAL_WRITE, 1, 3, step::SERIAL_WRITE, 4, 0x0b, step::SERIAL_WRITE, 0, b'x'];
    let typed = [
        step::TYPE,
        2,
        step::SERIAL_READ,
        5,
        step::SERIAL_READ,
        0,
        step::MOVE,
        step::SERIAL_READ,
        2,
    ];
    let power = [
        step::PRESS,
        step::POWER_WRITE,
        2,
        1,
        0x20,
        1,
        0,
        0,
        0,
        0,
        0,
        0,
        step::POWER_READ,
        0,
        1,
        step::MOVE,
    ];
    let baud = [step::SERIAL_WRITE, 3, 0x80, step::SERIAL_WRITE, 0, 12, step::SERIAL_WRITE, 3, 3];
    vec![enable.to_vec(), typed.to_vec(), power.to_vec(), [&baud[..], &enable, &typed].concat()]
}

/// A descriptor as a script names it: its kind, where it lies among the buffers, its length and what it holds.
type Piece = (u8, u16, u16, Vec<u8>);

/// What the device reads, from place `at` among the buffers.
fn read(at: u16, data: &[u8]) -> Piece {
    (piece::DATA, at, data.len() as u16, data.to_vec())
}

/// A step that offers a chain.
fn offer(queue: u8, pieces: &[Piece]) -> Vec<u8> {
    let mut bytes = vec![step::OFFER, queue, pieces.len() as u8 - 1];
    for (kind, at, length, data) in pieces {
        bytes.push(*kind);
        bytes.extend(at.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        if kind & piece::DATA != 0 {
            bytes.push(data.len() as u8);
            bytes.extend(data);
        }
    }
    bytes
}
