//! Which descriptors are the same open file description.

use std::cell::Cell;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::sys::kcmp_files;
use crate::sys::SysResult;

/// A descriptor table's slot that refers to a description.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    /// The task whose table it was found in.
    pub pid: i32,
    /// Number in that table.
    pub fd: u32,
}

/// One open file description, held by a duplicate of ours.
#[derive(Debug)]
pub(crate) struct Held {
    pub fd: OwnedFd,
    pub id: u32,
    /// Where it was found, first finding first.
    pub slots: Vec<Slot>,
}

/// What the same descriptions have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Device and number.
    pub inode: (u64, u64),
    /// Of an event counter: they all have one inode.
    pub eventfd: Option<u64>,
}

/// All descriptions found so far.
///
/// The kernel orders descriptions (kcmp(2)), so that among those of one key
/// a binary search finds an equal one.
#[derive(Debug, Default)]
pub(crate) struct Descriptions {
    held: Vec<Held>,
    by_key: HashMap<Key, Vec<usize>>,
    by_inode: HashMap<(u64, u64), Vec<usize>>,
    by_id: HashMap<u32, usize>,
    by_slot: HashMap<(i32, u32), usize>,
    /// Where [`Self::find`] has last looked in vain: the key, the length of its
    /// bucket then, and where a new one belongs.
    last: Cell<Option<(Key, usize, usize)>>,
}

impl Descriptions {
    /// The known description that `fd` refers to.
    pub(crate) fn find(&self, key: Key, fd: BorrowedFd<'_>) -> SysResult<Option<u32>> {
        match self.place(key, fd)? {
            Ok(i) => Ok(Some(self.held[i].id)),
            Err(at) => {
                self.last.set(Some((key, self.bucket(key).len(), at)));
                Ok(None)
            }
        }
    }

    /// Adds a description that [`Self::find`] did not know just now.
    pub(crate) fn insert(&mut self, key: Key, fd: OwnedFd, id: u32, slot: Slot) -> SysResult<()> {
        let place = match self.last.take() {
            Some((of, len, at)) if of == key && len == self.bucket(key).len() => Err(at),
            _ => self.place(key, fd.as_fd())?,
        };
        if let Err(at) = place {
            self.by_key
                .entry(key)
                .or_default()
                .insert(at, self.held.len());
            let of_inode = self.by_inode.entry(key.inode).or_default();
            of_inode.push(self.held.len());
            self.by_id.insert(id, self.held.len());
            self.by_slot.insert((slot.pid, slot.fd), self.held.len());
            self.held.push(Held {
                fd,
                id,
                slots: vec![slot],
            });
        }
        Ok(())
    }

    /// Adds a description that no task has yet.
    pub(crate) fn insert_unheld(&mut self, key: Key, fd: OwnedFd, id: u32) -> SysResult<()> {
        if let Err(at) = self.place(key, fd.as_fd())? {
            let bucket = self.by_key.entry(key).or_default();
            bucket.insert(at, self.held.len());
            let of_inode = self.by_inode.entry(key.inode).or_default();
            of_inode.push(self.held.len());
            self.by_id.insert(id, self.held.len());
            self.held.push(Held {
                fd,
                id,
                slots: Vec::new(),
            });
        }
        Ok(())
    }

    /// Notes one more slot of a known description.
    pub(crate) fn add_slot(&mut self, id: u32, slot: Slot) {
        if let Some(&i) = self.by_id.get(&id) {
            self.held[i].slots.push(slot);
            self.by_slot.insert((slot.pid, slot.fd), i);
        }
    }

    /// Our duplicate for `id`.
    pub(crate) fn get(&self, id: u32) -> Option<&Held> {
        self.by_id.get(&id).map(|&i| &self.held[i])
    }

    /// What a task's number stands for.
    pub(crate) fn at(&self, pid: i32, fd: u32) -> Option<&Held> {
        self.by_slot.get(&(pid, fd)).map(|&i| &self.held[i])
    }

    /// All descriptions of one inode.
    pub(crate) fn of_inode(&self, inode: (u64, u64)) -> impl Iterator<Item = &Held> {
        self.by_inode
            .get(&inode)
            .into_iter()
            .flatten()
            .map(|&i| &self.held[i])
    }

    fn bucket(&self, key: Key) -> &[usize] {
        self.by_key.get(&key).map_or(&[], Vec::as_slice)
    }

    /// Index of the equal description, or where a new one belongs in its bucket.
    fn place(&self, key: Key, fd: BorrowedFd<'_>) -> SysResult<Result<usize, usize>> {
        let bucket = self.bucket(key);
        let (mut low, mut high) = (0, bucket.len());
        while low < high {
            let mid = low + (high - low) / 2;
            match kcmp_files(self.held[bucket[mid]].fd.as_fd(), fd)? {
                std::cmp::Ordering::Equal => return Ok(Ok(bucket[mid])),
                std::cmp::Ordering::Less => low = mid + 1,
                std::cmp::Ordering::Greater => high = mid,
            }
        }
        Ok(Err(low))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn duplicates_are_found_and_reopened_files_are_not() {
        let mut all = Descriptions::default();
        let files: Vec<File> = (0..50).map(|_| File::open("/dev/null").unwrap()).collect();
        let key = |dev| Key {
            inode: (dev, 1),
            eventfd: None,
        };
        for (i, f) in files.iter().enumerate() {
            assert_eq!(all.find(key(1), f.as_fd()).unwrap(), None);
            let slot = Slot {
                pid: 1,
                fd: i as u32,
            };
            all.insert(key(1), f.try_clone().unwrap().into(), i as u32, slot)
                .unwrap();
        }
        for (i, f) in files.iter().enumerate() {
            assert_eq!(all.find(key(1), f.as_fd()).unwrap(), Some(i as u32));
        }
        assert_eq!(all.find(key(2), files[0].as_fd()).unwrap(), None);
    }
}
