//! What the agent answers when it does not do what was asked: status, code, sentence.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use decamp_shared::session::journal::JournalError;
use decamp_shared::workload::{Refusal, WorkloadError};

use super::registry::RegistryError;
use super::state_dir::StateDirError;
use crate::messages::ErrorBody;

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(crate) enum Answer {
    /// The request makes no sense.
    #[error("{0}")]
    Request(String),
    /// There is no such workload.
    #[error("There is no workload {0} on this host; `decamp ls --all` lists what there is")]
    UnknownWorkload(String),
    /// There is no such migration.
    #[error("There is no migration {0} {1}")]
    UnknownMigration(String, &'static str),
    /// It cannot be done in the state that things are in.
    #[error("{0}")]
    Conflict(String),
    /// It was refused before anything was touched.
    #[error("{message}")]
    Refused { message: String, refusals: Vec<Refusal> },
    /// It was tried and did not work.
    #[error("{0}")]
    Failed(String),
}

/// Result of what a request asks for.
pub(crate) type Result<T> = std::result::Result<T, Answer>;

impl Answer {
    /// A refusal without a list of reasons.
    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Answer::Refused { message: message.into(), refusals: Vec::new() }
    }

    /// A refusal for `refusals`; the message says the only one, or that there are several.
    pub(crate) fn refused_for(what: &str, refusals: Vec<Refusal>) -> Self {
        let message = match &refusals[..] {
            [only] => format!("{what}: {}", only.text),
            several => format!("{what}, for {} reasons", several.len()),
        };
        Answer::Refused { message, refusals }
    }

    /// Something that was tried and did not work, with all that is beneath it.
    pub(crate) fn failed(error: &dyn std::error::Error) -> Self {
        Answer::Failed(chain(error))
    }

    /// As the body of an answer.
    pub(crate) fn body(&self) -> ErrorBody {
        let refusals = match self {
            Answer::Refused { refusals, .. } => refusals.clone(),
            _ => Vec::new(),
        };
        ErrorBody { code: self.status_and_code().1.to_owned(), message: self.to_string(), refusals }
    }

    fn status_and_code(&self) -> (StatusCode, &'static str) {
        match self {
            Answer::Request(_) => (StatusCode::BAD_REQUEST, "bad-request"),
            Answer::UnknownWorkload(_) => (StatusCode::NOT_FOUND, "unknown-workload"),
            Answer::UnknownMigration(..) => (StatusCode::NOT_FOUND, "unknown-migration"),
            Answer::Conflict(_) => (StatusCode::CONFLICT, "conflict"),
            Answer::Refused { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "refused"),
            Answer::Failed(_) => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
        }
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        (self.status_and_code().0, Json(self.body())).into_response()
    }
}

impl From<RegistryError> for Answer {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::Unknown(name) => Answer::UnknownWorkload(name),
            RegistryError::Taken(_) => Answer::Conflict(error.to_string()),
            RegistryError::Database { .. } | RegistryError::Newer { .. } => Answer::failed(&error),
        }
    }
}

impl From<StateDirError> for Answer {
    fn from(error: StateDirError) -> Self {
        Answer::failed(&error)
    }
}

impl From<JournalError> for Answer {
    fn from(error: JournalError) -> Self {
        Answer::failed(&error)
    }
}

impl From<WorkloadError> for Answer {
    fn from(error: WorkloadError) -> Self {
        Answer::failed(&error)
    }
}

/// An error and all that is beneath it, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use decamp_shared::workload::RefusalCode;

    #[test]
    fn every_answer_has_the_status_that_the_cli_knows() {
        for (answer, status) in [
            (Answer::Request("x".into()), 400),
            (Answer::UnknownWorkload("web".into()), 404),
            (Answer::UnknownMigration("m".into(), "under way"), 404),
            (Answer::Conflict("x".into()), 409),
            (Answer::refused("x"), 422),
            (Answer::Failed("x".into()), 500),
        ] {
            assert_eq!(answer.into_response().status().as_u16(), status);
        }
    }

    #[test]
    fn a_single_reason_is_the_message() {
        let one = vec![Refusal::new(RefusalCode::File, "There is no kernel /srv/k")];
        assert_eq!(
            Answer::refused_for("web cannot run here", one.clone()).to_string(),
            "web cannot run here: There is no kernel /srv/k"
        );
        let two = [one.clone(), one].concat();
        assert_eq!(
            Answer::refused_for("web cannot run here", two).to_string(),
            "web cannot run here, for 2 reasons"
        );
    }
}
