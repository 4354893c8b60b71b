//! What of a sparse file holds something: the one place that asks for data and holes. Memory lies in such files
//! (of a virtual machine, of a store, shared by a container's processes), and so do files on a tmpfs.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::pages::PAGE_SIZE;

/// The pieces of a file that hold data, in ascending order, in bytes; holes are left out. It goes on with what
/// the file is when it is asked, and so ends early where the file is cut short meanwhile. Moves the position of
/// the file's description.
#[derive(Debug)]
pub struct Data<'f> {
    file: BorrowedFd<'f>,
    at: u64,
    end: u64,
}

impl<'f> Data<'f> {
    /// Of all of `file`, to where it ends.
    pub fn of(file: &'f impl AsFd) -> Self {
        Self::within(file, 0..u64::MAX)
    }

    /// Of the bytes `within` alone.
    pub fn within(file: &'f impl AsFd, within: Range<u64>) -> Self {
        Self { file: file.as_fd(), at: within.start, end: within.end }
    }

    /// The same in pages; one that is only partly data counts.
    ///
    /// # Errors
    /// As the iterator's items: what the kernel says, in `lseek(2)`.
    pub fn pages(self) -> impl Iterator<Item = io::Result<Range<u64>>> {
        let page = PAGE_SIZE as u64;
        self.map(move |piece| piece.map(|piece| piece.start / page..piece.end.div_ceil(page)))
    }

    fn next_piece(&self) -> io::Result<Option<Range<u64>>> {
        let found = |at: SeekFrom| match seek(self.file, at) {
            Ok(found) => Ok(Some(found)),
            // Nothing more, or the file has become shorter.
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(io::Error::from(error)),
        };
        if self.at >= self.end {
            return Ok(None);
        }
        let Some(start) = found(SeekFrom::Data(self.at))?.filter(|start| *start < self.end) else {
            return Ok(None);
        };
        let end = found(SeekFrom::Hole(start))?.map(|end| end.min(self.end));
        Ok(end.filter(|end| *end > start).map(|end| start..end))
    }
}

impl Iterator for Data<'_> {
    type Item = io::Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        let piece = self.next_piece().transpose();
        self.at = match &piece {
            Some(Ok(piece)) => piece.end,
            _ => self.end,
        };
        piece
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    const PAGE: u64 = PAGE_SIZE as u64;

    fn sparse() -> File {
        let file = File::from(memfd_create("sparse", MFdFlags::empty()).expect("a memory file"));
        file.set_len(16 * PAGE).expect("set its length");
        for page in [0, 3, 4, 9] {
            file.write_all_at(&[1; PAGE_SIZE], page * PAGE).expect("write a page");
        }
        file
    }

    fn pages(data: Data<'_>) -> Vec<Range<u64>> {
        data.pages().collect::<io::Result<_>>().expect("look at the file")
    }

    #[test]
    fn data_is_found_and_holes_are_not() {
        assert_eq!(pages(Data::of(&sparse())), [0..1, 3..5, 9..10]);
    }

    #[test]
    fn what_lies_outside_is_left_out() {
        let file = sparse();
        assert_eq!(pages(Data::within(&file, PAGE..10 * PAGE)), [3..5, 9..10]);
        assert_eq!(pages(Data::within(&file, 5 * PAGE..9 * PAGE)), [] as [Range<u64>; 0]);
        assert_eq!(pages(Data::within(&file, 4 * PAGE..4 * PAGE)), [] as [Range<u64>; 0]);
    }

    #[test]
    fn a_file_that_is_cut_short_ends_it() {
        let file = sparse();
        let mut data = Data::of(&file);
        assert_eq!(data.next().expect("the first piece").expect("look at it"), 0..PAGE);
        file.set_len(PAGE).expect("cut the file");
        assert!(data.next().is_none());
    }

    #[test]
    fn what_cannot_be_looked_at_is_an_error_once() {
        let (from, _to) = io::pipe().expect("a pipe");
        let mut data = Data::of(&from);
        assert!(data.next().expect("an answer").is_err());
        assert!(data.next().is_none());
    }
}
