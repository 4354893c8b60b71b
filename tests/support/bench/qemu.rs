//! The peer of the VM benchmark: the distribution's QEMU on KVM, one on each host, migrating by
//! multifd with as many channels as we have streams. How it is started and told what to do; what is
//! measured is known in `vm`.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{BenchError, Result};
use crate::hosts::{DESTINATION, DESTINATION_ADDRESS, Hosts, Reaped, SOURCE, copy};
use crate::qmp::Qmp;

/// The guest, as both sides run it.
pub(crate) struct Guest<'a> {
    /// Command line.
    pub(crate) cmdline: &'a str,
    /// Memory in MiB.
    pub(crate) memory_mib: u32,
}

/// Two QEMUs, the second waiting for the guest of the first.
pub(crate) struct Qemu {
    source: Qmp,
    destination: Qmp,
    consoles: [PathBuf; 2],
    // Last, so that the monitors are closed before the processes go.
    _processes: [Reaped; 2],
}

/// Pages go over as many connections as ours do by default.
const CHANNELS: u32 = 2;
const PORT: u16 = 47420;
/// Where sockets and certificates are within a host.
const PLACE: &str = "run/bench";

impl Qemu {
    /// What it is and how it is used, for the result.
    pub(crate) fn describe(tls: bool) -> Result<String> {
        let mut command = std::process::Command::new("qemu-system-x86_64");
        let said = crate::hosts::done(command.arg("--version"))?;
        let version = said.split_whitespace().nth(3).unwrap_or("of unknown version");
        let tls = if tls { ", TLS" } else { "" };
        Ok(format!("QEMU {version} (KVM, multifd, {CHANNELS} channels{tls})"))
    }

    /// Starts both, the guest at the source. The guest's image is `/srv/guest.elf` on both hosts.
    pub(crate) fn start(hosts: &Hosts, guest: &Guest<'_>, tls: bool) -> Result<Self> {
        let [source, destination] =
            [(SOURCE, "client"), (DESTINATION, "server")].map(|(host, endpoint)| {
                let mut extra = Vec::new();
                if host == DESTINATION {
                    extra.extend(["-incoming".to_owned(), "defer".to_owned()]);
                }
                if tls {
                    place_certificates(hosts, host, endpoint)?;
                    extra.push("-object".to_owned());
                    extra.push(format!(
                        "tls-creds-x509,id=tls0,dir=/{PLACE}/pki,endpoint={endpoint},verify-peer=on"
                    ));
                }
                start(hosts, host, guest, &extra)
            });
        let (source, destination) = (source?, destination?);
        let place = |host| Ok::<_, BenchError>(hosts.root(host)?.join(PLACE));
        let (here, there) = (place(SOURCE)?, place(DESTINATION)?);
        let mut qemu = Self {
            source: Qmp::connect(SOURCE, &here.join("qmp"))?,
            destination: Qmp::connect(DESTINATION, &there.join("qmp"))?,
            consoles: [here.join("console"), there.join("console")],
            _processes: [source, destination],
        };
        qemu.configure(tls)?;
        Ok(qemu)
    }

    /// The consoles' sockets, the source's first.
    pub(crate) fn consoles(&self) -> [PathBuf; 2] {
        self.consoles.clone()
    }

    /// Moves the guest. When the command was given, how long it took until QEMU said that it had
    /// completed, and what QEMU says of it.
    pub(crate) fn migrate(&mut self) -> Result<(Instant, Duration, Value)> {
        let uri = json!({"uri": format!("tcp:{DESTINATION_ADDRESS}:{PORT}")});
        let started = Instant::now();
        self.source.ask("migrate", uri)?;
        self.source.await_completed()?;
        let wall = started.elapsed();
        let said = self.source.ask("query-migrate", json!({}))?;
        Ok((started, wall, said))
    }

    fn configure(&mut self, tls: bool) -> Result<()> {
        for (is_source, monitor) in [(true, &mut self.source), (false, &mut self.destination)] {
            let on = |name: &str| json!({"capability": name, "state": true});
            monitor.ask(
                "migrate-set-capabilities",
                json!({"capabilities": [on("multifd"), on("events")]}),
            )?;
            let mut parameters = json!({
                "multifd-channels": CHANNELS,
                "max-bandwidth": 100u64 << 30,
                "downtime-limit": 300,
            });
            if tls {
                parameters["tls-creds"] = json!("tls0");
            }
            if tls && is_source {
                parameters["tls-hostname"] = json!(DESTINATION);
            }
            monitor.ask("migrate-set-parameters", parameters)?;
        }
        let uri = json!({"uri": format!("tcp:{DESTINATION_ADDRESS}:{PORT}")});
        self.destination.ask("migrate-incoming", uri)?;
        Ok(())
    }
}

fn start(hosts: &Hosts, host: &str, guest: &Guest<'_>, extra: &[String]) -> Result<Reaped> {
    let place = hosts.root(host)?.join(PLACE);
    let failed = || BenchError::io(format!("prepare {}", place.display()));
    fs::create_dir_all(&place).map_err(failed())?;
    for socket in ["qmp", "console"] {
        // A socket that an earlier one left.
        let _ = fs::remove_file(place.join(socket));
    }
    let errors = File::create(place.join("errors")).map_err(failed())?;
    let child = hosts
        .command(host, "qemu-system-x86_64")
        .args(["-nodefaults", "-M", "pc", "-accel", "kvm", "-cpu", "host,-arch-capabilities"])
        .args(["-display", "none", "-no-reboot", "-kernel", "/srv/guest.elf"])
        .args(["-append", guest.cmdline, "-m", &guest.memory_mib.to_string()])
        .arg("-chardev")
        .arg(format!("socket,id=s0,path=/{PLACE}/console,server=on,wait=off"))
        .args(["-serial", "chardev:s0", "-qmp"])
        .arg(format!("unix:/{PLACE}/qmp,server=on,wait=off"))
        .args(extra)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors)
        .spawn()
        .map_err(BenchError::io(format!("start QEMU on {host}")))?;
    Ok(Reaped(child))
}

/// The hosts' own certificates, under the names that QEMU wants.
fn place_certificates(hosts: &Hosts, host: &str, endpoint: &str) -> Result<()> {
    let (from, to) = (hosts.certificates(), hosts.root(host)?.join(PLACE).join("pki"));
    fs::create_dir_all(&to).map_err(BenchError::io(format!("make {}", to.display())))?;
    copy(&from.join("ca.pem"), &to.join("ca-cert.pem"))?;
    copy(&from.join(format!("{host}.pem")), &to.join(format!("{endpoint}-cert.pem")))?;
    copy(&from.join(format!("{host}.key")), &to.join(format!("{endpoint}-key.pem")))
}
