//! `decamp logs`: what a workload printed.

use clap::Args;
use hyper::Method;

use super::client::Client;
use super::failure::Failure;
use super::{output, values};

/// Print what a workload printed: a guest's serial console, a container's output
#[derive(Debug, Args)]
#[command(after_help = "Example: decamp logs web --follow")]
pub(crate) struct Logs {
    /// Its name
    #[arg(value_parser = values::workload)]
    name: String,
    /// Go on printing until it ends or moves away
    #[arg(long, short)]
    follow: bool,
}

impl Logs {
    pub(crate) async fn run(self, client: &Client, json: bool) -> Result<u8, Failure> {
        let follow = if self.follow { "?follow=1" } else { "" };
        let path = format!("/v1/workloads/{}/logs{follow}", self.name);
        let mut stream = client.stream(Method::GET, &path, None::<&()>).await?;
        if json {
            while let Some(line) = stream.line().await? {
                let text = String::from_utf8_lossy(&line);
                output::line(serde_json::json!({ "line": text }).to_string());
            }
        } else {
            while let Some(piece) = stream.piece().await? {
                output::raw(&piece);
            }
        }
        Ok(0)
    }
}
