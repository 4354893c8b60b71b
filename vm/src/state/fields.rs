//! The encoding of state sections: numbered fields, each with its length, in ascending order.
//!
//! A field is `number: u16, length: u32, bytes`, all little-endian. A reader takes each field by
//! its number and exact length and then says that it is done: what is missing, doubled, out of
//! order, cut off, too long or not used up is an error. Nothing here knows what the fields mean.

use std::collections::BTreeMap;

use crate::error::{Result, VmError};

/// The most bytes that one field may have.
const MAX_FIELD: usize = 1 << 20;

/// A section being written.
#[derive(Debug, Default)]
pub(crate) struct FieldWriter {
    bytes: Vec<u8>,
    last: u16,
}

impl FieldWriter {
    /// Adds field `number`; numbers ascend.
    pub(crate) fn put(&mut self, number: u16, field: &[u8]) {
        debug_assert!(number > self.last && field.len() <= MAX_FIELD);
        self.last = number;
        self.bytes.extend_from_slice(&number.to_le_bytes());
        self.bytes.extend_from_slice(&(field.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(field);
    }

    /// The section's payload.
    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// A section being read.
#[derive(Debug)]
pub(crate) struct FieldReader<'a> {
    section: &'a str,
    fields: BTreeMap<u16, &'a [u8]>,
}

impl<'a> FieldReader<'a> {
    /// Splits the payload of `section` into its fields.
    ///
    /// # Errors
    /// When a field is cut off, too long, doubled or out of order.
    pub(crate) fn new(section: &'a str, bytes: &'a [u8]) -> Result<Self> {
        let wrong = |reason: String| VmError::section(section, reason);
        let mut fields = BTreeMap::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let (head, after) = rest
                .split_first_chunk::<6>()
                .ok_or_else(|| wrong(format!("{} bytes after the last field", rest.len())))?;
            let number = u16::from_le_bytes([head[0], head[1]]);
            let length = u32::from_le_bytes([head[2], head[3], head[4], head[5]]) as usize;
            if length > MAX_FIELD || length > after.len() {
                return Err(wrong(format!(
                    "field {number} of {length} bytes, but only {} follow",
                    after.len()
                )));
            }
            if fields.last_key_value().is_some_and(|(last, _)| *last >= number) {
                return Err(wrong(format!("field {number} is doubled or out of order")));
            }
            let (field, after) = after.split_at(length);
            fields.insert(number, field);
            rest = after;
        }
        Ok(Self { section, fields })
    }

    /// Takes field `number`, whatever its length.
    pub(crate) fn take(&mut self, number: u16) -> Result<&'a [u8]> {
        self.fields
            .remove(&number)
            .ok_or_else(|| VmError::section(self.section, format!("field {number} is missing")))
    }

    /// Takes field `number` of exactly `length` bytes.
    pub(crate) fn take_exact(&mut self, number: u16, length: usize) -> Result<&'a [u8]> {
        let field = self.take(number)?;
        if field.len() != length {
            return Err(VmError::section(
                self.section,
                format!("field {number} has {} bytes instead of {length}", field.len()),
            ));
        }
        Ok(field)
    }

    /// Takes field `number` as an array.
    pub(crate) fn take_array<const N: usize>(&mut self, number: u16) -> Result<[u8; N]> {
        let field = self.take_exact(number, N)?;
        let mut array = [0; N];
        array.copy_from_slice(field);
        Ok(array)
    }

    /// Takes field `number` as rows of `N` bytes, at most `limit` of them.
    pub(crate) fn take_rows<const N: usize>(
        &mut self,
        number: u16,
        limit: usize,
    ) -> Result<Vec<[u8; N]>> {
        let field = self.take(number)?;
        let (rows, rest) = field.as_chunks::<N>();
        if !rest.is_empty() || rows.len() > limit {
            return Err(VmError::section(
                self.section,
                format!(
                    "field {number} has {} bytes: not at most {limit} rows of {N}",
                    field.len()
                ),
            ));
        }
        Ok(rows.to_vec())
    }

    /// Says that every field was used.
    pub(crate) fn finish(self) -> Result<()> {
        match self.fields.first_key_value() {
            None => Ok(()),
            Some((number, _)) => Err(VmError::section(
                self.section,
                format!("field {number} is not known to this version"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encode(fields: &BTreeMap<u16, Vec<u8>>) -> Vec<u8> {
        let mut writer = FieldWriter::default();
        fields.iter().for_each(|(number, field)| writer.put(*number, field));
        writer.finish()
    }

    proptest! {
        #[test]
        fn fields_come_back_and_a_cut_is_found(
            fields in prop::collection::btree_map(1u16.., prop::collection::vec(any::<u8>(), 0..40), 1..8),
            cut in any::<prop::sample::Index>(),
        ) {
            let bytes = encode(&fields);
            let read_all = |bytes: &[u8]| -> Result<()> {
                let mut reader = FieldReader::new("x", bytes)?;
                for (number, field) in &fields {
                    let taken = reader.take_exact(*number, field.len())?;
                    assert_eq!(taken, &field[..]);
                }
                reader.finish()
            };
            prop_assert!(read_all(&bytes).is_ok());
            prop_assert!(read_all(&bytes[..cut.index(bytes.len())]).is_err());
            let mut more = bytes.clone();
            more.push(0);
            prop_assert!(read_all(&more).is_err());
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(mut reader) = FieldReader::new("x", &bytes) {
                let _ = reader.take_array::<4>(1);
                let _ = reader.take_rows::<3>(2, 5);
                let _ = reader.finish();
            }
        }
    }

    #[test]
    fn doubled_unknown_and_overlong_fields_are_errors() {
        let mut one = FieldWriter::default();
        one.put(3, b"abc");
        let one = one.finish();
        let doubled = [one.clone(), one.clone()].concat();
        assert!(FieldReader::new("x", &doubled).is_err());
        assert!(FieldReader::new("x", &one).expect("one field").finish().is_err());
        let mut long = vec![3, 0];
        long.extend_from_slice(&u32::MAX.to_le_bytes());
        assert!(FieldReader::new("x", &long).is_err());
    }
}
