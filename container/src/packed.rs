//! CRIU's images on their way: small ones together, compressed. A tree of hundreds of processes has thousands
//! of them, most of which are alike.
//!
//! A section of this kind is the length of its contents (`u32`), and a zstd frame of them: image after image,
//! each the length of its name (`u8`), its name, its own length (`u32`) and its bytes. Numbers are
//! little-endian. There may be several. What comes is from another host: lengths are checked before anything is
//! allocated, and names before anything is written.

use std::ops::Range;

use decamp_shared::workload::Section;

use crate::beside;
use crate::error::{ContainerError, Result};

/// The kind of such a section.
pub(crate) const PACKED: &str = "container/images";
const VERSION: u32 = 1;
/// Longer images travel as they are, each in a section of its own: they take no longer so.
const SMALL: usize = 1 << 20;
/// Bytes of images that are put together, but for the last of them.
const TOGETHER: usize = 2 << 20;
/// Bytes that the contents of one section may have.
const MOST: usize = TOGETHER + SMALL + (1 << 16);
/// Bytes that all of them together may have.
const MOST_IN_ALL: u64 = 1 << 30;
/// What takes the least time: images of processes that are alike become a tenth so.
const LEVEL: i32 = 1;

/// An image: its name and its bytes.
pub(crate) type Image = (String, Vec<u8>);

/// Puts images together. Gives back those that travel by themselves.
pub(crate) fn pack(images: Vec<Image>) -> Result<(Vec<Section>, Vec<Image>)> {
    let (mut packs, mut alone) = (Vec::new(), Vec::new());
    let (mut current, mut all) = (Vec::new(), 0);
    for image in images {
        let small = image.1.len() <= SMALL && image.0.len() <= usize::from(u8::MAX);
        if !small || all > MOST_IN_ALL - 2 * MOST as u64 {
            alone.push(image);
            continue;
        }
        let before = current.len();
        append(&mut current, &image);
        all += (current.len() - before) as u64;
        if current.len() >= TOGETHER {
            packs.push(std::mem::take(&mut current));
        }
    }
    if !current.is_empty() {
        packs.push(current);
    }
    Ok((beside::each(packs, |plain| compress(&plain))?, alone))
}

/// Does `each` to every image in `sections`, of several sections at once.
///
/// # Errors
/// Before anything is done when the sections say that they hold too much; when one does not hold what it says;
/// those of `each`.
pub(crate) fn unpack(
    sections: Vec<Section>,
    each: impl Fn(&str, &[u8]) -> Result<()> + Sync,
) -> Result<()> {
    let lengths = sections.iter().map(announced).collect::<Result<Vec<_>>>()?;
    if lengths.iter().map(|length| *length as u64).sum::<u64>() > MOST_IN_ALL {
        return Err(bad("hold more than any container has"));
    }
    let each_section = |(section, length): (Section, usize)| -> Result<()> {
        let plain = decompress(&section, length)?;
        let mut rest = &plain[..];
        while !rest.is_empty() {
            let (name, bytes) =
                take_image(&mut rest).ok_or_else(|| bad("has an image that is cut short"))?;
            each(name, bytes)?;
        }
        Ok(())
    };
    beside::each(sections.into_iter().zip(lengths).collect(), each_section).map(drop)
}

fn bad(what: &str) -> ContainerError {
    ContainerError::section(PACKED, what)
}

fn append(plain: &mut Vec<u8>, (name, bytes): &Image) {
    plain.push(name.len() as u8);
    plain.extend_from_slice(name.as_bytes());
    plain.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    plain.extend_from_slice(bytes);
}

fn compress(plain: &[u8]) -> Result<Section> {
    let packed =
        zstd::bulk::compress(plain, LEVEL).map_err(ContainerError::io("compress CRIU's images"))?;
    let mut bytes = (plain.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&packed);
    Ok(Section { kind: PACKED.to_owned(), version: VERSION, bytes })
}

/// How much a section says that it holds.
fn announced(section: &Section) -> Result<usize> {
    if section.version != VERSION {
        return Err(bad("has a version that this build does not know"));
    }
    let head = section.bytes.first_chunk().copied().map(u32::from_le_bytes);
    let length = head.ok_or_else(|| bad("is cut short"))? as usize;
    if length > MOST { Err(bad("holds more than one may")) } else { Ok(length) }
}

fn decompress(section: &Section, length: usize) -> Result<Vec<u8>> {
    let packed = section.bytes.get(size_of::<u32>()..).unwrap_or_default();
    let plain = zstd::bulk::decompress(packed, length)
        .map_err(|error| bad(&format!("cannot be decompressed: {error}")))?;
    if plain.len() == length { Ok(plain) } else { Err(bad("holds less than it says")) }
}

fn take_image<'a>(rest: &mut &'a [u8]) -> Option<(&'a str, &'a [u8])> {
    let name = usize::from(*rest.first()?);
    let head: Range<usize> = 1 + name..1 + name + size_of::<u32>();
    let length = u32::from_le_bytes(rest.get(head.clone())?.try_into().ok()?) as usize;
    let name = std::str::from_utf8(rest.get(1..head.start)?).ok()?;
    let end = head.end.checked_add(length)?;
    let bytes = rest.get(head.end..end)?;
    *rest = &rest[end..];
    Some((name, bytes))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    fn unpacked(sections: Vec<Section>) -> Result<BTreeMap<String, Vec<u8>>> {
        let found = Mutex::new(BTreeMap::new());
        unpack(sections, |name, bytes| {
            found.lock().expect("no panic").insert(name.to_owned(), bytes.to_vec());
            Ok(())
        })?;
        Ok(found.into_inner().expect("no panic"))
    }

    fn holding(plain: &[u8], says: u32) -> Section {
        let mut section = compress(plain).expect("compressed");
        section.bytes[..4].copy_from_slice(&says.to_le_bytes());
        section
    }

    fn refused(sections: Vec<Section>, why: &str) {
        let error = unpacked(sections).expect_err(why).to_string();
        assert!(error.contains(why), "{error}");
    }

    #[test]
    fn small_images_come_back_and_large_ones_travel_alone() {
        let image =
            |number: usize, length| (format!("core-{number}.img"), vec![number as u8; length]);
        let mut images: Vec<_> = (0..300).map(|number| image(number, number * 200)).collect();
        images.push(image(300, SMALL));
        images.push(image(301, SMALL + 1));
        images.push((String::new(), Vec::new()));
        let all: BTreeMap<_, _> = images.iter().cloned().collect();
        let (sections, alone) = pack(images).expect("packed");
        assert_eq!(alone, [image(301, SMALL + 1)]);
        let bytes: usize = sections.iter().map(|section| section.bytes.len()).sum();
        assert!(
            (2..8).contains(&sections.len()) && bytes < 1 << 20,
            "{} in {bytes}",
            sections.len()
        );
        let mut back = unpacked(sections).expect("our own");
        back.extend(alone);
        assert_eq!(back, all);
        assert!(pack(Vec::new()).expect("packed").0.is_empty());
    }

    #[test]
    fn a_section_holds_what_it_says() {
        let mut plain = Vec::new();
        append(&mut plain, &("a.img".to_owned(), b"contents".to_vec()));
        let length = plain.len() as u32;
        assert_eq!(unpacked(vec![holding(&plain, length)]).expect("fine").len(), 1);
        refused(vec![holding(&plain, length - 1)], "cannot be decompressed");
        refused(vec![holding(&plain, length + 1)], "holds less than it says");
        refused(vec![holding(&plain, u32::MAX)], "holds more than one may");
        let cut = &plain[..plain.len() - 1];
        refused(vec![holding(cut, length - 1)], "cut short");
        let mut other = holding(&plain, length);
        other.version += 1;
        refused(vec![other], "version");
        refused(
            vec![Section { kind: PACKED.into(), version: VERSION, bytes: vec![1, 2] }],
            "cut short",
        );
        // Each is small, and there are many.
        let zeros = holding(&vec![0; MOST], MOST as u32);
        refused(
            vec![zeros; (MOST_IN_ALL / MOST as u64) as usize + 1],
            "more than any container has",
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_read(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            says in 0u32..400,
        ) {
            let _ = unpacked(vec![holding(&bytes, says)]);
            let _ = unpacked(vec![Section { kind: PACKED.into(), version: VERSION, bytes: bytes.clone() }]);
            let mut rest = &bytes[..];
            while let Some((name, image)) = take_image(&mut rest) {
                prop_assert!(name.len() + image.len() < bytes.len());
            }
        }
    }
}
