//! What podman's tools read of a checkpoint: the container in podman's words and its OCI configuration.
//! Nothing of it is read when decamp restores.
//!
//! A bundle has no image, so podman is told one that holds nothing ([`image::EMPTY`]); the root file system
//! comes whole as the difference to it. Networks are the host's own: podman makes a network namespace with
//! a loopback interface, and `podman network connect` does the rest.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use decamp_shared::archive::{ArchiveError, Parcel, Result};
use decamp_shared::workload::{Manifest, Section};
use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::dump::ContainerState;
use crate::facts::Needs;
use crate::podman::image;
use crate::segments::message::{Image, Message};
use crate::spec::ContainerSpec;

/// The part that holds CRIU's statistics.
pub(super) const STATISTICS_PART: &str = "stats-dump";
/// SIGTERM, as `decamp stop` uses it.
const STOP_SIGNAL: u32 = 15;
/// Seconds that a stopped one has to end by itself.
const STOP_TIMEOUT: u32 = 10;
/// Bytes of a shared memory file system, which is in the images and not podman's.
const SHM: u64 = 64_000 << 10;

/// CRIU's marks at the head of its statistics.
const STATISTICS_MARKS: &[u32] = &[0x5510_5940, 0x5709_3306];
/// The message about a dump in them, and how many pages were looked at and written (CRIU's stats.proto).
const OF_DUMP: u32 = 1;
const SCANNED: u32 = 5;
const WRITTEN: u32 = 7;

/// How podman restores a container from `file`.
pub(crate) fn advice(file: &Path) -> String {
    format!(
        "podman with runc restores it too: podman container restore --tcp-established --file-locks --import \
         {}\nOnce it has an empty image: tar -cf - -T /dev/null | podman import - localhost/decamp/empty",
        quoted(&file.display().to_string())
    )
}

/// As one word of a shell's.
fn quoted(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+,@%:=".contains(&byte);
    match !text.is_empty() && text.bytes().all(plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

/// The parts for podman.
pub(super) fn parcels(
    manifest: &Manifest,
    spec: &ContainerSpec,
    bundle: &Bundle,
    needs: &Needs,
    state: &ContainerState,
) -> Result<Vec<Parcel>> {
    let id = id_of(&manifest.uuid);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let config = config(manifest, spec, needs, &id, &time_text(now));
    let oci = spec_of(bundle, needs, &id);
    // Standard input, output and error, by which a runtime finds what it has to put in their places.
    let descriptors = [
        state.input.as_deref().unwrap_or("/dev/null"),
        &state.output,
        state.second_output.as_ref().unwrap_or(&state.output),
    ];
    Ok(vec![
        Parcel::json("config.dump", &config)?,
        Parcel::json("spec.dump", &oci)?,
        Parcel::json("network.status", &json!({}))?,
        Parcel::json("checkpoint/descriptors.json", &descriptors)?,
    ])
}

/// Podman's `ContainerConfig`, as far as a restore reads it.
fn config(manifest: &Manifest, spec: &ContainerSpec, needs: &Needs, id: &str, now: &str) -> Value {
    let oci: Value = serde_json::from_str(&needs.config).unwrap_or_default();
    json!({
        "id": id,
        "name": manifest.name,
        "rootfsImageName": image::EMPTY,
        // Its identity is another one wherever it is made; podman finds it by its name here too.
        "rootfsImageID": image::EMPTY,
        "command": oci.pointer("/process/args"),
        "runtime": spec.runtime,
        "createNetNS": true,
        "networkMode": "bridge",
        "NoShm": true,
        "NOShmShare": true,
        "shmSize": SHM,
        "stopSignal": STOP_SIGNAL,
        "stopTimeout": STOP_TIMEOUT,
        // It was not podman that made it, so podman has it from now on.
        "createdTime": now,
        "checkpointedTime": now,
        // What cleans up after it; podman looks for the name at the end, and enters a new one there.
        "exitCommand": ["/usr/bin/podman", "container", "cleanup", id],
        "cgroupManager": "cgroupfs",
        "cgroupParent": "/libpod_parent",
        "logDriver": "k8s-file",
        "labels": {"decamp.uuid": manifest.uuid},
    })
}

/// The OCI configuration, marked as podman's own are.
fn spec_of(bundle: &Bundle, needs: &Needs, id: &str) -> Value {
    let mut oci: Value = serde_json::from_str(&needs.config).unwrap_or_default();
    oci["root"]["path"] = json!(bundle.rootfs());
    oci["linux"]["cgroupsPath"] = json!(format!("/libpod_parent/libpod-{id}"));
    oci["annotations"]["io.container.manager"] = json!("libpod");
    oci
}

/// CRIU's statistics of the dump, with the pages that the page engine has written beside CRIU's own.
pub(super) fn statistics(section: &Section, pages: u64) -> Result<Parcel> {
    let bad = || ArchiveError::part(&section.kind, "is no statistics of CRIU's");
    let mut image = Image::parse_marked(&section.bytes, STATISTICS_MARKS).ok_or_else(bad)?;
    let add = |dump: &mut Message| {
        for tag in [SCANNED, WRITTEN] {
            dump.set_number(tag, dump.number(tag).unwrap_or(0).saturating_add(pages));
        }
    };
    let [all] = &mut image.messages[..] else { return Err(bad()) };
    if !all.change_each(OF_DUMP, add) {
        return Err(bad());
    }
    Ok(Parcel::bytes(STATISTICS_PART, image.to_bytes()))
}

/// Seconds since 1970 as podman writes a time: `2026-11-29T12:00:00Z`. Days become a date by counting
/// years from March, so that a leap day is the last of its year.
fn time_text(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let (hours, minutes, seconds) = (rest / 3_600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{seconds:02}Z")
}

/// Podman's names for containers are 64 hexadecimal digits.
fn id_of(uuid: &str) -> String {
    let digits: String = uuid.chars().filter(char::is_ascii_hexdigit).collect();
    format!("{:0<64}", digits.repeat(2).chars().take(64).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_written_as_podman_does() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_709_251_200, "2024-03-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(time_text(seconds), text);
        }
    }

    #[test]
    fn a_path_is_one_word() {
        assert!(advice(Path::new("/b/web.tar.zst")).contains("--import /b/web.tar.zst\n"));
        assert!(advice(Path::new("/b/it's $x")).contains(r"--import '/b/it'\''s $x'"));
    }

    #[test]
    fn pages_of_both_are_counted() {
        let mut dump = Message::default();
        for (tag, number) in [(1, 3), (SCANNED, 10), (WRITTEN, 4)] {
            dump.set_number(tag, number);
        }
        let mut all = Message::default();
        all.set_bytes(OF_DUMP, dump.to_bytes());
        let all = all.to_bytes();
        let mut bytes =
            STATISTICS_MARKS.iter().flat_map(|mark| mark.to_le_bytes()).collect::<Vec<u8>>();
        bytes.extend_from_slice(&(all.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&all);
        let section = Section { kind: "container/statistics".into(), version: 1, bytes };
        let parcel = statistics(&section, 7).expect("statistics");
        let mut bytes = Vec::new();
        (parcel.fill)(&mut bytes).expect("written");
        let read = Image::parse_marked(&bytes, STATISTICS_MARKS).expect("an image");
        let dump = read.messages[0].each(OF_DUMP).next().flatten().expect("of a dump");
        assert_eq!([1, SCANNED, WRITTEN].map(|tag| dump.number(tag)), [3, 17, 11].map(Some));
        let other = Section { bytes: section.bytes[1..].to_vec(), ..section };
        assert!(statistics(&other, 7).is_err());
    }
}
