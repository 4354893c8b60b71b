//! The destination's work: an empty shell beforehand, then CRIU's restore into a frozen cgroup.
//!
//! The shell is a stand-in container that runc makes and whose process is killed at once: what
//! remains are cgroups with the container's limits, made by this host's own runtime, and the
//! runtime's state in this host's own form. The restored tree takes its place.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use decamp_shared::workload::Section;
use rust_criu::rust_criu_protobuf::rpc::{
    Criu_cg_mode, Criu_network_lock_method, Criu_opts, Criu_req_type, Inherit_fd,
};
use serde_json::Value;

use crate::bundle::Bundle;
use crate::cgroup::Cgroups;
use crate::dump::{ContainerState, NETWORK_KEY, STATE, log_level, ms, tell_log, with_log};
use crate::error::{ContainerError, Result};
use crate::images;
use crate::network::Network;
use crate::runtime::{self, Runtime};
use crate::store::Store;
use crate::streams::Streams;
use crate::swrk::{Notice, Swrk};
use crate::sys;

const LOG: &str = "restore.log";
/// Tasks that CRIU has let go are in the freezer within this.
const STILL_WITHIN: Duration = Duration::from_secs(5);

/// What stands ready before any state has come.
pub(crate) struct Shell {
    /// Cgroups with the limits of the configuration.
    pub(crate) cgroups: Cgroups,
    /// The runtime's state of the stand-in.
    pub(crate) state: Value,
}

/// What a restore needs to know.
pub(crate) struct Restore<'a> {
    pub(crate) criu: &'a Path,
    pub(crate) bundle: &'a Bundle,
    pub(crate) cgroups: &'a Cgroups,
    pub(crate) network: &'a Network,
    pub(crate) streams: &'a Streams,
    pub(crate) store: &'a Store,
}

impl Shell {
    /// Has `runtime` make the stand-in in `store`, and ends its process.
    pub(crate) fn make(
        runtime: &Runtime,
        bundle: &Bundle,
        network: &Network,
        cgroups_path: &str,
        streams: &Streams,
        store: &Store,
    ) -> Result<Self> {
        let begun = Instant::now();
        let directory = store.scratch("stand-in")?;
        let root = directory.join("rootfs");
        let program = root.join("stand-in");
        let config = bundle.for_stand_in(&network.path(), cgroups_path, &root);
        let write = || -> std::io::Result<()> {
            fs::create_dir(&root)?;
            fs::write(&program, "")?;
            fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
            fs::write(directory.join("config.json"), config.to_string())
        };
        write().map_err(ContainerError::io("make a stand-in's bundle"))?;
        let hidden = runtime.hidden_in(&directory.join("runc"));
        let init = hidden.create(&directory, streams.write_end()?)?;
        let ended = sys::pidfd_open(init)
            .and_then(|process| sys::pidfd_kill(process.as_fd()))
            .and_then(|()| sys::reap(init));
        // However it ended: killed, or by itself a moment before.
        let _how = ended.map_err(ContainerError::io("end the stand-in's process"))?;
        let state = hidden.state()?;
        let cgroups = runtime::cgroups(&state)?;
        fs::remove_dir_all(&directory).map_err(ContainerError::io("remove the stand-in"))?;
        tracing::debug!(ms = ms(begun), "Made a stand-in");
        Ok(Self { cgroups, state })
    }
}

impl Restore<'_> {
    /// Starts the CRIU that will restore, so that it is there when the state comes. What it makes is
    /// born in the container's cgroups, because it is in them itself.
    pub(crate) fn begin(&self) -> Result<Swrk> {
        let begun = Instant::now();
        let inherited = [self.network.namespace().as_fd(), self.streams.write_end()?];
        let criu = Swrk::start_waiting(self.criu, &inherited)?;
        self.cgroups.enter(criu.pid())?;
        tracing::debug!(ms = ms(begun), "CRIU waits");
        Ok(criu)
    }

    /// Has `criu` restore a container from its sections, frozen. Gives the number of its first
    /// process, a child of this process. On an error no process of it is left.
    pub(crate) fn run(&self, criu: Swrk, sections: Vec<Section>) -> Result<i32> {
        let begun = Instant::now();
        let images = self.store.fresh_images()?;
        let others = images::unpack(sections, &images)?;
        let state = self.complete(&images, others)?;
        self.cgroups.apply(&state.settings)?;
        self.streams.give_to(state.output_owner)?;
        self.bundle.check_inside()?;
        let root = self.store.mount_root(&self.bundle.rootfs())?;
        tracing::debug!(ms = ms(begun), "Unpacked and completed the images");
        let begun = Instant::now();
        let outcome = self.request(criu, &images, &root, &state).and_then(|init| {
            self.await_stillness()?;
            Ok(init)
        });
        tell_log(&images.join(LOG));
        tracing::debug!(ms = ms(begun), fine = outcome.is_ok(), "CRIU restored");
        outcome.map_err(|error| {
            let error = with_log(error, &images.join(LOG));
            // CRIU kills what it has made; when it was CRIU that died, we do.
            if let Err(error) = self.cgroups.kill_all().and_then(|()| self.cgroups.thaw()) {
                tracing::warn!(%error, "Cannot clean up after a failed restore");
            }
            error
        })
    }

    /// Enters the hidden pages, and uses up every section that is no image.
    fn complete(&self, images: &Path, others: Vec<Section>) -> Result<ContainerState> {
        let (mut state, mut hidden) = (None, None);
        for section in others {
            match section.kind.as_str() {
                STATE if state.is_none() => state = Some(ContainerState::from_section(&section)?),
                images::HIDDEN if hidden.is_none() => hidden = Some(images::read_hidden(&section)?),
                _ => {
                    return Err(ContainerError::section(
                        section.kind,
                        "is not known here, or came twice",
                    ));
                }
            }
        }
        let missing = |kind: &str| ContainerError::section(kind, "is missing");
        let hidden = hidden.ok_or_else(|| missing(images::HIDDEN))?;
        let parent = self.store.parent();
        for (inner, pages) in hidden.iter().filter(|(_, pages)| !pages.is_empty()) {
            if !self.store.has(*inner) {
                return Err(ContainerError::section(
                    images::HIDDEN,
                    format!("speaks of process {inner}, whose memory never came"),
                ));
            }
            images::complete(images, &parent, *inner, pages)?;
        }
        std::os::unix::fs::symlink("../parent", images.join("parent"))
            .map_err(ContainerError::io("link the images to their parent"))?;
        state.ok_or_else(|| missing(STATE))
    }

    fn request(
        &self,
        criu: Swrk,
        images: &Path,
        root: &Path,
        state: &ContainerState,
    ) -> Result<i32> {
        let directory =
            File::open(images).map_err(ContainerError::io(format!("open {}", images.display())))?;
        let mut options = self.options(&directory, root, state)?;
        options.inherit_fd.push(inherit(NETWORK_KEY, self.network.namespace().as_raw_fd()));
        options.inherit_fd.push(inherit(&state.output, self.streams.write_end()?.as_raw_fd()));
        let mut holding = Holding { cgroups: self.cgroups, aside: None };
        let mut held = Ok(());
        let outcome = criu.request(Criu_req_type::RESTORE, options, |notice| {
            tracing::trace!(step = notice.step, "CRIU");
            match notice.step {
                "setup-namespaces" => holding.begin(notice),
                "pre-resume" => held = holding.hold(),
                _ => {}
            }
            held.is_ok()
        });
        held?;
        let init = outcome?.pid;
        if init > 0 {
            Ok(init)
        } else {
            Err(ContainerError::CriuProtocol("restored no process".to_owned()))
        }
    }

    fn await_stillness(&self) -> Result<()> {
        let begun = Instant::now();
        while !self.cgroups.is_frozen()? {
            if begun.elapsed() > STILL_WITHIN {
                return Err(ContainerError::State("The restored tasks are not still".to_owned()));
            }
            thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    fn options(&self, images: &File, root: &Path, state: &ContainerState) -> Result<Criu_opts> {
        let mut options = Criu_opts::new();
        options.set_images_dir_fd(images.as_raw_fd());
        options.set_log_file(LOG.to_owned());
        options.set_log_level(log_level());
        options.set_root(root.display().to_string());
        options.set_rst_sibling(true);
        options.set_notify_scripts(true);
        options.set_evasive_devices(true);
        options.set_manage_cgroups(true);
        options.set_manage_cgroups_mode(Criu_cg_mode::IGNORE);
        options.set_tcp_established(true);
        options.set_network_lock(Criu_network_lock_method::SKIP);
        options.set_file_locks(true);
        for mount in &state.mounts {
            options.external.push(mount.at_restore(self.bundle, self.cgroups)?);
        }
        Ok(options)
    }
}

/// How the restored tasks come to stand still: CRIU, in whose cgroup they are born, leaves it, and
/// what stays is frozen.
struct Holding<'a> {
    cgroups: &'a Cgroups,
    aside: Option<JoinHandle<Result<()>>>,
}

impl Holding<'_> {
    /// The first task exists, and all others will be its children, so CRIU itself need not stay.
    /// On v1 a change of cgroup waits for the kernel (20 ms): let that be while CRIU works.
    fn begin(&mut self, notice: &Notice<'_>) {
        let (cgroups, criu) = (self.cgroups.clone(), notice.criu);
        self.aside = Some(thread::spawn(move || cgroups.step_aside(criu)));
    }

    /// All tasks are restored and held by CRIU: their cgroup is frozen now, so that letting them go
    /// does not let them run.
    ///
    /// CRIU does not heed a refusal at this step. So on an error everything is killed while it is
    /// still held: killed tasks run nothing. If this process dies here, CRIU waits for its answer and
    /// holds them until they are swept.
    fn hold(&mut self) -> Result<()> {
        tracing::debug!("CRIU holds the restored tasks");
        fail::fail_point!("container-hold");
        let never =
            || ContainerError::CriuProtocol("never said that it made namespaces".to_owned());
        let aside = self.aside.take().ok_or_else(never).and_then(|aside| {
            aside
                .join()
                .unwrap_or_else(|_| Err(ContainerError::State("A thread panicked".to_owned())))
        });
        let held = aside.and_then(|()| self.cgroups.freeze_when_free());
        if held.is_err() {
            self.cgroups.kill_all()?;
        }
        held
    }
}

fn inherit(key: &str, descriptor: i32) -> Inherit_fd {
    let mut inherit = Inherit_fd::new();
    inherit.set_key(key.to_owned());
    inherit.set_fd(descriptor);
    inherit
}

/// Where the configuration that a container was started with is kept, and the one for the runtime.
pub(crate) fn oci_directory(place: &decamp_shared::workload::Place) -> PathBuf {
    place.dir.join("oci")
}
