//! A look at the kernel's own structures, for what no call and no file tells.
//!
//! It is done with two small programs of BPF iterators (the kernel's
//! Documentation/bpf/bpf_iterators.rst) that only read: one lists the open
//! files of a task by their addresses, the other copies memory. Whoever uses
//! an address keeps what is there alive, by a descriptor or by having stopped
//! the task.

mod btf;
mod program;

use nix::errno::Errno;

use super::{SysError, SysResult};
pub use btf::{Btf, Place};
use program::Iterator;

/// Bytes that one copy has at most.
const COPY_BYTES: usize = 240;
/// Copies that one program makes; all of them have to fit the kernel's buffer.
const COPIES: usize = 100;
/// Links of a list that one program follows.
const LINKS: usize = 2000;

/// An open file of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenFile {
    /// Number in the task's table.
    pub fd: u32,
    /// Address of its `struct file`.
    pub file: u64,
    /// Its `private_data`.
    pub private: u64,
}

/// The kernel's types and the way to look at them.
#[derive(Debug)]
pub struct Window {
    btf: Btf,
}

/// One structure that lies somewhere.
#[derive(Debug, Clone, Copy)]
pub struct Object<'a> {
    window: &'a Window,
    name: &'static str,
    /// Its address.
    pub at: u64,
}

impl Window {
    /// Fails where the kernel does not describe its types (`CONFIG_DEBUG_INFO_BTF`).
    pub fn open() -> SysResult<Self> {
        Ok(Self { btf: Btf::load()? })
    }

    /// The open files of a task; `tid` as we see it.
    pub fn files(&self, tid: i32) -> SysResult<Vec<OpenFile>> {
        let private = self.place("file", "private_data")?.offset;
        let walk = self.iterator("bpf_iter_task_file", &program::files(private as i16))?;
        let bytes = walk.run(tid)?;
        let word = |b: &[u8], n: usize| {
            let word = b[n * 8..][..8].try_into();
            u64::from_le_bytes(word.expect("8 bytes"))
        };
        let one = |b: &[u8]| OpenFile {
            fd: word(b, 0) as u32,
            file: word(b, 1),
            private: word(b, 2),
        };
        Ok(bytes.chunks_exact(24).map(one).collect())
    }

    /// Address of a task's `struct task_struct`.
    pub fn task(&self, tid: i32) -> SysResult<u64> {
        let walk = self.iterator("bpf_iter_task", &program::task())?;
        let bytes = walk.run(tid)?;
        let word = bytes.get(..8).and_then(|b| b.try_into().ok());
        let word = word.ok_or_else(|| SysError::new("BPF iterator", tid, Errno::ESRCH))?;
        Ok(u64::from_le_bytes(word))
    }

    /// Copies memory: (address, length) each.
    pub fn copy(&self, ranges: &[(u64, usize)]) -> SysResult<Vec<Vec<u8>>> {
        let mut parts = Vec::new();
        for &(at, len) in ranges {
            for from in (0..len).step_by(COPY_BYTES) {
                parts.push((at + from as u64, COPY_BYTES.min(len - from)));
            }
        }
        let mut bytes = Vec::new();
        for parts in parts.chunks(COPIES) {
            let walk = self.iterator("bpf_iter_task", &program::copy(parts))?;
            let out = walk.run(std::process::id() as i32)?;
            let mut rest = out.as_slice();
            for &(at, len) in parts {
                let torn = || SysError::new("BPF iterator", format!("{at:#x}"), Errno::EFAULT);
                let (head, more) = rest.split_at_checked(8 + len).ok_or_else(torn)?;
                if head[..8] != [0; 8] {
                    return Err(torn());
                }
                bytes.extend_from_slice(&head[8..]);
                rest = more;
            }
        }
        let mut rest = bytes.as_slice();
        let mut out = Vec::new();
        for &(_, len) in ranges {
            let (one, more) = rest.split_at(len);
            out.push(one.to_vec());
            rest = more;
        }
        Ok(out)
    }

    /// How many nodes a list has whose first is at `first`, where each begins
    /// with the address of the next and the last has 0 there.
    pub fn list_length(&self, first: u64, most: usize) -> SysResult<usize> {
        let (mut next, mut count) = (first, 0);
        while next != 0 && count < most {
            let walk = self.iterator("bpf_iter_task", &program::follow(next, LINKS))?;
            let out = walk.run(std::process::id() as i32)?;
            let word = |n: usize| {
                let word = out.get(n * 8..n * 8 + 8).and_then(|b| b.try_into().ok());
                let lost = || SysError::new("BPF iterator", format!("{next:#x}"), Errno::EFAULT);
                word.map(u64::from_le_bytes).ok_or_else(lost)
            };
            count += word(0)? as usize;
            next = word(1)?;
        }
        Ok(count)
    }

    /// Bytes of a structure.
    pub fn size(&self, structure: &str) -> SysResult<u64> {
        let missing = || SysError::new("BTF", structure, Errno::ENODATA);
        self.btf.size(structure).map(u64::from).ok_or_else(missing)
    }

    /// The structure of that name at an address.
    pub fn object(&self, name: &'static str, at: u64) -> Object<'_> {
        let window = self;
        Object { window, name, at }
    }

    /// Whether the kernel's structure has such a field.
    pub fn has(&self, structure: &str, path: &str) -> bool {
        self.btf.field(structure, path).is_some()
    }

    fn place(&self, structure: &str, path: &str) -> SysResult<Place> {
        let missing = || SysError::new("BTF", format!("{structure}.{path}"), Errno::ENODATA);
        self.btf.field(structure, path).ok_or_else(missing)
    }

    fn iterator(&self, target: &'static str, code: &[u8]) -> SysResult<Iterator> {
        let id = self.btf.function(target);
        let missing = || SysError::new("BTF", target, Errno::ENODATA);
        Iterator::load(id.ok_or_else(missing)?, code)
    }
}

impl Object<'_> {
    /// Address of a field.
    pub fn address(&self, path: &str) -> SysResult<u64> {
        Ok(self.at + u64::from(self.window.place(self.name, path)?.offset))
    }

    /// The bytes of a field.
    pub fn bytes(&self, path: &str) -> SysResult<Vec<u8>> {
        let place = self.window.place(self.name, path)?;
        let range = (self.at + u64::from(place.offset), place.bytes as usize);
        Ok(self.window.copy(&[range])?.pop().unwrap_or_default())
    }

    /// The values of fields of up to 8 bytes.
    pub fn numbers<const N: usize>(&self, paths: [&str; N]) -> SysResult<[u64; N]> {
        let mut places = Vec::new();
        for path in paths {
            let p = self.window.place(self.name, path)?;
            places.push((p, (p.bytes as usize).min(8)));
        }
        let at = |p: &Place| self.at + u64::from(p.offset);
        let ranges: Vec<_> = places.iter().map(|(p, len)| (at(p), *len)).collect();
        let found = self.window.copy(&ranges)?;
        let mut out = [0; N];
        for ((to, bytes), (p, _)) in out.iter_mut().zip(found).zip(&places) {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(&bytes);
            let value = u64::from_le_bytes(word);
            *to = match p.bits {
                Some((shift, width)) => value >> shift & (u64::MAX >> (64 - width)),
                None => value,
            };
        }
        Ok(out)
    }

    /// The value of a field of up to 8 bytes.
    pub fn number(&self, path: &str) -> SysResult<u64> {
        Ok(self.numbers([path])?[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn our_own_pipe_is_seen() {
        let Ok(window) = Window::open() else { return };
        let (r, _w) = std::io::pipe().unwrap();
        let files = window.files(std::process::id() as i32);
        // Without CAP_BPF nothing can be seen.
        let Ok(files) = files else { return };
        let own = files.iter().find(|f| f.fd == r.as_raw_fd() as u32).unwrap();
        let pipe = window.object("pipe_inode_info", own.private);
        assert_eq!(pipe.numbers(["readers", "writers"]).unwrap(), [1, 1]);
        let task = window.task(std::process::id() as i32).unwrap();
        let tgid = window.object("task_struct", task).number("tgid").unwrap();
        assert_eq!(tgid, u64::from(std::process::id()));
        assert!(window.copy(&[(8, 8)]).is_err());
    }
}
