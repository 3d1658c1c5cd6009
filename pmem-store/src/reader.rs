//! Reading a store in the new kernel.

use std::collections::BTreeMap;
use std::io;

use rcr_engine::image::ImageSource;

use crate::error::Error;
use crate::hash::hash_all;
use crate::layout::{
    CONSUMED_MARK, DATA_START, Entry, Nonce, SEALED_MARK, SLOT_LEN, SLOTS, Superblock,
    extent_align, get_u64, superblock,
};
use crate::region::Region;

/// A sealed store that was not restored yet.
#[derive(Debug)]
pub struct Reader<R> {
    region: R,
    entries: BTreeMap<String, Entry>,
}

impl<R: Region> Reader<R> {
    /// Opens the store and checks its metadata; [`Reader::verify`] checks the images.
    ///
    /// # Errors
    /// Every [`Error`] that says what is wrong with a store, [`Error::Consumed`]
    /// for one that was restored before.
    pub fn open(region: R, nonce: &Nonce) -> Result<Self, Error> {
        let bytes = region.bytes();
        if (bytes.len() as u64) < DATA_START {
            return Err(Error::TooSmall {
                len: bytes.len() as u64,
                needed: DATA_START,
            });
        }
        let (block, slot) = newest(bytes)?;
        if block.nonce != *nonce {
            return Err(Error::Stale);
        }
        if SLOTS
            .iter()
            .any(|&at| get_u64(bytes, at as usize + superblock::CONSUMED) != 0)
        {
            return Err(Error::Consumed);
        }
        if get_u64(slot, superblock::SEALED) != SEALED_MARK {
            return Err(Error::NotSealed);
        }
        if block.store_len != bytes.len() as u64 {
            return Err(Error::Damaged {
                what: "the region is not as long as the store",
            });
        }
        let entries = read_index(bytes, &block)?;
        Ok(Reader { region, entries })
    }

    /// Compares every image with its checksum.
    ///
    /// # Errors
    /// [`Error::ImageDamaged`] for the first image that differs.
    pub fn verify(&self) -> Result<(), Error> {
        let extents: Vec<&[u8]> = self.entries.values().map(|e| self.extent(e)).collect();
        for (entry, found) in self.entries.values().zip(hash_all(&extents)) {
            if found != entry.hash {
                let name = entry.name.clone();
                return Err(Error::ImageDamaged {
                    name,
                    expected: entry.hash,
                    found,
                });
            }
        }
        Ok(())
    }

    /// Says for good that the store was restored. To be called when everything
    /// restored stands still and before the first thread runs.
    ///
    /// # Errors
    /// [`Error::Sync`]; nothing may be resumed then.
    pub fn mark_consumed(&mut self) -> Result<(), Error> {
        for slot in SLOTS {
            let at = slot as usize + superblock::CONSUMED;
            self.region.bytes_mut()[at..at + 8].copy_from_slice(&CONSUMED_MARK.to_le_bytes());
            self.region.sync(at..at + 8).map_err(Error::Sync)?;
        }
        Ok(())
    }

    /// Bytes of all images together.
    pub fn content_bytes(&self) -> u64 {
        self.entries.values().map(|e| e.len).sum()
    }

    /// Gives the region back.
    pub fn into_region(self) -> R {
        self.region
    }

    fn extent(&self, entry: &Entry) -> &[u8] {
        &self.region.bytes()[entry.offset as usize..][..entry.len as usize]
    }
}

impl<R: Region> ImageSource for Reader<R> {
    fn get(&self, name: &str) -> io::Result<Option<&[u8]>> {
        Ok(self.entries.get(name).map(|entry| self.extent(entry)))
    }

    fn names(&self) -> Vec<String> {
        self.entries.keys().cloned().collect()
    }
}

/// The whole superblock of the highest generation, and its slot.
fn newest(bytes: &[u8]) -> Result<(Superblock, &[u8]), Error> {
    let mut best: Option<(Superblock, &[u8])> = None;
    let mut worst = Error::Foreign;
    for at in SLOTS {
        let slot = &bytes[at as usize..][..SLOT_LEN as usize];
        match Superblock::decode(slot) {
            Ok(block)
                if best
                    .as_ref()
                    .is_none_or(|(b, _)| b.generation < block.generation) =>
            {
                best = Some((block, slot));
            }
            Ok(_) | Err(Error::Foreign) => {}
            Err(error) => worst = error,
        }
    }
    best.ok_or(worst)
}

fn read_index(bytes: &[u8], block: &Superblock) -> Result<BTreeMap<String, Entry>, Error> {
    let index_end = block
        .index_offset
        .checked_add(block.index_len)
        .filter(|&end| end <= bytes.len() as u64)
        .ok_or(Error::Damaged {
            what: "the index lies outside the store",
        })?;
    if block.data_end > block.index_offset {
        return Err(Error::Damaged {
            what: "the index overlaps the images",
        });
    }
    let mut index = &bytes[block.index_offset as usize..index_end as usize];
    if crc32c::crc32c(index) != block.index_crc {
        return Err(Error::Damaged {
            what: "the index does not have its checksum",
        });
    }
    let mut entries = BTreeMap::new();
    let mut data_end = DATA_START;
    for _ in 0..block.object_count {
        let entry = Entry::decode(&mut index)?;
        let end = entry
            .offset
            .checked_add(entry.len)
            .filter(|&end| end <= block.data_end && entry.offset >= data_end)
            .ok_or(Error::Damaged {
                what: "an image lies outside its place",
            })?;
        if entry.offset % extent_align(entry.len) != 0 {
            return Err(Error::Damaged {
                what: "an image is not aligned",
            });
        }
        data_end = end;
        if entries.insert(entry.name.clone(), entry).is_some() {
            return Err(Error::Damaged {
                what: "two images have one name",
            });
        }
    }
    if !index.is_empty() {
        return Err(Error::Damaged {
            what: "the index has more than its entries",
        });
    }
    Ok(entries)
}
