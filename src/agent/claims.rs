//! Claims: at any time one thing at most is done to a workload. In memory only; what lasts stands in
//! the registry.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Held = BTreeMap<String, &'static str>;

/// Who is doing what to which workload.
#[derive(Clone, Debug, Default)]
pub(crate) struct Claims(Arc<Mutex<Held>>);

/// The right to do something to a workload; given back when dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    name: String,
    claims: Claims,
}

impl Claims {
    /// Claims the workload `name` for `doing` (`being started`, `being moved`).
    ///
    /// # Errors
    /// What is being done to it already.
    pub(crate) fn take(&self, name: &str, doing: &'static str) -> Result<Claim, &'static str> {
        let mut held = self.held();
        match held.get(name) {
            Some(already) => Err(already),
            None => {
                held.insert(name.to_owned(), doing);
                Ok(Claim { name: name.to_owned(), claims: self.clone() })
            }
        }
    }

    /// Whether something is being done to `name`.
    pub(crate) fn is_taken(&self, name: &str) -> bool {
        self.held().contains_key(name)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.held().remove(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_excludes_others_until_it_is_dropped() {
        let claims = Claims::default();
        let claim = claims.take("web", "being moved").expect("free");
        assert_eq!(claims.take("web", "being stopped").expect_err("taken"), "being moved");
        assert!(claims.take("other", "being stopped").is_ok());
        assert!(claims.is_taken("web"));
        drop(claim);
        assert!(!claims.is_taken("web"));
    }
}
