//! Saving: CRIU's dump of a container that stands still, and what goes along with it as sections.

use std::time::Instant;

use decamp_shared::workload::Section;

use super::{Container, not_paused};
use crate::dump::{self, ContainerState, Dump, Dumping, ms};
use crate::error::{ContainerError, Result};
use crate::hiding::Hidden;
use crate::input::Rest;
use crate::mounts;
use crate::tmpfs::Tree;
use crate::ways;

impl Container {
    /// Ends a CRIU that still has its hands on the tree; nobody wants what it dumps.
    pub(crate) fn let_go(&mut self) {
        let dumping = self.paused.as_mut().and_then(|paused| paused.dumping.take());
        if let Some(Err(error)) = dumping.map(Dumping::call_off) {
            tracing::debug!(%error, "A dump that nobody wanted any more failed");
        }
    }

    /// Has CRIU begin to dump, unless it did in this pause.
    pub(super) fn begin_dump(&mut self) -> Result<()> {
        let (init, terminal) = (self.init()?.pid(), self.has_terminal());
        let Some(paused) = &mut self.paused else { return Ok(()) };
        if paused.dumping.is_some() {
            return Ok(());
        }
        paused.mounts = mounts::external(&self.bundle, init)?;
        // Some of them may turn out to be CRIU's, and their files with them.
        paused.trees = self.segments.trees();
        let hidden = Hidden { ranges: paused.ranges.clone(), segments: self.segments.hidden() };
        let dump = Dump {
            criu: self.config.tools.criu.clone(),
            init,
            cgroups: self.cgroups.clone(),
            network: self.network.namespace_again()?,
            for_file: ways::is_for_file(&self.methods),
            mounts: paused.mounts.clone(),
            external: paused.trees.iter().map(Tree::at_dump).collect(),
            hidden: self.hiding.as_ref().ok().map(|way| (*way, hidden)),
            images: self.store.fresh_images()?,
            covers: self.store.fresh_covers()?,
            terminal,
        };
        paused.dumping = Some(dump.begin()?);
        Ok(())
    }

    pub(super) fn dump(&mut self) -> Result<Vec<Section>> {
        let begun = Instant::now();
        self.begin_dump()?;
        let terminal = self.has_terminal();
        self.hidden()?;
        let paused = self.paused.as_mut().ok_or_else(not_paused)?;
        paused.dumping.take().ok_or_else(not_paused)?.finish()?;
        let mut state = ContainerState {
            output: self.streams.key()?,
            output_owner: self.streams.owner()?,
            mounts: paused.mounts.clone(),
            second_output: None,
            input: self.streams.input_key()?,
            input_rest: Vec::new(),
            input_ended: false,
            settings: self.cgroups.settings(),
            terminal,
            eager: false,
        };
        if let Some(foreign) = &self.foreign {
            foreign.streams.enter(&mut state);
        }
        let pids = self.cgroups.processes()?;
        let rest = state.input.as_ref().map(|key| Rest::of(&pids, key)).transpose()?.flatten();
        match rest {
            Some(rest) => (state.input_rest, state.input_ended) = (rest.bytes, rest.ended),
            // Nobody has it any more.
            None => state.input = None,
        }
        let images = self.store.images();
        let hidden = paused.hidden.as_deref().unwrap_or_default();
        let aliases = self.forked.aliases();
        if !paused.harvested && !aliases.is_empty() {
            return Err(ContainerError::State(
                "What its processes share was not looked at since it stands still".to_owned(),
            ));
        }
        let (moved, for_file) = (self.segments.moved(), ways::is_for_file(&self.methods));
        let hidden = (hidden, &aliases);
        let sections = dump::sections(&images, hidden, &moved, &paused.trees, &state, for_file);
        // The images are in the sections now; twice would be twice the memory.
        self.store.drop_images();
        tracing::debug!(ms = ms(begun), "Saved");
        sections
    }

    fn has_terminal(&self) -> bool {
        self.terminal.is_some()
            || self.foreign.as_ref().is_some_and(|foreign| foreign.streams.terminal)
    }
}
