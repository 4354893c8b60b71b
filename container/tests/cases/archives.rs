//! Files that podman and decamp both know what to do with: ours restored by podman, podman's restored here,
//! and files that only look like podman's.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use decamp_shared::archive::checkpoint::{Asked, checkpoint};
use decamp_shared::archive::restore::{fill, verify};
use decamp_shared::archive::{Archive, Foreign, Unpacking};
use decamp_shared::files::Landing;
use decamp_shared::workload::{Backend, Manifest, PlacedTree};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

use crate::podman::{does_quietly, import, import_empty, make_bridge, set_up, write_network};
use crate::runtimes::says;
use crate::support::redis::Redis;
use crate::support::{Host, Spot, await_that};

/// The parts of a tar, in their order.
type Parts = Vec<(String, Vec<u8>)>;

/// podman with the CRIU that we use, which it looks for by name.
fn podman(host: &Host, arguments: &[&str]) {
    let criu = host.tools().criu;
    let path = std::env::var("PATH").unwrap_or_default();
    let beside = criu.parent().expect("a directory").display().to_string();
    let mut command = Command::new("podman");
    command.args(arguments).env("PATH", format!("{beside}:{path}"));
    let said = command.output().expect("podman");
    assert!(said.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&said.stderr));
}

/// Asks a Redis in the network namespace of a process.
fn digest_within(pid: &str) -> String {
    let namespace = format!("/proc/{pid}/ns/net");
    thread::spawn(move || {
        let namespace = File::open(namespace).expect("a namespace");
        setns(namespace, CloneFlags::CLONE_NEWNET).expect("entered");
        Redis::connect("127.0.0.1:6379").ask(&["DEBUG", "DIGEST"])
    })
    .join()
    .expect("Redis answers")
}

fn write(spot: &Spot<'_>, output: PathBuf) {
    let backend = spot.backend();
    let mut source = backend.source_for_file(&spot.spec, &spot.place).expect("a source");
    let asked = Asked {
        output,
        leave_running: false,
        host: "here".to_owned(),
        now_ms: 0,
        token: 1,
        stop: Default::default(),
    };
    checkpoint(&mut *source, &backend, &asked, &|| Ok(()), &|_| {}).expect("a checkpoint");
}

/// Redis with its values and masked files, in podman's hands after it.
pub(crate) fn podman_restores_our_file(host: &Host) {
    set_up(host);
    let spot = host.redis("ao", "10.99.0.7/24", &[]);
    spot.change_config(|config| {
        config["linux"]["maskedPaths"] = json!(["/proc/kcore", "/proc/keys", "/sys/firmware"]);
        // podman restores it in the host's.
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("namespaces");
        namespaces.push(json!({"type": "cgroup"}));
    });
    spot.run();
    let mut redis = Redis::connect("10.99.0.7:6379");
    redis.fill(8 << 20, 3);
    let digest = redis.ask(&["DEBUG", "DIGEST"]);
    drop(redis);
    let file = host.directory().join("ao.tar.zst");
    write(&spot, file.clone());
    host.assert_nothing_left("ao");
    import_empty();
    let file = file.display().to_string();
    for name in [spot.place.name.as_str(), "podmans-ao"] {
        let restore = ["container", "restore", "--import", &file];
        let renamed = ["--name", name];
        let ours = name == spot.place.name;
        let more: &[&str] = if ours { &["--tcp-established"] } else { &renamed };
        podman(host, &[&restore[..], more].concat());
        let pid = says("podman", &["inspect", "--format", "{{.State.Pid}}", name]);
        assert_eq!(digest_within(pid.trim()), digest);
        podman(host, &["stop", "--time", "5", name]);
        // It is podman's: its end is noted by what cleans up after it.
        await_that("podman to note its end", || {
            says("podman", &["inspect", "--format", "{{.State.Status}}", name]).trim() == "exited"
        });
        podman(host, &["rm", name]);
    }
    fs::remove_file(file).expect("removed");
}

/// What a killed agent had podman mount is unmounted by the next one's sweep, and what lives on is not.
pub(crate) fn an_image_that_stayed_mounted_goes(host: &Host) {
    const EMPTY: &str = "localhost/decamp/empty:latest";
    set_up(host);
    import_empty();
    let mounted = || says("podman", &["image", "mount"]).contains(EMPTY);
    podman(host, &["image", "mount", EMPTY]);
    assert!(mounted());
    let home = Path::new("/var/lib/containers/decamp");
    fs::create_dir_all(home).expect("a directory");
    let note = |started: u64| {
        let text = json!({"id": EMPTY, "process": [std::process::id(), started]});
        let path = home.join(format!(".{started}.image"));
        fs::write(&path, text.to_string()).expect("noted");
        path
    };
    let stat = fs::read_to_string("/proc/self/stat").expect("ours");
    let started = stat.rsplit(')').next().and_then(|rest| rest.split(' ').nth(20));
    let lives = note(started.and_then(|word| word.parse().ok()).expect("a time"));
    decamp_container::podman::leftover::clear(|_| true);
    assert!(mounted() && lives.exists(), "somebody has it");
    fs::remove_file(&lives).expect("removed");
    let gone = note(1);
    decamp_container::podman::leftover::clear(|_| true);
    assert!(!mounted() && !gone.exists());
    let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(home).expect("a directory"));
    assert_eq!(mode & 0o777, 0o700);
}

/// A file of podman's, as it is taken here.
struct Taken {
    manifest: Manifest,
    trees: Vec<PlacedTree>,
    archive: Archive,
    unpacking: Box<dyn Unpacking>,
}

/// Looks at all of a file of podman's, for `there`, with its files at `path`. Gives why it is refused.
fn look(there: &Spot<'_>, file: &Path, path: &Path) -> Result<Taken, String> {
    let backend = there.backend();
    let said =
        |error: decamp_shared::archive::ArchiveError| decamp_shared::session::error::chain(&error);
    let found = Foreign::survey(file, 1 << 32, &|part| backend.wants_of_foreign(part));
    let found = found.map_err(said)?;
    let described = backend.describe_foreign(&found, None).map_err(said)?;
    let mut manifest = described.manifest();
    (manifest.name, manifest.uuid) = (there.place.name.clone(), there.place.uuid.clone());
    let tree = manifest.files[0].clone();
    let trees = vec![PlacedTree { tree, path: path.to_owned() }];
    let refusals = backend.preflight(&manifest, &trees);
    if !refusals.is_empty() {
        let texts = refusals.into_iter().map(|refusal| refusal.text);
        return Err(texts.collect::<Vec<_>>().join("; "));
    }
    let mut unpacking = backend.unpack_foreign(&manifest, &trees, &found).map_err(said)?;
    let mut archive = found.into_archive(described).map_err(said)?;
    verify(&mut archive, &mut *unpacking, &|_| {}).map_err(said)?;
    Ok(Taken { manifest, trees, archive, unpacking })
}

impl Taken {
    /// Has it run at `there`.
    fn restore(mut self, there: &Spot<'_>) {
        let backend = there.backend();
        let spec = backend.respec(&self.manifest, &self.trees).expect("a spec");
        let prepared = backend.prepare(&self.manifest, &spec, &there.place);
        let mut destination = prepared.expect("a destination");
        let landing = Landing::new();
        fill(&self.archive, &mut *self.unpacking, &mut *destination, &landing, &|_| {})
            .expect("filled");
        landing.keep();
        destination.activate(1).expect("runs");
    }
}

/// Redis in podman's network, with a named volume, in our hands after it; and then lies in its place.
pub(crate) fn podmans_file_is_restored(host: &Host) {
    set_up(host);
    make_bridge(host, "br8", "10.96.0");
    write_network(2, "three", "br8", "10.96.0");
    let spot = host.redis("ap", "10.96.0.9/24", &["--enable-protected-configs", "yes"]);
    let config = fs::read(spot.bundle().join("config.json")).expect("a config");
    let config: Value = serde_json::from_slice(&config).expect("JSON");
    let arguments = config["process"]["args"].as_array().expect("arguments").iter();
    let arguments: Vec<&str> = arguments.map(|word| word.as_str().expect("a word")).collect();
    import(host, "redis", &spot, &[]);
    let directory = format!("--workdir={}", config["process"]["cwd"].as_str().expect("a path"));
    let network = "--network=three:ip=10.96.0.9,mac=02:00:00:00:00:09";
    let volume = ["--volume", "apvolume:/kept"];
    let first = ["run", "--detach", network, &directory, "--name", "ap"];
    podman(host, &[&first[..], &volume, &["localhost/redis"], &arguments].concat());
    let mut redis = Redis::connect("10.96.0.9:6379");
    redis.fill(8 << 20, 5);
    let digest = redis.ask(&["DEBUG", "DIGEST"]);
    // A file in its root, and one in its volume.
    for directory in ["/data", "/kept"] {
        assert_eq!(redis.ask(&["CONFIG", "SET", "dir", directory]), "OK");
        assert_eq!(redis.ask(&["SAVE"]), "OK");
    }
    drop(redis);
    let (file, plain) = (host.directory().join("ap.tar.zst"), host.directory().join("ap.tar"));
    for (file, how) in [(&file, "zstd"), (&plain, "none")] {
        let file = file.display().to_string();
        let words = ["container", "checkpoint", "--tcp-established", "--compress", how];
        let more: &[&str] = if how == "zstd" { &["--leave-running"] } else { &[] };
        podman(host, &[&words[..], more, &["--export", &file, "ap"]].concat());
    }
    podman(host, &["rm", "ap"]);
    make_bridge(host, "br8", "10.96.0");
    let path = host.directory().join("landed");
    let there = host.spot("ap2", json!({}));
    for file in [&file, &plain] {
        look(&there, file, &path).expect("nothing against it").restore(&there);
        let mut redis = Redis::connect("10.96.0.9:6379");
        assert_eq!(redis.ask(&["DEBUG", "DIGEST"]), digest);
        drop(redis);
        let mounted = says("podman", &["image", "mount"]);
        assert_eq!(mounted.trim(), "", "an image stays mounted");
        for saved in ["rootfs/data", "volumes/apvolume"] {
            assert!(path.join(saved).join("dump.rdb").is_file(), "{saved}");
        }
        there.stop();
        host.assert_nothing_left("ap2");
        fs::remove_dir_all(&path).expect("removed");
    }
    lies(&there, &plain, &path);
    does_quietly("podman", &["volume", "rm", "apvolume"]);
    does_quietly("ip", &["link", "delete", "br8"]);
    for file in [file, plain] {
        fs::remove_file(file).expect("removed");
    }
}

fn parts_of(file: &Path) -> Parts {
    let mut tar = tar::Archive::new(File::open(file).expect("a file"));
    let mut parts = Parts::new();
    for entry in tar.entries().expect("entries") {
        let mut entry = entry.expect("an entry");
        if entry.header().entry_type() == tar::EntryType::Regular {
            let name = String::from_utf8(entry.path_bytes().into_owned()).expect("a name");
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("read");
            parts.push((name, bytes));
        }
    }
    parts
}

/// A tar with one entry more than `parts`, if there is one.
fn tar_of(parts: &Parts, more: Option<(&str, tar::EntryType, &str)>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, kind, target: &str, bytes: &[u8]| {
        let mut head = tar::Header::new_ustar();
        let ustar = head.as_ustar_mut().expect("ustar");
        ustar.name[..name.len()].copy_from_slice(name.as_bytes());
        ustar.linkname[..target.len()].copy_from_slice(target.as_bytes());
        head.set_entry_type(kind);
        head.set_mode(0o644);
        head.set_uid(0);
        head.set_gid(0);
        head.set_mtime(0);
        if kind == tar::EntryType::Block {
            head.set_device_major(8).and_then(|()| head.set_device_minor(0)).expect("a device");
        }
        head.set_size(bytes.len() as u64);
        head.set_cksum();
        builder.append(&head, bytes).expect("written");
    };
    for (name, bytes) in parts {
        add(name, tar::EntryType::Regular, "", bytes);
    }
    if let Some((name, kind, target)) = more {
        add(name, kind, target, b"");
    }
    builder.into_inner().expect("finished")
}

/// Whatever the file says that is not so, nothing is touched.
fn lies(there: &Spot<'_>, honest: &Path, path: &Path) {
    let parts = parts_of(honest);
    let file = honest.with_extension("lie");
    let refused = |bytes: &[u8], says: &str| {
        fs::write(&file, bytes).expect("written");
        let why = look(there, &file, path).err().unwrap_or_else(|| panic!("not refused: {says}"));
        assert!(why.contains(says), "{says:?} is not in {why:?}");
        assert!(!path.exists(), "{says}");
    };
    let whole = tar_of(&parts, None);
    fs::write(&file, &whole).expect("written");
    look(there, &file, path).expect("it is as good as the one that podman wrote");
    let with = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut parts = parts.clone();
        let part = parts.iter_mut().find(|(found, _)| found == name).expect(name);
        change(&mut part.1);
        tar_of(&parts, None)
    };
    let without = |name: &str| {
        let parts = parts.iter().filter(|(found, _)| found != name).cloned().collect();
        tar_of(&parts, None)
    };
    let json_with = |name: &str, change: &dyn Fn(&mut Value)| {
        with(name, &|bytes| {
            let mut value = serde_json::from_slice(bytes).expect("JSON");
            change(&mut value);
            *bytes = value.to_string().into_bytes();
        })
    };
    // Cut anywhere.
    for eighth in 1..8 {
        refused(&whole[..whole.len() * eighth / 8], "");
    }
    refused(&whole[..whole.len() - 1024], "cut short");
    for name in ["config.dump", "spec.dump", "checkpoint/inventory.img", "checkpoint/pages-1.img"] {
        refused(&without(name), "is missing");
    }
    refused(&with("config.dump", &|bytes| bytes.truncate(10)), "cannot be read");
    refused(&with("spec.dump", &|bytes| *bytes = b"[]".to_vec()), "is no JSON object");
    refused(&with("checkpoint/pages-1.img", &|bytes| bytes.push(0)), "not as many pages");
    let foreign = |name: &str, kind, target| tar_of(&parts, Some((name, kind, target)));
    refused(&foreign("../x", tar::EntryType::Regular, ""), "a part of the name");
    refused(&foreign("/etc/x", tar::EntryType::Regular, ""), "a part of the name");
    refused(&foreign("checkpoint/../x.img", tar::EntryType::Regular, ""), "a part of the name");
    refused(&foreign("more", tar::EntryType::Regular, ""), "is no part of a checkpoint");
    refused(&foreign("volumes/x.tar", tar::EntryType::Regular, ""), "a volume that it does not");
    refused(&foreign("checkpoint/x.img", tar::EntryType::Symlink, "/etc/passwd"), "is no file");
    refused(&foreign("checkpoint/x.img", tar::EntryType::Link, "/etc/passwd"), "is no file");
    refused(&foreign("checkpoint/x.img", tar::EntryType::Block, ""), "is no file");
    refused(&foreign("config.dump", tar::EntryType::Regular, ""), "twice");
    refused(&foreign("ctr.log", tar::EntryType::Regular, ""), "twice");
    let volume = |name: &'static str| {
        json_with("config.dump", &move |config| {
            config["namedVolumes"][0]["volumeName"] = name.into()
        })
    };
    refused(&volume("../../etc"), "a volume of the name");
    refused(&volume(".."), "a volume of the name");
    let removed = json!(["/etc/../../x"]).to_string();
    let mut more = parts.clone();
    more.retain(|(name, _)| name != "deleted.files");
    more.push(("deleted.files".to_owned(), removed.into_bytes()));
    refused(&tar_of(&more, None), "leads upwards");
    let mount =
        json!({"destination": "/host", "type": "bind", "source": "/", "options": ["rbind"]});
    let mounted = json_with("spec.dump", &|spec| {
        spec["mounts"].as_array_mut().expect("mounts").push(mount.clone());
    });
    refused(&mounted, "/host is mounted from / of the host");
    let image = json_with("config.dump", &|config| config["rootfsImageID"] = "--all".into());
    refused(&image, "no identity of an image");
    let unknown = "0".repeat(64);
    let image =
        json_with("config.dump", &|config| config["rootfsImageID"] = unknown.clone().into());
    refused(&image, "does not have");
    for (name, kind, target, says) in [
        ("../../x", tar::EntryType::Regular, "", "leads upwards"),
        ("/x", tar::EntryType::Regular, "", "an absolute path"),
        ("x", tar::EntryType::Link, "/etc/passwd", "hard link"),
        ("x", tar::EntryType::Block, "", "device node"),
    ] {
        let tar = tar_of(&Parts::new(), Some((name, kind, target)));
        refused(&with("rootfs-diff.tar", &|bytes| bytes.clone_from(&tar)), says);
    }
    // What is told to be longer than anything here.
    let mut long = tar_of(&vec![("config.dump".to_owned(), vec![b' '])], None);
    let mut head = tar::Header::new_ustar();
    head.as_mut_bytes().copy_from_slice(&long[..512]);
    head.set_size(1 << 50);
    head.set_cksum();
    long[..512].copy_from_slice(head.as_bytes());
    refused(&long, "room for");
    // A bomb: much of nothing.
    let bomb = zstd_of_zeros(1 << 33);
    refused(&bomb, "room for");
    fs::remove_file(&file).expect("removed");
}

/// A tar of one file of zeros, compressed.
fn zstd_of_zeros(bytes: u64) -> Vec<u8> {
    let mut head = tar::Header::new_ustar();
    head.set_path("checkpoint/pages-1.img").expect("a name");
    head.set_entry_type(tar::EntryType::Regular);
    head.set_size(bytes);
    head.set_cksum();
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).expect("an encoder");
    std::io::copy(&mut &head.as_bytes()[..], &mut encoder).expect("written");
    std::io::copy(&mut std::io::repeat(0).take(1 << 20), &mut encoder).expect("written");
    encoder.finish().expect("finished")
}
