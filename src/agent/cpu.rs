//! What CPU this host and others can all offer a guest: each is asked, and what they say is put together.

use std::collections::BTreeSet;

use decamp_shared::session::asking::ask_cpu;
use decamp_shared::workload::{Kind, Refusal, RefusalCode};
use futures_util::future::join_all;

use super::Agent;
use super::answer::{Answer, Result, chain};
use super::workloads::blocking;
use crate::backend::cpu_baseline;
use crate::messages::{BaselineAnswer, BaselineRequest};

impl Agent {
    /// The widest CPU that this host and those of `request` have in common.
    ///
    /// # Errors
    /// When one of them is unknown, cannot be asked or cannot say; all of them are named.
    pub(crate) async fn cpu_baseline(&self, request: BaselineRequest) -> Result<BaselineAnswer> {
        let own = &self.config.name;
        let others: BTreeSet<&String> =
            request.hosts.iter().filter(|host| host.split(':').next() != Some(own)).collect();
        let peers: Vec<_> =
            others.into_iter().map(|host| self.peer(host)).collect::<Result<_>>()?;
        let backend = self.backends.of(Kind::Vm)?;
        let here = blocking(move || backend.cpu_offer()).await?.map_err(|error| chain(&error));
        let asked = peers.iter().map(|peer| async {
            let offer = ask_cpu(&self.dialer, peer).await.map_err(|error| chain(&error));
            (peer.name.clone(), offer)
        });
        let said = [vec![(own.clone(), here)], join_all(asked).await].concat();
        let (mut offers, mut refusals) = (Vec::new(), Vec::new());
        for (host, offer) in said {
            match offer {
                Ok(offer) => offers.push((host, offer)),
                Err(why) => {
                    let text = format!("{host} does not say what CPU it can offer: {why}");
                    refusals.push(Refusal::new(RefusalCode::Cpu, text));
                }
            }
        }
        if !refusals.is_empty() {
            return Err(Answer::refused_for("No CPU baseline", refusals));
        }
        cpu_baseline(&offers)
            .map_err(|error| Answer::refused(format!("No CPU baseline: {}", chain(&error))))
    }
}
