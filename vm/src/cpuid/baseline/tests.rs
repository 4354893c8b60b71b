//! Baselines of this host and of CPUs that lack some of what it has.

use proptest::prelude::*;

use super::super::{feature_registers, grant, trial};
use super::common::{ECX_PDCM, Register, XSAVE_BASE, clear, common, hide, pin, standing_alone};
use super::*;

fn own() -> Vec<CpuidEntry> {
    Offer::of_this_host().expect("KVM").entries
}

/// An offer that says nothing of registers, as older versions of decamp make it.
fn offer(entries: Vec<CpuidEntry>) -> Offer {
    Offer { version: ENTRIES_ALONE, entries, registers: None }
}

/// What a guest sees that may look at IA32_ARCH_CAPABILITIES, which not every KVM shows.
fn aware() -> Vec<CpuidEntry> {
    let mut entries = own();
    let leaf = entries.iter_mut().find(|one| (one.leaf, one.subleaf) == (7, 0));
    leaf.expect("leaf 7").edx |= 1 << 29;
    entries
}

/// An offer with that register.
fn telling(value: u64) -> Offer {
    let registers = Some(vec![FeatureRegister { index: CAPABILITIES, value }]);
    Offer { registers, ..offer(aware()) }
}

/// IA32_ARCH_CAPABILITIES.
const CAPABILITIES: u32 = 0x10a;

/// The CPU of this host without some of its features, its address widths narrower.
fn weaker(masks: &[u32], narrower: u32) -> Offer {
    let mut entries = own();
    let mut masks = masks.iter().cycle();
    for entry in &mut entries {
        let sets = feature_registers(entry, &CpuidEntry::default());
        let names: Vec<_> = sets.iter().map(|(name, ..)| *name).collect();
        for name in names {
            let mask = *masks.next().unwrap_or(&!0);
            match name {
                "EAX" => entry.eax &= mask,
                "EBX" => entry.ebx &= mask,
                "ECX" => entry.ecx &= mask,
                _ => entry.edx &= mask,
            }
        }
        if entry.leaf == 0x8000_0008 {
            entry.eax -= narrower;
        }
    }
    settle(&mut entries, 0);
    offer(entries)
}

fn without(leaf: u32, register: Register, bits: u32) -> Offer {
    let mut entries = own();
    let entry = entries.iter_mut().find(|one| (one.leaf, one.subleaf) == (leaf, 0));
    clear(entry.expect("the leaf"), register, bits);
    settle(&mut entries, 0);
    offer(entries)
}

fn both(one: Offer, other: Offer) -> (Baseline, BTreeMap<String, Vec<String>>) {
    Baseline::of(&[("alpha".into(), one), ("beta".into(), other)]).expect("a baseline")
}

#[test]
fn one_host_loses_nothing() {
    let mut entries = own();
    hide(&mut entries);
    let offer = offer(entries);
    let (baseline, lost) = both(offer.clone(), offer.clone());
    assert_eq!(lost, BTreeMap::from([("alpha".into(), vec![]), ("beta".into(), vec![])]));
    assert!(missing(&offer.entries, &baseline.entries).is_empty());
    let json = serde_json::to_vec(&baseline).expect("JSON");
    assert_eq!(Baseline::parse(&json).expect("own JSON"), baseline);
}

/// Hypervisors were seen that hide protection keys and show their component.
#[test]
fn state_that_every_host_shows_without_its_feature_stays() {
    const COMPONENT: u32 = 1 << 9;
    let mut entries = own();
    hide(&mut entries);
    let leaf = entries.iter_mut().find(|one| (one.leaf, one.subleaf) == (7, 0)).expect("leaf 7");
    clear(leaf, Register::Ecx, 1 << 3);
    let whole = entries.iter_mut().find(|one| (one.leaf, one.subleaf) == (0xd, 0)).expect("0xD");
    let end = whole.ecx;
    whole.eax |= COMPONENT;
    if find(&entries, 0xd, 9).is_none_or(|one| one.eax == 0) {
        entries.retain(|one| (one.leaf, one.subleaf) != (0xd, 9));
        let flags = find(&entries, 0xd, 0).expect("0xD").flags;
        let place = CpuidEntry { leaf: 0xd, subleaf: 9, flags, eax: 8, ebx: end, ecx: 0, edx: 0 };
        entries.push(place);
        let whole = entries.iter_mut().find(|one| (one.leaf, one.subleaf) == (0xd, 0));
        whole.expect("0xD").ecx = end + 8;
    }
    assert_eq!(standing_alone(&entries) as u32 & COMPONENT, COMPONENT);
    let shows = offer(entries.clone());
    let (baseline, lost) = both(shows.clone(), shows.clone());
    assert!(lost.values().all(Vec::is_empty), "{lost:?}");
    let held = pin(&entries, &baseline.entries);
    assert!(missing(&entries, &held).is_empty(), "{:?}", missing(&entries, &held));
    // Where one of them has no such state, neither has the baseline.
    settle(&mut entries, 0);
    let (baseline, lost) = both(shows, offer(entries));
    assert_eq!(find(&baseline.entries, 0xd, 0).expect("0xD").eax & COMPONENT, 0);
    assert!(lost["alpha"].iter().any(|name| name.starts_with("xsave_pkru ")), "{lost:?}");
    assert!(lost["beta"].is_empty(), "{lost:?}");
}

#[test]
fn what_one_lacks_neither_offers_and_it_is_named() {
    let full = offer(own());
    let (baseline, lost) = both(full, without(1, Register::Ecx, 1 << 25));
    assert!(lost["alpha"].iter().any(|name| name.starts_with("aes ")), "{lost:?}");
    assert!(lost["beta"].is_empty(), "{lost:?}");
    let entry = find(&baseline.entries, 1, 0).expect("leaf 1");
    assert_eq!(entry.ecx & 1 << 25, 0);
}

#[test]
fn state_goes_with_its_feature_and_features_with_their_state() {
    let weak = without(1, Register::Ecx, 1 << 28);
    let mask = find(&weak.entries, 0xd, 0).expect("leaf 0xD");
    assert_eq!((mask.eax & 0xe4, mask.ecx), (0, XSAVE_BASE), "{mask:?}");
    let leaf = find(&weak.entries, 7, 0).expect("leaf 7");
    assert_eq!(leaf.ebx & (1 << 5 | 1 << 16), 0, "AVX2 and AVX-512 without AVX");
    let mut moved = own();
    let place = moved.iter_mut().find(|one| (one.leaf, one.subleaf) == (0xd, 2));
    if let Some(place) = place.filter(|place| place.eax > 0) {
        place.ebx += 64;
        let mut entries = common(&own(), &moved);
        settle(&mut entries, 0);
        assert_eq!(find(&entries, 1, 0).expect("leaf 1").ecx & 1 << 28, 0, "AVX stayed");
    }
}

#[test]
fn cpus_of_different_makers_have_nothing_in_common() {
    let full = offer(own());
    let mut other = full.clone();
    let leaf = other.entries.iter_mut().find(|one| one.leaf == 0).expect("leaf 0");
    leaf.ebx ^= 0x0101_0101;
    let error = Baseline::of(&[("alpha".into(), full), ("beta".into(), other)]);
    assert!(error.is_err_and(|error| error.to_string().contains("different makers")));
    assert!(Baseline::of(&[]).is_err());
}

#[test]
fn what_is_no_baseline_is_refused_in_words() {
    let hosts = vec!["alpha".to_owned()];
    let good = Baseline { version: ENTRIES_ALONE, hosts, entries: own(), registers: None };
    let change = |act: &dyn Fn(&mut Baseline)| {
        let mut bad = good.clone();
        act(&mut bad);
        let json = serde_json::to_vec(&bad).expect("JSON");
        Baseline::parse(&json).expect_err("no baseline").to_string()
    };
    assert!(change(&|bad| bad.version = 3).contains("of version 3, and this decamp knows 2"));
    assert!(change(&|bad| bad.version = 2).contains("version 2 has registers"));
    assert!(change(&|bad| bad.registers = Some(Vec::new())).contains("version 1 has no registers"));
    let twice = change(&|bad| {
        (bad.version, bad.registers) = (2, telling(1).registers);
        let registers = bad.registers.as_mut().expect("registers");
        registers.push(registers[0]);
    });
    assert!(twice.contains("0x10a is there twice"), "{twice}");
    assert!(change(&|bad| bad.entries.clear()).contains("no CPUID entry 0x0"));
    let twice = change(&|bad| bad.entries.push(bad.entries[0]));
    assert!(twice.contains("twice"), "{twice}");
    let many = change(&|bad| bad.entries.resize(300, CpuidEntry::default()));
    assert!(many.contains("300"), "{many}");
    for bad in [&b"{}"[..], b"", b"[]", b"\x00", &vec![b' '; MAX_BYTES + 1]] {
        assert!(Baseline::parse(bad).is_err());
    }
}

#[test]
fn what_a_peers_kvm_did_not_fill_in_is_not_offered() {
    let full = offer(own());
    let mut older = full.clone();
    older.entries.resize(MAX_ENTRIES, CpuidEntry::default());
    let json = serde_json::to_vec(&older).expect("JSON");
    assert_eq!(Offer::parse(&json).expect("an offer"), full);
    // Only at the end: elsewhere one that is there twice is a mistake.
    older.entries.push(CpuidEntry { leaf: 0x8fff_ffff, ..Default::default() });
    older.entries.remove(MAX_ENTRIES - 1);
    let json = serde_json::to_vec(&older).expect("JSON");
    let error = Offer::parse(&json).expect_err("no offer").to_string();
    assert!(error.contains("CPUID entry 0x0.0 is there twice"), "{error}");
    let none = Offer { entries: vec![CpuidEntry::default(); 3], ..full };
    let json = serde_json::to_vec(&none).expect("JSON");
    let error = Offer::parse(&json).expect_err("no offer").to_string();
    assert!(error.contains("no CPUID entry 0x0"), "{error}");
}

#[test]
fn what_this_host_lacks_it_cannot_be_held_to() {
    let kvm = crate::host::open_kvm().expect("KVM");
    let mut more = own();
    let leaf = more.iter_mut().find(|one| (one.leaf, one.subleaf) == (7, 0)).expect("leaf 7");
    // A bit that no CPU has.
    leaf.ebx |= 1 << 22;
    let said = Held::new(more, None).refusals(&kvm).expect("an answer");
    assert!(said.iter().any(|one| one.contains("CPUID 0x7.0 EBX bit 22")), "{said:?}");
}

#[test]
fn a_guest_held_to_it_sees_no_more_or_its_host_says_so() {
    let kvm = crate::host::open_kvm().expect("KVM");
    let weak = without(7, Register::Ebx, 1 << 5 | 1 << 16);
    let (_vm, vcpu) = trial(&kvm).expect("a vCPU");
    let granted = grant(&vcpu, &pin(&own(), &weak.entries)).expect("CPUID");
    let beyond = missing(&granted, &weak.entries);
    let said = Held::new(weak.entries, None).refusals(&kvm).expect("an answer");
    assert_eq!(said.is_empty(), beyond.is_empty(), "{said:?} {beyond:?}");
    println!("beyond the baseline on this KVM: {beyond:?}");
}

#[test]
fn what_registers_of_one_do_not_say_neither_says_and_warnings_of_each_count() {
    let (baseline, lost) = both(telling(0b0010_0001), telling(0b0000_0101));
    assert_eq!(baseline.version, 2);
    assert_eq!(baseline.registers, telling(0b0000_0101).registers);
    assert_eq!(
        lost["alpha"],
        [
            "freedom from rsba (IA32_ARCH_CAPABILITIES bit 2)",
            "mds_no (IA32_ARCH_CAPABILITIES bit 5)"
        ]
    );
    assert!(lost["beta"].is_empty(), "{lost:?}");
    let json = serde_json::to_vec(&baseline).expect("JSON");
    assert_eq!(Baseline::parse(&json).expect("own JSON"), baseline);
}

#[test]
fn a_host_that_does_not_say_makes_a_file_that_older_versions_read() {
    let (baseline, _) = both(telling(1), offer(own()));
    assert_eq!((baseline.version, &baseline.registers), (1, &None));
    let json = serde_json::to_value(&baseline).expect("JSON");
    assert!(json.get("registers").is_none());
    let held = serde_json::to_value(baseline.held()).expect("JSON");
    assert!(held.is_array(), "as specs had it before");
    let again: Held = serde_json::from_value(held).expect("a list");
    assert_eq!(again, Held::new(own(), None));
}

fn value(list: &[FeatureRegister], index: u32) -> u64 {
    let found = list.iter().find(|one| one.index == index);
    found.unwrap_or_else(|| panic!("no {index:#x} in {list:x?}")).value
}

#[test]
fn a_vcpu_tells_what_the_baseline_says_and_no_more() {
    let kvm = crate::host::open_kvm().expect("KVM");
    let list = |value| vec![FeatureRegister { index: CAPABILITIES, value }];
    let (here, less) = (list(1 | 1 << 5), list(1 << 5 | 1 << 2 | 1 << 6));
    let (_vm, vcpu) = trial(&kvm).expect("a vCPU");
    grant(&vcpu, &aware()).expect("CPUID");
    // Whether a hypervisor has to flush is this host's own to say, and is nothing to a guest.
    let fresh = registers::of_vcpu(&vcpu).expect("registers");
    let fresh = fresh.iter().find(|one| one.index == CAPABILITIES);
    let own_word = fresh.map_or(0, |one| one.value & 1 << 3);
    let told = registers::hold(&vcpu, 0, &aware(), &less, &here);
    let leaf = find(&own(), 7, 0).copied().expect("leaf 7");
    match told {
        Ok(told) => {
            assert_eq!(value(&told, CAPABILITIES), 1 << 5 | 1 << 2 | own_word);
            assert_eq!(registers::of_vcpu(&vcpu).expect("registers"), told);
        }
        // Newer kernels have no such register on AMD, and show none. Nobody is told what is not so.
        Err(error) => {
            assert_eq!(leaf.edx & 1 << 29, 0, "{error}");
            assert!(error.to_string().contains("register 0x10a of vCPU 0 (value 0x24"), "{error}");
        }
    }
    // Who does not see that there is such a register is told nothing by it.
    let (_vm, vcpu) = trial(&kvm).expect("a vCPU");
    let mut blind = aware();
    let leaf = blind.iter_mut().find(|one| (one.leaf, one.subleaf) == (7, 0));
    clear(leaf.expect("leaf 7"), Register::Edx, 1 << 29);
    let granted = grant(&vcpu, &blind).expect("CPUID");
    if find(&granted, 7, 0).is_some_and(|leaf| leaf.edx & 1 << 29 != 0) {
        // Not every KVM hides from guests what a CPU has: this one sees it all the same.
        return;
    }
    let before = registers::of_vcpu(&vcpu).expect("registers");
    let told = registers::hold(&vcpu, 0, &granted, &less, &here).expect("told");
    let emptied = |one: FeatureRegister| FeatureRegister {
        value: if registers::in_baselines(&one) { one.value } else { 0 },
        ..one
    };
    assert_eq!(told, before.into_iter().map(emptied).collect::<Vec<_>>());
}

/// MSR_PLATFORM_INFO, which every KVM shows.
const PLATFORM: u32 = 0xce;

#[test]
fn a_host_holds_its_guests_to_a_baseline_or_says_what_it_lacks() {
    let kvm = crate::host::open_kvm().expect("KVM");
    let here = Offered::here(&kvm).expect("an offer");
    assert_eq!(value(&here.registers, PLATFORM) & 1 << 31, 1 << 31, "cpuid_fault");
    let mut less = here.registers.clone();
    less.iter_mut().find(|one| one.index == PLATFORM).expect("it").value &= !(1 << 31);
    let held = Held::new(here.entries.clone(), Some(less.clone()));
    assert_eq!(held.refusals(&kvm).expect("an answer"), Vec::<String>::new());
    let (_vm, vcpu) = trial(&kvm).expect("a vCPU");
    let granted = grant(&vcpu, &here.entries).expect("CPUID");
    held.tell(&kvm, [&vcpu].into_iter(), &granted).expect("told");
    let told = registers::of_vcpu(&vcpu).expect("registers");
    assert_eq!(value(&told, PLATFORM) & 1 << 31, 0);
    assert!(here.lacks(&granted, &told).is_empty(), "it can come back");
    let there = Offered { registers: less, ..here.clone() };
    assert_eq!(there.lacks(&granted, &here.registers), ["cpuid_fault (MSR_PLATFORM_INFO bit 31)"]);
    // Bits that no CPU has.
    let more = telling(1 << 50);
    let said = Held::new(more.entries, more.registers).refusals(&kvm).expect("an answer");
    assert!(said.contains(&"(IA32_ARCH_CAPABILITIES bit 50)".to_owned()), "{said:?}");
}

/// IA32_PERF_CAPABILITIES.
const COUNTING: u32 = 0x345;

#[test]
fn how_a_cpu_counts_is_in_no_baseline_and_who_is_held_to_one_is_not_told() {
    let kvm = crate::host::open_kvm().expect("KVM");
    let mut counting = telling(1);
    let leaf = counting.entries.iter_mut().find(|one| one.leaf == 1).expect("leaf 1");
    leaf.ecx |= ECX_PDCM;
    let format = FeatureRegister { index: COUNTING, value: 1 << 13 | 5 };
    counting.registers.as_mut().expect("registers").push(format);
    let seen = |entries: &[CpuidEntry]| find(entries, 1, 0).expect("leaf 1").ecx & ECX_PDCM;
    let (baseline, lost) = both(counting.clone(), counting.clone());
    assert_eq!((seen(&baseline.entries), baseline.registers), (0, telling(1).registers));
    assert!(lost["alpha"].contains(&"pdcm (CPUID 0x1.0 ECX bit 15)".to_owned()), "{lost:?}");
    let (alone, _) = Baseline::of(&[("alpha".into(), counting.clone())]).expect("of one host");
    assert_eq!((seen(&alone.entries), alone.registers), (0, telling(1).registers));
    assert_eq!(seen(&pin(&counting.entries, &counting.entries)), 0);
    // A spec that an older version wrote.
    let older = serde_json::json!({"entries": counting.entries, "registers": counting.registers});
    let older: Held = serde_json::from_value(older).expect("a CPU");
    let mut hidden = telling(1);
    hide(&mut hidden.entries);
    assert_eq!(older, Held::new(hidden.entries, hidden.registers));
    // Whether or not a baseline speaks of registers, the register itself is emptied.
    let (_vm, vcpu) = trial(&kvm).expect("a vCPU");
    let held = Held::new(own(), None);
    let granted = grant(&vcpu, &held.pin(&own())).expect("CPUID");
    held.tell(&kvm, [&vcpu].into_iter(), &granted).expect("told");
    let told = registers::of_vcpu(&vcpu).expect("registers");
    let left = told.iter().find(|one| one.index == COUNTING).map_or(0, |one| one.value);
    assert_eq!(left, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn a_baseline_is_less_than_each_and_who_is_held_to_it_fits_all(
        one in prop::collection::vec(any::<u32>(), 8),
        other in prop::collection::vec(any::<u32>(), 8),
        narrower in 0u32..4,
    ) {
        let offers = [weaker(&one, narrower), weaker(&other, 0)];
        let (baseline, _) = both(offers[0].clone(), offers[1].clone());
        for offer in &offers {
            prop_assert_eq!(missing(&baseline.entries, &offer.entries), Vec::<String>::new());
            let pinned = pin(&offer.entries, &baseline.entries);
            prop_assert_eq!(missing(&pinned, &baseline.entries), Vec::<String>::new());
            for destination in &offers {
                prop_assert_eq!(missing(&pinned, &destination.entries), Vec::<String>::new());
            }
        }
        let again = pin(&offers[0].entries, &pin(&offers[0].entries, &baseline.entries));
        prop_assert_eq!(again, pin(&offers[0].entries, &baseline.entries));
    }
}
