//! Workloads that somebody else started: taking charge of one while it runs, and giving it back as it
//! runs. Whatever goes wrong, it runs on as if nothing had been.

use std::sync::Arc;

use decamp_shared::workload::{Backend, Foreign, Kind, Place};
use serde_json::Value;

use super::Agent;
use super::answer::{Answer, Result};
use super::registry::Workload;
use super::supervise::exit_record;
use super::workloads::{blocking, gone};
use crate::backend::is_adopted;
use crate::messages::{AdoptRequest, State, WorkloadView, is_workload_name};

impl Agent {
    /// Takes charge of a container that runs already and returns when its keeper has it.
    pub(crate) async fn adopt_new(&self, request: AdoptRequest) -> Result<WorkloadView> {
        let what = request.what;
        let backend = self.backends.of(Kind::Container)?;
        let refused =
            |refusals| Answer::refused_for(&format!("{what} cannot be adopted"), refusals);
        let Foreign { name, spec } = self.look_at(&backend, &what).await?.map_err(refused)?;
        if !is_workload_name(&name) {
            return Err(Answer::refused(format!(
                "{what} cannot be adopted: {name:?} cannot be the name of a workload (1 to 40 of a-z, \
                 0-9, `_`, `.` and `-`, beginning with a letter or digit)"
            )));
        }
        let _claim = self.claim(&name, "being adopted").await?;
        if let Some(taken) = self.registry.get(&name)? {
            let how = match is_adopted(&taken.spec) && taken.state == State::Running {
                true => "it is adopted already".to_owned(),
                false => format!(
                    "the name {name} is taken by a workload that is {}: `decamp rm {name}` first, or \
                     give the container another name",
                    taken.state
                ),
            };
            return Err(Answer::refused(format!("{what} cannot be adopted: {how}")));
        }
        let uuid = uuid::Uuid::new_v4().to_string();
        let workload = Workload::new(&name, &uuid, Kind::Container, spec, State::Starting);
        let place = self.place(&workload);
        self.state_dir.make_place(&place)?;
        self.registry.create(&workload)?;
        let answer = match self.take_charge(&backend, &workload, &place).await {
            Ok(running) => return Ok(running.view()),
            Err(answer) => answer,
        };
        self.forget_unless_kept(&name, &place).await?;
        Err(answer)
    }

    /// Gives an adopted workload, which runs, back. False: it had just ended by itself, which is not noted yet.
    pub(crate) async fn let_go(&self, workload: &Workload, place: &Place) -> Result<bool> {
        let backend = self.backends.of(workload.kind)?;
        let given = give_back(backend, place.clone()).await;
        match (given, gone(place).await?) {
            (Ok(()), true) => Ok(true),
            (Err(_), true) if exit_record(place).is_some() => Ok(false),
            (Err(answer), _) => Err(answer),
            (Ok(()), false) => Err(Answer::Failed(format!(
                "The keeper of {} does not end: try again",
                workload.name
            ))),
        }
    }

    async fn look_at(
        &self,
        backend: &Arc<dyn Backend>,
        what: &str,
    ) -> Result<std::result::Result<Foreign, Vec<decamp_shared::workload::Refusal>>> {
        let (backend, what) = (Arc::clone(backend), what.to_owned());
        blocking(move || backend.find_foreign(&what)).await
    }

    async fn take_charge(
        &self,
        backend: &Arc<dyn Backend>,
        workload: &Workload,
        place: &Place,
    ) -> Result<Workload> {
        let adopt = |backend: &dyn Backend, spec: &Value, at: &Place| backend.adopt(spec, at);
        let written = match self.begin_to_run(backend, workload, place, adopt).await? {
            Ok(running) => return Ok(running),
            Err(error) => error,
        };
        give_back(Arc::clone(backend), place.clone()).await?;
        Err(written)
    }
}

async fn give_back(backend: Arc<dyn Backend>, place: Place) -> Result<()> {
    Ok(blocking(move || backend.let_go(&place)).await??)
}
