//! What is known of a container, and everything that speaks against a move.

use std::collections::BTreeMap;

use super::Container;
use crate::error::Result;
use crate::facts::{Facts, HostNeeds};
use crate::file_locks;
use crate::huge;
use crate::init::Init;
use crate::landed;
use crate::limits;
use crate::mappings;
use crate::memory;
use crate::mounts;
use crate::obstacles::Subject;
use crate::podman;
use crate::spec::ContainerSpec;
use crate::tmpfs::held;
use crate::volumes;
use crate::ways;

impl Container {
    /// The container as it is looked at for what speaks against a move.
    pub(super) fn subject(&self, init: i32) -> Result<Subject<'_>> {
        let mut pipes = vec![self.streams.key()?];
        pipes.extend(self.streams.input_key()?);
        if let Some(foreign) = &self.foreign {
            pipes.extend(foreign.streams.outputs.iter().chain(&foreign.streams.input).cloned());
        }
        let (cgroups, bundle, network) = (&self.cgroups, &self.bundle, &self.network);
        Ok(Subject { init, cgroups, bundle, network, pipes })
    }

    /// Bytes on the tmpfs mounts that it has for itself, as far as that can be told.
    fn on_tmpfs(&self) -> u64 {
        let Some(init) = self.init.as_ref().map(Init::pid) else { return 0 };
        let given = mounts::external(&self.bundle, init);
        let own = given.and_then(|given| held::own(init, &given));
        own.unwrap_or_default().iter().map(|own| own.used(init)).sum()
    }

    pub(super) fn gather_facts(&mut self) -> Result<Facts> {
        self.note_that_it_runs();
        // A move begins so.
        mappings::prepare();
        let pids = match &self.init {
            Some(_) => self.cgroups.processes()?,
            None => Vec::new(),
        };
        let init = self.init.as_ref().map_or(0, Init::pid);
        let mut obstacles = self.bundle.move_obstacles();
        let found = volumes::found(&self.bundle);
        if obstacles.is_empty() && found.obstacles.is_empty() {
            let bundle = self.bundle.clone().with_volumes(&found.volumes);
            obstacles.extend(landed::obstacle(&bundle));
        }
        obstacles.extend(ways::obstacles(&self.methods, &self.hiding));
        obstacles.extend(limits::obstacle(&pids));
        let made = ContainerSpec::from_json(&self.config.spec)?.podman;
        obstacles.extend(made.as_ref().and_then(podman::restarting::obstacle));
        obstacles.extend(huge::obstacle(&pids));
        let mut own = Vec::new();
        if self.init.is_some() {
            let (seen, against) = podman::own::seen(&self.bundle, init);
            own = seen;
            obstacles.extend(against);
            obstacles.extend(self.subject(init)?.look()?);
            obstacles.extend(mounts::obstacles(&self.bundle, init)?);
            obstacles.extend(volumes::obstacles(&self.bundle, init)?);
            if self.cgroups.is_nested()? {
                obstacles.push("The container made cgroups of its own below its own".to_owned());
            }
        }
        let processes = memory::processes(&pids, init)?;
        let processes: BTreeMap<i32, i32> =
            processes.iter().map(|process| (process.inner, process.pid)).collect();
        let highest = processes.keys().next_back().copied().unwrap_or(0);
        let resident: u64 = pids.iter().map(|pid| memory::resident(*pid)).sum();
        let shared = huge::Shared::of(&pids);
        let moves_live = ways::moves_segments(&self.methods, &self.hiding);
        Ok(Facts {
            host: HostNeeds::of_processes(&pids, highest),
            container: self.runtime.id().to_owned(),
            init,
            processes,
            cgroup: self.cgroups.freezer()?.to_owned(),
            memory_limit: self.cgroups.memory_limit(),
            on_tmpfs: self.on_tmpfs(),
            resident: resident.saturating_add(shared.in_images(moves_live)),
            shared_huge: shared.files,
            unhidden: self.hiding.clone().err(),
            obstacles,
            locks: file_locks::held(&pids, &self.bundle, init),
            own,
        })
    }
}
