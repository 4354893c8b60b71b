//! What a file stream must be able to do, for the transport's own streams and for anything that
//! reads and writes. No framing here.

use std::io::{self, Read, Write};

use super::error::StreamError;
use crate::transport::DataStream;

type Result<T> = std::result::Result<T, StreamError>;

/// A blocking stream in both directions.
pub trait FileChannel: Send {
    /// Fills `buffer`.
    ///
    /// # Errors
    /// When the stream ends, breaks or stalls first.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<()>;
    /// Fills `buffer`, and waits for its first byte as long as it takes. False: the stream ended
    /// before that byte.
    ///
    /// # Errors
    /// As [`FileChannel::fill`], once a byte has come.
    fn fill_next(&mut self, buffer: &mut [u8]) -> Result<bool>;
    /// Writes all of `bytes` and hands them to the kernel.
    ///
    /// # Errors
    /// When the stream breaks or stalls.
    fn put(&mut self, bytes: &[u8]) -> Result<()>;
    /// Says that nothing more will be written, where the stream can say so.
    ///
    /// # Errors
    /// When the stream is broken.
    fn end(&mut self) -> Result<()>;
}

impl FileChannel for DataStream {
    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        Ok(DataStream::read_exact(self, buffer)?)
    }

    fn fill_next(&mut self, buffer: &mut [u8]) -> Result<bool> {
        Ok(DataStream::read_next(self, buffer)?)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(DataStream::write_all(self, bytes)?)
    }

    fn end(&mut self) -> Result<()> {
        Ok(DataStream::end_writing(self)?)
    }
}

impl<S: Read + Write + Send> FileChannel for S {
    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        Ok(Read::read_exact(self, buffer)?)
    }

    fn fill_next(&mut self, buffer: &mut [u8]) -> Result<bool> {
        loop {
            match self.read(buffer) {
                Ok(0) => return Ok(buffer.is_empty()),
                Ok(count) => {
                    return Ok(Read::read_exact(self, &mut buffer[count..]).map(|()| true)?);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        Write::write_all(self, bytes)?;
        Ok(self.flush()?)
    }

    /// A plain stream ends when it is dropped.
    fn end(&mut self) -> Result<()> {
        Ok(self.flush()?)
    }
}
