//! What the old kernel tells the new one about where the store lies.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::layout::Nonce;
use crate::range::PhysRange;

/// Type of the setup_data node that carries a locator. Kernels pass types that
/// they do not know on to user space untouched.
pub const SETUP_DATA_TYPE: u32 = 0x2e72_6372;

const MAGIC: [u8; 8] = *b"RCRLOCAT";
const VERSION: u32 = 1;
/// Offsets in the encoding; see `FORMAT.md`.
const AT_VERSION: usize = 0x08;
const AT_COUNT: usize = 0x0c;
const AT_NONCE: usize = 0x10;
const AT_RANGES: usize = 0x20;
const RANGE_LEN: usize = 16;
const CRC_LEN: usize = 4;
/// Ranges are multiples of huge pages.
const RANGE_ALIGN: u64 = 2 << 20;
/// No processor of the architecture has physical addresses beyond 52 bits.
const PHYS_MAX: u64 = 1 << 52;
const SETUP_DATA_DIR: &str = "/sys/kernel/boot_params/setup_data";

/// The physical ranges of a region, in the order of its bytes, and the store's nonce.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Locator {
    /// Which hand-over it is.
    pub nonce: Nonce,
    /// The ranges; together they are the region.
    pub ranges: Vec<PhysRange>,
}

/// Why there is no usable locator.
#[derive(Debug, thiserror::Error)]
pub enum LocatorError {
    /// The bytes are none of ours.
    #[error("not a locator")]
    Foreign,
    /// Written by a program that speaks another version.
    #[error("the locator has version {0}; this program reads version {VERSION}")]
    Version(u32),
    /// The bytes contradict themselves or their checksum.
    #[error("the locator is damaged: {0}")]
    Damaged(&'static str),
    /// What the boot loader passed cannot be read.
    #[error("reading {path}")]
    Read {
        /// File or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Locator {
    /// Bytes of all ranges.
    pub fn total_bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.len).sum()
    }

    /// The ranges as first address and first address after.
    pub fn address_ranges(&self) -> Vec<Range<u64>> {
        self.ranges
            .iter()
            .map(|range| range.start..range.end())
            .collect()
    }

    /// The encoding that [`Locator::from_bytes`] reads.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(AT_RANGES + self.ranges.len() * RANGE_LEN + CRC_LEN);
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend((self.ranges.len() as u32).to_le_bytes());
        out.extend(self.nonce);
        for range in &self.ranges {
            out.extend(range.start.to_le_bytes());
            out.extend(range.len.to_le_bytes());
        }
        out.extend(crc32c::crc32c(&out).to_le_bytes());
        out
    }

    /// Reads an encoding. Bytes behind it are ignored.
    ///
    /// # Errors
    /// All of [`LocatorError`] but `Read`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Locator, LocatorError> {
        if bytes.len() < AT_RANGES + CRC_LEN || bytes[..MAGIC.len()] != MAGIC {
            return Err(LocatorError::Foreign);
        }
        let version = u32_at(bytes, AT_VERSION);
        if version != VERSION {
            return Err(LocatorError::Version(version));
        }
        let count = u32_at(bytes, AT_COUNT) as usize;
        if count > (bytes.len() - AT_RANGES - CRC_LEN) / RANGE_LEN {
            return Err(LocatorError::Damaged("it ends early"));
        }
        let crc_at = AT_RANGES + count * RANGE_LEN;
        if crc32c::crc32c(&bytes[..crc_at]) != u32_at(bytes, crc_at) {
            return Err(LocatorError::Damaged("it does not have its checksum"));
        }
        let mut nonce = Nonce::default();
        nonce.copy_from_slice(&bytes[AT_NONCE..AT_NONCE + 16]);
        let ranges: Vec<PhysRange> = bytes[AT_RANGES..crc_at]
            .chunks_exact(RANGE_LEN)
            .map(|range| PhysRange {
                start: u64_at(range, 0),
                len: u64_at(range, 8),
            })
            .collect();
        check_ranges(&ranges)?;
        Ok(Locator { nonce, ranges })
    }

    /// The locator that the kernel was booted with, or `None` where there is none.
    ///
    /// It stays readable for as long as the kernel runs, so it also tells which
    /// soft-reserved ranges the next kernel shall see as RAM again.
    ///
    /// # Errors
    /// [`LocatorError`] where there is one that cannot be used.
    pub fn of_this_boot() -> Result<Option<Locator>, LocatorError> {
        Locator::in_setup_data(Path::new(SETUP_DATA_DIR))
    }

    /// [`Locator::of_this_boot`] for another folder laid out the same.
    ///
    /// # Errors
    /// As there.
    pub fn in_setup_data(dir: &Path) -> Result<Option<Locator>, LocatorError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            |source| LocatorError::Read { path, source }
        };
        let nodes = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            nodes => nodes.map_err(failed(dir))?,
        };
        for node in nodes {
            let node = node.map_err(failed(dir))?.path();
            let type_path = node.join("type");
            let kind = fs::read_to_string(&type_path).map_err(failed(&type_path))?;
            if kind.trim() == format!("{SETUP_DATA_TYPE:#x}") {
                let data_path = node.join("data");
                let data = fs::read(&data_path).map_err(failed(&data_path))?;
                return Locator::from_bytes(&data).map(Some);
            }
        }
        Ok(None)
    }
}

fn check_ranges(ranges: &[PhysRange]) -> Result<(), LocatorError> {
    for range in ranges {
        if range.len == 0 || range.start % RANGE_ALIGN != 0 || range.len % RANGE_ALIGN != 0 {
            return Err(LocatorError::Damaged("a range is not made of huge pages"));
        }
        if range.start >= PHYS_MAX || range.len > PHYS_MAX - range.start {
            return Err(LocatorError::Damaged("a range is beyond physical memory"));
        }
    }
    let mut sorted = ranges.to_vec();
    sorted.sort();
    if sorted.windows(2).any(|pair| pair[0].overlaps(&pair[1])) {
        return Err(LocatorError::Damaged("two ranges overlap"));
    }
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(
        bytes[at..at + 4]
            .try_into()
            .expect("four bytes were sliced"),
    )
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(
        bytes[at..at + 8]
            .try_into()
            .expect("eight bytes were sliced"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn sample() -> Locator {
        Locator {
            nonce: [7; 16],
            ranges: vec![
                PhysRange {
                    start: 4096 * MIB,
                    len: 256 * MIB,
                },
                PhysRange {
                    start: 1024 * MIB,
                    len: 128 * MIB,
                },
            ],
        }
    }

    #[test]
    fn a_locator_survives_its_encoding_with_padding_behind() {
        let mut bytes = sample().to_bytes();
        bytes.resize(4096, 0);
        assert_eq!(Locator::from_bytes(&bytes).unwrap(), sample());
        assert_eq!(sample().total_bytes(), 384 * MIB);
    }

    #[test]
    fn ranges_that_cannot_be_are_refused_even_with_a_right_checksum() {
        for bad in [
            vec![PhysRange {
                start: 4096,
                len: 2 * MIB,
            }],
            vec![PhysRange { start: 0, len: 0 }],
            vec![PhysRange {
                start: u64::MAX - 2 * MIB + 1,
                len: 2 * MIB,
            }],
            vec![
                PhysRange {
                    start: 0,
                    len: 4 * MIB,
                },
                PhysRange {
                    start: 2 * MIB,
                    len: 2 * MIB,
                },
            ],
        ] {
            let bytes = Locator {
                nonce: [0; 16],
                ranges: bad,
            }
            .to_bytes();
            assert!(matches!(
                Locator::from_bytes(&bytes),
                Err(LocatorError::Damaged(_))
            ));
        }
    }

    #[test]
    fn it_is_found_among_other_setup_data() {
        let dir = tempfile::tempdir().unwrap();
        assert!(
            Locator::in_setup_data(&dir.path().join("absent"))
                .unwrap()
                .is_none()
        );
        for (node, kind, data) in [
            ("0", 9, vec![1, 2, 3]),
            ("1", SETUP_DATA_TYPE, sample().to_bytes()),
        ] {
            let node = dir.path().join(node);
            fs::create_dir(&node).unwrap();
            fs::write(node.join("type"), format!("{kind:#x}\n")).unwrap();
            fs::write(node.join("data"), data).unwrap();
        }
        assert_eq!(Locator::in_setup_data(dir.path()).unwrap(), Some(sample()));
    }

    proptest! {
        #[test]
        fn any_flip_is_an_error(at in 0usize..(AT_RANGES + 2 * RANGE_LEN + CRC_LEN), bit in 0u8..8) {
            let mut bytes = sample().to_bytes();
            bytes[at] ^= 1 << bit;
            prop_assert!(Locator::from_bytes(&bytes).is_err());
        }

        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut forged = sample().to_bytes();
            forged.extend(&bytes);
            forged[AT_COUNT..AT_COUNT + 4].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
            let _ = Locator::from_bytes(&forged);
            let _ = Locator::from_bytes(&bytes);
        }
    }
}
