//! Where each byte of a store lies. Drawn in `FORMAT.md`; all integers are little endian.

use std::fs::File;
use std::io::{self, Read};

use crate::error::Error;

/// First bytes of each superblock.
pub const MAGIC: [u8; 8] = *b"RCRSTORE";
/// Version of the format. Readers take this one only.
pub const VERSION: u32 = 1;

/// Alignment of extents and of the index.
pub const EXTENT_ALIGN: u64 = 4096;
/// Alignment of extents that are at least this long.
pub const LARGE_ALIGN: u64 = 2 << 20;
/// Bytes of an image that are hashed in one go.
pub const HASH_CHUNK: usize = 4 << 20;
/// Longest image name in bytes.
pub const NAME_LEN_MAX: usize = 1024;

/// Offsets of the two superblock slots from the start of the store.
pub const SLOTS: [u64; 2] = [0, 4096];
/// Bytes of one slot.
pub const SLOT_LEN: u64 = 4096;
/// First byte that an extent may take.
pub const DATA_START: u64 = 2 * SLOT_LEN;

/// Offsets within a superblock slot.
pub mod superblock {
    /// `[u8; 8]`: [`super::MAGIC`].
    pub const MAGIC: usize = 0x00;
    /// `u32`: [`super::VERSION`].
    pub const VERSION: usize = 0x08;
    /// `u32`: how many images the index names.
    pub const OBJECT_COUNT: usize = 0x0c;
    /// `[u8; 16]`: which hand-over the store belongs to.
    pub const NONCE: usize = 0x10;
    /// `u64`: the valid slot with the higher generation counts.
    pub const GENERATION: usize = 0x20;
    /// `u64`: bytes of the region when the store was made.
    pub const STORE_LEN: usize = 0x28;
    /// `u64`: where the index starts.
    pub const INDEX_OFFSET: usize = 0x30;
    /// `u64`: bytes of the index.
    pub const INDEX_LEN: usize = 0x38;
    /// `u64`: first byte after the last extent.
    pub const DATA_END: usize = 0x40;
    /// `u32`: CRC32C of the index.
    pub const INDEX_CRC: usize = 0x48;
    /// `u32`: CRC32C of the slot's bytes before this field.
    pub const CRC: usize = 0x4c;
    /// Bytes covered by the fields above.
    pub const LEN: usize = 0x50;
    /// `u64`: [`super::SEALED_MARK`] once the store is complete, written after all else.
    pub const SEALED: usize = 0x80;
    /// `u64`: zero until the store is restored; anything else means it was.
    pub const CONSUMED: usize = 0xc0;
}

/// The value at [`superblock::SEALED`] in a sealed store.
pub const SEALED_MARK: u64 = u64::from_le_bytes(*b"rcrSEAL1");
/// The value at [`superblock::CONSUMED`] in a store that was restored.
pub const CONSUMED_MARK: u64 = u64::from_le_bytes(*b"rcrUSED1");

/// Offsets within an entry of the index.
pub mod entry {
    /// `u64`: where the extent starts.
    pub const OFFSET: usize = 0x00;
    /// `u64`: bytes of the image.
    pub const LEN: usize = 0x08;
    /// `u64`: xxh3-64 over the xxh3-64 of each [`super::HASH_CHUNK`] of the image.
    pub const HASH: usize = 0x10;
    /// `u32`: bytes of the name.
    pub const NAME_LEN: usize = 0x18;
    /// `u32`: zero.
    pub const RESERVED: usize = 0x1c;
    /// The name, padded with zeros to a multiple of [`ALIGN`].
    pub const NAME: usize = 0x20;
    /// Entries start at multiples of this.
    pub const ALIGN: usize = 8;
}

/// Identifies one hand-over; a store with another one is left over from earlier.
pub type Nonce = [u8; 16];

/// A nonce that no other hand-over has.
///
/// # Errors
/// What reading /dev/urandom says.
pub fn fresh_nonce() -> io::Result<Nonce> {
    let mut nonce = Nonce::default();
    File::open("/dev/urandom")?.read_exact(&mut nonce)?;
    Ok(nonce)
}

/// The fields of a superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// See [`superblock::OBJECT_COUNT`].
    pub object_count: u32,
    /// See [`superblock::NONCE`].
    pub nonce: Nonce,
    /// See [`superblock::GENERATION`].
    pub generation: u64,
    /// See [`superblock::STORE_LEN`].
    pub store_len: u64,
    /// See [`superblock::INDEX_OFFSET`].
    pub index_offset: u64,
    /// See [`superblock::INDEX_LEN`].
    pub index_len: u64,
    /// See [`superblock::DATA_END`].
    pub data_end: u64,
    /// See [`superblock::INDEX_CRC`].
    pub index_crc: u32,
}

impl Superblock {
    /// The bytes at the start of a slot, checksum included, marks not.
    pub fn encode(&self) -> [u8; superblock::LEN] {
        use superblock as at;
        let mut out = [0u8; at::LEN];
        put(&mut out, at::MAGIC, &MAGIC);
        put(&mut out, at::VERSION, &VERSION.to_le_bytes());
        put(&mut out, at::OBJECT_COUNT, &self.object_count.to_le_bytes());
        put(&mut out, at::NONCE, &self.nonce);
        put(&mut out, at::GENERATION, &self.generation.to_le_bytes());
        put(&mut out, at::STORE_LEN, &self.store_len.to_le_bytes());
        put(&mut out, at::INDEX_OFFSET, &self.index_offset.to_le_bytes());
        put(&mut out, at::INDEX_LEN, &self.index_len.to_le_bytes());
        put(&mut out, at::DATA_END, &self.data_end.to_le_bytes());
        put(&mut out, at::INDEX_CRC, &self.index_crc.to_le_bytes());
        let crc = crc32c::crc32c(&out[..at::CRC]);
        put(&mut out, at::CRC, &crc.to_le_bytes());
        out
    }

    /// Reads a slot of at least [`superblock::LEN`] bytes.
    ///
    /// # Errors
    /// [`Error::Foreign`] without our magic, [`Error::Damaged`] with a wrong
    /// checksum, [`Error::Version`] where a whole superblock has another version.
    pub fn decode(slot: &[u8]) -> Result<Superblock, Error> {
        use superblock as at;
        if slot.len() < at::LEN || slot[..MAGIC.len()] != MAGIC {
            return Err(Error::Foreign);
        }
        if crc32c::crc32c(&slot[..at::CRC]) != get_u32(slot, at::CRC) {
            return Err(Error::Damaged {
                what: "the superblock does not have its checksum",
            });
        }
        let found = get_u32(slot, at::VERSION);
        if found != VERSION {
            return Err(Error::Version {
                found,
                supported: VERSION,
            });
        }
        let mut nonce = Nonce::default();
        nonce.copy_from_slice(&slot[at::NONCE..at::NONCE + 16]);
        Ok(Superblock {
            object_count: get_u32(slot, at::OBJECT_COUNT),
            nonce,
            generation: get_u64(slot, at::GENERATION),
            store_len: get_u64(slot, at::STORE_LEN),
            index_offset: get_u64(slot, at::INDEX_OFFSET),
            index_len: get_u64(slot, at::INDEX_LEN),
            data_end: get_u64(slot, at::DATA_END),
            index_crc: get_u32(slot, at::INDEX_CRC),
        })
    }
}

/// One image in the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The image's name.
    pub name: String,
    /// Where its extent starts.
    pub offset: u64,
    /// Its bytes.
    pub len: u64,
    /// See [`entry::HASH`].
    pub hash: u64,
}

impl Entry {
    /// Bytes that an entry for a name of that length takes in the index.
    pub fn encoded_len(name_len: usize) -> u64 {
        (entry::NAME + name_len.next_multiple_of(entry::ALIGN)) as u64
    }

    /// Appends the entry to an index.
    pub fn encode(&self, index: &mut Vec<u8>) {
        let start = index.len();
        index.resize(start + Entry::encoded_len(self.name.len()) as usize, 0);
        let out = &mut index[start..];
        put(out, entry::OFFSET, &self.offset.to_le_bytes());
        put(out, entry::LEN, &self.len.to_le_bytes());
        put(out, entry::HASH, &self.hash.to_le_bytes());
        put(
            out,
            entry::NAME_LEN,
            &(self.name.len() as u32).to_le_bytes(),
        );
        put(out, entry::NAME, self.name.as_bytes());
    }

    /// Takes the entry at the start of `index` and moves `index` behind it.
    ///
    /// # Errors
    /// [`Error::Damaged`] where the index ends early or the name is none.
    pub fn decode(index: &mut &[u8]) -> Result<Entry, Error> {
        let ends_early = Error::Damaged {
            what: "the index ends within an entry",
        };
        if index.len() < entry::NAME {
            return Err(ends_early);
        }
        let name_len = get_u32(index, entry::NAME_LEN) as usize;
        if name_len == 0 || name_len > NAME_LEN_MAX {
            return Err(Error::Damaged {
                what: "an image's name is empty or too long",
            });
        }
        let entry_len = Entry::encoded_len(name_len) as usize;
        if index.len() < entry_len {
            return Err(ends_early);
        }
        let name =
            std::str::from_utf8(&index[entry::NAME..entry::NAME + name_len]).map_err(|_| {
                Error::Damaged {
                    what: "an image's name is not UTF-8",
                }
            })?;
        let decoded = Entry {
            name: name.to_owned(),
            offset: get_u64(index, entry::OFFSET),
            len: get_u64(index, entry::LEN),
            hash: get_u64(index, entry::HASH),
        };
        *index = &index[entry_len..];
        Ok(decoded)
    }
}

/// The alignment that an extent of `len` bytes starts at.
pub fn extent_align(len: u64) -> u64 {
    if len >= LARGE_ALIGN {
        LARGE_ALIGN
    } else {
        EXTENT_ALIGN
    }
}

/// Region bytes that are enough for images of these name and content lengths,
/// stored in any order.
pub fn region_bytes_needed(images: impl IntoIterator<Item = (usize, u64)>) -> u64 {
    let mut needed = DATA_START + EXTENT_ALIGN;
    for (name_len, len) in images {
        needed = needed
            .saturating_add(len)
            .saturating_add(extent_align(len))
            .saturating_add(Entry::encoded_len(name_len));
    }
    needed
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(
        bytes[at..at + 4]
            .try_into()
            .expect("four bytes were sliced"),
    )
}

/// The `u64` at `at`, which must lie within `bytes`.
pub(crate) fn get_u64(bytes: &[u8], at: usize) -> u64 {
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

    proptest! {
        #[test]
        fn a_superblock_survives_its_encoding(
            object_count: u32, nonce: Nonce, generation: u64, store_len: u64,
            index_offset: u64, index_len: u64, data_end: u64, index_crc: u32,
        ) {
            let block = Superblock {
                object_count, nonce, generation, store_len, index_offset, index_len, data_end,
                index_crc,
            };
            prop_assert_eq!(Superblock::decode(&block.encode()).unwrap(), block);
        }

        #[test]
        fn any_bytes_decode_to_an_error_or_a_value(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Superblock::decode(&bytes);
            let mut rest = &bytes[..];
            while let Ok(entry) = Entry::decode(&mut rest) {
                prop_assert!(!entry.name.is_empty());
            }
        }

        #[test]
        fn an_entry_survives_its_encoding(name in "[ -~]{1,60}", offset: u64, len: u64, hash: u64) {
            let entry = Entry { name, offset, len, hash };
            let mut index = Vec::new();
            entry.encode(&mut index);
            prop_assert_eq!(index.len() as u64, Entry::encoded_len(entry.name.len()));
            prop_assert_eq!(Entry::decode(&mut &index[..]).unwrap(), entry);
        }
    }
}
