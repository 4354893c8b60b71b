//! CRIU's image files as lists of protobuf messages whose fields are kept as they are, known or not: so
//! a few of them can be changed without losing what a newer CRIU has put beside them.

use std::fs;
use std::path::Path;

use crate::error::{ContainerError, Result};

/// Mark at the head of every image.
const COMMON_MAGIC: u32 = 0x5456_4319;
/// The second mark of an image of a process's mappings.
pub(crate) const MM_MAGIC: u32 = 0x5749_2820;
/// The same of the image of a tree of processes.
pub(crate) const PSTREE_MAGIC: u32 = 0x5027_3030;
/// Field numbers of protobuf end here.
const TAG_CAP: u64 = 1 << 29;

/// The contents of a field.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Varint(u64),
    Eight([u8; 8]),
    Bytes(Vec<u8>),
    Four([u8; 4]),
}

/// A message: its fields in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Message {
    fields: Vec<(u32, Value)>,
}

impl Message {
    /// Nothing when these bytes are no message.
    pub(crate) fn parse(mut bytes: &[u8]) -> Option<Self> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = take_varint(&mut bytes)?;
            let tag = u32::try_from(key >> 3).ok().filter(|_| key >> 3 < TAG_CAP)?;
            let value = match key & 7 {
                0 => Value::Varint(take_varint(&mut bytes)?),
                1 => Value::Eight(take_array(&mut bytes)?),
                2 => {
                    let length = usize::try_from(take_varint(&mut bytes)?).ok()?;
                    Value::Bytes(take(&mut bytes, length)?.to_vec())
                }
                5 => Value::Four(take_array(&mut bytes)?),
                _ => return None,
            };
            fields.push((tag, value));
        }
        Some(Self { fields })
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (tag, value) in &self.fields {
            let kind = match value {
                Value::Varint(_) => 0,
                Value::Eight(_) => 1,
                Value::Bytes(_) => 2,
                Value::Four(_) => 5,
            };
            put_varint(&mut bytes, u64::from(*tag) << 3 | kind);
            match value {
                Value::Varint(number) => put_varint(&mut bytes, *number),
                Value::Eight(raw) => bytes.extend_from_slice(raw),
                Value::Four(raw) => bytes.extend_from_slice(raw),
                Value::Bytes(raw) => {
                    put_varint(&mut bytes, raw.len() as u64);
                    bytes.extend_from_slice(raw);
                }
            }
        }
        bytes
    }

    /// The number in field `tag`.
    pub(crate) fn number(&self, tag: u32) -> Option<u64> {
        // The last one counts, as everywhere in protobuf.
        self.fields.iter().rev().find_map(|field| match field {
            (found, Value::Varint(number)) if *found == tag => Some(*number),
            _ => None,
        })
    }

    /// All numbers in field `tag`, in order; nothing when something else is in it.
    pub(crate) fn numbers(&self, tag: u32) -> Option<Vec<u64>> {
        let each = self.fields.iter().filter(|(found, _)| *found == tag);
        let number = |(_, value): &(u32, Value)| match value {
            Value::Varint(number) => Some(*number),
            _ => None,
        };
        each.map(number).collect()
    }

    /// The bytes in field `tag`.
    pub(crate) fn bytes(&self, tag: u32) -> Option<&[u8]> {
        self.fields.iter().rev().find_map(|field| match field {
            (found, Value::Bytes(bytes)) if *found == tag => Some(&bytes[..]),
            _ => None,
        })
    }

    /// Has field `tag` hold a number, and nothing else.
    pub(crate) fn set_number(&mut self, tag: u32, number: u64) {
        self.set(tag, Value::Varint(number));
    }

    /// Has field `tag` hold these bytes, and nothing else.
    pub(crate) fn set_bytes(&mut self, tag: u32, bytes: Vec<u8>) {
        self.set(tag, Value::Bytes(bytes));
    }

    fn set(&mut self, tag: u32, value: Value) {
        let at = self.fields.iter().position(|(found, _)| *found == tag);
        self.remove(tag);
        self.fields.insert(at.unwrap_or(self.fields.len()), (tag, value));
    }

    /// Takes field `tag` out.
    pub(crate) fn remove(&mut self, tag: u32) {
        self.fields.retain(|(found, _)| *found != tag);
    }

    /// Each message in field `tag`; nothing for what is none.
    pub(crate) fn each(&self, tag: u32) -> impl Iterator<Item = Option<Self>> {
        self.fields.iter().filter(move |(found, _)| *found == tag).map(|(_, value)| match value {
            Value::Bytes(bytes) => Self::parse(bytes),
            _ => None,
        })
    }

    /// Has field `tag` hold this number too.
    #[cfg(test)]
    pub(crate) fn add_number(&mut self, tag: u32, number: u64) {
        self.fields.push((tag, Value::Varint(number)));
    }

    /// Has field `tag` hold these bytes too.
    #[cfg(test)]
    pub(crate) fn add_bytes(&mut self, tag: u32, bytes: Vec<u8>) {
        self.fields.push((tag, Value::Bytes(bytes)));
    }

    /// Changes each message in field `tag`; false when one of them is none.
    pub(crate) fn change_each(&mut self, tag: u32, mut change: impl FnMut(&mut Self)) -> bool {
        for (found, value) in &mut self.fields {
            if *found != tag {
                continue;
            }
            let Value::Bytes(bytes) = value else { return false };
            let Some(mut inner) = Self::parse(bytes) else { return false };
            change(&mut inner);
            *bytes = inner.to_bytes();
        }
        true
    }
}

/// An image file: messages after a head.
pub(crate) struct Image {
    marks: Vec<u32>,
    pub(crate) messages: Vec<Message>,
}

impl Image {
    #[cfg(test)]
    pub(crate) fn of(kind: u32, messages: Vec<Message>) -> Self {
        Self { marks: vec![COMMON_MAGIC, kind], messages }
    }

    /// Reads an image whose second mark is `kind`; nothing when there is no such file.
    pub(crate) fn read(path: &Path, kind: u32) -> Result<Option<Self>> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(ContainerError::io(format!("read {}", path.display()))(error));
            }
        };
        let image = Self::parse(&bytes, kind);
        image.map(Some).ok_or_else(|| ContainerError::malformed(path, "is no image of CRIU's"))
    }

    /// Nothing when these bytes are no image whose second mark is `kind`.
    pub(crate) fn parse(bytes: &[u8], kind: u32) -> Option<Self> {
        Self::parse_marked(bytes, &[COMMON_MAGIC, kind])
    }

    /// The same for those that have other marks at their head.
    pub(crate) fn parse_marked(mut bytes: &[u8], marks: &[u32]) -> Option<Self> {
        for mark in marks {
            if take_array(&mut bytes).map(u32::from_le_bytes) != Some(*mark) {
                return None;
            }
        }
        let mut messages = Vec::new();
        while !bytes.is_empty() {
            let length = take_array(&mut bytes).map(u32::from_le_bytes)?;
            messages.push(Message::parse(take(&mut bytes, length as usize)?)?);
        }
        Some(Self { marks: marks.to_vec(), messages })
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, self.to_bytes())
            .map_err(ContainerError::io(format!("write {}", path.display())))
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.marks.iter().flat_map(|mark| mark.to_le_bytes()).collect();
        for message in &self.messages {
            let message = message.to_bytes();
            bytes.extend_from_slice(&(message.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&message);
        }
        bytes
    }
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (first, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(first)
}

fn take_array<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    take(bytes, N)?.try_into().ok()
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let [byte] = take_array::<1>(bytes)?;
        // More than 64 bits, of which others make something else.
        if shift == 63 && byte > 1 {
            return None;
        }
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn put_varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message() -> impl Strategy<Value = Message> {
        let value = prop_oneof![
            any::<u64>().prop_map(Value::Varint),
            any::<[u8; 8]>().prop_map(Value::Eight),
            any::<[u8; 4]>().prop_map(Value::Four),
            prop::collection::vec(any::<u8>(), 0..200).prop_map(Value::Bytes),
        ];
        prop::collection::vec((1u32..(1 << 29), value), 0..12).prop_map(|fields| Message { fields })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(messages in prop::collection::vec(message(), 0..4), kind: u32) {
            let image = Image::of(kind, messages);
            let bytes = image.to_bytes();
            let read = Image::parse(&bytes, kind).expect("an image");
            prop_assert_eq!(&read.messages, &image.messages);
            prop_assert!(Image::parse(&bytes, kind.wrapping_add(1)).is_none());
        }

        #[test]
        fn what_is_cut_or_made_up_is_no_message_or_one_and_nothing_worse(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            if let Some(message) = Message::parse(&bytes) {
                prop_assert_eq!(Message::parse(&message.to_bytes()), Some(message));
            }
        }
    }

    #[test]
    fn a_number_is_of_64_bits() {
        let number = |last: u8| {
            let mut bytes = [vec![8], vec![0x80; 9]].concat();
            bytes.push(last);
            Message::parse(&bytes).and_then(|message| message.number(1))
        };
        assert_eq!((number(0), number(1)), (Some(0), Some(1 << 63)));
        // As a truth value it would be false here, and true for CRIU.
        assert_eq!((number(2), number(3), number(0x80)), (None, None, None));
    }

    #[test]
    fn a_field_is_changed_in_its_place() {
        let mut message = Message::default();
        message.set_number(1, 300);
        message.set_bytes(2, b"two".to_vec());
        message.set_number(3, 3);
        message.set_number(1, 7);
        assert_eq!(message.to_bytes(), [8, 7, 18, 3, b't', b'w', b'o', 24, 3]);
        assert_eq!((message.number(1), message.number(2)), (Some(7), None));
        assert_eq!(message.bytes(2), Some(&b"two"[..]));
        message.remove(2);
        assert_eq!(message.to_bytes(), [8, 7, 24, 3]);
        assert!(Message::parse(&[18, 3, b't']).is_none() && Message::parse(&[3]).is_none());
    }
}
