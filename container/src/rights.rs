//! Which rights a container's processes may have: those of its configuration, and no others. One rule, for the
//! processes of a container that runs here and is to move, as the kernel tells of them, and for what images
//! ask for that came from another host or out of a file: CRIU gives a process whatever they say.
//!
//! Within a container rights only become fewer: nobody gains a capability that is not in its bounding set, or
//! takes off its filter of system calls. So what has more came in from outside (`runc exec --cap`), or was
//! forged.

use std::fmt;
use std::fs;

use serde_json::Value;

use crate::bundle::Bundle;
use crate::segments::message::Message;

/// Capabilities by their numbers (linux/capability.h).
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];
/// A runtime that does not know a capability leaves it in the bounding set, and so do we.
const KNOWN: u64 = (1 << NAMES.len()) - 1;

/// Mode of a task under a filter of system calls (linux/seccomp.h).
pub(crate) const FILTERED: u64 = 2;
/// State of a process that has ended (CRIU's `image.h`): it gets its number and nothing else.
const ENDED: u64 = 2;

/// Fields of CRIU's `core_entry`, `task_core_entry`, `thread_core_entry` and `creds_entry`.
const TASK: u32 = 3;
const THREAD: u32 = 5;
const STATE: u32 = 1;
const OLD_SECCOMP: u32 = 11;
const OLD_FILTER: u32 = 12;
const CREDENTIALS: u32 = 10;
const FILTER: u32 = 12;
const SECCOMP: u32 = 11;
const INHERITABLE: u32 = 9;
const PERMITTED: u32 = 10;
const EFFECTIVE: u32 = 11;
const BOUNDING: u32 = 12;
const NO_NEW_PRIVILEGES: u32 = 18;
const AMBIENT: u32 = 19;
/// Of its `userns_entry`: numbers of users and of groups, each as three numbers.
const ID_MAPS: [u32; 2] = [1, 2];

/// What a configuration gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rights {
    bounding: u64,
    /// What is in any of its sets.
    any: u64,
    no_new_privileges: bool,
    filtered: bool,
    /// Of a user namespace of its own.
    id_maps: Option<[Vec<[u64; 3]>; 2]>,
}

/// What a task has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    bounding: u64,
    any: u64,
    no_new_privileges: bool,
    filtered: bool,
}

/// Why a task may not have what it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Excess {
    Capabilities(u64),
    Bounding(u64),
    NewPrivileges,
    Unfiltered,
}

impl Rights {
    /// What `bundle` gives.
    pub(crate) fn of(bundle: &Bundle) -> Self {
        let config = bundle.config();
        let process = &config["process"];
        let set = |kind: &str| capabilities(&process["capabilities"][kind]);
        let bounding = set("bounding");
        let others = ["effective", "permitted", "inheritable", "ambient"].map(set);
        let seccomp = &config["linux"]["seccomp"];
        let rules = seccomp["syscalls"].as_array().is_some_and(|rules| !rules.is_empty());
        let allows = [None, Some("SCMP_ACT_ALLOW")].contains(&seccomp["defaultAction"].as_str());
        let map = |kind: &str| id_map(&config["linux"][kind]);
        Self {
            bounding,
            any: others.into_iter().fold(bounding, |any, set| any | set),
            no_new_privileges: process["noNewPrivileges"] == true,
            filtered: seccomp.is_object() && (rules || !allows),
            id_maps: bundle.mapped_root().map(|_| ["uidMappings", "gidMappings"].map(map)),
        }
    }

    /// Whether tasks have to be under a filter of system calls.
    pub(crate) fn filters(&self) -> bool {
        self.filtered
    }

    /// All that `held` has more.
    pub(crate) fn exceeded(&self, held: &Held) -> Vec<Excess> {
        let (any, bounding) = (held.any & !self.any, held.bounding & KNOWN & !self.bounding);
        let each = [
            (any != 0, Excess::Capabilities(any)),
            (any == 0 && bounding != 0, Excess::Bounding(bounding)),
            (self.no_new_privileges && !held.no_new_privileges, Excess::NewPrivileges),
            (self.filtered && !held.filtered, Excess::Unfiltered),
        ];
        each.into_iter().filter(|(is, _)| *is).map(|(_, excess)| excess).collect()
    }

    /// Whether users and groups of process `pid` have the numbers that the configuration gives them; nothing
    /// when it has gone.
    pub(crate) fn has_its_numbers(&self, pid: i32) -> Option<bool> {
        let Some(wanted) = &self.id_maps else { return Some(true) };
        let mut found = ["uid_map", "gid_map"].iter().zip(wanted).map(|(kind, wanted)| {
            let text = fs::read_to_string(format!("/proc/{pid}/{kind}")).ok()?;
            Some(map_in(&text)? == *wanted)
        });
        found.try_fold(true, |all, one| Some(all & one?))
    }

    /// Whether an image of a user namespace gives users and groups those numbers.
    pub(crate) fn are_its_numbers(&self, image: &Message) -> bool {
        let Some(wanted) = &self.id_maps else { return true };
        ID_MAPS.iter().zip(wanted).all(|(tag, wanted)| {
            let extent = |extent: Option<Message>| {
                let extent = extent?;
                Some([1, 2, 3].map(|tag| u64::from(extent.number(tag).unwrap_or(0) as u32)))
            };
            let found: Option<Vec<_>> = image.each(*tag).map(extent).collect();
            found.is_some_and(|found| sorted(found) == *wanted)
        })
    }
}

impl Held {
    /// What `/proc/PID/status` says.
    pub(crate) fn parse(status: &[u8]) -> Self {
        let mut held = Self::default();
        for line in status.split(|byte| *byte == b'\n') {
            let Ok(line) = std::str::from_utf8(line) else { continue };
            let Some((key, value)) = line.split_once(":\t") else { continue };
            let set = || u64::from_str_radix(value.trim(), 16).unwrap_or(0);
            match key {
                "CapBnd" => held.bounding = set(),
                "CapInh" | "CapPrm" | "CapEff" | "CapAmb" => held.any |= set(),
                "NoNewPrivs" => held.no_new_privileges = value.trim() != "0",
                "Seccomp" => held.filtered = value.trim() == FILTERED.to_string(),
                _ => {}
            }
        }
        held
    }

    /// What CRIU would give the task of a `core` image; nothing when that task has ended.
    ///
    /// # Errors
    /// When the image says nothing of it (then it would have CRIU's own rights), or in a way that CRIU writes
    /// nothing.
    pub(crate) fn of_image(core: &Message) -> std::result::Result<Option<Self>, &'static str> {
        let task = one(core, TASK).map_err(|_| "has two tasks in one")?;
        let state = task.as_ref().map(|task| task.number(STATE).unwrap_or(0) as u32);
        if state.map(u64::from) == Some(ENDED) {
            return Ok(None);
        }
        let none = "does not say which rights a task has";
        let thread = one(core, THREAD).ok().flatten().ok_or(none)?;
        let credentials = one(&thread, CREDENTIALS).ok().flatten().ok_or(none)?;
        let set = |tag| -> std::result::Result<u64, &'static str> {
            let words = credentials.numbers(tag).ok_or("has capabilities in another form")?;
            match words[..] {
                [] => Ok(0),
                [low] => Ok(u64::from(low as u32)),
                [low, high] => Ok(u64::from(low as u32) | u64::from(high as u32) << 32),
                _ => Err("has more capabilities than there are"),
            }
        };
        let number = |message: &Message, tag| u64::from(message.number(tag).unwrap_or(0) as u32);
        // Threads beside the first may get its filter (SECCOMP_FILTER_FLAG_TSYNC), and say nothing of it then.
        let filtered = task.as_ref().is_none_or(|task| {
            // One that is told in the older way counts for CRIU.
            let old = task.number(OLD_SECCOMP).map(|_| number(task, OLD_SECCOMP));
            old.unwrap_or_else(|| number(&thread, SECCOMP)) == FILTERED
        });
        let others = [INHERITABLE, PERMITTED, EFFECTIVE, AMBIENT];
        Ok(Some(Self {
            bounding: set(BOUNDING)?,
            any: others.into_iter().try_fold(0, |any, tag| set(tag).map(|set| any | set))?,
            no_new_privileges: number(&credentials, NO_NEW_PRIVILEGES) != 0,
            filtered,
        }))
    }
}

impl Excess {
    /// What to do about one that no destination would give.
    pub(crate) fn remedy(&self) -> &'static str {
        match self {
            // crun takes this from the configuration only with a whole process in a file.
            Self::NewPrivileges => {
                "end it, and bring it in with --no-new-privs (crun exec --no-new-privs, or -p with a process like \
                 the configuration's)"
            }
            _ => {
                "end it: what is brought in from outside may have what the configuration gives and no more"
            }
        }
    }
}

impl fmt::Display for Excess {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capabilities(set) => {
                write!(
                    out,
                    "it has capabilities that the container's configuration does not give: "
                )?;
                list(*set, out)
            }
            Self::Bounding(set) => {
                write!(
                    out,
                    "it could gain capabilities that the container's configuration does not give: "
                )?;
                list(*set, out)
            }
            Self::NewPrivileges => {
                write!(
                    out,
                    "it may gain privileges, which the configuration forbids (noNewPrivileges)"
                )
            }
            Self::Unfiltered => {
                write!(
                    out,
                    "it is under no filter of system calls, as the configuration has it (seccomp)"
                )
            }
        }
    }
}

/// Mode that a `core` image has for its thread, and which filter in their list that is under as the first of a
/// process; no filter where it is told in the older way, by which CRIU gives it to all threads anyhow. Nothing
/// when it has ended, or the image makes no sense.
pub(crate) fn seccomp_of(core: &Message) -> Option<(u64, Option<u64>)> {
    let thread = one(core, THREAD).ok()??;
    let number = |tag| u64::from(thread.number(tag).unwrap_or(0) as u32);
    let is_old = one(core, TASK).ok()?.is_some_and(|task| task.number(OLD_FILTER).is_some());
    Some((number(SECCOMP), (!is_old).then(|| number(FILTER))))
}

/// Names of capabilities; of those without a name the number.
fn list(set: u64, out: &mut fmt::Formatter<'_>) -> fmt::Result {
    let mut numbers = (0..64usize).filter(|number| set >> number & 1 == 1);
    let mut said = |number: usize, between: &str| match NAMES.get(number) {
        Some(name) => write!(out, "{between}CAP_{name}"),
        None => write!(out, "{between}{number}"),
    };
    numbers.next().map_or(Ok(()), |first| said(first, ""))?;
    numbers.try_for_each(|number| said(number, ", "))
}

/// The message in field `tag`, if it is there.
///
/// # Errors
/// When there are several, which CRIU would put together, or what is there is none.
fn one(message: &Message, tag: u32) -> std::result::Result<Option<Message>, ()> {
    let mut found = message.each(tag);
    match (found.next(), found.next()) {
        (None, _) => Ok(None),
        (Some(Some(one)), None) => Ok(Some(one)),
        _ => Err(()),
    }
}

/// A set of capabilities of a configuration.
fn capabilities(list: &Value) -> u64 {
    let names = list.as_array().into_iter().flatten().filter_map(Value::as_str);
    let bit = |name: &str| {
        let name = name.to_ascii_uppercase();
        let name = name.strip_prefix("CAP_").unwrap_or(&name);
        NAMES.iter().position(|known| *known == name).map_or(0, |number| 1 << number)
    };
    names.map(bit).fold(0, |set, bit: u64| set | bit)
}

/// Numbers of users or groups of a configuration: inside, outside, how many.
fn id_map(list: &Value) -> Vec<[u64; 3]> {
    let each = list.as_array().into_iter().flatten();
    let extent = |extent: &Value| {
        ["containerID", "hostID", "size"].map(|key| extent[key].as_u64().unwrap_or(0))
    };
    sorted(each.map(extent).collect())
}

/// The same as the kernel tells of them.
fn map_in(text: &str) -> Option<Vec<[u64; 3]>> {
    let line = |line: &str| {
        let numbers: Vec<u64> =
            line.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
        numbers.try_into().ok()
    };
    text.lines().map(line).collect::<Option<Vec<[u64; 3]>>>().map(sorted)
}

fn sorted(mut map: Vec<[u64; 3]>) -> Vec<[u64; 3]> {
    map.sort_unstable();
    map
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use super::*;

    fn rights(config: &Value) -> Rights {
        let text = config.to_string();
        Rights::of(&Bundle::parse(Path::new("/b"), text.as_bytes()).expect("a bundle"))
    }

    fn usual() -> Value {
        serde_json::json!({
            "process": {
                "noNewPrivileges": true,
                "capabilities": {"bounding": ["CAP_CHOWN", "CAP_BPF"], "permitted": ["CAP_KILL"]},
            },
            "linux": {"seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}},
        })
    }

    /// What CRIU writes of a task with these capabilities.
    pub(crate) fn core(
        permitted: u64,
        bounding: u64,
        no_new_privileges: u64,
        seccomp: u64,
    ) -> Message {
        let mut credentials = Message::default();
        for (tag, set) in [(PERMITTED, permitted), (BOUNDING, bounding)] {
            credentials.add_number(tag, set & u64::from(u32::MAX));
            credentials.add_number(tag, set >> 32);
        }
        credentials.set_number(NO_NEW_PRIVILEGES, no_new_privileges);
        let mut thread = Message::default();
        thread.set_number(SECCOMP, seccomp);
        thread.set_bytes(CREDENTIALS, credentials.to_bytes());
        let mut task = Message::default();
        task.set_number(STATE, 1);
        let mut core = Message::default();
        core.set_bytes(TASK, task.to_bytes());
        core.set_bytes(THREAD, thread.to_bytes());
        core
    }

    fn said(config: &Value, core: &Message) -> Vec<String> {
        let held = Held::of_image(core).expect("said").expect("it lives");
        rights(config).exceeded(&held).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn no_more_is_had_than_the_configuration_gives() {
        let (chown, kill, bpf, admin) = (1u64, 1 << 5, 1 << 39, 1 << 21);
        assert_eq!(said(&usual(), &core(chown | kill | bpf, chown, 1, 2)), [""; 0]);
        let all = said(&usual(), &core(admin | 1 << 41, 0, 0, 0));
        assert!(all[0].ends_with("does not give: CAP_SYS_ADMIN, 41"), "{all:?}");
        assert!(Excess::Unfiltered.remedy().contains("and no more"));
        assert!(Excess::NewPrivileges.remedy().contains("crun exec --no-new-privs"));
        assert!(all[1].contains("noNewPrivileges") && all[2].contains("seccomp"), "{all:?}");
        // Of the bounding set what no runtime knows is left, and what is only permitted is not in it.
        assert_eq!(said(&usual(), &core(0, chown | 1 << 50, 1, 2)), [""; 0]);
        assert!(said(&usual(), &core(0, kill, 1, 2))[0].ends_with("CAP_KILL"));
        // What is not forbidden is allowed, and no capabilities are none.
        let empty = serde_json::json!({});
        assert_eq!(said(&empty, &core(0, 0, 0, 0)), [""; 0]);
        assert!(said(&empty, &core(chown, 0, 0, 0))[0].ends_with("CAP_CHOWN"));
        let open = serde_json::json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}}});
        assert_eq!(said(&open, &core(0, 0, 0, 0)), [""; 0]);
    }

    #[test]
    fn what_would_get_the_rights_of_criu_is_refused() {
        let whole = core(1, 1, 1, 2);
        let mut task = Message::default();
        task.set_number(STATE, 1);
        let mut without = whole.clone();
        without.remove(THREAD);
        assert!(Held::of_image(&without).is_err(), "it lives, and says nothing");
        without.remove(TASK);
        assert!(Held::of_image(&without).is_err());
        let mut bare = whole.clone();
        bare.set_bytes(THREAD, Vec::new());
        assert!(Held::of_image(&bare).is_err());
        // CRIU would put both together.
        let mut twice = whole.clone();
        twice.add_bytes(THREAD, Vec::new());
        assert!(Held::of_image(&twice).is_err());
        let words = |words: &[u64], packed: bool| {
            let mut credentials = Message::default();
            words.iter().for_each(|word| credentials.add_number(EFFECTIVE, *word));
            if packed {
                credentials.add_bytes(EFFECTIVE, vec![1]);
            }
            let mut thread = Message::default();
            thread.set_bytes(CREDENTIALS, credentials.to_bytes());
            let mut core = Message::default();
            core.set_bytes(THREAD, thread.to_bytes());
            Held::of_image(&core)
        };
        // CRIU reads 32 bits of each.
        let high = words(&[0, 1 << 40 | 1 << 7], false).expect("said").expect("it lives");
        assert_eq!(high.any, 1 << 39);
        assert!(words(&[0, 0, 1], false).is_err() && words(&[], true).is_err());
        // A filter that is told in the older way is the one that counts.
        let mut old = whole;
        task.set_number(OLD_SECCOMP, 0);
        old.set_bytes(TASK, task.to_bytes());
        assert!(said(&usual(), &old)[0].contains("seccomp"));
        // Of the first thread's threads hear.
        let mut thread = core(1, 1, 1, 0);
        assert!(said(&usual(), &thread)[0].contains("seccomp"));
        thread.remove(TASK);
        assert_eq!(said(&usual(), &thread), [""; 0]);
        // What has ended gets nothing.
        task.set_number(STATE, ENDED);
        without.set_bytes(TASK, task.to_bytes());
        assert_eq!(Held::of_image(&without), Ok(None));
    }

    #[test]
    fn the_kernel_says_what_we_ourselves_have() {
        let status = fs::read("/proc/self/status").expect("ours");
        let held = Held::parse(&status);
        let made =
            b"CapInh:\t0000000000000001\nCapPrm:\t2\nCapBnd:\tff\nNoNewPrivs:\t1\nSeccomp:\t2\n";
        let wanted = Held { bounding: 0xff, any: 3, no_new_privileges: true, filtered: true };
        assert_eq!(Held::parse(made), wanted);
        if nix::unistd::geteuid().is_root() {
            assert!(held.any != 0 && held.bounding & held.any == held.any, "{held:?}");
        }
    }

    #[test]
    fn users_keep_the_numbers_that_the_configuration_gives() {
        let map = serde_json::json!([{"containerID": 0, "hostID": 100000, "size": 65536}]);
        let config = serde_json::json!({"linux": {
            "namespaces": [{"type": "user"}], "uidMappings": map, "gidMappings": map,
        }});
        let rights = rights(&config);
        let image = |lower: u64, both: bool| {
            let mut extent = Message::default();
            for (tag, number) in [(1, 0), (2, lower), (3, 65536)] {
                extent.set_number(tag, number);
            }
            let mut image = Message::default();
            for tag in &ID_MAPS[..if both { 2 } else { 1 }] {
                image.add_bytes(*tag, extent.to_bytes());
            }
            image
        };
        assert!(rights.are_its_numbers(&image(100_000, true)));
        assert!(!rights.are_its_numbers(&image(0, true)), "root of the host");
        assert!(!rights.are_its_numbers(&image(100_000, false)));
        let mut more = image(100_000, true);
        more.add_bytes(ID_MAPS[0], image(0, true).bytes(ID_MAPS[0]).expect("one").to_vec());
        assert!(!rights.are_its_numbers(&more));
        assert_eq!(map_in("         0     100000      65536\n"), Some(vec![[0, 100_000, 65536]]));
        assert_eq!(map_in("0 1\n"), None);
    }
}
