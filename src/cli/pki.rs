//! `decamp pki`: certificates for hosts.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::failure::{Failure, chain};
use super::output;
use crate::pki::{self, Issued, PkiError};

/// Make certificates for hosts
///
/// Agents speak only to agents whose certificate comes from the same authority. Nothing that exists
/// is overwritten.
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp pki init /etc/decamp/pki\n\
    Example: decamp pki issue /etc/decamp/pki edge-2 --address 10.0.0.2")]
pub(crate) struct Pki {
    #[command(subcommand)]
    verb: PkiVerb,
}

#[derive(Debug, Subcommand)]
enum PkiVerb {
    /// Make an authority: DIR/ca.pem and DIR/ca.key, good for ten years
    #[command(after_help = "Example: decamp pki init /etc/decamp/pki")]
    Init {
        /// Where to; created when missing. Keep it off the hosts: only ca.pem goes there
        dir: PathBuf,
    },
    /// Issue a host's certificate: DIR/NAME.pem and DIR/NAME.key, good for a year
    #[command(after_help = "Example: decamp pki issue /etc/decamp/pki edge-2 --address 10.0.0.2")]
    Issue {
        /// The authority's directory
        dir: PathBuf,
        /// Name of the host, as in its agent's configuration
        name: String,
        /// An address of the host to name beside it
        #[arg(long, value_name = "IP|DNS")]
        address: Vec<String>,
    },
}

impl Pki {
    pub(crate) fn run(self, json: bool) -> Result<u8, Failure> {
        let (issued, hint) = match self.verb {
            PkiVerb::Init { dir } => {
                let hint = format!("Next: decamp pki issue {} HOST", dir.display());
                (pki::init(&dir), hint)
            }
            PkiVerb::Issue { dir, name, address } => {
                let hint = format!(
                    "Copy both to {name}, together with {}, and name them in its agent.toml",
                    dir.join("ca.pem").display()
                );
                (pki::issue(&dir, &name, &address), hint)
            }
        };
        let Issued { certificate, key } = issued.map_err(|error| failure(&error))?;
        if json {
            output::json(&Issued { certificate, key });
        } else {
            output::line(format!("certificate   {}", certificate.display()));
            output::line(format!("key           {}", key.display()));
            output::line(hint);
        }
        Ok(0)
    }
}

fn failure(error: &PkiError) -> Failure {
    let text = chain(error);
    match error {
        PkiError::Name(_) => Failure::usage(text),
        PkiError::Exists(_) | PkiError::NoAuthority(_) => Failure::refused(text),
        PkiError::File { .. } | PkiError::Certificate { .. } | PkiError::Authority { .. } => {
            Failure::other(text)
        }
    }
}
