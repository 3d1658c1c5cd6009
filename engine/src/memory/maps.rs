//! Reading `/proc/PID/smaps`, as bytes (paths need not be UTF-8).

use crate::sys::text;
use std::io;

use super::sysv;

/// One mapping of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// `PROT_*`.
    pub prot: i32,
    /// Whether it is MAP_SHARED.
    pub shared: bool,
    /// Offset into the file, bytes.
    pub offset: u64,
    /// Device of the file, as (major, minor).
    pub dev: (u32, u32),
    /// Inode of the file; 0 for plain anonymous memory.
    pub inode: u64,
    /// The name column, raw.
    pub name: Vec<u8>,
    /// The two-letter flags of the `VmFlags:` line.
    pub flags: Vec<[u8; 2]>,
    /// It is of a System V segment of another IPC namespace than ours: the bytes
    /// of the whole segment.
    pub foreign_segment: Option<u64>,
    /// Bytes of its pages (`KernelPageSize:`), more than usual for hugetlb.
    pub page_bytes: u64,
    /// Number of its protection key, see pkeys(7); 0 where it has none.
    pub protection_key: u32,
}

impl Vma {
    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it has a kernel flag, by its two letters (`gd`, `lo`, `ht`).
    pub fn has(&self, flag: &[u8; 2]) -> bool {
        self.flags.contains(flag)
    }

    /// Whether the name column is just that.
    pub fn is_named(&self, name: &str) -> bool {
        self.name == name.as_bytes()
    }

    /// Device and inode of its file, as fstat(2) tells them.
    pub fn file_inode(&self) -> (u64, u64) {
        (libc::makedev(self.dev.0, self.dev.1), self.inode)
    }

    /// How it is called in messages.
    pub fn describe(&self) -> String {
        let name = match self.name.is_empty() {
            true => "anonymous".into(),
            false => String::from_utf8_lossy(&self.name).into_owned(),
        };
        format!("mapping {:x}-{:x} ({name})", self.start, self.end)
    }
}

/// All mappings of a process with their flags, in address order.
pub fn read(pid: i32) -> io::Result<Vec<Vma>> {
    let path = format!("/proc/{pid}/smaps");
    let text = text::read(&path)?;
    let mut vmas = parse(&text).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{path} is not understood"),
        )
    })?;
    sysv::measure(pid, &mut vmas)?;
    Ok(vmas)
}

/// All mappings without their flags: far cheaper for the kernel to make.
pub fn read_ranges(pid: i32) -> io::Result<Vec<Vma>> {
    let path = format!("/proc/{pid}/maps");
    let text = text::read(&path)?;
    let mut vmas = parse(&text).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{path} is not understood"),
        )
    })?;
    sysv::measure(pid, &mut vmas)?;
    Ok(vmas)
}

pub(crate) fn parse(text: &[u8]) -> Option<Vec<Vma>> {
    let mut vmas: Vec<Vma> = Vec::new();
    for line in text.split(|&b| b == b'\n').filter(|l| !l.is_empty()) {
        if let Some(rest) = line.strip_prefix(b"VmFlags:") {
            let words = rest.split(|&b| b == b' ').filter(|w| w.len() == 2);
            vmas.last_mut()?.flags = words.map(|w| [w[0], w[1]]).collect();
        } else if let Some(rest) = line.strip_prefix(b"KernelPageSize:") {
            let kib = std::str::from_utf8(rest).ok()?.trim().strip_suffix(" kB")?;
            let kib: u64 = kib.parse().ok()?;
            vmas.last_mut()?.page_bytes = kib.checked_mul(1024)?;
        } else if let Some(rest) = line.strip_prefix(b"ProtectionKey:") {
            vmas.last_mut()?.protection_key =
                std::str::from_utf8(rest).ok()?.trim().parse().ok()?;
        } else if is_key_line(line) {
            vmas.last()?;
        } else {
            vmas.push(parse_head(line)?);
        }
    }
    Some(vmas)
}

/// `Rss:   4 kB` lines have their colon before the first blank.
fn is_key_line(line: &[u8]) -> bool {
    let word = line.split(|&b| b == b' ').next().unwrap_or_default();
    word.ends_with(b":")
}

fn parse_head(line: &[u8]) -> Option<Vma> {
    let mut rest = line;
    let mut word = || {
        let from = rest.iter().position(|&b| b != b' ')?;
        let end = rest[from..]
            .iter()
            .position(|&b| b == b' ')
            .map_or(rest.len(), |n| from + n);
        let w = std::str::from_utf8(&rest[from..end]).ok()?;
        rest = &rest[end..];
        Some(w)
    };
    let (start, end) = word()?.split_once('-')?;
    let perms = word()?.as_bytes();
    let offset = word()?;
    let (major, minor) = word()?.split_once(':')?;
    let inode = word()?.parse().ok()?;
    let name = rest
        .iter()
        .position(|&b| b != b' ')
        .map_or(&b""[..], |n| &rest[n..])
        .to_vec();
    let &[r, w, x, s] = perms else { return None };
    let bit = |have: u8, letter, value| if have == letter { value } else { 0 };
    let hex = |s| u64::from_str_radix(s, 16).ok();
    let vma = Vma {
        start: hex(start)?,
        end: hex(end)?,
        prot: bit(r, b'r', libc::PROT_READ)
            | bit(w, b'w', libc::PROT_WRITE)
            | bit(x, b'x', libc::PROT_EXEC),
        shared: s == b's',
        offset: hex(offset)?,
        dev: (hex(major)? as u32, hex(minor)? as u32),
        inode,
        name,
        flags: Vec::new(),
        foreign_segment: None,
        page_bytes: 4096,
        protection_key: 0,
    };
    (vma.end > vma.start).then_some(vma)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_itself() {
        let vmas = read(std::process::id() as i32).unwrap();
        let stack = vmas.iter().find(|v| v.is_named("[stack]")).unwrap();
        assert!(stack.has(b"gd") && stack.prot & libc::PROT_WRITE != 0);
        assert!(vmas.windows(2).all(|w| w[0].end <= w[1].start));
    }

    #[test]
    fn keeps_odd_names() {
        let v =
            parse(b"1000-2000 r--s 00001000 fd:01 77                         /a b\xff (deleted)\n")
                .unwrap();
        assert_eq!(v[0].name, b"/a b\xff (deleted)");
        assert!(v[0].shared && v[0].offset == 0x1000 && v[0].dev == (0xfd, 1));
    }

    #[test]
    fn keyed_mappings_are_refused() {
        let text = |prot: &str, key: u32| {
            let head = format!("1000-2000 {prot} 00000000 00:00 0 \n");
            format!(
                "{head}KernelPageSize:        4 kB\nProtectionKey:         {key}\nVmFlags: rd \n"
            )
        };
        let refused = |text: String| {
            let vmas = parse(text.as_bytes()).unwrap();
            super::super::vma::refusals(1, "x", &vmas).len()
        };
        assert_eq!(refused(text("rw-p", 0)), 0);
        assert_eq!(refused(text("rw-p", 3)), 1);
        assert_eq!(refused(text("--xp", 1)), 0);
    }

    proptest::proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let _ = parse(&bytes);
        }
    }
}
