//! Walking over a `newc` archive (`Documentation/driver-api/early-userspace/
//! buffer-format.rst`): headers and names are read, contents skipped.

use std::io::{self, BufRead, Read};

/// Length of a header: a magic of 6 and 13 fields of 8 hexadecimal digits.
const HEADER_BYTES: usize = 110;

/// Field numbers, counted behind the magic.
const FIELD_FILE_BYTES: usize = 6;
const FIELD_NAME_BYTES: usize = 11;

/// Longest name, its NUL included (the kernel's PATH_MAX).
const NAME_BYTES_MAX: u32 = 4096;

/// The name that ends an archive.
const TRAILER: &[u8] = b"TRAILER!!!";

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Cut off, or the stream around it is damaged.
    #[error("the archive ends early")]
    Read(#[from] io::Error),
    /// No header where one should be.
    #[error("no newc header at byte {at} of the archive")]
    Header {
        /// Offset from the archive's beginning.
        at: u64,
    },
    /// A name longer than any path, or none.
    #[error("a name of {bytes} bytes at byte {at} of the archive")]
    Name {
        /// Length as the header says it.
        bytes: u32,
        /// Offset of its header from the archive's beginning.
        at: u64,
    },
    /// More than can sensibly be in an initrd.
    #[error("more than {entries_max} files or {bytes_max} bytes")]
    TooMuch {
        /// Most files.
        entries_max: usize,
        /// Most bytes.
        bytes_max: u64,
    },
}

/// Reads one archive up to and with its trailer and calls `entry` with each name
/// and its content's length, before the content is skipped.
pub(super) fn read<R: BufRead>(
    input: &mut R,
    mut entry: impl FnMut(&[u8], u64) -> Result<(), ArchiveError>,
) -> Result<(), ArchiveError> {
    let mut at = 0u64;
    let mut name = Vec::new();
    loop {
        let mut header = [0; HEADER_BYTES];
        input.read_exact(&mut header)?;
        let (file_bytes, name_bytes) = lengths(&header).ok_or(ArchiveError::Header { at })?;
        if name_bytes == 0 || name_bytes > NAME_BYTES_MAX {
            return Err(ArchiveError::Name {
                bytes: name_bytes,
                at,
            });
        }
        at += HEADER_BYTES as u64;
        name.resize(name_bytes as usize, 0);
        input.read_exact(&mut name)?;
        at += u64::from(name_bytes);
        let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
        at += skip(input, at.next_multiple_of(4) - at)?;
        let last = &name[..end] == TRAILER;
        if !last {
            entry(&name[..end], u64::from(file_bytes))?;
        }
        at += skip(input, u64::from(file_bytes))?;
        // Only a row of further entries needs the padding; the very last bytes
        // of a file may lack it.
        if last {
            return Ok(());
        }
        at += skip(input, at.next_multiple_of(4) - at)?;
    }
}

/// Content length and name length of a header.
fn lengths(header: &[u8; HEADER_BYTES]) -> Option<(u32, u32)> {
    if !header.starts_with(b"070701") && !header.starts_with(b"070702") {
        return None;
    }
    let field = |number: usize| {
        let digits = &header[6 + 8 * number..][..8];
        if !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    Some((field(FIELD_FILE_BYTES)?, field(FIELD_NAME_BYTES)?))
}

fn skip(input: &mut impl Read, bytes: u64) -> io::Result<u64> {
    let skipped = io::copy(&mut input.take(bytes), &mut io::sink())?;
    if skipped < bytes {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(skipped)
}
