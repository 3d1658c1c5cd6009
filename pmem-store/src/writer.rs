//! Filling a store in the old kernel.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::ops::Range;

use rcr_engine::image::{ImageSink, ImageSource};

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
    index: Index,
}

/// What a store has so far.
#[derive(Debug)]
struct Index {
    entries: Vec<Entry>,
    /// So many of the entries, from the front, have their checksum.
    hashed: usize,
    names: HashSet<String>,
    data_end: u64,
    len: u64,
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
            index: Index {
                entries: Vec::new(),
                hashed: 0,
                names: HashSet::new(),
                data_end: DATA_START,
                len: 0,
            },
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
        self.index.data_end.next_multiple_of(EXTENT_ALIGN) + self.index.len
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

    /// The region, its store never sealed.
    pub fn into_region(self) -> R {
        self.region
    }

    /// Makes room for an image of `len` bytes and hands it out, its content undefined.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::Duplicate`] or [`Error::BadName`]; the store is
    /// then as before.
    pub fn allocate(&mut self, name: &str, len: u64) -> Result<&mut [u8], Error> {
        let place = self.index.place(name, len, self.capacity())?;
        Ok(&mut self.region.bytes_mut()[place.start as usize..place.end as usize])
    }

    /// What the store has so far, to be read, and the rest of it, to be written
    /// at the same time.
    pub fn split(&mut self) -> (Written<'_>, Rest<'_>) {
        let capacity = self.capacity();
        let base = self.index.data_end;
        let (old, free) = self.region.bytes_mut().split_at_mut(base as usize);
        let place = |e: &Entry| {
            (
                e.name.clone(),
                e.offset as usize..(e.offset + e.len) as usize,
            )
        };
        let written = Written {
            bytes: old,
            places: self.index.entries.iter().map(place).collect(),
        };
        let rest = Rest {
            bytes: free,
            base,
            capacity,
            index: &mut self.index,
        };
        (written, rest)
    }

    /// Computes the checksums of what the store has so far, which [`Self::seal`]
    /// then need not.
    pub fn settle(&mut self) {
        let bytes = self.region.bytes();
        let new = &mut self.index.entries[self.index.hashed..];
        let extents: Vec<&[u8]> = new
            .iter()
            .map(|e| &bytes[e.offset as usize..][..e.len as usize])
            .collect();
        for (entry, hash) in new.iter_mut().zip(hash_all(&extents)) {
            entry.hash = hash;
        }
        self.index.hashed = self.index.entries.len();
    }

    /// Computes the checksums, writes the index and, last of all, the `sealed` mark.
    ///
    /// # Errors
    /// [`Error::Sync`]; the store then opens as not sealed or as complete.
    pub fn seal(mut self) -> Result<R, Error> {
        self.settle();
        let mut index = Vec::with_capacity(self.index.len as usize);
        for entry in &self.index.entries {
            entry.encode(&mut index);
        }
        let index_offset = self.index.data_end.next_multiple_of(EXTENT_ALIGN);
        self.sync(DATA_START..self.index.data_end)?;
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
            object_count: self.index.entries.len() as u32,
            nonce: self.nonce,
            generation,
            store_len: self.capacity(),
            index_offset,
            index_len: self.index.len,
            data_end: self.index.data_end,
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

impl Index {
    /// Takes `len` bytes under `name`; gives their place in the region.
    fn place(&mut self, name: &str, len: u64, capacity: u64) -> Result<Range<u64>, Error> {
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
        let index_len = self.len + Entry::encoded_len(name.len());
        let total = data_end
            .checked_next_multiple_of(EXTENT_ALIGN)
            .unwrap_or(u64::MAX)
            .saturating_add(index_len);
        if total > capacity || self.entries.len() >= u32::MAX as usize {
            let missing = total.saturating_sub(capacity);
            return Err(Error::Full {
                name: name.to_owned(),
                len,
                missing,
            });
        }
        self.data_end = data_end;
        self.len = index_len;
        self.names.insert(name.to_owned());
        self.entries.push(Entry {
            name: name.to_owned(),
            offset,
            len,
            hash: 0,
        });
        Ok(offset..data_end)
    }
}

/// The images that an unfinished store has.
#[derive(Debug)]
pub struct Written<'a> {
    bytes: &'a [u8],
    places: BTreeMap<String, Range<usize>>,
}

impl ImageSource for Written<'_> {
    fn get(&self, name: &str) -> io::Result<Option<&[u8]>> {
        let place = self.places.get(name);
        Ok(place.map(|place| &self.bytes[place.clone()]))
    }

    fn names(&self) -> Vec<String> {
        self.places.keys().cloned().collect()
    }
}

/// The part of an unfinished store that nothing is in yet.
#[derive(Debug)]
pub struct Rest<'a> {
    bytes: &'a mut [u8],
    /// Where it begins in the region.
    base: u64,
    capacity: u64,
    index: &'a mut Index,
}

impl ImageSink for Rest<'_> {
    fn put(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.reserve(name, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }

    fn reserve(&mut self, name: &str, len: usize) -> io::Result<&mut [u8]> {
        let place = self.index.place(name, len as u64, self.capacity)?;
        let (start, end) = (place.start - self.base, place.end - self.base);
        Ok(&mut self.bytes[start as usize..end as usize])
    }
}
