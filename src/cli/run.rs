//! `decamp run`: starts a virtual machine or a container.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use decamp_shared::workload::Kind;
use serde_json::{Value, json};

use super::client::Client;
use super::failure::Failure;
use super::{output, values};
use crate::messages::{RunRequest, WorkloadView};

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
    /// Start a virtual machine from an ELF kernel with a PVH entry
    #[command(after_help = "Example: decamp run vm web --kernel /srv/guest.elf --memory 1G")]
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
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    cpus: u32,
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = values::size)]
    memory: u64,
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
        let started: WorkloadView = client.post("/v1/workloads", &self.request()).await?;
        if json {
            output::json(&started);
        } else {
            output::line(format!("{} runs", started.name));
        }
        Ok(0)
    }

    fn request(self) -> RunRequest {
        match self.kind {
            What::Vm(vm) => RunRequest {
                name: vm.name,
                kind: Kind::Vm,
                spec: json!({
                    "kernel": values::absolute(&vm.kernel),
                    "initrd": vm.initrd.as_deref().map(values::absolute),
                    "cmdline": vm.cmdline,
                    "cpus": vm.cpus,
                    "memory_bytes": vm.memory,
                }),
            },
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
        }
    }
}

/// `bridge=BR,ip=CIDR[,gateway=IP][,mac=MAC]` as the container backend's own words.
fn net(text: &str) -> Result<Value, String> {
    let mut net = json!({"bridge": null, "ip": null, "gateway": null, "mac": null});
    for part in text.split(',') {
        let (key, value) =
            part.split_once('=').ok_or_else(|| format!("{part:?} is not KEY=VALUE"))?;
        let slot = net
            .get_mut(key)
            .ok_or_else(|| format!("{key:?} is not one of bridge, ip, gateway, mac"))?;
        if !slot.is_null() {
            return Err(format!("{key} is given twice"));
        }
        if value.is_empty() {
            return Err(format!("{key} is empty"));
        }
        *slot = Value::from(value);
    }
    for needed in ["bridge", "ip"] {
        if net[needed].is_null() {
            return Err(format!("{needed} is missing; write bridge=br0,ip=10.0.0.5/24"));
        }
    }
    check_addresses(&net)?;
    Ok(net)
}

fn check_addresses(net: &Value) -> Result<(), String> {
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
    let mac = text("mac");
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
    }
}
