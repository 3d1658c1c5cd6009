//! Lines of inotify instances and fanotify groups.

/// A watch of inotify or a mark of fanotify.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Mark {
    /// inotify's number for it.
    pub wd: Option<i32>,
    /// Inode number, for what sits on an inode.
    pub ino: Option<u64>,
    /// Device number in the kernel's own form: 12 bits major, 20 bits minor.
    pub dev: Option<u32>,
    /// The mount, for what sits on one.
    pub mnt_id: Option<u32>,
    pub mask: u32,
    pub ignored_mask: u32,
    /// fanotify's `FAN_MARK_*` that are a mark's state.
    pub mflags: u32,
    pub handle_kind: u32,
    /// Empty where the file system has no handles.
    pub handle: Vec<u8>,
}

impl Mark {
    /// `wd:1 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8
    /// fhandle-type:1 f_handle:7e9e0000640d1b6d`
    pub(super) fn parse(words: &str) -> Option<Self> {
        let mut m = Mark::default();
        for word in words.split_whitespace() {
            let (key, value) = word.split_once(':')?;
            let number = || u32::from_str_radix(value, 16).ok();
            match key {
                "wd" => m.wd = Some(i32::from_str_radix(value, 16).ok()?),
                "ino" => m.ino = Some(u64::from_str_radix(value, 16).ok()?),
                "sdev" => m.dev = Some(number()?),
                "mnt_id" => m.mnt_id = Some(number()?),
                "mask" => m.mask = number()?,
                "ignored_mask" => m.ignored_mask = number()?,
                "mflags" => m.mflags = number()?,
                "fhandle-type" => m.handle_kind = number()?,
                "f_handle" => m.handle = bytes(value)?,
                _ => {}
            }
        }
        Some(m)
    }

    /// Its device number as stat(2) gives it.
    pub(crate) fn st_dev(&self) -> u64 {
        let dev = self.dev.unwrap_or(0);
        libc::makedev(dev >> 20, dev & 0xf_ffff)
    }
}

/// `flags:0 event-flags:8000`
pub(super) fn group(words: &str) -> Option<(u32, u32)> {
    let (flags, events) = words.strip_prefix("flags:")?.split_once(" event-flags:")?;
    Some((
        u32::from_str_radix(flags, 16).ok()?,
        u32::from_str_radix(events, 16).ok()?,
    ))
}

fn bytes(hex: &str) -> Option<Vec<u8>> {
    let digits = hex.as_bytes().chunks(2);
    digits
        .map(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::FdInfo;
    use super::*;

    #[test]
    fn watches_and_marks() {
        let text = "inotify wd:a ino:98c361 sdev:fe00000 mask:80000102 ignored_mask:0 \
            fhandle-bytes:8 fhandle-type:1 f_handle:61c3980020a95c1d\n";
        let i = FdInfo::parse(text).unwrap();
        let m = &i.marks[0];
        assert_eq!(
            (m.wd, m.ino, m.mask),
            (Some(10), Some(0x98c361), 0x8000_0102)
        );
        assert_eq!(m.st_dev(), libc::makedev(254, 0));
        assert_eq!(m.handle, [0x61, 0xc3, 0x98, 0, 0x20, 0xa9, 0x5c, 0x1d]);
        let text = "fanotify flags:0 event-flags:8000\n\
            fanotify mnt_id:1e mflags:40 mask:20 ignored_mask:1\n";
        let i = FdInfo::parse(text).unwrap();
        assert_eq!(i.fanotify, Some((0, 0x8000)));
        let want = Mark {
            mnt_id: Some(30),
            mflags: 0x40,
            mask: 0x20,
            ignored_mask: 1,
            ..Mark::default()
        };
        assert_eq!(i.marks, [want]);
    }
}
