//! How a container's memory is tracked, kept from CRIU and restored: what a host's configuration allows,
//! and what a move came to use. Plain data; what a host can do is found out by the backend.

use serde::{Deserialize, Serialize};

/// What the configuration says of each step (`[containers]` in the agent's file).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Methods {
    /// How dirty pages are found.
    pub tracker: TrackerChoice,
    /// How CRIU is kept from copying memory that the page engine moves.
    pub hiding: HidingChoice,
    /// When memory is put in its place at the destination.
    pub restore: RestoreChoice,
    /// What becomes of pages that forked processes still share.
    #[serde(skip_serializing_if = "ForkedChoice::is_auto")]
    pub forked: ForkedChoice,
}

/// How dirty pages are found while a container runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrackerChoice {
    /// The best that works: in the order of this list.
    #[default]
    Auto,
    /// Write protection that lifts itself.
    WriteProtect,
    /// The kernel's soft-dirty bits.
    SoftDirty,
    /// Comparison with what was sent.
    PageHash,
    /// Not at all: a container is copied while it stands still.
    None,
}

/// Whether memory is hidden from CRIU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HidingChoice {
    /// Where that works.
    #[default]
    Auto,
    /// Always: where it does not work nothing is moved.
    Hidden,
    /// Never: CRIU dumps all memory by itself.
    None,
}

/// When memory is put in its place at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestoreChoice {
    /// Late where that works.
    #[default]
    Auto,
    /// When the container runs already: where that does not work nothing comes here.
    Lazy,
    /// Before it runs.
    Eager,
}

/// What becomes of pages that processes still share since a fork.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ForkedChoice {
    /// They travel once, and are shared again at the destination where memory is short without that.
    #[default]
    Auto,
    /// They travel once, and are shared again as far as CRIU can, whatever that takes of the stop.
    Shared,
    /// They travel once, and each process has its own at the destination.
    Apart,
    /// They travel once for each process, which has its own at the destination.
    Each,
}

impl ForkedChoice {
    /// Left out when it is told to a keeper: one that is older than the choice does not know it.
    fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

impl Methods {
    /// What is wrong with these choices together.
    pub fn contradiction(&self) -> Option<String> {
        let tracks = !matches!(self.tracker, TrackerChoice::Auto | TrackerChoice::None);
        (tracks && self.hiding == HidingChoice::None).then(|| {
            format!(
                "tracker = \"{}\" cannot be with hiding = \"none\": memory that CRIU dumps by itself is \
                 copied while the container stands still. Say hiding = \"auto\", or tracker = \"auto\" or \
                 \"none\"",
                self.tracker.word()
            )
        })
    }
}

impl TrackerChoice {
    /// The word for it, in the configuration and in reports.
    pub fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::WriteProtect => "write-protect",
            Self::SoftDirty => "soft-dirty",
            Self::PageHash => "page-hash",
            Self::None => "none",
        }
    }
}

/// The ways that a move came to use, as far as one end of it knows them. For the report alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ways {
    /// How state was dumped at the source: [`Ways::HIDDEN`], [`Ways::MOUNTS`] or [`Ways::CRIU`].
    pub dump: Option<String>,
    /// How memory was restored at the destination: [`Ways::LAZY`] or [`Ways::EAGER`].
    pub restore: Option<String>,
    /// Why each way that is not the best was taken.
    pub fallbacks: Vec<String>,
}

impl Ways {
    /// Memory that the page engine moves was hidden from CRIU.
    pub const HIDDEN: &str = "hidden";
    /// The same, where CRIU could not be under a filter.
    pub const MOUNTS: &str = "hidden-by-mounts";
    /// All memory travelled in CRIU's own images.
    pub const CRIU: &str = "criu";
    /// Memory came when the workload ran already.
    pub const LAZY: &str = "lazy";
    /// All memory was in its place before the workload ran.
    pub const EAGER: &str = "eager";
    /// More reasons than there are steps, or longer ones, are not believed.
    const FALLBACKS_MOST: usize = 8;
    const TEXT_MOST: usize = 512;

    /// What a peer says of how it restored, as far as it can be: a word that is not known is left out,
    /// long texts are cut.
    pub fn from_peer(restore: &str, fallbacks: Vec<String>) -> Self {
        let plain = |text: String| -> String {
            text.chars().filter(|letter| !letter.is_control()).take(Self::TEXT_MOST).collect()
        };
        Self {
            dump: None,
            restore: [Self::LAZY, Self::EAGER].contains(&restore).then(|| restore.to_owned()),
            fallbacks: fallbacks.into_iter().take(Self::FALLBACKS_MOST).map(plain).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tracker_needs_memory_that_is_hidden() {
        let mut methods = Methods { hiding: HidingChoice::None, ..Methods::default() };
        assert_eq!(methods.contradiction(), None);
        methods.tracker = TrackerChoice::None;
        assert_eq!(methods.contradiction(), None);
        methods.tracker = TrackerChoice::PageHash;
        let text = methods.contradiction().expect("it cannot be");
        assert!(text.contains("tracker = \"page-hash\""), "{text}");
        methods.hiding = HidingChoice::Hidden;
        assert_eq!(methods.contradiction(), None);
    }

    #[test]
    fn words_are_those_of_the_configuration() {
        for choice in [TrackerChoice::Auto, TrackerChoice::WriteProtect, TrackerChoice::None] {
            let text = serde_json::to_string(&choice).expect("JSON");
            assert_eq!(text, format!("\"{}\"", choice.word()));
        }
    }

    #[test]
    fn a_peers_words_are_taken_with_care() {
        let ways = Ways::from_peer("late", vec!["a\u{1b}[2Jb".repeat(400); 20]);
        assert_eq!(ways.restore, None);
        assert_eq!(ways.fallbacks.len(), 8);
        assert!(ways.fallbacks.iter().all(|text| text.len() == 512 && !text.contains('\u{1b}')));
        assert_eq!(Ways::from_peer("eager", Vec::new()).restore.as_deref(), Some("eager"));
    }
}
