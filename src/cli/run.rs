//! `decamp run`: starts a virtual machine or a container.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use decamp_shared::workload::Kind;
use serde_json::{Value, json};

use super::client::Client;
use super::failure::{Failure, chain};
use super::{output, values};
use crate::backend::read_cpu_baseline;
use crate::messages::{RunRequest, WorkloadView};

/// No more of a file is read.
const BASELINE_CAP: u64 = (1 << 20) + 1;

/// Start a virtual machine or a container
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp run vm web --kernel /srv/guest.elf --memory 1G\n\
    Example: decamp run container redis --bundle /srv/redis --net bridge=br0,ip=10.77.1.10/16")]
pub(crate) struct Run {
    #[command(subcommand)]
    kind: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Start a virtual machine from a Linux bzImage or an ELF kernel
    #[command(
        after_help = "Example: decamp run vm web --kernel /boot/vmlinuz --initrd /boot/initrd.img \
        --cmdline console=ttyS0 --cpus 2 --memory 1G"
    )]
    Vm(Vm),
    /// Start a container from an OCI bundle
    #[command(after_help = "Example: decamp run container redis --bundle /srv/redis \
        --net bridge=br0,ip=10.77.1.10/16")]
    Container(Container),
}

#[derive(Debug, Args)]
struct Vm {
    /// Its name, unique on the host
    #[arg(value_parser = values::workload)]
    name: String,
    /// Kernel image
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial ramdisk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "STR", default_value = "", allow_hyphen_values = true)]
    cmdline: String,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=254))]
    cpus: u32,
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = values::size)]
    memory: u64,
    /// Hold it to the CPU of this file, which `decamp cpu baseline` made
    #[arg(long, value_name = "FILE")]
    cpu_baseline: Option<PathBuf>,
    /// Sockets between programs of the guest and of the host
    #[arg(long, value_name = "cid=N", num_args = 0..=1, require_equals = true,
        default_missing_value = "", value_parser = vsock)]
    vsock: Option<Value>,
    /// Disk: a raw file or a block device; `shared` says that other hosts have the very same
    #[arg(long = "disk", value_name = "FILE[,readonly][,shared]", value_parser = disk)]
    disks: Vec<Disk>,
    /// Network interface on a bridge of the host; several times for several
    #[arg(long, value_name = "bridge=BR[,mac=MAC]", value_parser = vm_net)]
    net: Vec<Value>,
}

/// A disk as it was asked for.
#[derive(Clone, Debug, PartialEq)]
struct Disk {
    path: PathBuf,
    readonly: bool,
    shared: bool,
}

#[derive(Debug, Args)]
struct Container {
    /// Its name, unique on the host
    #[arg(value_parser = values::workload)]
    name: String,
    /// OCI bundle: a directory with config.json and the root file system
    #[arg(long, value_name = "DIR")]
    bundle: PathBuf,
    /// OCI runtime
    #[arg(long, default_value = "runc", value_parser = ["runc", "crun"])]
    runtime: String,
    /// Give it a terminal, whose output is in its log
    #[arg(long)]
    tty: bool,
    /// Network interface on a bridge of the host
    #[arg(long, value_name = "bridge=BR,ip=CIDR[,gateway=IP][,mac=MAC]", value_parser = net)]
    net: Option<Value>,
}

impl Run {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let started: WorkloadView = client.post("/v1/workloads", &self.request()?).await?;
        if json {
            output::json(&started);
        } else {
            output::line(format!("{} runs", started.name));
        }
        Ok(0)
    }

    fn request(self) -> Result<RunRequest, Failure> {
        let request = match self.kind {
            What::Vm(vm) => RunRequest { name: vm.name.clone(), kind: Kind::Vm, spec: vm.spec()? },
            What::Container(container) => RunRequest {
                name: container.name,
                kind: Kind::Container,
                spec: json!({
                    "bundle": values::absolute(&container.bundle),
                    "runtime": container.runtime,
                    "tty": container.tty,
                    "net": container.net,
                }),
            },
        };
        Ok(request)
    }
}

impl Vm {
    fn spec(&self) -> Result<Value, Failure> {
        let mut spec = json!({
            "kernel": values::absolute(&self.kernel),
            "initrd": self.initrd.as_deref().map(values::absolute),
            "cmdline": self.cmdline,
            "cpus": self.cpus,
            "memory_bytes": self.memory,
        });
        // Not said when it is not asked for: an older agent knows no such device.
        if let Some(vsock) = &self.vsock {
            spec["vsock"] = vsock.clone();
        }
        if !self.net.is_empty() {
            spec["net"] = self.net.clone().into();
        }
        let disk = |disk: &Disk| {
            let Disk { path, readonly, shared } = disk;
            json!({ "path": values::absolute(path), "readonly": readonly, "shared": shared })
        };
        if !self.disks.is_empty() {
            spec["disks"] = self.disks.iter().map(disk).collect();
        }
        if let Some(path) = &self.cpu_baseline {
            spec["cpu_baseline"] = cpu_baseline(path)?;
        }
        Ok(spec)
    }
}

/// `cid=N`, or nothing, as the VM backend's own words.
fn vsock(text: &str) -> Result<Value, String> {
    if text.is_empty() {
        return Ok(json!({}));
    }
    let cid = text.strip_prefix("cid=").and_then(|number| number.parse::<u32>().ok());
    cid.filter(|cid| (3..u32::MAX).contains(cid))
        .map(|cid| json!({"cid": cid}))
        .ok_or_else(|| format!("{text:?} is not cid=N, with a number from 3 to {}", u32::MAX - 1))
}

/// `FILE[,readonly][,shared]`.
fn disk(text: &str) -> Result<Disk, String> {
    let mut words = text.split(',');
    let path = words.next().filter(|path| !path.is_empty());
    let path =
        path.ok_or_else(|| format!("{text:?} names no file; write FILE[,readonly][,shared]"))?;
    let mut disk = Disk { path: path.into(), readonly: false, shared: false };
    for word in words {
        let said = match word {
            "readonly" => &mut disk.readonly,
            "shared" => &mut disk.shared,
            _ => return Err(format!("{word:?} is not one of readonly, shared")),
        };
        if std::mem::replace(said, true) {
            return Err(format!("{word} is given twice"));
        }
    }
    Ok(disk)
}

/// What a file of `decamp cpu baseline` says.
fn cpu_baseline(path: &Path) -> Result<Value, Failure> {
    let wrong = |why: &dyn std::fmt::Display| {
        Failure::usage(format!("{} is no CPU baseline: {why}", path.display()))
    };
    let file = File::open(path).map_err(|error| wrong(&error))?;
    let mut bytes = Vec::new();
    // One byte more than any has, which is refused as too long.
    file.take(BASELINE_CAP).read_to_end(&mut bytes).map_err(|error| wrong(&error))?;
    read_cpu_baseline(&bytes).map_err(|error| wrong(&chain(&error)))
}

/// `bridge=BR,ip=CIDR[,gateway=IP][,mac=MAC]` as the container backend's own words.
fn net(text: &str) -> Result<Value, String> {
    let net = pairs(text, &["bridge", "ip", "gateway", "mac"], &["bridge", "ip"])?;
    check_ip(&net)?;
    check_mac(&net)?;
    Ok(net)
}

/// `bridge=BR[,mac=MAC]` as the VM backend's own words.
fn vm_net(text: &str) -> Result<Value, String> {
    let net = pairs(text, &["bridge", "mac"], &["bridge"])?;
    check_mac(&net)?;
    Ok(net)
}

/// `KEY=VALUE,...` with the keys `known`, of which those `needed` are there.
fn pairs(text: &str, known: &[&str], needed: &[&str]) -> Result<Value, String> {
    let mut net: Value = known.iter().map(|key| ((*key).to_owned(), Value::Null)).collect();
    for part in text.split(',') {
        let (key, value) =
            part.split_once('=').ok_or_else(|| format!("{part:?} is not KEY=VALUE"))?;
        let slot = net
            .get_mut(key)
            .ok_or_else(|| format!("{key:?} is not one of {}", known.join(", ")))?;
        if !slot.is_null() {
            return Err(format!("{key} is given twice"));
        }
        if value.is_empty() {
            return Err(format!("{key} is empty"));
        }
        *slot = Value::from(value);
    }
    match needed.iter().find(|key| net[**key].is_null()) {
        None => Ok(net),
        Some(&"ip") => Err("ip is missing; write bridge=br0,ip=10.0.0.5/24".into()),
        Some(key) => Err(format!("{key} is missing; write {key}=br0")),
    }
}

fn check_ip(net: &Value) -> Result<(), String> {
    let text = |key: &str| net[key].as_str().unwrap_or_default();
    let ip = text("ip");
    let right = ip.split_once('/').is_some_and(|(address, bits)| {
        address.parse::<std::net::Ipv4Addr>().is_ok()
            && bits.parse::<u8>().is_ok_and(|bits| (1..=32).contains(&bits))
    });
    if !right {
        return Err(format!("{ip:?} is not an IPv4 address with its prefix, as in 10.0.0.5/24"));
    }
    let gateway = text("gateway");
    if !gateway.is_empty() && gateway.parse::<std::net::Ipv4Addr>().is_err() {
        return Err(format!("{gateway:?} is not an IPv4 address"));
    }
    Ok(())
}

fn check_mac(net: &Value) -> Result<(), String> {
    let mac = net["mac"].as_str().unwrap_or_default();
    let pair = |two: &str| two.len() == 2 && two.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !mac.is_empty() && (mac.split(':').count() != 6 || !mac.split(':').all(pair)) {
        return Err(format!("{mac:?} is not a MAC address, as in 02:00:00:00:00:05"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_there_when_they_are_asked_for() {
        let spec = |more: &[&str]| {
            #[derive(Debug, clap::Parser)]
            struct Line {
                #[command(flatten)]
                run: Run,
            }
            let line = [&["run", "vm", "web", "--kernel", "/k"], more].concat();
            let parsed = <Line as clap::Parser>::try_parse_from(line);
            parsed
                .map(|line| line.run.request().expect("no file is read").spec)
                .map_err(|error| error.to_string())
        };
        assert!(spec(&[]).expect("none").get("vsock").is_none());
        assert_eq!(spec(&["--vsock"]).expect("usual")["vsock"], json!({}));
        assert_eq!(spec(&["--vsock=cid=52"]).expect("own")["vsock"], json!({"cid": 52}));
        for wrong in ["cid=2", "cid=4294967295", "52", "cid="] {
            let error = spec(&[&format!("--vsock={wrong}")]).expect_err(wrong);
            assert!(error.contains("from 3 to"), "{error}");
        }
    }

    #[test]
    fn a_disk_is_a_file_and_words() {
        let is = |text, readonly, shared| {
            assert_eq!(disk(text), Ok(Disk { path: "/srv/d.img".into(), readonly, shared }));
        };
        is("/srv/d.img", false, false);
        is("/srv/d.img,readonly", true, false);
        is("/srv/d.img,shared,readonly", true, true);
        for bad in ["", ",readonly", "/d,rw", "/d,", "/d,shared,shared"] {
            assert!(disk(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_network_is_read_whole_or_not_at_all() {
        assert_eq!(
            net("bridge=br0,ip=10.77.1.10/16"),
            Ok(json!({"bridge": "br0", "ip": "10.77.1.10/16", "gateway": null, "mac": null}))
        );
        let full = net("ip=10.0.0.5/24,bridge=br0,gateway=10.0.0.1,mac=02:00:00:00:00:05");
        assert_eq!(full.expect("right")["mac"], "02:00:00:00:00:05");
        for bad in [
            "",
            "br0",
            "bridge=br0",
            "ip=10.0.0.5/24",
            "bridge=br0,ip=10.0.0.5",
            "bridge=br0,ip=10.0.0.5/33",
            "bridge=br0,ip=fd00::1/64",
            "bridge=br0,ip=10.0.0.5/24,gateway=x",
            "bridge=br0,ip=10.0.0.5/24,mac=02:00",
            "bridge=br0,bridge=br1,ip=10.0.0.5/24",
            "bridge=,ip=10.0.0.5/24",
            "bridge=br0,ip=10.0.0.5/24,ip6=fd00::1/64",
        ] {
            assert!(net(bad).is_err(), "{bad}");
        }
        assert_eq!(vm_net("bridge=br0"), Ok(json!({"bridge": "br0", "mac": null})));
        let full = vm_net("mac=02:00:00:00:00:05,bridge=br0").expect("right");
        assert_eq!(full["mac"], "02:00:00:00:00:05");
        for bad in ["", "mac=02:00:00:00:00:05", "bridge=br0,ip=10.0.0.5/24", "bridge=br0,mac=x"] {
            assert!(vm_net(bad).is_err(), "{bad}");
        }
    }
}
