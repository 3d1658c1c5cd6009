//! Damaged images: real ones with a few bytes changed. Reading them ends with a
//! result or an error, never with a panic or with memory without bound.

use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, setrlimit};
use rcr_engine::image::{DirSource, ImageSource};

/// Address space that reading images may take, beside what they are long.
const MEMORY_MAX: u64 = 1 << 30;

/// Images of which one is another.
struct Damaged<'a> {
    source: &'a DirSource,
    name: String,
    bytes: Option<Vec<u8>>,
}

impl ImageSource for Damaged<'_> {
    fn get(&self, name: &str) -> io::Result<Option<&[u8]>> {
        if name == self.name {
            return Ok(self.bytes.as_deref());
        }
        self.source.get(name)
    }

    fn names(&self) -> Vec<String> {
        self.source.names()
    }
}

/// Reads `count` damaged versions of the images in `dir`; the same seed damages
/// in the same way.
pub fn mutate(dir: &Path, seed: u64, count: u32) -> Result<()> {
    let source = DirSource::open(dir)?;
    rcr_engine::restore::verify(&source).context("the images as they are")?;
    let total: usize = source
        .names()
        .iter()
        .filter_map(|n| source.get(n).ok().flatten())
        .map(<[u8]>::len)
        .sum();
    let limit = MEMORY_MAX + 4 * total as u64;
    setrlimit(Resource::RLIMIT_AS, limit, limit)?;
    let names: Vec<String> = source
        .names()
        .into_iter()
        .filter(|n| !n.starts_with("pages-"))
        .collect();
    let mut dice = seed | 1;
    let mut roll = |sides: usize| {
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        (dice % sides.max(1) as u64) as usize
    };
    for n in 0..count {
        let name = names[roll(names.len())].clone();
        let Some(bytes) = source.get(&name)? else {
            continue;
        };
        let mut bytes = Some(bytes.to_vec());
        for _ in 0..1 + roll(3) {
            bytes = damage(bytes, &mut roll);
        }
        // Said before, since a crash leaves no time to.
        eprintln!("seed {seed}, number {n}: {name}");
        let damaged = Damaged {
            source: &source,
            name,
            bytes,
        };
        // Many changes hit what has no wrong values.
        let _ = rcr_engine::restore::verify(&damaged);
    }
    Ok(())
}

fn damage(bytes: Option<Vec<u8>>, roll: &mut impl FnMut(usize) -> usize) -> Option<Vec<u8>> {
    const EDGES: [u32; 6] = [0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 0x1000];
    let mut bytes = bytes?;
    let at = roll(bytes.len());
    match roll(7) {
        0 => bytes.truncate(at),
        1 => return None,
        2 if !bytes.is_empty() => bytes[at] = roll(256) as u8,
        3 if !bytes.is_empty() => bytes[at] ^= 1 << roll(8),
        4 if bytes.len() >= at + 4 => {
            let edge = EDGES[roll(EDGES.len())];
            bytes[at..at + 4].copy_from_slice(&edge.to_le_bytes());
        }
        // A record's length follows the two words of the header.
        5 if bytes.len() >= 12 => {
            let edge = EDGES[roll(EDGES.len())];
            bytes[8..12].copy_from_slice(&edge.to_le_bytes());
        }
        _ => {
            let end = (at + roll(64)).min(bytes.len());
            let again = bytes[at..end].to_vec();
            bytes.extend(again);
        }
    }
    Some(bytes)
}
