//! Filling a store in the old kernel.

use std::collections::HashSet;
use std::io;
use std::ops::Range;

use rcr_engine::image::ImageSink;

use crate::error::Error;
use crate::hash::hash_all;
use crate::layout::{
    DATA_START, EXTENT_ALIGN, Entry, NAME_LEN_MAX, Nonce, SEALED_MARK, SLOT_LEN, SLOTS, Superblock,
    extent_align, superblock,
};
use crate::region::Region;

/// The slot that an unfinished store describes itself in.
const OPEN_SLOT: usize = 0;
/// The slot whose `sealed` mark commits the store.
const SEALED_SLOT: usize = 1;

/// A store being filled.
///
/// Dropping it leaves a store that opens as [`Error::NotSealed`].
#[derive(Debug)]
pub struct Writer<R> {
    region: R,
    nonce: Nonce,
    entries: Vec<Entry>,
    names: HashSet<String>,
    data_end: u64,
    index_len: u64,
}

impl<R: Region> Writer<R> {
    /// Starts an empty store and invalidates whatever the region held.
    ///
    /// # Errors
    /// [`Error::TooSmall`], or [`Error::Sync`] where the region fails.
    pub fn create(region: R, nonce: Nonce) -> Result<Self, Error> {
        let mut writer = Writer {
            region,
            nonce,
            entries: Vec::new(),
            names: HashSet::new(),
            data_end: DATA_START,
            index_len: 0,
        };
        let len = writer.capacity();
        let needed = DATA_START + EXTENT_ALIGN;
        if len < needed {
            return Err(Error::TooSmall { len, needed });
        }
        // A seal of the region's former content must not survive beside the new superblock.
        for slot in SLOTS {
            writer.write_through(slot, &[0; SLOT_LEN as usize])?;
        }
        let open = writer.superblock(1, 0, 0);
        writer.write_through(SLOTS[OPEN_SLOT], &open.encode())?;
        Ok(writer)
    }

    /// Bytes taken so far, padding, superblocks and index included.
    pub fn used(&self) -> u64 {
        self.data_end.next_multiple_of(EXTENT_ALIGN) + self.index_len
    }

    /// Bytes of the region.
    pub fn capacity(&self) -> u64 {
        self.region.bytes().len() as u64
    }

    /// The region beneath.
    pub fn region(&self) -> &R {
        &self.region
    }

    /// The region beneath, for what it offers beyond bytes; its bytes are the store's.
    pub fn region_mut(&mut self) -> &mut R {
        &mut self.region
    }

    /// Makes room for an image of `len` bytes and hands it out, its content undefined.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::Duplicate`] or [`Error::BadName`]; the store is
    /// then as before.
    pub fn allocate(&mut self, name: &str, len: u64) -> Result<&mut [u8], Error> {
        if name.is_empty() || name.len() > NAME_LEN_MAX || name.contains('\0') {
            return Err(Error::BadName {
                name: name.to_owned(),
                max: NAME_LEN_MAX,
            });
        }
        if self.names.contains(name) {
            return Err(Error::Duplicate {
                name: name.to_owned(),
            });
        }
        let offset = self.data_end.next_multiple_of(extent_align(len));
        let data_end = offset.saturating_add(len);
        let index_len = self.index_len + Entry::encoded_len(name.len());
        let total = data_end
            .checked_next_multiple_of(EXTENT_ALIGN)
            .unwrap_or(u64::MAX)
            .saturating_add(index_len);
        if total > self.capacity() || self.entries.len() >= u32::MAX as usize {
            let missing = total.saturating_sub(self.capacity());
            return Err(Error::Full {
                name: name.to_owned(),
                len,
                missing,
            });
        }
        self.data_end = data_end;
        self.index_len = index_len;
        self.names.insert(name.to_owned());
        self.entries.push(Entry {
            name: name.to_owned(),
            offset,
            len,
            hash: 0,
        });
        Ok(&mut self.region.bytes_mut()[offset as usize..data_end as usize])
    }

    /// Computes the checksums, writes the index and, last of all, the `sealed` mark.
    ///
    /// # Errors
    /// [`Error::Sync`]; the store then opens as not sealed or as complete.
    pub fn seal(mut self) -> Result<R, Error> {
        let bytes = self.region.bytes();
        let extents: Vec<&[u8]> = self
            .entries
            .iter()
            .map(|e| &bytes[e.offset as usize..][..e.len as usize])
            .collect();
        let hashes = hash_all(&extents);
        let mut index = Vec::with_capacity(self.index_len as usize);
        for (entry, hash) in self.entries.iter_mut().zip(hashes) {
            entry.hash = hash;
            entry.encode(&mut index);
        }
        let index_offset = self.data_end.next_multiple_of(EXTENT_ALIGN);
        self.sync(DATA_START..self.data_end)?;
        self.write_through(index_offset, &index)?;
        let complete = self.superblock(2, index_offset, crc32c::crc32c(&index));
        self.write_through(SLOTS[SEALED_SLOT], &complete.encode())?;
        self.write_through(
            SLOTS[SEALED_SLOT] + superblock::SEALED as u64,
            &SEALED_MARK.to_le_bytes(),
        )?;
        Ok(self.region)
    }

    fn superblock(&self, generation: u64, index_offset: u64, index_crc: u32) -> Superblock {
        Superblock {
            object_count: self.entries.len() as u32,
            nonce: self.nonce,
            generation,
            store_len: self.capacity(),
            index_offset,
            index_len: self.index_len,
            data_end: self.data_end,
            index_crc,
        }
    }

    fn write_through(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let range = offset..offset + bytes.len() as u64;
        self.region.bytes_mut()[range.start as usize..range.end as usize].copy_from_slice(bytes);
        self.sync(range)
    }

    fn sync(&mut self, range: Range<u64>) -> Result<(), Error> {
        self.region
            .sync(range.start as usize..range.end as usize)
            .map_err(Error::Sync)
    }
}

impl<R: Region> ImageSink for Writer<R> {
    fn put(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.allocate(name, bytes.len() as u64)?
            .copy_from_slice(bytes);
        Ok(())
    }

    fn reserve(&mut self, name: &str, len: usize) -> io::Result<&mut [u8]> {
        Ok(self.allocate(name, len as u64)?)
    }
}
