//! What the targets share.

pub mod seeds;

use std::collections::BTreeMap;
use std::io;

use rcr_engine::image::ImageSource;

/// Images in memory.
#[derive(Debug, Default)]
pub struct Images(BTreeMap<String, Vec<u8>>);

/// Images that have one name only.
const SINGLE: &[&str] = &[
    "inventory.img",
    "pstree.img",
    "files.img",
    "pipes-data.img",
    "fifo-data.img",
    "sk-queues.img",
    "bpfmap-data.img",
    "memfd.img",
    "remap-fpath.img",
    "seccomp.img",
    "cgroup.img",
    "filelocks.img",
    "timens-0.img",
    "rcr-files.img",
    "rcr-inventory.img",
    "rcr-network.img",
];

/// Images of a process, a table or a namespace.
const NUMBERED: &[&str] = &[
    "core",
    "ids",
    "mm",
    "fs",
    "pagemap",
    "pages",
    "fdinfo",
    "rcr-task",
    "rcr-thread",
    "rcr-mm",
    "rcr-shared-pages",
    "tcp-stream",
    "ghost-file",
    "ipcns-msg",
    "ipcns-shm",
    "ipcns-sem",
    "route",
];

/// Processes, and with them everything else, have numbers up to this.
const NUMBERS: u8 = 10;

impl Images {
    /// Images that are laid out as [`Images::put`] writes them.
    ///
    /// A row of `name length length bytes`: the number of the name among all
    /// there are, and two bytes of length, the lower one first. Simple enough
    /// for real images to become seeds.
    pub fn from_row(mut bytes: &[u8]) -> Self {
        let mut images = BTreeMap::new();
        while let Some((&[name, low, high], rest)) = bytes.split_first_chunk() {
            let len = usize::from(u16::from_le_bytes([low, high])).min(rest.len());
            let (here, rest) = rest.split_at(len);
            images.insert(name_of(name), here.to_vec());
            bytes = rest;
        }
        Self(images)
    }

    /// Appends an image to a row, if its name is known and it is not too long.
    pub fn put(row: &mut Vec<u8>, name: &str, bytes: &[u8]) {
        let number = (0..=u8::MAX).find(|&n| name_of(n) == name);
        if let (Some(number), Ok(len)) = (number, u16::try_from(bytes.len())) {
            row.push(number);
            row.extend_from_slice(&len.to_le_bytes());
            row.extend_from_slice(bytes);
        }
    }
}

/// The name with a number; a process image also in the generation before.
fn name_of(number: u8) -> String {
    let n = usize::from(number);
    if let Some(name) = SINGLE.get(n) {
        return (*name).to_owned();
    }
    let n = n - SINGLE.len();
    let of = n % usize::from(NUMBERS);
    match NUMBERED.get(n / usize::from(NUMBERS)) {
        Some(name) => format!("{name}-{of}.img"),
        None => match n % 2 {
            0 => format!("parent/pagemap-{of}.img"),
            _ => format!("parent/pages-{of}.img"),
        },
    }
}

impl ImageSource for Images {
    fn get(&self, name: &str) -> io::Result<Option<&[u8]>> {
        Ok(self.0.get(name).map(Vec::as_slice))
    }

    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }
}

/// Text, wherever it is not.
pub fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}
