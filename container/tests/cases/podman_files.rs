//! What containers of podman have beside their root file system: volumes, terminals, and what podman itself mounts,
//! moved with them.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use decamp_shared::workload::{FileRole, FileTree};
use serde_json::json;

use crate::podman::{Pod, await_count, await_status, import, inspect, last_count, set_up};
use crate::runtimes::{does, says};
use crate::support::{Host, await_that, copy_pages, program};

/// A volume of podman's, a directory and a file of the host, and two file systems in memory. One podman stands
/// for two: the next host has the volume under another name.
pub(crate) fn podman_volumes_go_along(host: &Host) {
    set_up(host);
    let volume = |name: &str| {
        let point = says("podman", &["volume", "inspect", "--format", "{{.Mountpoint}}", name]);
        PathBuf::from(point.trim())
    };
    does("podman", &["volume", "create", "--label=k=v", "pv-data"]);
    let room = host.directory().join("pv-room");
    fs::create_dir_all(room.join("conf")).expect("a directory");
    fs::write(room.join("conf/file"), "of the host\n").expect("written");
    fs::write(room.join("one"), "one\n").expect("written");
    let mounts = [
        "--volume=pv-data:/vol".to_owned(),
        format!("--volume={}:/conf:ro", room.join("conf").display()),
        format!("--volume={}:/etc/one", room.join("one").display()),
        "--tmpfs=/x:size=1m".to_owned(),
        "--mount=type=tmpfs,destination=/y".to_owned(),
    ];
    // Replaced in one step, so that no reader ever sees half a number, and by another process, so that the first one's
    // streams are what they are.
    let line = "i=0; while :; do i=$((i+1)); echo $i; for at in vol x y; do \
        /bin/busybox sh -c \"echo $i >/$at/new; /bin/busybox mv /$at/new /$at/count\"; done; sleep 0.1; done";
    let mut pod = Pod::start(host, "pv", &mounts.each_ref().map(String::as_str), line);
    await_count(pod.name(), 2);
    let here = volume("pv-data");
    chown(&here, Some(33), Some(44)).expect("given away");
    fs::set_permissions(&here, fs::Permissions::from_mode(0o1770)).expect("changed");
    pod.adopt();
    assert_eq!(pod.spot.spec["podman"]["volumes"][0]["name"], "pv-data");
    pod.spot.spec["podman"]["volumes"][0]["name"] = json!("pw-data");
    let data = here.ancestors().nth(2).expect("where volumes are").join("pw-data/_data");
    let moved = host.directory().join("pv-moved");
    let place = |tree: &FileTree| match tree.role() {
        FileRole::Bundle => moved.join("files"),
        FileRole::Volume if Path::new(&tree.path) == here => data.clone(),
        _ => moved.join(Path::new(&tree.path).file_name().expect("a name")),
    };
    let there = pod.spot.twin("pw");
    let name = there.place.name.as_str();
    let has_volume = || {
        let exists = Command::new("podman").args(["volume", "exists", "pw-data"]).status();
        exists.expect("podman").success()
    };
    // What a sweep goes by.
    let would_go = || {
        let mark = fs::read_to_string(there.place.dir.join("container.claim")).expect("a mark");
        mark.contains("pw-data")
    };
    for comes in [false, true] {
        let mut source = pod.spot.source();
        let mut destination = there.prepare_at(&mut *source, place);
        assert!(has_volume(), "podman made none");
        assert!(would_go(), "nobody knows of the volume");
        assert!(!moved.join("one").exists() && !moved.join("conf").exists(), "something stands in");
        if !comes {
            destination.discard().expect("discard");
            assert!(!has_volume(), "podman kept a volume that did not come");
            host.assert_nothing_left("pw");
            continue;
        }
        source.pause().expect("pause");
        copy_pages(&mut *source, &mut *destination);
        for tree in source.manifest().expect("a manifest").files {
            let to = place(&tree);
            fs::create_dir_all(to.parent().expect("a parent")).expect("a directory");
            let from =
                if tree.role() == FileRole::VolumeFile { tree.path } else { tree.path + "/." };
            does("cp", &["-a", &from, to.to_str().expect("UTF-8")]);
        }
        destination.load(source.save().expect("save")).expect("load");
        source.fence(1).expect("fence");
        destination.activate(1).expect("activate");
        assert!(!would_go(), "what it writes would be removed if its keeper died");
        source.release().expect("release");
    }
    await_status(pod.name(), "exited");
    let before = last_count(pod.name());
    await_count(name, before + 3);
    let reads = |path: &str| says("podman", &["exec", name, "/bin/busybox", "cat", path]);
    for path in ["/vol/count", "/x/count", "/y/count"] {
        assert!(reads(path).trim().parse::<u64>().expect("a number") > before, "{path}");
    }
    assert_eq!((reads("/conf/file"), reads("/etc/one")), ("of the host\n".into(), "one\n".into()));
    let left = fs::read_to_string(here.join("count")).expect("a count");
    assert!(left.trim().parse::<u64>().expect("a number") <= before + 1, "it wrote where it was");
    let looks = fs::metadata(&data).expect("the volume");
    assert_eq!((looks.uid(), looks.gid(), looks.mode() & 0o7777), (33, 44, 0o1770));
    let said = inspect(name);
    let mounted = said["Mounts"].as_array().expect("mounts").iter();
    let mounted = mounted.map(|mount| {
        let text = |key: &str| mount[key].as_str().unwrap_or_default().to_owned();
        (text("Destination"), text("Type"), text("Name"), mount["RW"] == true)
    });
    let mut mounted: Vec<_> = mounted.collect();
    mounted.sort();
    let expected = [
        ("/conf", "bind", "", false),
        ("/etc/one", "bind", "", true),
        ("/vol", "volume", "pw-data", true),
    ];
    let expected = expected.map(|(at, kind, name, rw)| (at.into(), kind.into(), name.into(), rw));
    assert_eq!(mounted, expected);
    let label = says("podman", &["volume", "inspect", "--format", "{{.Labels.k}}", "pw-data"]);
    assert_eq!(label.trim(), "v");
    // What podman starts again has them too, by itself.
    does("podman", &["stop", "--time", "0", name]);
    there.await_exit();
    does("podman", &["start", name]);
    await_status(name, "running");
    assert_eq!(reads("/conf/file"), "of the host\n");
    does("podman", &["rm", "-f", "-t", "0", name]);
    assert!(has_volume(), "it went with its container");
    drop(pod);
    does("podman", &["volume", "rm", "pv-data", "pw-data"]);
}

/// `conmon` has the terminal at the next host, and whoever attaches types into it; here nothing is left of a
/// container that was to be removed when it ends.
pub(crate) fn podman_terminal_goes_along(host: &Host) {
    let line = "(i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done) & exec /bin/busybox cat >/data/typed";
    let more = ["--tty", "--interactive", "--rm"];
    let mut pod = Pod::start(host, "pt", &more, line);
    await_count(pod.name(), 2);
    pod.adopt();
    let there = pod.spot.twin("pu");
    pod.spot.move_live(&there, 1);
    let name = there.place.name.as_str();
    let exists = |name: &str| {
        let exists = Command::new("podman").args(["container", "exists", name]).status();
        exists.expect("podman").success()
    };
    await_that("podman to remove it here", || !exists(pod.name()));
    await_status(name, "running");
    let count = last_count(name);
    await_count(name, count + 3);
    let said = inspect(name);
    assert_eq!(
        (&said["Config"]["Tty"], &said["HostConfig"]["AutoRemove"]),
        (&json!(true), &json!(true))
    );
    let mut attached = Command::new("podman")
        .args(["attach", "--sig-proxy=false", name])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("podman attach");
    attached.stdin.as_mut().expect("a pipe").write_all(b"typed\n").expect("types");
    let typed = || says("podman", &["exec", name, "/bin/busybox", "cat", "/data/typed"]);
    await_that("what is typed", || typed().contains("typed"));
    let _ = attached.kill().and_then(|()| attached.wait());
    does("podman", &["stop", "--time", "0", name]);
    there.await_exit();
    await_that("podman to remove it", || !exists(name));
    host.assert_nothing_left("pt");
}

/// The program of `--init` and a secret in two places are those of the next podman, which has to have the same.
pub(crate) fn podman_init_and_secrets_go_along(host: &Host) {
    if program("catatonit").is_none() {
        return host.skip("needs catatonit (tests/setup)");
    }
    set_up(host);
    let keep = |contents: &str| {
        let line = format!("echo {contents} | podman secret create po-key -");
        does("sh", &["-c", &line]);
    };
    keep("word");
    let twice = ["--secret=po-key", "--secret=po-key,target=/opt/key,uid=1234,mode=0440"];
    let line = "exec 3</run/secrets/po-key; i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";
    let mut pod = Pod::start(host, "po", &[&["--init"][..], &twice].concat(), line);
    await_count(pod.name(), 2);
    pod.adopt();
    let nowhere = Path::new("/nowhere");
    assert_eq!(pod.refused_there(nowhere), [""; 0]);
    let refuses = |says: &str| {
        let against = pod.refused_there(nowhere);
        // The secret is in two places.
        let all = against.iter().all(|text| text.contains(says) && !text.contains("word"));
        assert!(!against.is_empty() && all, "{says:?} is not in {against:?}");
    };
    does("podman", &["secret", "rm", "po-key"]);
    refuses("podman secret create po-key");
    keep("ward");
    refuses("secret po-key there is another than the one in the container");
    does("podman", &["secret", "rm", "po-key"]);
    keep("word");
    let conf = "/etc/containers/containers.conf";
    let text = fs::read_to_string(conf).expect("a configuration");
    let other = text.replace("[containers]", "[containers]\ninit_path = \"/bin/busybox\"");
    fs::write(conf, other).expect("written");
    refuses("program of --init there, /bin/busybox, is another");
    fs::write(conf, text).expect("written");
    let stray = ["exec", pod.name(), "/bin/busybox", "touch", "/run/secrets/stray"];
    does("podman", &stray);
    refuses("/run/secrets/stray is in a directory that podman makes");
    does("podman", &[&stray[..3], &["rm", "/run/secrets/stray"]].concat());
    let there = pod.spot.twin("pz");
    pod.spot.move_live(&there, 1);
    let name = there.place.name.as_str();
    await_count(name, last_count(pod.name()) + 3);
    let within =
        |words: &[&str]| says("podman", &[&["exec", name, "/bin/busybox"], words].concat());
    // podman has one file for both.
    let looks = within(&["stat", "-c", "%u %g %a %s", "/run/secrets/po-key", "/opt/key"]);
    assert_eq!(looks, "1234 0 440 5\n1234 0 440 5\n");
    assert_eq!(within(&["cat", "/run/secrets/po-key", "/opt/key"]), "word\nword\n");
    let first = within(&["cat", "/proc/1/cmdline"]);
    assert!(first.starts_with("/run/podman-init\0--\0/bin/sh\0"), "{first:?}");
    let (was, said) = (inspect(pod.name()), inspect(name));
    for what in ["/HostConfig/Init", "/Path", "/Args", "/Config/Secrets/1/Name"] {
        assert_eq!(said.pointer(what), was.pointer(what), "{what}");
    }
    // What podman starts again has all of it, by itself.
    does("podman", &["stop", "--time", "0", name]);
    there.await_exit();
    does("podman", &["start", name]);
    await_status(name, "running");
    assert_eq!(within(&["cat", "/opt/key"]), "word\n");
    does("podman", &["rm", "-f", "-t", "0", name]);
    drop(pod);
    does("podman", &["secret", "rm", "po-key"]);
    host.assert_nothing_left("pz");
}

/// A user that its image does not name is in the `passwd` that podman mounts where it cannot change the image's.
pub(crate) fn podman_names_its_user_anew(host: &Host) {
    set_up(host);
    let spot = host.shell("pc", "true");
    let passwd = spot.bundle().join("rootfs/etc/passwd");
    fs::create_dir_all(passwd.parent().expect("a parent")).expect("a directory");
    fs::write(&passwd, "root:x:0:0::/:/bin/sh\n").expect("written");
    import(host, "named", &spot, &[]);
    let name = spot.place.name.clone();
    let options = ["--detach", "--network=none", "--read-only", "--user=1234:55", "--name", &name];
    let line = "exec 3</etc/passwd; i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";
    let last = ["localhost/named", "/bin/sh", "-c", line];
    does("podman", &[&["run"][..], &options, &last].concat());
    let mut pod = Pod { spot };
    await_count(pod.name(), 2);
    pod.adopt();
    let there = pod.spot.twin("pd");
    pod.spot.move_live(&there, 1);
    let name = there.place.name.as_str();
    await_count(name, last_count(pod.name()) + 3);
    let reads = |name: &str| says("podman", &["exec", name, "/bin/busybox", "cat", "/etc/passwd"]);
    let named = reads(name);
    assert!(named.starts_with("root:") && named.contains(":1234:55:"), "{named}");
    does("podman", &["rm", "-f", "-t", "0", name]);
    host.assert_nothing_left("pd");
}
