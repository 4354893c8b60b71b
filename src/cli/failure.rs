//! Why a verb ends without success: exit code, words for machines, words for people.

use std::fmt::Write as _;

use decamp_shared::workload::Refusal;

use super::output;
use crate::messages::ErrorBody;

/// Anything else.
const OTHER: u8 = 1;
/// Bad usage.
const USAGE: u8 = 2;
/// Refused before anything was touched.
const REFUSED: u8 = 3;
/// The agent took the request and was gone before it answered.
const LOST: &str = "agent-lost";

/// The end of a verb that did not do what was asked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Failure {
    /// Exit code of the command contract.
    pub(crate) exit: u8,
    /// What is told.
    pub(crate) body: ErrorBody,
}

impl Failure {
    /// Exit code 1.
    pub(crate) fn other(message: impl Into<String>) -> Self {
        Self::new(OTHER, "failed", message)
    }

    /// Exit code 1: the agent took the request and was gone before it answered. What was asked may be
    /// done, or be under way.
    pub(crate) fn lost(message: impl Into<String>) -> Self {
        Self::new(OTHER, LOST, message)
    }

    /// Whether this is of [`Self::lost`].
    pub(crate) fn is_lost(&self) -> bool {
        self.body.code == LOST
    }

    /// Exit code 2.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(USAGE, "bad-request", message)
    }

    /// Exit code 3.
    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self::new(REFUSED, "refused", message)
    }

    /// From an agent's answer.
    pub(crate) fn from_answer(status: u16, body: ErrorBody) -> Self {
        Self { exit: exit_code(status), body }
    }

    fn new(exit: u8, code: &str, message: impl Into<String>) -> Self {
        let body = ErrorBody { code: code.into(), message: message.into(), refusals: Vec::new() };
        Self { exit, body }
    }

    /// Tells it: to people on standard error, to machines on standard output too.
    pub(crate) fn tell(&self, json: bool) {
        eprintln!("decamp: {}", self.text());
        if json {
            output::json(&serde_json::json!({ "error": self.body }));
        }
    }

    /// The message, and every reason that it does not say already.
    pub(crate) fn text(&self) -> String {
        with_reasons(&self.body.message, &self.body.refusals)
    }
}

/// `message`, and each refusal that it does not contain on a line of its own.
pub(crate) fn with_reasons(message: &str, refusals: &[Refusal]) -> String {
    let mut text = message.to_owned();
    for refusal in refusals.iter().filter(|one| !message.contains(&one.text)) {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n  - {}", refusal.text);
    }
    text
}

/// An error and all that is beneath it, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let _ = write!(text, ": {inner}");
        source = inner.source();
    }
    text
}

/// The exit code for an HTTP status of the agent.
fn exit_code(status: u16) -> u8 {
    match status {
        400 => USAGE,
        404 | 409 | 422 => REFUSED,
        _ => OTHER,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use decamp_shared::workload::RefusalCode;

    #[test]
    fn statuses_become_the_exit_codes_of_the_contract() {
        for (status, exit) in [(400, 2), (404, 3), (409, 3), (422, 3), (500, 1), (503, 1), (418, 1)]
        {
            assert_eq!(exit_code(status), exit, "{status}");
        }
    }

    #[test]
    fn every_reason_is_told_once() {
        let refusals = vec![
            Refusal::new(RefusalCode::Memory, "Not enough memory"),
            Refusal::new(RefusalCode::Bridge, "No bridge br0"),
        ];
        assert_eq!(
            with_reasons("Not enough memory", &refusals),
            "Not enough memory\n  - No bridge br0"
        );
        assert_eq!(
            with_reasons("Refused", &refusals),
            "Refused\n  - Not enough memory\n  - No bridge br0"
        );
    }
}
