//! A distribution's initrd: what is in it and how it can be hooked.
//!
//! An initrd is a row of `newc` archives, each plain or inside a compressed
//! stream, with zeros between them; the kernel unpacks them one over the other
//! (`init/initramfs.c`). Only names are read here, nothing is kept of the files.

mod family;
mod newc;

use std::collections::BTreeSet;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

pub use family::Family;

use crate::compress::{CompressError, Compression};
use newc::ArchiveError;

/// Most bytes that all parts together may unpack to.
const UNPACKED_BYTES_MAX: u64 = 4 << 30;

/// Most files in an initrd.
const ENTRIES_MAX: usize = 1_000_000;

/// Most bytes of an initrd file.
const FILE_BYTES_MAX: u64 = 2 << 30;

/// Boundary at which the appended archive begins. The kernel wants 4.
const APPEND_ALIGN: usize = 512;

/// An initrd that has been read and understood.
#[derive(Debug, Clone)]
pub struct Initrd {
    bytes: Vec<u8>,
    names: Names,
    family: Family,
}

/// Why an initrd cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The file cannot be read.
    #[error("initrd {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no such file.
    #[error(
        "there is no initrd {}; make it with 'update-initramfs -c -k VERSION' or 'dracut --kver VERSION', or name another one",
        path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// Made by neither initramfs-tools nor dracut.
    #[error(
        "{} is an unknown initrd: it was made by neither initramfs-tools nor dracut; make one with 'update-initramfs' or 'dracut' and name that one",
        path.display()
    )]
    Unknown {
        /// The file.
        path: PathBuf,
    },
    /// A part is packed in a way that cannot be read.
    #[error("initrd {}, at byte {offset}", path.display())]
    Compression {
        /// The file.
        path: PathBuf,
        /// Where the part begins.
        offset: usize,
        /// What is wrong with it.
        source: CompressError,
    },
    /// A part is no archive.
    #[error("initrd {}, part at byte {offset}", path.display())]
    Archive {
        /// The file.
        path: PathBuf,
        /// Where the part begins.
        offset: usize,
        /// What is wrong with it.
        source: ArchiveError,
    },
    /// Something stands between the parts that the kernel would not take either.
    #[error("initrd {}: neither an archive nor a compressed stream at byte {offset}", path.display())]
    Junk {
        /// The file.
        path: PathBuf,
        /// Where it stands.
        offset: usize,
    },
    /// More than can sensibly be in an initrd.
    #[error("initrd {} is larger than {limit_bytes} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit_bytes: u64,
    },
}

/// Names in an initrd, without leading `/` or `./`.
#[derive(Debug, Clone, Default)]
pub struct Names(BTreeSet<Vec<u8>>);

impl Names {
    /// Whether the initrd has an entry of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.0.contains(name.as_bytes())
    }

    /// Every name in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(Vec::as_slice)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn insert(&mut self, name: &[u8]) {
        let name = name.strip_prefix(b"./").unwrap_or(name);
        let name = name.strip_prefix(b"/").unwrap_or(name);
        self.0.insert(name.to_vec());
    }
}

impl<S: AsRef<[u8]>> FromIterator<S> for Names {
    fn from_iter<I: IntoIterator<Item = S>>(names: I) -> Self {
        let mut out = Names::default();
        names.into_iter().for_each(|name| out.insert(name.as_ref()));
        out
    }
}

impl Initrd {
    /// Reads the initrd file at `path`.
    pub fn read(path: &Path) -> Result<Self, InitrdError> {
        let error = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => InitrdError::Missing { path: path.into() },
            _ => InitrdError::Read {
                path: path.into(),
                source,
            },
        };
        let file = std::fs::File::open(path).map_err(error)?;
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX + 1)
            .read_to_end(&mut bytes)
            .map_err(error)?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(InitrdError::TooLarge {
                path: path.into(),
                limit_bytes: FILE_BYTES_MAX,
            });
        }
        Self::parse(path, bytes)
    }

    /// Reads an initrd from memory; `path` is for messages.
    pub fn parse(path: &Path, bytes: Vec<u8>) -> Result<Self, InitrdError> {
        let names = list(path, &bytes)?;
        let family =
            Family::of(&names).ok_or_else(|| InitrdError::Unknown { path: path.into() })?;
        Ok(Initrd {
            bytes,
            names,
            family,
        })
    }

    /// Who made it.
    pub fn family(&self) -> Family {
        self.family
    }

    /// The names of its files.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// The initrd with `overlay`, a `newc` archive, behind it.
    pub fn append(&self, overlay: &[u8]) -> Vec<u8> {
        append(&self.bytes, overlay)
    }
}

/// `initrd` followed by `overlay` at a boundary that the kernel takes.
pub fn append(initrd: &[u8], overlay: &[u8]) -> Vec<u8> {
    let start = initrd.len().next_multiple_of(APPEND_ALIGN);
    let mut out = Vec::with_capacity(start + overlay.len());
    out.extend_from_slice(initrd);
    out.resize(start, 0);
    out.extend_from_slice(overlay);
    out
}

/// The names in all parts of `bytes`.
pub fn list(path: &Path, bytes: &[u8]) -> Result<Names, InitrdError> {
    let mut names = Names::default();
    let mut unpacked_bytes = 0;
    let mut rest = bytes;
    loop {
        let zeros = rest.iter().take_while(|b| **b == 0).count();
        rest = &rest[zeros..];
        if rest.is_empty() {
            return Ok(names);
        }
        let offset = bytes.len() - rest.len();
        let archive_error = |source| InitrdError::Archive {
            path: path.into(),
            offset,
            source,
        };
        let compression_error = |source| InitrdError::Compression {
            path: path.into(),
            offset,
            source,
        };
        let mut budget = Budget {
            names: &mut names,
            unpacked_bytes: &mut unpacked_bytes,
        };
        if rest[0] == b'0' && offset.is_multiple_of(4) {
            newc::read(&mut rest, |name, bytes| budget.take(name, bytes)).map_err(archive_error)?;
            continue;
        }
        let Some(compression) = Compression::detect(rest).map_err(compression_error)? else {
            return Err(InitrdError::Junk {
                path: path.into(),
                offset,
            });
        };
        let damaged = |source| {
            compression_error(CompressError::Damaged {
                what: compression,
                source,
            })
        };
        let mut stream =
            BufReader::with_capacity(1 << 16, compression.reader(&mut rest).map_err(damaged)?);
        while skip_zeros(&mut stream).map_err(damaged)? {
            newc::read(&mut stream, |name, bytes| budget.take(name, bytes))
                .map_err(archive_error)?;
        }
    }
}

/// What may still come out of an initrd.
struct Budget<'a> {
    names: &'a mut Names,
    unpacked_bytes: &'a mut u64,
}

impl Budget<'_> {
    fn take(&mut self, name: &[u8], bytes: u64) -> Result<(), ArchiveError> {
        *self.unpacked_bytes = self.unpacked_bytes.saturating_add(bytes);
        if *self.unpacked_bytes > UNPACKED_BYTES_MAX || self.names.len() >= ENTRIES_MAX {
            return Err(ArchiveError::TooMuch {
                bytes_max: UNPACKED_BYTES_MAX,
                entries_max: ENTRIES_MAX,
            });
        }
        self.names.insert(name);
        Ok(())
    }
}

/// Skips zeros; `false` at the end. A stream of zeros alone is bounded by the
/// size it could sensibly unpack to.
fn skip_zeros(stream: &mut impl BufRead) -> io::Result<bool> {
    let mut skipped_bytes = 0u64;
    loop {
        let buffer = stream.fill_buf()?;
        if buffer.is_empty() {
            return Ok(false);
        }
        let zeros = buffer.iter().take_while(|b| **b == 0).count();
        let more = zeros < buffer.len();
        stream.consume(zeros);
        skipped_bytes += zeros as u64;
        if more {
            return Ok(true);
        }
        if skipped_bytes > UNPACKED_BYTES_MAX {
            return Err(io::Error::other("nothing but zeros"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::tests::{gzip, lz4, xz, zstd};

    fn archive(names: &[&str]) -> Vec<u8> {
        let mut out = Vec::new();
        for name in names {
            let builder = cpio::NewcBuilder::new(name).mode(0o100_644);
            let mut writer = builder.write(&mut out, 5);
            io::Write::write_all(&mut writer, b"12345").unwrap();
            writer.finish().unwrap();
        }
        cpio::newc::trailer(&mut out).unwrap();
        out
    }

    fn names_of(bytes: &[u8]) -> Vec<String> {
        let names = list(Path::new("x"), bytes).unwrap();
        names
            .iter()
            .map(|n| String::from_utf8(n.to_vec()).unwrap())
            .collect()
    }

    #[test]
    fn parts_of_every_packing_are_read_in_a_row() {
        let main = archive(&["conf/initramfs.conf", "./scripts/functions"]);
        let mut packings = vec![main.clone(), gzip(&main), zstd(&main), lz4(&main)];
        packings.extend(xz(&main));
        for packed in packings {
            let early = append(&archive(&["kernel/x86/microcode/a.bin"]), &packed);
            let both = append(&early, &archive(&["/rcr/rcr-early"]));
            assert_eq!(
                names_of(&both),
                [
                    "conf/initramfs.conf",
                    "kernel/x86/microcode/a.bin",
                    "rcr/rcr-early",
                    "scripts/functions"
                ]
            );
            assert_eq!(both.len() % 4, 0);
        }
    }

    #[test]
    fn two_archives_in_one_stream() {
        let both = append(&archive(&["a"]), &archive(&["b"]));
        assert_eq!(names_of(&gzip(&both)), ["a", "b"]);
    }

    #[test]
    fn bad_initrds_are_told_apart() {
        let path = Path::new("/boot/initrd.img-1");
        let parse = |bytes: Vec<u8>| Initrd::parse(path, bytes).unwrap_err();
        assert!(matches!(
            parse(archive(&["bin/sh"])),
            InitrdError::Unknown { .. }
        ));
        assert!(matches!(parse(Vec::new()), InitrdError::Unknown { .. }));
        assert!(matches!(
            parse(b"MZ\x90\0".to_vec()),
            InitrdError::Junk { offset: 0, .. }
        ));
        assert!(matches!(
            parse(b"BZh9".to_vec()),
            InitrdError::Compression { .. }
        ));
        let mut cut = archive(&["conf/initramfs.conf"]);
        cut.truncate(120);
        assert!(matches!(parse(cut), InitrdError::Archive { .. }));
        let missing = Initrd::read(Path::new("/nonexistent/initrd.img-7")).unwrap_err();
        assert!(
            missing.to_string().contains("update-initramfs"),
            "{missing}"
        );
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_give_an_answer(bytes: Vec<u8>) {
            let _ = list(Path::new("x"), &bytes);
            let _ = list(Path::new("x"), &[b"070701", bytes.as_slice()].concat());
        }

        #[test]
        fn a_changed_byte_gives_an_answer(at in 0usize..400, value: u8) {
            let mut bytes = archive(&["conf/initramfs.conf", "scripts/functions"]);
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = list(Path::new("x"), &bytes);
            let _ = list(Path::new("x"), &gzip(&bytes));
        }
    }
}
