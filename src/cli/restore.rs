//! `decamp restore`: a workload out of a file.

use std::path::PathBuf;

use clap::Args;

use super::archive::{Ended, follow};
use super::client::Client;
use super::failure::Failure;
use super::{output, values};
use crate::messages::RestoreRequest;

/// Restore a workload from a file that `decamp checkpoint`, or podman, wrote
///
/// All of the file is checked before anything is touched. The workload gets its name of then, or --name,
/// and an identity of its own; its files go where they stood then, or where --path says, and nothing may
/// stand there. Restoring a file twice makes two copies, with the same addresses on the network: that
/// nobody runs both is up to you. A name that is taken on this host is refused.
///
/// What `podman container checkpoint --export` wrote becomes a container of decamp's own, in
/// /var/lib/containers/decamp/NAME unless --path says otherwise. This host's podman must have its image, and
/// its network if it had one.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: decamp restore /srv/web.tar.zst --name web-2 --path /srv/web=/srv/web-2"
)]
pub(crate) struct Restore {
    /// The file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Another name
    #[arg(long, value_parser = values::workload)]
    name: Option<String>,
    /// Put files from below OLD below NEW; may be given several times
    #[arg(long, value_name = "OLD=NEW", value_parser = values::mapping)]
    path: Vec<(PathBuf, PathBuf)>,
}

impl Restore {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let request = RestoreRequest {
            file: values::absolute(&self.file),
            name: self.name,
            paths: self.path,
        };
        match follow(client, "/v1/restore", &request, json).await? {
            Ended::Restored(view) if json => output::json(&view),
            Ended::Restored(view) => {
                output::line(format!(
                    "{} runs, restored from {}",
                    view.name,
                    request.file.display()
                ));
            }
            Ended::Checkpointed(_) => {
                return Err(Failure::other("The agent answered something else"));
            }
        }
        Ok(0)
    }
}
